"""What is charged for a storage, and the sums of one device type."""

import weakref
from dataclasses import dataclass, field
from typing import Any

from .history import History

CATEGORIES = ("weights", "gradients", "optimizer", "saved", "transient", "cache", "other")
TIMELINE_LIMIT = 1 << 15
# The CUDA caching allocator hands out multiples of this many bytes (CUDACachingAllocator.cpp).
CUDA_ROUNDING = 512


class Charge(weakref.ref):
    """One live storage: the weak reference itself carries what was charged for it."""

    __slots__ = ("born", "category", "inside", "key", "ledger", "nbytes", "note", "since")

    key: int
    nbytes: int
    category: str
    ledger: "Ledger"
    born: int  # number of charges made in its ledger before this one
    since: int  # when it got its size, in the time of its ledger's history
    inside: bool  # created while tracking, not before
    note: Any  # whatever a Watcher writes here; unset without one


@dataclass
class Ledger:
    """Bytes of one device type, now and at their peak."""

    device: str = "cpu"
    live: int = 0
    existing: int = 0
    by_category: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))
    peak: int = 0
    peak_by_category: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))
    peak_phase: str = ""
    peak_operator: str = ""
    peak_serial: int = -1
    serial: int = 0
    retained: int = 0
    timeline: list[tuple[str, int]] = field(default_factory=list)
    history: History | None = None

    def note(self, phase: str) -> None:
        """Append one point; when the list is full, keep the higher of each two neighbours."""
        # Bytes that existed before are left out here and added on reading, because such a
        # storage may be noticed only after points were written for a time when it was there.
        self.timeline.append((phase, self.live - self.existing))
        if len(self.timeline) >= TIMELINE_LIMIT:
            pairs = zip(self.timeline[::2], self.timeline[1::2], strict=False)
            self.timeline = [max(pair, key=lambda point: point[1]) for pair in pairs]

    def settle(self, phase: str, operator: str, scratch: int = 0) -> None:
        """Take the present, with what the operator held for itself, as the peak if higher."""
        if self.live + scratch > self.peak:
            self.peak = self.live + scratch
            self.peak_by_category = dict(self.by_category)
            self.peak_by_category["transient"] += scratch
            self.peak_phase, self.peak_operator = phase, operator
            self.peak_serial = self.serial
        if self.history is not None:
            self.history.settled(phase, scratch)


def rounded(nbytes: int, device: str) -> int:
    """What the device's allocator takes for a storage of this size."""
    return -(-nbytes // CUDA_ROUNDING) * CUDA_ROUNDING if device == "cuda" else nbytes
