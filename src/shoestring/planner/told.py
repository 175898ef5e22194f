"""A plan in words: what is done to blocks, loss, modules, weights, optimizer and batch, and what
it comes to. However many spans a plan has, it takes a line for each way to run a block."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..stack import Span
from ..units import format_bytes, format_seconds

if TYPE_CHECKING:
    from .plans import Plan

_RANGES = 8  # most ranges of blocks in a line
_ITEMS = 6  # most items of a list


def told(plan: "Plan") -> str:
    """A few lines, without the table."""
    head = f"Plan for {plan.model}, {plan.blocks} blocks, within {format_bytes(plan.budget_bytes)}:"
    rows = [*_of_blocks(plan.spans), *_of_patches(plan)]
    rows.append(("peak", f"{format_bytes(plan.peak_bytes)}, reached in the {plan.instant}"))
    if plan.step_seconds is not None:
        rows.append(("a step", format_seconds(plan.step_seconds)))
    width = max(len(name) for name, _ in rows)
    return "\n".join([head, *(f"  {name:{width}}  {words}".rstrip() for name, words in rows)])


def _of_blocks(spans: Iterable[Span]) -> Iterator[tuple[str, str]]:
    """A line for every method and those of its settings that are words: the others say where."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    placing: dict[str, list[Mapping[str, Any]]] = {}
    for span in spans:
        modes = [str(value) for value in span.config.values() if isinstance(value, str)]
        name = ", ".join([span.method, *modes])
        ranges.setdefault(name, []).append((span.start, span.stop))
        placing.setdefault(name, []).append(
            {k: v for k, v in span.config.items() if not isinstance(v, str)}
        )
    for index, (name, found) in enumerate(ranges.items()):
        count = sum(stop - start for start, stop in found)
        where = ", ".join(_range(*each) for each in found[:_RANGES])
        more = ", ..." if len(found) > _RANGES else ""
        placed = placing[name][0] if len(found) == 1 else {}
        words = f"{name}, {count} {'block' if count == 1 else 'blocks'}: {where}{more}"
        yield "blocks" if index == 0 else "", ", ".join([words, *settings(placed)])


def _of_patches(plan: "Plan") -> Iterator[tuple[str, str]]:
    for way in plan.patches:
        yield way.applies_to, ", ".join([way.method, *settings(way.config)])


def settings(config: Mapping[str, Any]) -> Iterator[str]:
    """k=v of every setting; lists that are long, or of lists, by their length."""
    for key, value in config.items():
        if not isinstance(value, list | tuple):
            yield f"{key}={value}"
        elif len(value) > _ITEMS or any(isinstance(item, list | tuple) for item in value):
            yield f"{key}: {len(value)} entries"
        else:
            yield f"{key}={list(value)}"


def _range(start: int, stop: int) -> str:
    return str(start) if stop - start == 1 else f"{start}-{stop - 1}"
