"""The top of the page: what was promised and what was measured, for one run or for several."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..units import format_bytes, format_seconds
from .charts import percent, swatch
from .markup import Html, join, tag
from .run import RunRecord, number, text
from .summary import WENT_ON, Pair, Summary, summary_of

DASH = Html("&ndash;")
ARROW = Html("&rarr;")
CATEGORIES = ("weights", "optimizer", "other", "cache", "gradients", "saved", "transient")
"""In the order they are stacked: what stays below, what comes and goes above."""


def category_colour(name: str) -> str:
    """The custom property of style.css for a category of the meter."""
    return f"--c-{name}" if name in CATEGORIES else "--c-other"


def stacking(names: Sequence[str]) -> list[str]:
    """Categories from the bottom up; those nobody knows come last."""
    known = [name for name in CATEGORIES if name in names]
    return known + [name for name in names if name not in CATEGORIES]


def facts(run: RunRecord) -> list[str]:
    """What was trained, in a few words each."""
    receipt, config = run.receipt, run.config
    parameters = number(receipt, "model", "parameters")
    blocks, seed = number(run.plan, "blocks"), number(receipt, "seed")
    if seed is None:
        seed = number(config, "run", "seed")
    return [
        fact
        for fact in (
            text(receipt, "model", "name") or text(run.plan, "model"),
            f"{count(parameters)} parameters" if parameters is not None else None,
            f"{blocks:,.0f} blocks" if blocks is not None else None,
            text(receipt, "model", "rule") or text(config, "model", "rule"),
            _last_part(text(receipt, "data", "source") or text(config, "data", "source")),
            f"seed {seed:.0f}" if seed is not None else None,
        )
        if fact
    ]


def _last_part(source: str | None) -> str | None:
    return source and (source.rstrip("/").rpartition("/")[2] or source)


def badge(summary: Summary) -> Html:
    """How the run ended."""
    kind = {"finished": "good", "interrupted": "early", WENT_ON: "early"}.get(summary.status, "bad")
    return tag("span", summary.status, cls=f"badge {kind}")


def tiles(run: RunRecord) -> Html:
    """The receipt of one run: peak, step, quality, length."""
    summary = summary_of(run)
    return tag(
        "div",
        _peak_tile(summary),
        _step_tile(summary),
        _quality_tile(summary),
        _length_tile(run, summary),
        cls="tiles",
    )


def _tile(name: str, value: str, *lines: str) -> Html:
    shown = [tag("p", line) for line in lines if line]
    return tag("div", tag("h3", name), tag("p", value, cls="value"), *shown, cls="tile")


def _peak_tile(summary: Summary) -> Html:
    peak, budget = summary.peak, summary.budget_bytes
    bar = Html()
    if budget and peak.measured is not None:
        promised = Html()
        if peak.promised is not None:
            promised = tag("i", cls="tick", style=f"left:{percent(peak.promised / budget)}")
        share = peak.measured / budget
        fill = tag("b", style=f"width:{percent(share)}", cls="over" if share > 1 else None)
        used = f"{100 * share:.0f} % of the budget of {size(budget)}"
        bar = join(tag("div", fill, promised, cls="bar"), tag("p", used))
    return _tile("Peak memory", shown(peak.measured, size), _promise(peak, size), bar)


def _step_tile(summary: Summary) -> Html:
    pair = summary.step_s
    speed = f"{1 / pair.measured:.3g} updates a second" if pair.measured else ""
    return _tile("One update", shown(pair.measured, duration), _promise(pair, duration), speed)


def _promise(pair: Pair, form: Callable[[float], str]) -> str:
    if pair.promised is None:
        return "nothing was promised"
    error = f" ({signed(pair.error)})" if pair.error is not None else ""
    return f"promised {form(pair.promised)}{error}"


def _quality_tile(summary: Summary) -> Html:
    bits = [number(each, "bits_per_byte") for each in (summary.before, summary.after)]
    nats = [number(each, "nats_per_token") for each in (summary.before, summary.after)]
    if bits[0] is None and bits[1] is None:
        return _tile("Held-out text", DASH, "not measured")
    value = join(shown(bits[0], "{:.3f}".format), " ", ARROW, " ", shown(bits[1], "{:.3f}".format))
    change = "bits a byte"
    if bits[0] and bits[1] is not None:
        change += f" ({signed(bits[1] / bits[0] - 1)})"
    loss = join(shown(nats[0], "{:.3f}".format), " ", ARROW, " ", shown(nats[1], "{:.3f}".format),
                " nats a token")  # fmt: skip
    return _tile("Held-out text", value, change, loss)


def _length_tile(run: RunRecord, summary: Summary) -> Html:
    spent = f"in {format_seconds(summary.total_s)}" if summary.total_s is not None else ""
    epochs = number(run.receipt, "data", "epochs")
    passes = f"{epochs:.3g} passes through the data" if epochs is not None else ""
    return _tile("Updates", f"{summary.updates:,}", spent, passes)


def at_the_peak(summaries: Sequence[tuple[str, Summary]]) -> Html:
    """What the peaks are made of, promised above measured, as bars on one scale."""
    bars = [
        (f"{name} {what}".strip(), found)
        for name, summary in summaries
        for what, found in (
            ("promised", summary.promised_by_category),
            ("measured", summary.measured_by_category),
        )
        if sum(found.values()) > 0
    ]
    if not bars:
        return Html()
    most = max(sum(found.values()) for _, found in bars)
    names = stacking(sorted({name for _, found in bars for name, n in found.items() if n > 0}))
    lines = [_category_bar(name, found, names, most) for name, found in bars]
    head = tag("tr", tag("td"), *(tag("th", name) for name, _ in bars))
    body = [
        tag("tr", tag("th", swatch(category_colour(n)), n),
            *(tag("td", _mib(found.get(n, 0))) for _, found in bars))
        for n in names
    ]  # fmt: skip
    sums = (tag("td", _mib(sum(found.values()))) for _, found in bars)
    body.append(tag("tr", tag("th", "in all"), *sums, cls="sum"))
    table = tag("table", tag("thead", head), tag("tbody", *body), cls="numbers")
    return tag(
        "div",
        tag("h3", "What the peak is made of", tag("span", "MiB")),
        tag("div", tag("div", *lines, cls="category-bars"), tag("div", table, cls="scroll"),
            cls="beside" if len(bars) == 2 else None),
        cls="card",
    )  # fmt: skip


def _category_bar(name: str, found: Mapping[str, float], names: Sequence[str], most: float) -> Html:
    parts = [
        tag("b", title=f"{n}: {size(found[n])}",
            style=f"width:{percent(found[n] / most)};background:var({category_colour(n)})")
        for n in names
        if found.get(n, 0) > 0
    ]  # fmt: skip
    return tag("div", tag("span", name), tag("div", *parts, cls="bar"), cls="labelled")


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:,.1f}"


# ---- several runs -----------------------------------------------------------------------------


def side_by_side(runs: Sequence[RunRecord], names: Sequence[Html]) -> Html:
    """The receipts of several runs, one column each."""
    summaries = [summary_of(run) for run in runs]
    head = tag("tr", tag("td"), *(tag("th", name) for name in names))
    body = [
        _row("status", [badge(s) for s in summaries]),
        _row("updates", [f"{s.updates:,}" for s in summaries]),
        _row("budget", [shown(s.budget_bytes, size) for s in summaries]),
        *_pair_rows("peak", [s.peak for s in summaries], size),
        *_pair_rows("one update", [s.step_s for s in summaries], duration),
        _row("in all", [shown(s.total_s, format_seconds) for s in summaries]),
        *_quality_rows(summaries),
        _row("model", [text(r.receipt, "model", "name") or DASH for r in runs]),
        _row("parameters", [shown(number(r.receipt, "model", "parameters"), count) for r in runs]),
        _row("rule", [text(r.receipt, "model", "rule") or DASH for r in runs]),
        _row("data", [_last_part(text(r.receipt, "data", "source")) or DASH for r in runs]),
    ]
    table = tag("table", tag("thead", head), tag("tbody", *body), cls="numbers receipts")
    return tag("div", tag("div", table, cls="scroll"), cls="card")


def _row(name: str, cells: Sequence[str]) -> Html:
    return tag("tr", tag("th", name), *(tag("td", cell) for cell in cells))


def _pair_rows(name: str, pairs: Sequence[Pair], form: Callable[[float], str]) -> list[Html]:
    return [
        _row(f"{name}, promised", [shown(pair.promised, form) for pair in pairs]),
        _row(f"{name}, measured", [tag("b", shown(pair.measured, form)) for pair in pairs]),
        _row(f"{name}, error", [shown(pair.error, signed) for pair in pairs]),
    ]


def _quality_rows(summaries: Sequence[Summary]) -> list[Html]:
    form = "{:.3f}".format
    return [
        _row(
            f"held-out {words}, {when}",
            [shown(number(getattr(s, when), key), form) for s in summaries],
        )
        for key, words in (("bits_per_byte", "bits a byte"), ("nats_per_token", "nats a token"))
        for when in ("before", "after")
    ]


# ---- words of numbers -------------------------------------------------------------------------


def shown(value: float | None, form: Callable[[float], Any]) -> str:
    """A number in its form, or a dash where there is none."""
    return DASH if value is None else str(form(value))


def size(nbytes: float) -> str:
    """Bytes as elsewhere, but gigabytes to two digits: a peak is held against its budget."""
    return f"{nbytes / 2**30:,.2f} GiB" if 2**30 <= nbytes < 2**40 else format_bytes(nbytes)


def duration(seconds: float) -> str:
    """Seconds to three digits: a step is held against its promise to a percent."""
    if seconds >= 60:
        return format_seconds(seconds)
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def signed(share: float) -> str:
    """0.034 -> +3.4 %."""
    return f"{100 * share:+.1f}\u00a0%"


def count(value: float) -> str:
    """2132096 -> 2.13 M."""
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f}"
