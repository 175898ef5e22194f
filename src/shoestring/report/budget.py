"""A page with a budget slider: what fits into every budget, what it costs, and the usual recipes.

The page is made of `Sweep.data()` of the planner. Every plan stands in it, drawn, and a script
shows the one that the budget picks; without a script it shows that of the budget it was asked for,
and all of them as a table. It loads nothing.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .charts import Axes, Series, legend, line_chart, percent
from .choices import panels, recipes, table
from .curves import Range, spanning
from .document import document
from .markup import Html, join, tag
from .receipts import count
from .sheet import LETTERS, TIMES, Sheet, factor, sheet_of

_PLANS, _RECIPES = "--s0", "--s1"


def write_budget_page(data: Mapping[str, Any], out: Path, *, title: str = "") -> Path:
    """Write the page; a reader sees the old file or the new. CheckpointError when it cannot be
    written, ConfigError for a directory."""
    from ..checkpoint import write_text  # reaches torch

    if out.is_dir():
        raise ConfigError(f"{out} is a directory", expected="the name of a file to write")
    write_text(out, budget_page(data, title=title))
    return out


def budget_page(data: Mapping[str, Any], *, title: str = "") -> str:
    """The page of a sweep's data; `data["versions"]`, words about what made it, may be there."""
    sheet, name = sheet_of(data), title or str(data["model"])
    main = tag(
        "main", _control(sheet), _curve(sheet), *panels(sheet), recipes(sheet), table(sheet),
        _section("How to read this", "notes", _notes(sheet)),
    )  # fmt: skip
    at = percent(sheet.budgets.share(sheet.budget / sheet.scale))
    up = percent(sheet.memory.share(sheet.budget / sheet.scale))
    here = "".join(f";--{k}:{v}" for k, v in zip("xy", _place(sheet, sheet.start), strict=True))
    footer = tag("footer", tag("p", "Made by shoestring plan. ", str(data.get("versions") or "")))
    body = tag("div", _header(sheet, name), main, footer, id="page",
               style=f"--at:{at};--up:{up}{here}")  # fmt: skip
    return document(f"{name} - Shoestring plan", body, styles=("budget.css",),
                    scripts=("budget.js",))  # fmt: skip


def _section(title: str, name: str, *content: str) -> Html:
    return tag("section", tag("h2", title), *content, id=name)


def _header(sheet: Sheet, title: str) -> Html:
    data = sheet.data
    whole, trained = data["parameters"], data["trained"]
    said = [
        data["model"] if title != data["model"] else "",
        f"{data['blocks']:,} blocks",
        f"{count(whole)} parameters" + (f", {count(trained)} trained" if trained < whole else ""),
        *(f"{name} {f' {TIMES} '.join(f'{n:,}' for n in shape)}"
          for name, shape in data["batch"].items() if name in ("input_ids", "ids")),
        f"allowed: {data['allow']}",
        f"timed on {data['device']}" if data["timed"] else "nothing was timed",
    ]  # fmt: skip
    facts = tag("ul", *(tag("li", f) for f in said if f), cls="facts")
    return tag("header", tag("p", "Shoestring plan", cls="brand"), tag("h1", title), facts)


# ---- the budget ---------------------------------------------------------------------------------


def _control(sheet: Sheet) -> Html:
    """Slider and field; shown by the script, which alone can use them."""
    low, high = (sheet.scale * end for end in (sheet.budgets.low, sheet.budgets.high))
    told = {
        "unit": sheet.unit, "scale": sheet.scale, "low": low, "high": high,
        "top": sheet.memory.high * sheet.scale, "budget": sheet.budget,
        "peaks": [plan["peak_bytes"] for plan in sheet.plans],
        "places": [_place(sheet, i) for i in range(len(sheet.plans))],
        "words": [f"{sheet.time(p)} a step, {factor(p)}" if p["seconds"] is not None
                  else f"{factor(p)} the work" for p in sheet.plans],
    }  # fmt: skip
    field = tag("input", id="typed", inputmode="decimal", autocomplete="off", size="7",
                aria_label=f"budget in {sheet.unit}")  # fmt: skip
    step = str(max(1, int((high - low) / 1000)))
    slider = tag("input", id="slider", type="range", min=f"{low:.0f}", max=f"{high:.0f}",
                 step=step, aria_label="budget")  # fmt: skip
    top = tag(
        "div", tag("label", "Budget", tag("span", field, tag("b", sheet.unit), cls="field")),
        tag("button", "\u2039 less", id="less", type="button", title="the next smaller plan"),
        tag("button", "more \u203a", id="more", type="button", title="the next larger plan"),
        tag("output", id="answer", role="status"), cls="row",
    )  # fmt: skip
    return tag("div", top, tag("div", slider, cls="track"), id="control", cls="card", hidden="",
               data_told=json.dumps(told, separators=(",", ":")))  # fmt: skip


def _place(sheet: Sheet, index: int | None) -> tuple[str, str]:
    """Where a plan stands on the curve, in percent; beyond it where there is none."""
    if index is None:
        return "-100%", "-100%"
    plan = sheet.plans[index]
    across = sheet.budgets.share(plan["peak_bytes"] / sheet.scale)
    return percent(across), percent(_times(sheet).share(sheet.height(plan)))


def _times(sheet: Sheet) -> Range:
    return spanning([sheet.height(p) for p in (*sheet.plans, *sheet.recipes)], margin=0.09)


def _curve(sheet: Sheet) -> Html:
    """Memory against time: plans as a staircase, recipes as points with letters."""
    y, timed = _times(sheet), sheet.data["timed"]
    unit = sheet.height(sheet.plans[-1]) / sheet.plans[-1]["factor"]  # of keeping everything
    modelled = [(b / sheet.scale, f * unit) for b, f in sheet.data["curve"]]
    series = [
        _stairs("all choices", "--soft", modelled, sheet, "faint"),
        _stairs("plan", _PLANS, _points(sheet, sheet.plans), sheet, "line"),
        Series("plan", _PLANS, *_columns(_points(sheet, sheet.plans)), "dots", told=False),
        *(Series(f"{letter}: {recipe['name']}", _RECIPES, *_columns(_points(sheet, [recipe])),
                 "dots")
          for letter, recipe in zip(LETTERS, sheet.recipes, strict=False)),
    ]  # fmt: skip
    letters = [
        tag("b", letter, cls="letter", style=f"left:{percent(sheet.budgets.share(x))};"
            f"bottom:{percent(y.share(height))}")
        for letter, (x, height) in zip(LETTERS, _points(sheet, sheet.recipes), strict=False)
    ]  # fmt: skip
    axes = Axes(
        title="Memory against time", x=sheet.budgets, y=y, x_name=f"peak, {sheet.unit}",
        y_unit="seconds a step" if timed else "work, keeping everything = 1",
        over=join(tag("i", cls="limit"), *letters, tag("i", cls="here")),
    )  # fmt: skip
    key = legend([("plans, simulated", _PLANS), ("fixed recipes, by the same costs", _RECIPES)])
    return tag("section", key, line_chart(series, axes), id="curve")


def _points(sheet: Sheet, points: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    return [(p["peak_bytes"] / sheet.scale, sheet.height(p)) for p in points]


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _stairs(
    name: str, colour: str, points: Sequence[tuple[float, float]], sheet: Sheet, style: str
) -> Series:
    """What each budget gets: that of the last point it reaches."""
    xs, ys = _columns(points)
    ends = [*xs[1:], max(sheet.budgets.high, xs[-1])]
    return Series(
        name, colour, [x for pair in zip(xs, ends, strict=True) for x in pair],
        [y for y in ys for _ in range(2)], style, told=style == "line",
    )  # fmt: skip


def _notes(sheet: Sheet) -> Html:
    data = sheet.data
    n, all_of_them = len(sheet.plans), data["choices"]
    time = (
        "Times are predicted: every distinct block was run alone on this device, and put together. "
        "They are good for comparing what stands on this page."
        if data["timed"]
        else "Nothing was timed: time is counted work, good only for comparing plans."
    )
    said = [
        "A peak is the most bytes of live tensors at once: weights, gradients, optimizer states, "
        "batch, activations. What the process needs beside them (libraries, the allocator's "
        "rounding) is not in it.",
        f"Every plan and every recipe here is simulated: whole steps on tensors without data, "
        f"which is the promise that plan makes. Of {all_of_them:,} choices on the curve {n} are "
        "shown, those that matter most; the thin line is all of them as the chain model guessed. "
        "A budget between two plans may have a slightly faster one: plan --budget finds it.",
        time,
        f"Keeping everything is 1 {TIMES}. A recipe's letter stands at its point of the curve.",
        "One step is drawn from allocation to allocation, in the middle of a run; the peak may be "
        "higher where the first step makes the optimizer's states.",
    ]
    return tag("ul", *(tag("li", each) for each in said), cls="card notes")
