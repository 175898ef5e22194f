"""Numbers made ready to be drawn: long curves made short, ranges, and ticks of axes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STRETCHES = 600
"""Most stretches a curve is drawn in; with lowest, highest and median, 1,800 points."""
_RAW = 100  # up to so many points a curve is drawn as it is


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve in stretches of `every` points. x: where each stretch begins; NaN where a stretch
    has no number at all."""

    x: list[float]
    low: list[float]
    high: list[float]
    median: list[float]
    every: int

    def __len__(self) -> int:
        return len(self.x)

    @property
    def smooth(self) -> list[float]:
        """The medians, smoothed over a hundredth of the curve; a short curve stays as it is."""
        if len(self.x) <= _RAW:
            return self.median
        return smoothed(self.median, 2 / (1 + max(6.0, 0.01 * len(self.x))))


def stretched(x: Sequence[float], y: Sequence[float], stretches: int = STRETCHES) -> Curve:
    """Lowest, highest and median of y in at most so many stretches of neighbours."""
    every = max(1, -(-len(x) // stretches))
    curve = Curve([], [], [], [], every)
    for start in range(0, len(x), every):
        part = sorted(value for value in y[start : start + every] if math.isfinite(value))
        curve.x.append(x[start])
        curve.low.append(part[0] if part else math.nan)
        curve.high.append(part[-1] if part else math.nan)
        curve.median.append(part[len(part) // 2] if part else math.nan)
    return curve


def smoothed(values: Sequence[float], share: float) -> list[float]:
    """Exponential means from the left and from the right, averaged, so that nothing is shifted;
    NaN stays NaN and is left out of them."""
    right = _exponential(values, share)
    left = _exponential(values[::-1], share)[::-1]
    return [a / 2 + b / 2 for a, b in zip(right, left, strict=True)]


def _exponential(values: Iterable[float], share: float) -> list[float]:
    out, total, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total += share * (value - total)
            weight += share * (1 - weight)  # what `total` would be if all values were 1
            out.append(total / weight)
        else:
            out.append(math.nan)
    return out


@dataclass(frozen=True, slots=True)
class Range:
    """What an axis shows."""

    low: float
    high: float

    def share(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high one."""
        return (value - self.low) / (self.high - self.low)


def spanning(values: Iterable[float], *, margin: float = 0.0, from_zero: bool = False) -> Range:
    """From the lowest to the highest finite value, never empty."""
    finite = [value for value in values if math.isfinite(value) and abs(value) < 1e300]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if from_zero:
        low = min(low, 0.0)
    room = margin * (high - low)
    low, high = (low if from_zero else low - room), high + room
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-290):
        half = 0.5 * abs(high) or 0.5
        low, high = (low if from_zero else low - half), high + half
    return Range(low, high)


def without_outliers(values: Iterable[float]) -> list[float]:
    """The values, less the few highest where those would flatten all the rest."""
    ordered = sorted(value for value in values if math.isfinite(value))
    if len(ordered) < 2 * _RAW:
        return ordered
    usual = ordered[int(0.99 * len(ordered))]
    if ordered[-1] - ordered[0] <= 8 * (usual - ordered[0]):
        return ordered
    return [value for value in ordered if value <= usual]


def ticks(shown: Range, count: int) -> list[float]:
    """About `count` round numbers inside a range."""
    power = 10.0 ** math.floor(math.log10((shown.high - shown.low) / count))
    found = [_multiples(shown, m * power) for m in (1, 2, 2.5, 5, 10)]
    return min(found, key=lambda each: abs(len(each) - count))


def _multiples(shown: Range, step: float) -> list[float]:
    first = math.ceil(shown.low / step - 1e-9)
    last = math.floor(shown.high / step + 1e-9)
    return [index * step for index in range(first, min(last, first + 100) + 1)]


def short(value: float) -> str:
    """A number for an axis: 1,500, 20k, 0.25, 3e-4."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-3:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if name == 'k' else unit):,.4g}{name}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"
