"""The study as a table, and as one page with pictures that loads nothing."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...report.charts import Axes, Series, legend, line_chart
from ...report.curves import Range, spanning
from ...report.document import document
from ...report.markup import Html, join, tag
from ...units import format_bytes
from ..verdict import Spread
from .claims import Rows, verdicts

_HEAD = (
    "cache", "bytes a token", "of 16 bits", "shared", "KL to float32", "perplexity", "top-1",
    "needles", "copied", "chains: of 16 bits", "1 hop", "2 hops", "4 hops",
)  # fmt: skip
_KINDS = {
    "ours": ("ours", "--s0"), "package": ("installed packages", "--s1"),
    "simulated": ("published, simulated", "--s2"), "control": ("control arms", "--s7"),
}  # fmt: skip
_PARTS = ("english", "chains")
_LINES = 8  # schemes drawn by hops


def table(result: Mapping[str, Any]) -> str:
    """Markdown: both of `tables`."""
    return "\n".join(tables(result))


def tables(result: Mapping[str, Any]) -> tuple[str, str]:
    """Markdown: a row for each peer, with the spread over seeds; and the verdicts."""
    rows = Rows(result)
    lines = ["| " + " | ".join(_HEAD) + " |", "|---" + "|---:" * (len(_HEAD) - 1) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in _cells(result, rows)]
    judged = ["| claim | verdict | decided by | because |", "|---|---|---|---|"]
    for each in verdicts(result):
        judged.append(
            f"| {each.claim} ({each.source}) | **{each.verdict}** | {each.rule} | {each.because} |"
        )
    return "\n".join([*lines, "", _footnote(result)]) + "\n", "\n".join(judged) + "\n"


def _cells(result: Mapping[str, Any], rows: Rows) -> list[list[str]]:
    missing = rows.missing(result)
    names = list(dict.fromkeys(row["name"] for row in result["rows"]))
    found = []
    for name in names:
        if name in missing:
            found.append([name, missing[name], *[""] * (len(_HEAD) - 2)])
            continue
        english = [
            _said(rows.get("english", name, key), how)
            for key, how in (
                ("bytes_per_token", ",.0f"), ("share_of_16_bits", ".1%"), ("kl", ".4f"),
                ("perplexity", ".3f"), ("top1", ".3f"), ("needles", ".0%"), ("copied", ".0%"),
            )
        ]  # fmt: skip
        chains = [
            _said(rows.get("chains", name, key), ".1%")
            for key in ("share_of_16_bits", "hops_1", "hops_2", "hops_4")
        ]
        seeds = max(len(rows.of.get((part, name), [])) for part in _PARTS)
        shared = max(
            row["shared_bytes"] for part in _PARTS for row in rows.of.get((part, name), [])
        )
        english.insert(2, format_bytes(shared) if shared else "")
        found.append([f"{name} ({seeds} seeds)" if seeds > 1 else name, *english, *chains])
    return found


def _said(spread: Spread | None, how: str) -> str:
    """The mean, and half of the range where seeds differ in what is shown."""
    if spread is None:
        return ""
    half = (spread.high - spread.low) / 2
    mean = format(spread.mean, how)
    return mean if format(half, how) == format(0.0, how) else f"{mean} \u00b1 {half:{how}}"


def _footnote(result: Mapping[str, Any]) -> str:
    size, versions = result["size"], result["versions"]
    trained = result.get("stages", [])
    said = [
        f"SmolLM2-135M-Instruct, float32, 1 x {size['tokens']} tokens of English in chunks of "
        f"{size['chunk']}, window {size['window']}, {size['sinks']} sinks."
        if size["english"] and "english" not in result.get("left_out", {})
        else "English was left out"
        + (f": {reason}." if (reason := result.get("left_out", {}).get("english")) else "."),
        f"Chains: {size['rows']} texts of {size['pairs']} pairs, "
        f"{size['rows'] * size['rounds']} questions of each number of hops, window "
        f"{size['chain_window']}"
        + (f"; model trained to {trained[-1]['right']:.1%}." if trained else "."),
        "\u00b1: half of the range over seeds. "
        + ", ".join(f"{name} {found}" for name, found in versions.items() if found)
        + f"; {result['threads']} thread(s).",
    ]
    return " ".join(said)


def write_page(result: Mapping[str, Any], out: Path) -> Path:
    """Write the page. CheckpointError when it cannot be written."""
    from ...checkpoint import write_text

    write_text(out, page(result))
    return out


def page(result: Mapping[str, Any]) -> str:
    """Verdicts, two pictures, and the table."""
    rows = Rows(result)
    judged = tag("table", tag("tr", *(tag("th", x) for x in ("claim", "verdict", "because"))), *(
        tag("tr", tag("td", f"{v.claim} ({v.source})"), tag("td", tag("b", v.verdict)),
            tag("td", f"{v.rule}. {v.because}")) for v in verdicts(result)
    ))  # fmt: skip
    whole = tag("table", tag("tr", *(tag("th", x) for x in _HEAD)), *(
        tag("tr", *(tag("td", x) for x in cells)) for cells in _cells(result, rows)
    ))  # fmt: skip
    parts = [
        tag("header", tag("p", "Shoestring study", cls="brand"), tag("h1", "Compressed context")),
        tag("h2", "Verdicts"), tag("div", judged, cls="card"),
        *_pictures(result, rows),
        tag("h2", "Every cache"), tag("div", whole, cls="card"),
        tag("footer", tag("p", _footnote(result))),
    ]  # fmt: skip
    return document("Compressed context - Shoestring study", tag("div", *parts, id="page"))


def _pictures(result: Mapping[str, Any], rows: Rows) -> list[Html]:
    found = []
    kinds = {row["name"]: row["kind"] for row in result["rows"]}
    if drawn := _by_bytes(rows, kinds):
        found += [tag("h2", "What is lost, by what it takes"), drawn]
    if drawn := _by_hops(rows):
        found += [tag("h2", "Answers in several steps"), drawn]
    return found


def _by_bytes(rows: Rows, kinds: Mapping[str, str]) -> Html | None:
    """Dots: log10 of KL over bytes a token."""
    points: dict[str, list[tuple[float, float]]] = {}
    for name in rows.names("english"):
        kl, size = (rows.get("english", name, key) for key in ("kl", "bytes_per_token"))
        if kl and size and kl.mean > 0 and rows.is_compressed("english", name):
            points.setdefault(kinds[name], []).append((size.mean, math.log10(kl.mean)))
    if not points:
        return None
    series = [
        Series(_KINDS[kind][0], _KINDS[kind][1], [x for x, _ in at], [y for _, y in at], "dots")
        for kind, at in points.items()
    ]
    axes = Axes(
        title="log10 of KL to the float32 cache", x_name="bytes a token, all counted",
        x=spanning((x for at in points.values() for x, _ in at), margin=0.05, from_zero=True),
        y=spanning((y for at in points.values() for _, y in at), margin=0.05),
    )  # fmt: skip
    names = [(s.name, s.colour) for s in series]
    return join(legend(names), line_chart(series, axes))


def _by_hops(rows: Rows) -> Html | None:
    """Lines over 1, 2 and 4 hops: the plain cache, and those that lose most from one to four."""
    at: list[tuple[float, str, Sequence[float]]] = []
    for name in rows.names("chains"):
        spreads = [rows.get("chains", name, f"hops_{hops}") for hops in (1, 2, 4)]
        if all(spreads):
            y = [spread.mean for spread in spreads if spread]
            at.append((y[2] - y[0] - 2 * (name == "float32"), name, y))
    if not at:
        return None
    series = [
        Series(name, f"--s{index % 8}", [1.0, 2.0, 4.0], y)
        for index, (_, name, y) in enumerate(sorted(at)[:_LINES])
    ]
    axes = Axes(title="share of right answers", x_name="hops", x=Range(1.0, 4.0), y=Range(0.0, 1.0))
    return join(legend([(s.name, s.colour) for s in series]), line_chart(series, axes))
