"""`shoestring plan MODEL --max`: the largest batch, the longest context, the smallest budget."""

from dataclasses import asdict, replace
from typing import Any, Literal

from ..units import format_bytes
from .subjects import Subject


def answer(
    question: Literal["batch", "length", "budget"], subject: Subject
) -> tuple[dict[str, Any], Subject, str]:
    """(the answer as JSON-able data, the subject with it in place, the answer in words).

    Nothing is timed. OutOfBudget when the budget holds no size at all.
    """
    if question == "budget":
        return _smallest_budget(subject)
    from ..planner import largest

    def sized(n: int) -> Subject:
        if question == "batch":
            return replace(subject, batch_size=n)
        return replace(subject, length=n)

    most = None if question == "batch" else subject.most_length
    start = subject.batch_size if question == "batch" else min(subject.length, most or 1 << 62)
    first = sized(start).plans_now(seconds=False)
    budget = first.limit_bytes(subject.budget)
    least = 1 if question == "batch" else min(subject.least_length, start)
    found = largest(
        lambda n: first if n == start else sized(n).plans_now(seconds=False), budget,
        start=start, least=least, most=most,
    )  # fmt: skip
    then = replace(sized(found.size), budget=budget)
    name, unit = ("batch", "row") if question == "batch" else ("context", "token")
    words = (
        f"{'largest' if question == 'batch' else 'longest'} {name}: {_count(found.size, unit)} "
        f"({then.batch_size} x {then.length}), peak {format_bytes(found.peak_bytes)} of "
        f"{format_bytes(budget)}; "
    )
    if found.next_bytes is None:
        words += "the model has no more positions"
    else:
        words += f"{found.size + 1:,} would need {format_bytes(found.next_bytes)}"
    words += f"; {len(found.simulated)} sizes simulated"
    return {**asdict(found), "budget_bytes": budget, "most": most}, then, words


def _count(number: int, unit: str) -> str:
    return f"{number:,} {unit}" if number == 1 else f"{number:,} {unit}s"


def _smallest_budget(subject: Subject) -> tuple[dict[str, Any], Subject, str]:
    plans = subject.plans_now(seconds=False)
    smallest, planner = plans.smallest_bytes, plans.planner
    instant = planner.promise(planner.smallest).instant
    words = (
        f"smallest budget: {format_bytes(smallest)} ({smallest} bytes), decided in the {instant}"
    )
    found = {"size": smallest, "peak_bytes": smallest, "instant": instant}
    return found, replace(subject, budget=smallest), words
