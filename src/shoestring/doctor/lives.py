"""The lives of all storages of a piece of work, and what the peak would be with other ones.

Time is counted in settlings (an operator is done that allocated): a storage is alive at instant t
when `born <= t <= died`. What a storage was is known for certain only at its end, so every
question is asked after the work is over.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

LIVES_LIMIT = 1 << 18
FOREVER = 1 << 62


@dataclass(slots=True, eq=False)
class Life:
    """One storage: when it was there, what it was, and who made it."""

    born: int  # 0: before the work began
    nbytes: int
    device: str
    shape: tuple[int, ...]
    dtype: str
    operator: str = ""
    module: str = ""
    block: int | None = None
    phase: str = ""
    step: int = 0
    category: str = "other"
    died: int = FOREVER
    written: list[int] = field(default_factory=list)  # when a gradient was added to it
    is_output: bool = False  # what the model's forward returned, or what a block handed on

    def at(self, instant: int) -> bool:
        """Whether it is alive at that instant."""
        return self.born <= instant <= self.died


class Lives:
    """All storages of one piece of work; of the dead ones, at least those of the peak."""

    def __init__(self) -> None:
        self.live: set[Life] = set()
        self.dead: list[Life] = []
        self.scratch: dict[tuple[str, int], int] = {}  # (device, instant) -> bytes
        self.is_cut = False

    def __iter__(self) -> Iterator[Life]:
        yield from self.dead
        yield from self.live

    def restart(self) -> None:
        """What is alive now was there before."""
        self.dead.clear()
        self.scratch.clear()
        self.is_cut = False
        for life in self.live:
            life.born, life.step, life.is_output = 0, 0, False

    def begin(self, life: Life) -> None:
        """A storage is there."""
        self.live.add(life)

    def end(self, life: Life, instant: int, peaks: Iterable[int]) -> None:
        """A storage is gone; when too many are kept, those at none of the peaks are let go."""
        life.died = instant
        self.live.discard(life)
        self.dead.append(life)
        if len(self.dead) > LIVES_LIMIT:
            at = tuple(peaks)
            self.dead = [each for each in self.dead if any(each.at(peak) for peak in at)]
            self.is_cut = True

    def at(self, instant: int, device: str) -> list[Life]:
        """What is alive at an instant, largest first."""
        found = [each for each in self if each.device == device and each.at(instant)]
        return sorted(found, key=lambda each: (-each.nbytes, each.born))

    def peak(
        self,
        device: str,
        end: int,
        there: Callable[[Life], Iterable[tuple[int, int]]] = lambda life: ((life.born, life.died),),
    ) -> tuple[int, int]:
        """(peak bytes, instant) if every storage were there in the stretches `there` gives.

        Only where nothing was cut.
        """
        changes = np.zeros(end + 2, dtype=np.int64)
        for life in self:
            if life.device == device:
                for start, stop in there(life):
                    if start <= stop:
                        changes[min(start, end + 1)] += life.nbytes
                        changes[min(stop, end) + 1] -= life.nbytes
        held = changes.cumsum()[: end + 1]
        for (where, instant), nbytes in self.scratch.items():
            if where == device:
                held[instant] += nbytes
        instant = int(held.argmax())
        return int(held[instant]), instant
