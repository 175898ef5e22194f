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

    first = subject.plans(subject.batch_size, subject.length, False)
    budget = first.limit_bytes(subject.budget)
    if question == "batch":
        found = largest(lambda n: subject.plans(n, subject.length, False), budget,
                        start=subject.batch_size)  # fmt: skip
        name, unit, most = "batch", "row", None
        then = replace(subject, batch_size=found.size, budget=budget)
    else:
        most = subject.most_length
        start = subject.length if most is None else min(subject.length, most)
        found = largest(lambda n: subject.plans(subject.batch_size, n, False), budget,
                        start=start, least=min(subject.least_length, start), most=most)  # fmt: skip
        name, unit = "context", "token"
        then = replace(subject, length=found.size, budget=budget)
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
    plans = subject.plans(subject.batch_size, subject.length, False)
    smallest, planner = plans.smallest_bytes, plans.planner
    instant = planner.promise(planner.smallest).instant
    words = (
        f"smallest budget: {format_bytes(smallest)} ({smallest} bytes), decided in the {instant}"
    )
    found = {"size": smallest, "peak_bytes": smallest, "instant": instant}
    return found, replace(subject, budget=smallest), words
