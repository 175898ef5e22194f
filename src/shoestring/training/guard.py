"""What stops a run before it does damage: numbers that are not finite, bytes over the budget.

The finite guard runs on every step, before the update, and reads one number from the device.
The budget guard reads the allocator's own peak on CUDA, on every step; on CPU it tracks every
tensor of the first two steps and of one step in `EVERY`, which costs a share of those steps
only, and reads the process's resident bytes on every step.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import OutOfBudget, TrainingDiverged
from ..meter import Meter
from ..rss import RssPeak
from ..units import format_bytes
from .sharding import local

EVERY = 100
"""Steps between two steps whose tensors are tracked."""
PROCESS_BYTES = 64 << 20
"""What a step may take of the process besides tensors: autograd's graph, kernels' scratch, code
that is loaded on first use."""


class FiniteGuard:
    """Stops a step before its update when a loss or a gradient is not finite.

    Every gradient behind a bad one is bad too, so the one to name is the first that backward
    made; the order is written down during the first backward, by hooks that are then removed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._arrived: dict[str, None] = {}  # a dict keeps the order of arrival
        self._handles = [
            parameter.register_post_accumulate_grad_hook(
                lambda _, name=name: self._arrived.setdefault(name)
            )
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]

    def check(self, step: int, losses: Sequence[float], norm: float) -> None:
        """TrainingDiverged naming the first bad tensor.

        losses: one for each microbatch; norm: the gradients' global L2 norm.
        """
        while self._handles:
            self._handles.pop().remove()
        for index, loss in enumerate(losses):
            if not math.isfinite(loss):
                where = f" in microbatch {index}" if len(losses) > 1 else ""
                raise _diverged(step, f"the loss is {loss}{where}", bad_weight(self._model))
        if math.isfinite(norm):
            return
        gradients = {name: p.grad for name, p in self._model.named_parameters()}
        for name in (*self._arrived, *gradients):
            gradient = gradients[name]
            if gradient is not None and not torch.isfinite(local(gradient)).all():
                raise _diverged(step, f"the gradient of {name} is not finite")
        raise _diverged(step, f"the norm of all gradients is {norm}")


def bad_weight(model: nn.Module) -> str | None:
    """The name of the first weight or buffer that is not finite, if there is one; of divided ones
    in this process's part."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not torch.isfinite(local(tensor)).all():
            return name
    return None


def _diverged(step: int, what: str, bad_weight: str | None = None) -> TrainingDiverged:
    if bad_weight:
        hint = f"{bad_weight} already held a number that is not finite: look where it came from."
    else:
        hint = "Nothing was updated. Lower optim.lr, lengthen the warm-up or clip gradients harder."
    return TrainingDiverged(f"step {step}: {what}", expected="finite numbers", hint=hint)


@dataclass(slots=True)
class Measured:
    """What a watched piece of work took. peak_bytes and by_category: None where not measured."""

    seconds: float = 0.0
    peak_bytes: int | None = None
    by_category: dict[str, int] | None = None


class BudgetGuard:
    """Holds what a piece of work was measured to take against what it may take.

    limit_bytes: the budget; None for none.  promised_bytes: the plan's peak; None without a plan.
    base_bytes: what the process holds besides tensors; None where it cannot be told.  slack: RSS
    may exceed the budget by this share and `PROCESS_BYTES`; None: RSS is only kept, because an
    allocator that was not told to give memory back makes it say little.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        limit_bytes: int | None,
        promised_bytes: int | None,
        base_bytes: int | None,
        slack: float | None,
    ) -> None:
        self.device = device
        self.limit_bytes = limit_bytes
        self.promised_bytes = promised_bytes
        self.base_bytes = base_bytes
        self.slack = slack
        self.peak_bytes: int | None = None
        self.by_category: dict[str, int] | None = None
        self.rss_peak_bytes: int | None = None
        self.first_step = 0
        self._history: dict[str, Any] | None = None
        self._keeps_history = True
        self._rss = RssPeak()
        self._is_stale = True

    def tracks(self, step: int) -> bool:
        """Whether the tensors of this step (counted from 1) are to be tracked."""
        return step <= self.first_step + 2 or step % EVERY == 0

    def state(self) -> dict[str, Any]:
        """The peaks so far, as JSON."""
        return {
            "peak_bytes": self.peak_bytes,
            "by_category": self.by_category,
            "rss_peak_bytes": self.rss_peak_bytes,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from the peaks of a run that is resumed."""
        self.peak_bytes, self.by_category = state["peak_bytes"], state["by_category"]
        self.rss_peak_bytes = state["rss_peak_bytes"]

    def take_history(self) -> dict[str, Any] | None:
        """The one step that is kept from instant to instant, once it was made; only once."""
        history, self._history = self._history, None
        return history

    @contextlib.contextmanager
    def watch(
        self,
        where: str,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        tracked: bool,
        also: Sequence[Tensor] = (),
    ) -> Iterator[Measured]:
        """Measure the body; OutOfBudget after it when it took more than it may.

        also: tensors that are there besides the model's and the optimizer's.
        """
        seen = Measured()
        is_cuda = self.device.type == "cuda"
        if is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self._is_stale:
            # The tracker's own bookkeeping is in the process, but in no step without it.
            self._rss.start()
            self._is_stale = False
        # One step is kept instant by instant: the first tracked one that finds states to update.
        keeps = self._keeps_history and bool(optimizer.state)
        meter = Meter(model, optimizer, history=keeps) if tracked else contextlib.nullcontext()
        if isinstance(meter, Meter):
            meter.tracker.assign("other", also)
        started = time.perf_counter()
        with meter:
            yield seen
        seen.seconds = time.perf_counter() - started
        if isinstance(meter, Meter):
            seen.peak_bytes, seen.by_category = meter.peak_bytes, meter.by_category
            if meter.history is not None:
                self._history, self._keeps_history = meter.history, False
        if is_cuda:
            seen.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        if seen.peak_bytes is not None:
            self._check_tensors(where, seen.peak_bytes, seen.by_category)
        if tracked or is_cuda:
            self._is_stale = True
        elif (rss_bytes := self._rss.read()[0]) is not None:
            self._check_process(where, rss_bytes)

    def _check_tensors(
        self, where: str, peak_bytes: int, by_category: dict[str, int] | None
    ) -> None:
        if peak_bytes > (self.peak_bytes or 0):
            self.peak_bytes, self.by_category = peak_bytes, by_category
        if self.limit_bytes is not None and peak_bytes > self.limit_bytes:
            raise self._over(where, "live tensors", peak_bytes)

    def _check_process(self, where: str, rss_bytes: int) -> None:
        if self.base_bytes is None:
            return
        grown = rss_bytes - self.base_bytes
        self.rss_peak_bytes = max(self.rss_peak_bytes or 0, grown)
        if self.limit_bytes is None or self.slack is None:
            return
        if grown > self.limit_bytes * (1 + self.slack) + PROCESS_BYTES:
            raise self._over(where, "resident memory of the process", grown)

    def _over(self, where: str, what: str, measured: int) -> OutOfBudget:
        assert self.limit_bytes is not None
        promise = "no plan promised a peak"
        if self.promised_bytes is not None:
            promise = f"the plan promised {format_bytes(self.promised_bytes)}"
        return OutOfBudget(
            f"{where}: {what} peaked at {format_bytes(measured)}; {promise}",
            expected=f"at most the budget of {format_bytes(self.limit_bytes)}",
            hint=f"Set run.budget to {math.ceil(measured / 2**20)}MiB or more, or a smaller batch.",
            smallest_bytes=measured,
            instant=where,
        )
