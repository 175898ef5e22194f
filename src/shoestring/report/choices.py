"""The plans of a budget page: a panel for each, and the tables of recipes and of all plans."""

from collections.abc import Iterator, Mapping
from typing import Any

from .charts import percent, swatch
from .markup import Html, join, tag
from .memory import step_chart, step_of
from .plans import patches, strip, way
from .receipts import DASH, category_colour, shown, signed, size
from .sheet import LETTERS, Sheet, factor, in_seconds, picked

_STRETCHES = 75  # of a plan's timeline; two instants of each are drawn


def panels(sheet: Sheet) -> Iterator[Html]:
    """One for every plan, all but the one that is shown first hidden, and one for none."""
    for index in range(len(sheet.plans)):
        yield _panel(sheet, index)
    least = sheet.plans[0]
    yield tag(
        "section", tag("h2", "Nothing fits"),
        tag("div", tag("b", f"The smallest plan needs {size(least['peak_bytes'])}"),
            tag("p", f"It is decided in the {least['instant']}. Where the budget is given on the "
                "command line, the error names changes that would fit."), cls="notice bad"),
        id="nothing", hidden=None if sheet.start is None else "",
    )  # fmt: skip


def _panel(sheet: Sheet, index: int) -> Html:
    plan = sheet.plans[index]
    whole = {**plan, "blocks": sheet.data["blocks"]}
    after = sheet.plans[index + 1]["peak_bytes"] if index + 1 < len(sheet.plans) else None
    until = f"to {size(after)}" if after else "on"
    head = tag(
        "h2", "The plan", tag("span", f"for budgets from {size(plan['peak_bytes'])} {until}")
    )
    pair = tag(
        "div",
        tag("div", tag("h3", "Blocks"), strip(whole, sheet.colours), patches(whole), cls="card"),
        tag("div", tag("h3", "What the peak is made of"), _categories(sheet, plan), cls="card"),
        cls="pair",
    )
    return tag("section", head, _tiles(sheet, plan), pair, _timeline(sheet, plan), cls="choice",
               hidden=None if index == sheet.start else "")  # fmt: skip


def _tiles(sheet: Sheet, plan: Mapping[str, Any]) -> Html:
    left = max(0.0, sheet.budget - plan["peak_bytes"])
    off = plan["modelled_bytes"] / plan["peak_bytes"] - 1
    tiles = (
        ("Peak", size(plan["peak_bytes"]), tag("span", f"{size(left)} of the budget is left",
                                               cls="left")),
        ("One step", shown(plan["seconds"], in_seconds), f"{factor(plan)} keeping everything"),
        ("Highest in the", plan["instant"], f"simulated; {signed(off)} by the chain model"),
    )  # fmt: skip
    return tag(
        "div",
        *(tag("div", tag("h3", name), tag("p", value, cls="value"), tag("p", line), cls="tile")
          for name, value, line in tiles),
        cls="tiles three",
    )  # fmt: skip


def _categories(sheet: Sheet, plan: Mapping[str, Any]) -> Html:
    held = {n: plan["by_category"].get(n, 0) for n in sheet.categories}
    bars = [
        tag("b", title=f"{n}: {size(b)}", style=f"background:var({category_colour(n)});"
            f"width:{percent(b / sheet.scale / sheet.memory.high)}")
        for n, b in held.items() if b
    ]  # fmt: skip
    rows = [
        tag("tr", tag("th", swatch(category_colour(n)), n), tag("td", size(b)),
            tag("td", f"{100 * b / plan['peak_bytes']:.0f}\u00a0%"))
        for n, b in held.items() if b
    ]  # fmt: skip
    bar = tag("div", tag("div", *bars, cls="parts"), tag("i", cls="limit up"), cls="held")
    ends = tag("div", tag("span", "0"), tag("span", f"{sheet.memory.high:.4g} {sheet.unit}"),
               cls="strip-ends")  # fmt: skip
    return join(bar, ends, tag("table", tag("tbody", *rows), cls="numbers"))


def _timeline(sheet: Sheet, plan: Mapping[str, Any]) -> Html:
    step = step_of(plan["history"])
    if step is None:
        return Html()
    step = step.thinned(_STRETCHES)
    over = tag("i", cls="limit level-line")
    names = [n for n in sheet.categories if n in step.held]
    picture = step_chart("One step", step, names, sheet.memory, sheet.unit, sheet.scale, over=over)
    return tag("div", picture, cls="single")


# ---- tables -------------------------------------------------------------------------------------


def recipes(sheet: Sheet) -> Html:
    """The recipes, each held against the plan of its peak and that of its time."""
    if not sheet.recipes:
        return Html()
    head = ["", "peak", "a step", "", "a plan of that peak", "a plan of that time", ""]
    rows = [_recipe(sheet, letter, r) for letter, r in zip(LETTERS, sheet.recipes, strict=False)]
    table = tag("table", tag("thead", tag("tr", *(tag("th", h) for h in head))),
                tag("tbody", *rows), cls="numbers recipes")  # fmt: skip
    note = tag(
        "p",
        "What people use where nothing is planned, priced by the same measurements of the same "
        "blocks as the plans, and simulated as they are. A plan of that peak needs no more memory, "
        "one of that time takes no longer.",
        cls="note",
    )
    card = tag("div", tag("div", table, cls="scroll"), note, cls="card")
    return tag("section", tag("h2", "Fixed recipes"), card, id="recipes")


def _recipe(sheet: Sheet, letter: str, recipe: Mapping[str, Any]) -> Html:
    mine = picked(sheet.plans, recipe["peak_bytes"])
    quicker, lighter = DASH, DASH
    if mine is not None:
        plan = sheet.plans[mine]
        quicker = join(sheet.time(plan), " ", tag("small", _less(plan, recipe, "factor")))
    as_fast = [p for p in sheet.plans if p["factor"] <= recipe["factor"] * (1 + 1e-9)]
    if as_fast:
        lighter = join(size(as_fast[0]["peak_bytes"]), " ",
                       tag("small", _less(as_fast[0], recipe, "peak_bytes")))  # fmt: skip
    notes = [recipe["note"], "" if recipe["fidelity"] == "exact" else recipe["fidelity"]]
    said = ", ".join(note for note in notes if note)
    name = tag("th", tag("b", letter, cls="letter"), recipe["name"], tag("small", said))
    fits = recipe["peak_bytes"] <= sheet.budget
    return tag(
        "tr", name, tag("td", size(recipe["peak_bytes"])), tag("td", sheet.time(recipe)),
        tag("td", factor(recipe)), tag("td", quicker), tag("td", lighter),
        tag("td", "fits" if fits else "too much", cls="fits" if fits else "over"),
        data_peak=str(recipe["peak_bytes"]),
    )  # fmt: skip


def _less(plan: Mapping[str, Any], recipe: Mapping[str, Any], what: str) -> str:
    """-12 %, in words of a table."""
    share = plan[what] / recipe[what] - 1
    return "the same" if abs(share) < 0.0005 else signed(share)


def table(sheet: Sheet) -> Html:
    """Every plan in one line."""
    head = ["peak", "a step", "", "highest in the", "blocks", "beside them"]
    rows = [_row(sheet, i) for i in range(len(sheet.plans))]
    table = tag("table", tag("thead", tag("tr", *(tag("th", h) for h in head))),
                tag("tbody", *rows), cls="numbers plans")  # fmt: skip
    card = tag("div", tag("div", table, cls="scroll"), cls="card")
    return tag("section", tag("h2", "Every plan"), card, id="plans")


def _row(sheet: Sheet, index: int) -> Html:
    plan = sheet.plans[index]
    beside = ", ".join(way(p["method"], p["config"]) for p in plan["patches"])
    return tag(
        "tr", tag("th", size(plan["peak_bytes"])), tag("td", sheet.time(plan)),
        tag("td", factor(plan)), tag("td", plan["instant"]), tag("td", _blocks(plan)),
        tag("td", beside or DASH), cls="mine" if index == sheet.start else None,
        data_peak=str(plan["peak_bytes"]),
    )  # fmt: skip


def _blocks(plan: Mapping[str, Any]) -> str:
    """7 keep, 5 recompute."""
    counts: dict[str, int] = {}
    for span in plan["spans"]:
        name = way(span["method"], span["config"])
        counts[name] = counts.get(name, 0) + span["stop"] - span["start"]
    return "; ".join(f"{n} {name}" for name, n in counts.items())
