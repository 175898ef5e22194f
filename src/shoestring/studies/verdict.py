"""What studies say of a claim: held, did not hold, or only when; and numbers over seeds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HELD, NOT, ONLY, UNKNOWN = "held", "did not hold", "only when", "not measured"


@dataclass(frozen=True, slots=True)
class Verdict:
    """claim, its source, how it is decided, the verdict, and the numbers behind it."""

    claim: str
    source: str
    rule: str
    verdict: str
    because: str

    def to_json(self) -> dict[str, str]:
        """As plain JSON."""
        return {
            "claim": self.claim, "source": self.source, "rule": self.rule,
            "verdict": self.verdict, "because": self.because,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, lowest and highest over seeds."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.mean:.4f}"
        return f"{self.mean:.4f} ({self.low:.4f} to {self.high:.4f})"


def of_all(cases: Mapping[str, Any], good: set[str]) -> str:
    """The verdict on cases, of which some are good."""
    if not cases:
        return UNKNOWN
    return HELD if good == set(cases) else ONLY if good else NOT
