"""The plan as a strip of blocks coloured by method, its patches, and what else there was."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .charts import percent, swatch
from .markup import Html, join, tag
from .receipts import DASH, duration, shown, size
from .run import RunRecord, dig, items, mapping, number, text

COLOURS = tuple(f"--s{index}" for index in range(8))
_Span = tuple[str, int, int, Mapping[str, Any]]
_RANGES = 12  # most ranges of blocks that are listed for one method
_CELLS = 400  # more blocks than this are drawn as whole spans


def method_colours(plans: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """A colour for every way to run a block on the page, the same in every strip."""
    names: dict[str, None] = {}
    for each in plans:
        names |= dict.fromkeys(way(name, config) for name, _, _, config in _spans(each))
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}


def way(method: str, config: Mapping[str, Any]) -> str:
    """A method with those of its settings that are words: numbers say where, not how."""
    return ", ".join([method, *(value for value in config.values() if isinstance(value, str))])


def plan(run: RunRecord, colours: Mapping[str, str]) -> Html:
    """One run's plan, or a word that it had none."""
    if not run.plan:
        return tag("p", "This run had no plan.", cls="nothing")
    return join(strip(run.plan, colours), patches(run.plan), _alternatives(run.plan))


def _spans(plan: Mapping[str, Any]) -> Iterator[_Span]:
    """(method, start, stop, config) of every span that can be read."""
    for span in items(plan, "spans"):
        start, stop = number(span, "start"), number(span, "stop")
        name = text(span, "method")
        if name is not None and start is not None and stop is not None and 0 <= start < stop:
            yield name, int(start), int(stop), mapping(span, "config")


def strip(plan: Mapping[str, Any], colours: Mapping[str, str]) -> Html:
    """Its blocks from the first to the last, coloured by how they are run, and in words."""
    spans = sorted(_spans(plan), key=lambda span: span[1])
    blocks = int(number(plan, "blocks") or 0)
    end = max([blocks, *(stop for _, _, stop, _ in spans)])
    if end <= 0:
        return tag("p", "The plan names no blocks.", cls="nothing")
    cells = [_cell(name, start, stop, end, config, colours) for name, start, stop, config in spans]
    words = [_used(*key, ranges, colours) for key, ranges in _uses(spans)]
    ends = tag("div", tag("span", "first block"), tag("span", "last block"), cls="strip-ends")
    return join(
        tag("div", *cells, cls="strip", role="img", aria_label="method of every block"),
        ends,
        tag("ul", *words, cls="spans"),
    )


_Use = tuple[str, str, str]  # method, settings in words, what its colour goes by


def _uses(spans: Sequence[_Span]) -> Iterable[tuple[_Use, list[tuple[int, int]]]]:
    """Every method with its settings, and the ranges of blocks it is used for."""
    uses: dict[_Use, list[tuple[int, int]]] = {}
    for name, start, stop, config in spans:
        ranges = uses.setdefault((name, settings(config), way(name, config)), [])
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
    return uses.items()


def _used(
    name: str, config: str, kind: str, ranges: Sequence[tuple[int, int]], colours: Mapping[str, str]
) -> Html:
    blocks = sum(stop - start for start, stop in ranges)
    where = ", ".join(numbers(*each) for each in ranges[:_RANGES])
    if len(ranges) > _RANGES:
        where += ", ..."
    word = "block" if blocks == 1 else "blocks"
    return tag(
        "li", swatch(colours[kind]), tag("b", name), f" {blocks:,} {word}: {where}", _aside(config)
    )


def _cell(
    name: str, start: int, stop: int, end: int, config: Mapping[str, Any],
    colours: Mapping[str, str],
) -> Html:  # fmt: skip
    blocks = [tag("i") for _ in range(start, stop)] if end <= _CELLS else [tag("i")]
    # Half a pixel more, or rounding leaves a gap before the next one.
    style = f"left:{percent(start / end)};width:calc({percent((stop - start) / end)} + 0.5px);"
    style += f"--method:var({colours[way(name, config)]})"
    title = f"{name}, blocks {numbers(start, stop)} {settings(config)}".strip()
    return tag("div", *blocks, title=title, style=style)


def numbers(start: int, stop: int) -> str:
    """0, 4 -> 0-3."""
    return str(start) if stop - start == 1 else f"{start}-{stop - 1}"


def _aside(words: str) -> Html:
    return tag("span", words) if words else Html()


def settings(config: Mapping[str, Any]) -> str:
    """Settings of a method in one line; long lists by their length."""
    return ", ".join(f"{key} = {_setting(value)}" for key, value in config.items())


def _setting(value: Any) -> str:
    return f"{len(value)} entries" if isinstance(value, list) and len(value) > 8 else str(value)


def patches(plan: Mapping[str, Any]) -> Html:
    """What is done beside the blocks."""
    found = [each for each in items(plan, "patches") if text(each, "method")]
    if not found:
        return tag("p", "Loss and modules run as they are.", cls="note")
    parts = [
        tag("li", tag("b", str(dig(each, "method"))), _aside(settings(mapping(each, "config"))))
        for each in found
    ]
    return join(tag("h3", "Beside the blocks"), tag("ul", *parts, cls="pills"))


def _alternatives(plan: Mapping[str, Any]) -> Html:
    budget = number(plan, "budget_bytes")
    rows = [row for row in items(plan, "rows") if number(row, "peak_bytes") is not None]
    mine = {"name": "this plan", "peak_bytes": plan.get("peak_bytes"),
            "seconds": plan.get("step_seconds"), "instant": plan.get("instant")}  # fmt: skip
    if number(mine, "peak_bytes") is not None:
        rows.append(mine)
    if not rows:
        return Html()
    most = max([number(row, "peak_bytes") or 0.0 for row in rows] + [budget or 0.0]) or 1.0
    head = tag("tr", tag("td"), tag("th", "peak"), tag("th", "one update"),
               tag("th", "highest in the", cls="wide"), tag("th", ""))  # fmt: skip
    body = [_alternative(row, budget, most, is_mine=row is mine) for row in rows]
    table = tag("table", tag("thead", head), tag("tbody", *body), cls="numbers alternatives")
    return join(tag("h3", "What else there was"), tag("div", table, cls="scroll"))


def _alternative(row: Any, budget: float | None, most: float, *, is_mine: bool) -> Html:
    peak = number(row, "peak_bytes") or 0.0
    fits = budget is None or peak <= budget
    fill = tag("b", style=f"width:{percent(peak / most)}", cls=None if fits else "over")
    tick = Html()
    if budget is not None:
        tick = tag("i", cls="tick", style=f"left:{percent(budget / most)}", title="budget")
    return tag(
        "tr",
        tag("th", text(row, "name") or DASH, tag("div", fill, tick, cls="bar")),
        tag("td", size(peak)),
        tag("td", shown(number(row, "seconds"), duration)),
        tag("td", text(row, "instant") or DASH, cls="wide"),
        tag("td", "fits" if fits else "too much", cls="fits" if fits else "over"),
        cls="mine" if is_mine else None,
    )
