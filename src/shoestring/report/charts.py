"""Charts as inline SVG: they show everything without scripts, at any width.

The SVG is stretched to the width it is given; its lines keep their thickness
(`vector-effect`), and all words stand outside it as HTML, placed in percent, so that nothing is
distorted. What a pointer shows is in a data attribute, read by page.js.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .curves import Range, short, ticks
from .markup import Html, join, tag

WIDTH, HEIGHT = 1000, 400
_MANY = 40  # more dots than this are drawn smaller
_PHASE_WIDTH = 30  # ems of small type in the narrowest chart beside another


@dataclass(frozen=True, slots=True)
class Series:
    """One thing that is drawn. colour: a custom property of style.css.

    style: "line", "faint" (a thin line), "dots", or "band" (between y and `low`).
    told: whether a pointer is told its value (that of a dot only where one is near).
    """

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "line"
    low: Sequence[float] = ()
    told: bool = True


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal line with its name. place: where the name stands, "right" or "left"."""

    name: str
    colour: str
    y: float
    place: str = "right"


@dataclass(frozen=True, kw_only=True, slots=True)
class Axes:
    """Ranges and words of a chart. phases: (name, first x) of stretches of the x axis.  over:
    what lies over the picture, placed in percent of it."""

    title: str
    x: Range
    y: Range
    x_name: str
    y_unit: str = ""
    x_ticks: int = 5
    y_ticks: int = 5
    phases: Sequence[tuple[str, float]] = ()
    levels: Sequence[Level] = field(default_factory=tuple)
    is_small: bool = False
    over: Html = field(default_factory=Html)


def line_chart(series: Sequence[Series], axes: Axes) -> Html:
    """Lines, bands and dots over one x axis."""
    return _figure(join(*(_draw(each, axes) for each in series)), axes, series)


def area_chart(series: Sequence[Series], axes: Axes) -> Html:
    """Series stacked on one another, the first at the bottom, with a dot on the highest sum; all
    have the same x."""
    drawn = []
    below = [0.0] * (len(series[0].x) if series else 0)
    for each in series:
        top = [low + value for low, value in zip(below, each.y, strict=True)]
        drawn.append(_draw(Series(each.name, each.colour, each.x, top, "area", below), axes))
        below = top
    if below:
        highest = max(range(len(below)), key=below.__getitem__)
        peak = Series("peak", "--ink", [series[0].x[highest]], [below[highest]], "dots")
        drawn.append(_draw(peak, axes))
    return _figure(join(*drawn), axes, series)


def legend(entries: Iterable[tuple[str, str]]) -> Html:
    """Names beside their colours: (name, colour)."""
    return tag("ul", *(tag("li", swatch(c), name) for name, c in entries), cls="legend")


def swatch(colour: str) -> Html:
    """A small square of a colour."""
    return tag("i", cls="swatch", style=f"background:var({colour})")


def percent(share: float) -> str:
    """A share as a length of CSS, kept inside what it is a share of."""
    return f"{100 * min(1.0, max(0.0, share)):.2f}%"


# ---- drawing ----------------------------------------------------------------------------------


def _draw(series: Series, axes: Axes) -> Html:
    points = [(_x(axes, x), _y(axes, y)) for x, y in zip(series.x, series.y, strict=True)]
    stroke, fill = f"stroke:var({series.colour})", f"fill:var({series.colour})"
    if series.style == "area":
        fill += f";{stroke}"  # else what lasts an instant is too thin to be seen
    if series.style == "dots":
        # A line of no length with round ends is a dot that stretching does not turn oval.
        dots = "".join(f"M{x} {y}h0" for x, y in points if y)
        return tag("path", d=dots, cls="dots many" if len(points) > _MANY else "dots", style=stroke)
    if series.style in ("band", "area"):
        lower = [(x, _y(axes, y)) for (x, _), y in zip(points, series.low, strict=True)]
        return tag("path", d=_between(points, lower), cls=series.style, style=fill)
    return tag("path", d=_path(points), cls=series.style, style=stroke)


def _x(axes: Axes, value: float) -> str:
    share = min(1.0, max(0.0, axes.x.share(value)))
    return f"{WIDTH * share:.1f}".removesuffix(".0")


def _y(axes: Axes, value: float) -> str:
    """Empty for what is no number. What lies beyond the axis is drawn at its end."""
    if not math.isfinite(value):
        return ""
    share = min(1.0, max(0.0, axes.y.share(value)))
    return f"{HEIGHT * (1 - share):.1f}".removesuffix(".0")


def _path(points: Sequence[tuple[str, str]]) -> str:
    """A line through the points, broken where there is none."""
    drawn, is_broken = [], True
    for x, y in points:
        if y:
            drawn.append(f"{'M' if is_broken else 'L'}{x} {y}")
        is_broken = not y
    return "".join(drawn)


def _between(upper: Sequence[tuple[str, str]], lower: Sequence[tuple[str, str]]) -> str:
    drawn: list[str] = []
    run: list[tuple[str, str, str]] = []
    pairs = [(x, a, b) for (x, a), (_, b) in zip(upper, lower, strict=True)]
    for each in (*pairs, ("", "", "")):
        if each[1] and each[2]:
            run.append(each)
        elif run:
            there = "L".join(f"{x} {a}" for x, a, _ in run)
            back = "L".join(f"{x} {b}" for x, _, b in reversed(run))
            drawn.append(f"M{there}L{back}Z")
            run = []
    return "".join(drawn)


# ---- what stands around it --------------------------------------------------------------------


def _x_name(share: float, name: str) -> Html:
    # In the middle of its place, but where that would stick out at the right.
    end = {"cls": "end"} if share > 0.97 else {}
    return tag("span", name, style=f"left:{percent(share)}", **end)


def _figure(drawn: Html, axes: Axes, series: Sequence[Series]) -> Html:
    x_at, y_at = ticks(axes.x, axes.x_ticks), ticks(axes.y, axes.y_ticks)
    grid = "".join(f"M0 {_y(axes, y)}H{WIDTH}" for y in y_at)
    walls = "".join(f"M{_x(axes, x)} 0V{HEIGHT}" for _, x in axes.phases[1:])
    picture = tag(
        "svg",
        tag("path", d=grid, cls="grid"),
        drawn,
        tag("path", d=walls, cls="wall") if walls else Html(),
        *(_level_line(level, axes) for level in axes.levels),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=axes.title,
    )
    marks = [_level_name(level, axes) for level in axes.levels]
    y_names = [tag("span", short(y), style=f"bottom:{percent(axes.y.share(y))}") for y in y_at]
    x_names = [_x_name(axes.x.share(x), short(x)) for x in x_at]
    head = tag("figcaption", axes.title, tag("span", axes.y_unit) if axes.y_unit else Html())
    return tag(
        "figure",
        head,
        tag("div", *y_names, cls="y", aria_hidden="true"),
        tag("div", picture, *marks, axes.over, cls="area", data_points=_told(series, axes)),
        _phases(axes) if axes.phases else tag("div", *x_names, cls="x", aria_hidden="true"),
        Html() if axes.is_small else tag("div", axes.x_name, cls="x-name"),
        cls="chart small" if axes.is_small else "chart",
    )


def _level_line(level: Level, axes: Axes) -> Html:
    d = f"M0 {_y(axes, level.y)}H{WIDTH}"
    return tag("path", d=d, cls="level", style=f"stroke:var({level.colour})")


def _level_name(level: Level, axes: Axes) -> Html:
    style = f"bottom:{percent(axes.y.share(level.y))};color:var({level.colour})"
    return tag("span", level.name, cls=f"mark {level.place}", style=style)


def _phases(axes: Axes) -> Html:
    ends = [*(x for _, x in axes.phases[1:]), axes.x.high]
    parts = []
    for (name, start), end in zip(axes.phases, ends, strict=True):
        left, right = axes.x.share(start), axes.x.share(end)
        style = f"left:{percent(left)};width:{percent(right - left)}"
        has_room = _PHASE_WIDTH * (right - left) > 1.2 + 0.45 * len(name)
        said = tag("b", name) if has_room else Html()
        parts.append(tag("span", said, title=name, style=style))
    return tag("div", *parts, cls="phases")


def _told(series: Sequence[Series], axes: Axes) -> str:
    """What page.js tells at a pointer, as JSON. Equal x are written once."""
    xs: list[list[float | None]] = []
    rows: list[Mapping[str, Any]] = []
    for each in (s for s in series if s.told and len(s.x)):
        x = _rounded(each.x)
        if x not in xs:
            xs.append(x)
        row = {"name": each.name, "colour": each.colour, "x": xs.index(x), "y": _rounded(each.y)}
        rows.append(row | ({"sparse": 1} if each.style == "dots" else {}))
    return json.dumps(
        {
            "low": axes.x.low,
            "high": axes.x.high,
            "unit": axes.y_unit,
            "x": axes.x_name,
            "xs": xs,
            "rows": rows,
            "phases": [list(phase) for phase in axes.phases],
        },
        separators=(",", ":"),
    )


def _rounded(values: Sequence[float]) -> list[float | None]:
    """Six digits are more than a tooltip shows; what is no number is null."""
    return [_number(value) for value in values]


def _number(value: float) -> float | None:
    if not math.isfinite(value):
        return None
    digits = float(f"{value:.6g}")
    return int(digits) if digits.is_integer() and abs(digits) < 1e15 else digits
