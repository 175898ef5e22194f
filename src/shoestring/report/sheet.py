"""A sweep of plans over all budgets, as its page reads it: shared scales, and words of numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .curves import Range, spanning
from .memory import scale_of
from .plans import method_colours
from .receipts import duration, stacking

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TIMES = "\u00d7"
_MARGIN = 0.04  # of the axis, beyond the smallest plan and the largest of all


@dataclass(frozen=True)
class Sheet:
    """A sweep's data, and what all pictures of its page share.

    budgets: the axis of the slider and the curve, in `scale` bytes (`unit`).  memory: that of
    pictures that begin at nothing.  start: which plan is shown first, None where none fits.
    """

    data: Mapping[str, Any]
    budgets: Range
    memory: Range
    unit: str
    scale: int
    categories: Sequence[str]
    colours: Mapping[str, str]
    budget: float
    start: int | None

    @property
    def plans(self) -> Sequence[Mapping[str, Any]]:
        """By rising peak and falling time."""
        found: Sequence[Mapping[str, Any]] = self.data["plans"]
        return found

    @property
    def recipes(self) -> Sequence[Mapping[str, Any]]:
        found: Sequence[Mapping[str, Any]] = self.data["recipes"]
        return found

    def in_unit(self, nbytes: float) -> str:
        """As the slider's field has it."""
        return f"{nbytes / self.scale:.2f}"

    def time(self, point: Mapping[str, Any]) -> str:
        """A step of it: seconds where there are any."""
        return factor(point) if point["seconds"] is None else in_seconds(point["seconds"])

    def height(self, point: Mapping[str, Any]) -> float:
        """What the curve is drawn over: milliseconds or seconds, or the factor."""
        return float(point["factor"] if point["seconds"] is None else point["seconds"])


def sheet_of(data: Mapping[str, Any]) -> Sheet:
    """What the page is drawn from. `data`: `Sweep.data()`."""
    plans = data["plans"]
    peaks = [point["peak_bytes"] for point in (*plans, *data["recipes"])]
    memory, unit, scale = scale_of(max(point["peak_bytes"] for point in plans))
    shown_range = spanning([peak / scale for peak in peaks], margin=_MARGIN)
    asked = data.get("budget_bytes")
    budget = plans[-1]["peak_bytes"] if asked is None else asked
    return Sheet(
        data=data, budgets=shown_range, memory=memory, unit=unit, scale=scale,
        categories=stacking(sorted({n for p in plans for n, held in p["by_category"].items()
                                    if held})),
        colours=method_colours(reversed(plans)), budget=float(budget), start=picked(plans, budget),
    )  # fmt: skip


def picked(plans: Sequence[Mapping[str, Any]], budget: float) -> int | None:
    """Which plan a budget gets: the fastest that fits, and so the last."""
    fitting = [i for i, plan in enumerate(plans) if plan["peak_bytes"] <= budget]
    return fitting[-1] if fitting else None


def factor(point: Mapping[str, Any]) -> str:
    """1.25 x."""
    return f"{point['factor']:.2f} {TIMES}"


def in_seconds(seconds: float) -> str:
    """As elsewhere, zeros kept: 5.00 s is held against 5.05 s."""
    if seconds >= 60:
        return duration(seconds)
    value, unit = (seconds, "s") if seconds >= 1 else (1000 * seconds, "ms")
    return f"{value:#.3g}".rstrip(".") + f" {unit}"
