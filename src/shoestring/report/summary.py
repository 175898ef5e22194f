"""The few numbers a run is judged by, from its receipt or, where it has none, from what it left
on the way: the plan's promise and the measured lines of metrics.jsonl."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .run import RunRecord, dig, mapping, number, text

WENT_ON = "went on after this receipt"
"""The status of a run that was resumed, and killed before it could write another receipt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Something promised and measured; None where it is not known."""

    promised: float | None
    measured: float | None

    @property
    def error(self) -> float | None:
        """(promised - measured) / measured: above 0 when less was taken than promised."""
        if self.promised is None or not self.measured:
            return None
        return (self.promised - self.measured) / self.measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """budget_bytes, peak, step_s, updates, total_s: as in a receipt. before, after: held-out
    evaluations. promised_by_category, measured_by_category: the two peaks."""

    status: str
    error: str | None
    updates: int
    budget_bytes: float | None
    peak: Pair
    step_s: Pair
    total_s: float | None
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    promised_by_category: Mapping[str, float]
    measured_by_category: Mapping[str, float]


def summary_of(run: RunRecord) -> Summary:
    """What a run promised and what came of it."""
    receipt, plan = run.receipt, run.plan
    has_receipt = bool(receipt)
    highest = max(run.steps.step, default=0)
    first, last = _evaluations(run)
    promised = _first(number(receipt, "memory", "promised_bytes"), number(plan, "peak_bytes"))
    return Summary(
        status=(
            WENT_ON
            if run.went_on
            else text(receipt, "status") or ("unknown" if has_receipt else "no receipt")
        ),
        error=text(receipt, "error"),
        updates=int(
            (run.last_step if run.went_on else _first(number(receipt, "steps"), highest)) or 0
        ),
        budget_bytes=_first(
            number(receipt, "memory", "budget_bytes"), number(plan, "budget_bytes")
        ),
        peak=Pair(
            promised=promised,
            measured=_first(
                number(receipt, "memory", "measured_bytes"), _highest(run, "peak_bytes")
            ),
        ),
        step_s=Pair(
            promised=_first(
                number(receipt, "seconds", "promised_step"), number(plan, "step_seconds")
            ),
            measured=_first(number(receipt, "seconds", "measured_step"), _median_seconds(run)),
        ),
        total_s=number(receipt, "seconds", "total"),
        before=mapping(receipt, "quality", "before") or first,
        after=(run.went_on and last) or mapping(receipt, "quality", "after") or last,
        promised_by_category=_bytes(
            dig(receipt, "memory", "promised_by_category") or dig(plan, "by_category")
        ),
        measured_by_category=_bytes(dig(receipt, "memory", "measured_by_category")),
    )


def _evaluations(run: RunRecord) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The evaluation before the first update and the last one after an update."""
    first: Mapping[str, Any] = {}
    last: Mapping[str, Any] = {}
    for each in run.evaluations:
        if number(each, "step") == 0:
            first = each
        else:
            last = each
    return first, last


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _highest(run: RunRecord, name: str) -> float | None:
    return max(_finite(run.steps[name]), default=None)


def _median_seconds(run: RunRecord) -> float | None:
    """Over the steps whose tensors were not tracked, which slows a step down."""
    pairs = zip(run.steps["seconds"], run.steps["peak_bytes"], strict=True)
    plain = [seconds for seconds, peak in pairs if math.isnan(peak)]
    found = _finite(plain) or _finite(run.steps["seconds"])
    return statistics.median(found) if found else None


def _bytes(found: Any) -> dict[str, float]:
    if not isinstance(found, Mapping):
        return {}
    counts = {str(name): number(count) for name, count in found.items()}
    return {name: count for name, count in counts.items() if count is not None}
