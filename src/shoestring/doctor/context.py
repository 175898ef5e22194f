"""`Doctor`: a `with` block around somebody's own step, and what it finds."""

import gc
import re
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from ..allocator import explain, is_tuned
from ..errors import ConfigError
from ..planner.given import Loss
from ..rss import RssPeak, status_bytes
from .advice import prescribe
from .diagnosis import Diagnosis
from .facts import facts_of, leak, leaked
from .timeline import name_phases
from .watch import Watch

_ASKED = re.compile(r"allocate ([0-9.]+) ?(bytes|B|KiB|MiB|GiB|TiB)")
_UNIT = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class Doctor:
    """Watches a training step of your own, and says where its memory goes and what to do.

        with shoestring.Doctor(model, optimizer) as doctor:
            step()                      # forward, backward, optimizer step; one or several
        print(doctor.diagnosis)

    model, optimizer: found when they run, if not given; given ones count from the start.
    batch, loss: as for `shoestring.plan`, when the loss is not the model's own: what a change
    saves can then be simulated.
    warm_up: steps that are let pass; the diagnosis is of those after them, if there are any.
    on_phase: called with `doctor.watch` whenever a phase begins.

    The step runs as it is, only slower. When it ends with an exception (memory that runs out is
    one), the exception goes on, and the diagnosis is of what was there until then. A second
    `with` of the same doctor begins anew. Three steps and more show leaks best; two do if
    something was trained before.

    diagnosis: made when it is first asked for, because changes are tried on fake tensors then.
    ConfigError before the block is over.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        *,
        batch: Mapping[str, Any] | None = None,
        loss: Loss | None = None,
        warm_up: int = 0,
        on_phase: Callable[[Watch], None] | None = None,
    ) -> None:
        for name, value, kind in (("model", model, nn.Module), ("optimizer", optimizer, Optimizer)):
            if value is not None and not isinstance(value, kind):
                raise ConfigError(
                    f"Doctor's {name} is a {type(value).__name__}",
                    expected=f"a torch {kind.__name__}, or nothing",
                )
        self._model, self._optimizer = model, optimizer
        self._batch, self._loss = batch, loss
        self._warm_up, self._on_phase = warm_up, on_phase
        self.watch: Watch | None = None
        self._failure: dict[str, Any] | None = None
        self._is_over = False
        self._diagnosis: Diagnosis | None = None

    def __enter__(self) -> Self:
        if self.watch is not None and not self._is_over:
            raise ConfigError("this Doctor is watching already", expected="one `with` at a time")
        self._diagnosis, self._is_over, self._failure = None, False, None
        watch = self.watch = Watch(
            self._model, warm_up=self._warm_up, on_phase=self._on_phase, on_restart=self._begin
        )
        if self._optimizer is not None:
            watch.optimizers.append(self._optimizer)
        watch.tracker.seed(self._model, self._optimizer)
        self._begin()
        watch.start()
        watch.tracker.__enter__()
        return self

    def _begin(self) -> None:
        """Set what the system counts to now."""
        self._rss = RssPeak()
        self._rss.start()
        self._rss_start = _resident()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        watch = self.watch
        assert watch is not None
        self._end_bytes = watch.tracker.live_bytes
        self._failure = _failure(watch, error) if error is not None else None
        watch.tracker.__exit__(kind, error, trace)
        watch.stop()
        self._is_over = True
        self._allocator = self._system(watch)
        name_phases(watch.segments, watch.visits, failed=error is not None)

    @property
    def diagnosis(self) -> Diagnosis:
        """What was found. ConfigError before the block is over."""
        if self._diagnosis is None and (self.watch is None or not self._is_over):
            raise ConfigError(
                "this Doctor has seen nothing yet", expected="`with doctor: step()` before"
            )
        if self._diagnosis is None:
            assert self.watch is not None
            self._diagnosis = self._diagnose(self.watch)
            self.watch = None  # and with it what it knows of the model
        return self._diagnosis

    def _diagnose(self, watch: Watch) -> Diagnosis:
        facts = dict(facts_of(watch))
        lost = leaked(watch)
        facts |= {
            "end_bytes": self._end_bytes, "allocator": self._allocator, "failure": self._failure,
            "leak": leak(watch, lost, facts["peak_bytes"]),
        }  # fmt: skip
        gc.collect()
        return Diagnosis(**facts, **prescribe(watch, facts, lost, self._batch, self._loss))

    def _system(self, watch: Watch) -> dict[str, Any]:
        peak, message = self._rss.read()
        start, ledger = self._rss_start, watch.tracker.ledger
        found: dict[str, Any] = {
            "tuned": is_tuned(), "explanation": explain(), "rss_peak_bytes": peak,
            "rss_start_bytes": start, "rss_message": message, "over_bytes": None,
        }  # fmt: skip
        if ledger.device == "cuda":
            stats = torch.cuda.memory_stats()
            found |= {
                "reserved_bytes": torch.cuda.max_memory_reserved(),
                "allocated_bytes": torch.cuda.max_memory_allocated(),
                "retries": stats.get("num_alloc_retries", 0),
            }
        elif peak is not None and start is not None:
            found["over_bytes"] = (peak - start) - (ledger.peak - ledger.existing)
        return found


def _resident() -> int | None:
    try:
        return status_bytes("VmRSS")
    except OSError:
        return None


def _failure(watch: Watch, error: BaseException) -> dict[str, Any]:
    found = _ASKED.search(str(error))
    asked = int(float(found[1]) * _UNIT[found[2]]) if found else None
    message = str(error).strip().splitlines()
    return {
        "kind": type(error).__name__, "message": message[0] if message else "",
        "phase": watch.tracker.phase, "operator": watch.operator, "module": watch.place[0],
        "asked_bytes": asked, "live_bytes": watch.tracker.live_bytes,
    }  # fmt: skip
