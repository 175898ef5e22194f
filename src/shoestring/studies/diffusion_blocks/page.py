"""The study as tables, as a sheet of drawn digits, and as one page that loads nothing."""

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ...report.charts import Axes, Series, legend, line_chart
from ...report.curves import spanning
from ...report.document import document
from ...report.markup import Html, join, tag
from ...training.blockwise.png import grid_of, png_of
from ..verdict import Spread
from . import scores
from .claims import bars, verdicts, wrong_tool
from .rows import MEASURES, Measure, Rows, in_order
from .size import COUNTS, ENDS, GREEDY, LONG, RECOMPUTED, SHALLOW, TOTAL

MIB = 1 << 20
COLOURS = {
    ENDS: "--s0", SHALLOW: "--s1", LONG: "--ink", RECOMPUTED: "--s2",
    "2 blocks": "--s3", "3 blocks": "--s4", "4 blocks": "--s5", GREEDY: "--s6", TOTAL: "--s7",
}  # fmt: skip
_LINES = (ENDS, SHALLOW, LONG, *(f"{count} blocks" for count in COUNTS), GREEDY)
_TITLES = {"digits": "Digits", "text": "Text", "photographs": "Patches of photographs"}


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Markdown by name: a table for each part, the verdicts, the bars, and where it is the wrong
    tool."""
    rows = Rows(result)
    found = {}
    for part in rows.parts():
        heads, cells = _rows(result, rows, part)
        found[part] = _markdown(heads, cells) + "\n" + _footnote(result, part) + "\n"
    found["read"] = _markdown(*_read(rows))
    found["bars"] = _markdown(
        ("what", "bar", "found", "status", "lowest of all arms"),
        [(b.what, b.bar, b.found, f"**{b.status}**", b.best) for b in bars(result)],
    )
    found["verdicts"] = _markdown(
        ("claim", "verdict", "decided by", "because"),
        [(f"{v.claim} ({v.source})", f"**{v.verdict}**", v.rule, v.because)
         for v in verdicts(result)],
    )  # fmt: skip
    found["wrong_tool"] = "\n".join(f"- {said}" for said in wrong_tool(result)) + "\n"
    return found


def _markdown(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)]) + "\n"


def _rows(
    result: Mapping[str, Any], rows: Rows, part: str
) -> tuple[tuple[str, ...], list[list[str]]]:
    """Heads and cells of a part's table."""
    measures = [measure for measure in MEASURES if measure.part == part]
    heads = ["trained", "seeds", "updates of a block", "layers at once", "parameters in training",
             "peak, MiB", "of end to end", "seconds of one core"]  # fmt: skip
    for measure in measures:
        heads += [measure.name, "x end to end"]
    if part == "digits":
        heads.append("read as asked")
    cells = []
    for name in rows.names(part):
        first = next(iter(rows.of[part, name].values()))
        scored = rows.values(part, name, measures[0].key)
        peak = rows.get(part, name, "peak_bytes")
        share = rows.ratio(part, name, "peak_bytes")
        row = [
            name, str(len(scored)), f"{first['updates']:,}", str(first["layers"]),
            f"{first['parameters']:,}", f"{peak.mean / MIB:.2f}" if peak else "",
            f"{share.mean:.3f}" if share else "", _seconds(rows, part, name),
        ]  # fmt: skip
        for measure in measures:
            row.append(_told(rows.get(part, name, measure.key)))
            ratio = rows.ratio(part, name, measure.key)
            row.append(f"{ratio.mean:.3f}" if ratio else "")
        if part == "digits":
            agreement = rows.get(part, name, "agreement")
            row.append(f"{agreement.mean:.1%}" if agreement else "")
        cells.append(row)
    return tuple(heads), cells


def _seconds(rows: Rows, part: str, name: str) -> str:
    if name == RECOMPUTED:
        row = next(iter(rows.of[part, name].values()))
        plain = rows.get(part, ENDS, "cpu_seconds")
        return f"{plain.mean * row['seconds_ratio']:.0f} (by ratio)" if plain else ""
    cpu = rows.get(part, name, "cpu_seconds")
    return f"{cpu.mean:.0f}" if cpu else ""


def _told(spread: Spread | None) -> str:
    """The mean, and half of the range over seeds."""
    if spread is None:
        return ""
    digits = max(0, 3 - math.floor(math.log10(abs(spread.mean) or 1)))
    half = (spread.high - spread.low) / 2
    return f"{spread.mean:.{digits}f}" + (f" \u00b1 {half:.{digits}f}" if half else "")


def _read(rows: Rows) -> tuple[tuple[str, ...], list[list[str]]]:
    """How much worse each range of noise is answered with another's condition."""
    cells = []
    for part in rows.parts():
        for name in (ENDS, *(f"{count} blocks" for count in COUNTS)):
            found = [row["read"] for row in rows.of.get((part, name), {}).values()
                     if row.get("read")]  # fmt: skip
            means = [
                sum(each["other"] / each["right"] - 1 for each in of_range) / len(of_range)
                for of_range in zip(*found, strict=True)
            ]
            if means:
                cells.append([part, name, ", ".join(f"{mean:+.1%}" for mean in means)])
    return ("part", "trained", "loss with another condition, highest noise first"), cells


def _footnote(result: Mapping[str, Any], part: str) -> str:
    size, eyes = result["size"], result.get("eyes")
    batch = f"{size['texts']} texts of {size['length']} bytes" if part == "text" else (
        f"{size['batch']} images"
    )  # fmt: skip
    rate = size["lr"][list(_TITLES).index(part)]
    said = [
        f"{size['layers']} layers of width {size['width']}, batches of {batch}, learning rate "
        f"{rate:g}. {result['data'][part]['source']}. Mean and half of the range over seeds.",
        "Peak: weights, gradients, states and activations of one job's second update. Seconds: "
        "processor time of all blocks together.",
    ]
    if part == "digits" and eyes:
        said.append(
            f"Distance: Frechet's in {eyes['features']} features of a classifier that is right on "
            f"{eyes['accuracy']:.1%} of the held-out digits; {size['drawn']:,} drawn in "
            f"{size['calls']} calls with guidance {size['guidance']:g}; of as many training digits "
            f"{eyes['floor']:.2f}, of noise {eyes['ceiling']:.1f}."
        )
    found = ", ".join(f"{name} {version}" for name, version in result["versions"].items()
                      if version)  # fmt: skip
    return " ".join([*said, f"{found}; {result['threads']} thread(s)."])


# ---- pictures ----------------------------------------------------------------------------------


def sheet(result: Mapping[str, Any]) -> bytes | None:
    """A PNG of the first digits of every arm, a row each in the order of the table, real ones
    last; None where none were drawn."""
    drawn = [scores.unpacked(picture) for _, picture in _pictures(result)]
    if not drawn:
        return None
    big = F.interpolate(torch.cat(drawn), scale_factor=3)
    return png_of(grid_of(big, columns=scores.SHOWN))


def _pictures(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(arm, packed images) of what was drawn, the real ones last."""
    found = [(row["name"], row["picture"]) for row in in_order(result) if "picture" in row]
    return [*found, ("held out", result["eyes"]["picture"])] if found else []


def _digits(result: Mapping[str, Any]) -> list[Html]:
    shown = []
    for name, picture in _pictures(result):
        images = F.interpolate(scores.unpacked(picture), scale_factor=3)
        png = base64.b64encode(png_of(grid_of(images, columns=scores.SHOWN))).decode()
        image = tag(
            "img", src=f"data:image/png;base64,{png}", alt=f"digits drawn by {name}",
            style="width:100%;image-rendering:pixelated",
        )  # fmt: skip
        shown.append(tag("figure", tag("figcaption", name), image))
    if not shown:
        return []
    return [tag("h2", "What was drawn"), tag("div", *shown, cls="card")]


def _texts(result: Mapping[str, Any]) -> list[Html]:
    drawn = [(row["name"], row["drawn"]) for row in in_order(result) if "drawn" in row]
    if not drawn:
        return []
    shown = [
        tag("p", tag("b", name), *(tag("pre", text) for text in texts)) for name, texts in drawn
    ]
    return [tag("h2", "What was written"), tag("div", *shown, cls="card")]


def _front(rows: Rows, measure: Measure) -> Html | None:
    """A dot for each seed: the measure over the peak."""
    series = []
    for name, colour in COLOURS.items():
        peak = rows.get(measure.part, name, "peak_bytes")
        found = list(rows.values(measure.part, name, measure.key).values())
        if peak and found:
            x = [peak.mean / MIB] * len(found)
            series.append(Series(name, colour, x, found, "dots"))
    if not series:
        return None
    axes = Axes(
        title=measure.name, x_name="peak of one job, MiB",
        x=spanning((x for each in series for x in each.x), margin=0.05, from_zero=True),
        y=spanning((y for each in series for y in each.y), margin=0.08),
    )  # fmt: skip
    return join(legend([(s.name, s.colour) for s in series]), line_chart(series, axes))


def _by_noise(rows: Rows, part: str) -> Html | None:
    """Lines: the ratio to end to end by noise, of the seeds' mean."""
    key, x_name = ("parts", "share of the text that is masked") if part == "text" else (
        "losses", "log10 of sigma"
    )  # fmt: skip
    means = {}
    for name in _LINES:
        found = [row[key] for row in rows.of.get((part, name), {}).values() if key in row]
        if found:
            means[name] = [sum(column) / len(column) for column in zip(*found, strict=True)]
    if ENDS not in means or len(means) < 2:
        return None
    if part == "text":
        x = [1 - (share + 0.5) / scores.SHARES for share in range(scores.SHARES)]
    else:
        x = [math.log10(sigma) for sigma in scores.SIGMAS]
    series = [
        Series(name, COLOURS[name], x, [a / b for a, b in zip(mean, means[ENDS], strict=True)])
        for name, mean in means.items()
    ]
    axes = Axes(
        title=f"{_TITLES[part]}: loss as a multiple of end to end's", x_name=x_name,
        x=spanning(x), y=spanning((y for each in series for y in each.y), margin=0.05),
    )  # fmt: skip
    return join(legend([(s.name, s.colour) for s in series]), line_chart(series, axes))


# ---- the page ----------------------------------------------------------------------------------


def write_page(result: Mapping[str, Any], out: Path) -> Path:
    """Write the page. CheckpointError when it cannot be written."""
    from ...checkpoint import write_text

    write_text(out, page(result))
    return out


def page(result: Mapping[str, Any]) -> str:
    """Verdicts, bars, where it is the wrong tool, pictures, and the tables."""
    rows = Rows(result)
    judged = _table(("claim", "verdict", "because"), [
        (f"{v.claim} ({v.source})", tag("b", v.verdict), f"{v.rule}. {v.because}")
        for v in verdicts(result)
    ])  # fmt: skip
    reached = _table(("what", "bar", "found", "", "lowest of all arms"), [
        (b.what, b.bar, b.found, tag("b", b.status), b.best) for b in bars(result)
    ])  # fmt: skip
    wrong = tag("ul", *(tag("li", said) for said in wrong_tool(result)))
    drawn = [
        *(_front(rows, measure) for measure in MEASURES),
        *(_by_noise(rows, part) for part in rows.parts()),
    ]
    pictures = [chart for chart in drawn if chart]
    parts = [
        tag("header", tag("p", "Shoestring study", cls="brand"), tag("h1", "Diffusion blocks")),
        tag("h2", "Verdicts"), tag("div", judged, cls="card"),
        tag("h2", "Bars"), tag("div", reached, cls="card"),
        tag("h2", "Where it is the wrong tool"), tag("div", wrong, cls="card"),
        tag("h2", "Quality, memory and noise"), *pictures,
        *_digits(result), *_texts(result),
        *(piece for part in rows.parts() for piece in _part(result, rows, part)),
        tag("h2", "What is read of the condition"), tag("div", _table(*_read(rows)), cls="card"),
        *_left_out(result),
    ]  # fmt: skip
    body = tag("div", *parts, id="page")
    return document("Diffusion blocks - Shoestring study", body, images=True)


def _part(result: Mapping[str, Any], rows: Rows, part: str) -> list[Html]:
    heads, cells = _rows(result, rows, part)
    note = tag("p", _footnote(result, part))
    return [tag("h2", _TITLES[part]), tag("div", _table(heads, cells), note, cls="card")]


def _left_out(result: Mapping[str, Any]) -> list[Html]:
    said = [tag("p", f"{part} was left out: {why}") for part, why in result["left_out"].items()]
    return [tag("footer", *said)] if said else []


def _table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> Html:
    apart = "padding:0.15em 1em 0.15em 0;vertical-align:top;text-align:left"
    return tag("table", tag("tr", *(tag("th", head, style=apart) for head in heads)), *(
        tag("tr", *(tag("td", cell, style=apart) for cell in row)) for row in cells
    ))  # fmt: skip
