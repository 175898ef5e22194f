"""What a step holds at every instant, by category: kept as the births and deaths of storages.

The category of a storage is known for certain only at its end: what the forward makes is `saved`
if it is still there when the backward begins, and a gradient is one once it hangs on a parameter.
So nothing is summed while the work runs. A life is written down when it ends, under the category
it has then, and counts as that from its birth on; a picture of saved bytes grows through the
forward. Four numbers a storage, for the first `LIVES_LIMIT` storages of the work.

Time is counted in charges: instant k is the moment after k of them, and one more stands for the
end, when what the work let go of is gone.
"""

import itertools
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

LIVES_LIMIT = 1 << 18
POINTS = 600
"""Most points of a timeline that is written to a file."""
EXISTING = -1
"""Born before the work began."""


class History:
    """Lives of the storages of one device, in the order of their deaths."""

    def __init__(self, categories: Sequence[str]) -> None:
        self.categories = tuple(categories)
        self.now = 0
        self._code = {name: code for code, name in enumerate(self.categories)}
        self._born, self._died, self._nbytes = array("q"), array("q"), array("q")
        self._kind = array("b")
        self._phases: list[tuple[int, str]] = []
        self._scratch: list[tuple[int, int]] = []
        self._settled = 0

    def began(self) -> int:
        """A storage was made: when."""
        self.now += 1
        return self.now - 1

    def ended(self, born: int, nbytes: int, category: str, died: int | None = None) -> None:
        """A storage that was made at `born`, or was EXISTING, is gone."""
        if born < LIVES_LIMIT:
            self._born.append(born)
            self._died.append(self.now if died is None else died)
            self._nbytes.append(nbytes)
            self._kind.append(self._code[category])

    def left(self, born: int, nbytes: int, category: str) -> None:
        """A storage is still there when the work is over."""
        self.ended(born, nbytes, category, self.now + 1)

    def settled(self, phase: str, scratch: int) -> None:
        """An operator is done with its storages, and held `scratch` bytes for itself."""
        if not self._phases or self._phases[-1][1] != phase:
            self._phases.append((self._settled + 1 if self._phases else 0, phase))
        if scratch:
            self.now += 1  # an instant of its own: what was there before may be gone by now
            if self.now <= LIVES_LIMIT:
                self._scratch.append((self.now, scratch))
        self._settled = self.now

    def timeline(
        self,
        *,
        points: int = POINTS,
        skip: tuple[int, int] | None = None,
        present: str | None = None,
    ) -> dict[str, Any]:
        """The work as JSON: at most `points` instants, the highest and lowest of every stretch.

        skip: leave out what came after the first and up to the second of two values of `now`.
        present: count what is left of this category at the end as if it had been there from the
        start. With both, one step tells of the next.
        """
        held = self._held(present)
        kept = np.arange(held.shape[1])
        if skip is not None:
            kept = kept[(kept <= skip[0]) | (kept > skip[1])]
        totals = held.sum(axis=0)[kept]
        chosen = np.array(_extremes(totals, points))
        names = [each for each, row in zip(self.categories, held, strict=True) if row.any()]
        rows = {name: held[self._code[name], kept[chosen]].tolist() for name in names}
        return {
            "instants": len(kept),
            "is_cut": self.now > LIVES_LIMIT,
            "peak_bytes": int(totals.max()),
            "at": chosen.tolist(),
            "phases": _at_points(self._named(), kept[chosen].tolist()),
            "bytes": rows,
        }

    def _held(self, present: str | None) -> Any:
        """(categories, instants) bytes."""
        end = min(self.now, LIVES_LIMIT) + 1
        born = np.frombuffer(self._born, dtype=np.int64).copy()
        died = np.frombuffer(self._died, dtype=np.int64)
        nbytes = np.frombuffer(self._nbytes, dtype=np.int64)
        kind = np.frombuffer(self._kind, dtype=np.int8)
        if present is not None:
            born[(kind == self._code[present]) & (died > self.now)] = EXISTING
        changes = np.zeros((len(self.categories), end + 2), dtype=np.int64)
        np.add.at(changes, (kind, np.minimum(born + 1, end + 1)), nbytes)
        np.add.at(changes, (kind, np.minimum(died + 1, end + 1)), -nbytes)
        held = changes.cumsum(axis=1)[:, : end + 1]
        for instant, scratch in self._scratch:
            held[self._code["transient"], instant] += scratch
        return held

    def _named(self) -> list[tuple[int, str]]:
        """The phases. A forward that no backward comes after was no forward: what follows the
        last backward, such as the norm of the gradients, can be told only from the end."""
        names = [name for _, name in self._phases]
        back = [at for at, name in enumerate(names) if name.endswith("backward")]
        last = back[-1] if back else len(names)
        return [
            (start, "after backward" if at > last and name == "forward" else name)
            for at, (start, name) in enumerate(self._phases)
        ]


def _at_points(phases: Sequence[tuple[int, str]], instants: Sequence[int]) -> list[list[Any]]:
    """[phase, index of its first point], for every phase that has a point."""
    found: list[list[Any]] = []
    at = 0
    for index, instant in enumerate(instants):
        while at + 1 < len(phases) and phases[at + 1][0] <= instant:
            at += 1
        name = phases[at][1] if phases else ""
        if not found or found[-1][0] != name:
            found.append([name, index])
    return found


def _extremes(totals: Any, points: int) -> list[int]:
    """Indices of the highest and the lowest of every stretch, both ends, and the very highest."""
    count = len(totals)
    if count <= points:
        return list(range(count))
    bounds = np.linspace(0, count, max(1, (points - 3) // 2) + 1).astype(int)
    chosen = {0, count - 1, int(totals.argmax())}
    for low, high in itertools.pairwise(bounds):
        chosen |= {low + int(totals[low:high].argmax()), low + int(totals[low:high].argmin())}
    return sorted(chosen)
