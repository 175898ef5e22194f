"""Rows of a result by part and arm, seeds taken together; arms are compared seed by seed."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..verdict import Spread
from .size import ARMS, ENDS, PARTS, RECOMPUTED


@dataclass(frozen=True, slots=True)
class Measure:
    """A number of a row, where less is better. bar: of its ratio to end to end."""

    part: str
    key: str
    name: str
    bar: float


MEASURES = (
    Measure("digits", "score", "loss of digits", 1.05),
    Measure("digits", "distance", "distance of drawn digits", 1.05),
    Measure("text", "score", "bits per character", 1.03),
    Measure("photographs", "score", "loss of photographs", 1.05),
)


def in_order(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All rows, by part, arm and seed, whichever was run first."""
    names = list(ARMS)
    return sorted(
        result["rows"],
        key=lambda row: (PARTS.index(row["part"]), names.index(row["name"]), row["seed"]),
    )


class Rows:
    """of: rows by (part, arm) and seed."""

    def __init__(self, result: Mapping[str, Any]) -> None:
        self.of: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
        for row in in_order(result):
            self.of.setdefault((row["part"], row["name"]), {})[row["seed"]] = row

    def parts(self) -> list[str]:
        """Parts that were measured, in their order."""
        return list(dict.fromkeys(part for part, _ in self.of))

    def names(self, part: str) -> list[str]:
        """Arms of a part, in their order."""
        return [name for found, name in self.of if found == part]

    def values(self, part: str, name: str, key: str) -> dict[int, float]:
        """A number of an arm by seed. What is recomputed is end to end, but for what it takes."""
        rows = self.of.get((part, name), {})
        found = {seed: row[key] for seed, row in rows.items() if row.get(key) is not None}
        if name == RECOMPUTED and rows and not found:
            return self.values(part, ENDS, key)
        return found

    def get(self, part: str, name: str, key: str) -> Spread | None:
        """A number of an arm over its seeds, or None."""
        return _spread(list(self.values(part, name, key).values()))

    def ratio(self, part: str, name: str, key: str, base: str = ENDS) -> Spread | None:
        """Of an arm's number to another's with the same seed, over the seeds both have."""
        one, other = self.values(part, name, key), self.values(part, base, key)
        return _spread([one[seed] / other[seed] for seed in one if other.get(seed)])

    def is_ahead(self, part: str, name: str, key: str, of: str) -> bool | None:
        """Whether an arm's number is lower than another's in every seed that both have."""
        ratio = self.ratio(part, name, key, of)
        return None if ratio is None else ratio.high < 1

    def means(self, part: str, key: str, names: Sequence[str]) -> dict[str, float]:
        """Of the arms that have a number: its mean over the seeds that all of them have."""
        found = {name: got for name in names if (got := self.values(part, name, key))}
        common = set.intersection(*(set(got) for got in found.values())) if found else set()
        if not common:
            return {}
        return {
            name: statistics.fmean(got[seed] for seed in sorted(common))
            for name, got in found.items()
        }

    def best(self, part: str, key: str, names: Sequence[str]) -> str | None:
        """Of these arms the one with the lowest mean."""
        means = self.means(part, key, names)
        return min(means, key=lambda name: means[name]) if means else None


def _spread(values: list[float]) -> Spread | None:
    return Spread(statistics.fmean(values), min(values), max(values)) if values else None
