"""Measured bytes of a training step: the peak, what it is made of, and when it happens.

One TorchDispatchMode, the `Tracker`, charges every storage once when an operator hands it out
and refunds it when the storage dies, so that real and fake tensors are counted by the same code.
`Meter` runs a Tracker around a piece of real work and adds what the system says (RSS, CUDA).
`allocator_peak` is the slow, independent way to the same number, for checks.

Not seen by a Tracker: memory that kernels take and give back inside one call (but for the copies
that elementwise operators make, which are known), the 8 bytes of a Python number that autograd
keeps, library workspaces, the CUDA context, and whatever the C allocator keeps.
"""

from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from ..rss import RssPeak
from .ledger import CATEGORIES, Charge, Ledger
from .operators import tensors_in
from .outside import count_again, is_outside, leave_out
from .profiler import allocator_peak
from .tracker import Tracker, active_tracker
from .watcher import Watcher

__all__ = [
    "CATEGORIES",
    "Charge",
    "Ledger",
    "Meter",
    "Tracker",
    "Watcher",
    "active_tracker",
    "allocator_peak",
    "count_again",
    "is_outside",
    "leave_out",
    "tensors_in",
]


class Meter:
    """Bytes of the work done inside a `with` block.

        with Meter(model, optimizer) as meter:
            step()
        meter.peak_bytes, meter.by_category, meter.instant

    Without a model and an optimizer, tensors that existed before count as soon as something
    touches them, and then as if they had been there from the start.

    peak_bytes: most bytes of live tensors at once.  by_category: that peak, by `CATEGORIES`.
    instant: the phase the peak fell in.  retained_bytes: held for the backward at the end of
    the forward.  baseline_bytes: what existed before.  end_bytes: what is left afterwards.
    timeline: (phase, bytes) after each operator that allocated.
    history: with `history=True`, the same by category and as JSON, at most 600 points of it.
    rss_peak_bytes: peak resident set of the process, or None with the reason in rss_message.
    cuda_peak_bytes: torch.cuda.max_memory_allocated, or None without CUDA.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        *,
        history: bool = False,
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self.tracker = Tracker(history=history)
        self.history: dict[str, Any] | None = None
        self._rss = RssPeak()
        self.rss_peak_bytes: int | None = None
        self.rss_message: str | None = None
        self.cuda_peak_bytes: int | None = None

    def __enter__(self) -> Self:
        self.tracker.seed(self._model, self._optimizer)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self._rss.start()
        self.tracker.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        ledger = self.tracker.ledger
        self.end_bytes = ledger.live
        self.tracker.__exit__(kind, error, trace)
        self.rss_peak_bytes, self.rss_message = self._rss.read()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self.cuda_peak_bytes = torch.cuda.max_memory_allocated()
        ledger = self.tracker.ledger
        self.peak_bytes = ledger.peak
        self.by_category = dict(ledger.peak_by_category)
        self.instant = ledger.peak_phase
        self.instant_operator = ledger.peak_operator
        self.retained_bytes = ledger.retained
        self.baseline_bytes = ledger.existing
        self.timeline = ledger.timeline
        if ledger.history is not None:
            self.history = ledger.history.timeline()

    def mark(self, name: str) -> None:
        """Start a phase called `name`; see Tracker.mark."""
        self.tracker.mark(name)
