"""The inverse questions: the largest batch, the longest context, that a budget can train.

What a size needs is the peak of its smallest plan, a simulation of whole steps. Peaks are nearly
piecewise linear in batch and length, so the next size to look at is where the line through the
two nearest known ones meets the budget, and a few sizes are enough. The answer is exact: its
smallest plan was simulated and fits, and so was that of the next larger size, which does not.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import ConfigError
from .changes import out_of_budget
from .make import PlanFor

PlansOf = Callable[[int], PlanFor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """The largest size that fits. Bytes are peaks of smallest plans.

    next_bytes: what the next larger one needs, None where `most` ended the search.  simulated:
    the sizes that were looked at, and what they need.
    """

    size: int
    peak_bytes: int
    next_bytes: int | None
    simulated: dict[int, int]


@dataclass
class _Search:
    plans_of: PlansOf
    budget: int
    known: dict[int, int] = field(default_factory=dict)
    low: int | None = None
    """The largest size that was found to fit."""
    high: int | None = None
    """The smallest above it that was found not to."""

    def look(self, size: int) -> bool:
        """Whether a size fits, as `plan` would say."""
        plans = self.plans_of(size)
        self.known[size] = plans.smallest_bytes
        fits = plans.smallest_bytes <= self.budget
        # The smallest by the chain model need not be the smallest simulated.
        fits = fits or plans.planner.choose(self.budget) is not None
        if fits:
            self.low = size if self.low is None else max(size, self.low)
        else:
            self.high = size if self.high is None else min(size, self.high)
        return fits

    def guess(self) -> int:
        """Where the line through the two nearest known sizes meets the budget."""
        near = sorted(self.known, key=lambda n: abs(self.known[n] - self.budget))[:2]
        a, b = sorted(near)
        slope = (self.known[b] - self.known[a]) / (b - a)
        if slope <= 0:
            return 2 * b
        return int(a + (self.budget - self.known[a]) / slope)


def largest(
    plans_of: PlansOf, budget: int, *, start: int, least: int = 1, most: int | None = None
) -> Limit:
    """The largest size (rows of a batch, tokens of a row) that a budget in bytes can train.

    plans_of: size -> its plans, such as `lambda n: planner(model, batch_of(n), seconds=False)`.
    start: the first size to look at.  least, most: the range of sizes there are.

    OutOfBudget when not even `least` fits.
    """
    if not least <= start or (most is not None and not start <= most):
        raise ConfigError(f"a search cannot start at {start}",
                          expected=f"{least} or more, at most {most}")  # fmt: skip
    search = _Search(plans_of, budget)
    if not search.look(start) and (start == least or not search.look(least)):
        raise out_of_budget(plans_of(least).planner, budget)
    size = _climb(search, most)
    return Limit(
        size=size, peak_bytes=search.known[size], next_bytes=search.known.get(size + 1),
        simulated=dict(sorted(search.known.items())),
    )  # fmt: skip


def _climb(search: _Search, most: int | None) -> int:
    """Narrow [fits, does not] until they are neighbours, or `most` fits."""
    halve = False
    while True:
        assert search.low is not None
        low, high = search.low, search.high
        if low == most or high == low + 1:
            return low
        top = high - 1 if high is not None else min(most or 8 * low, 8 * low)
        wanted = search.guess() if len(search.known) > 1 else 2 * low
        if halve and high is not None:
            wanted = (low + high) // 2
        before = None if high is None else high - low
        search.look(min(max(wanted, low + 1), top))
        # A line that gains little is no line there: cut the stretch in two.
        after = None if search.high is None else search.high - search.low
        halve = before is not None and after is not None and after > before // 2
