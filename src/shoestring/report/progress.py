"""The curves of a report: loss, held-out bits per byte, and how the run went, of one run or of
several over one another."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .charts import Axes, Series, legend, line_chart
from .curves import STRETCHES, Curve, Range, spanning, stretched, without_outliers
from .markup import Html, join, tag
from .run import RunRecord, number, text

TRAINING, HELD_OUT = "--s0", "--s1"
SMALL = (("lr", "Learning rate", ""), ("norm", "Gradient norm", ""),
         ("tokens_per_s", "Speed", "tokens a second"))  # fmt: skip


_INCIDENTS = 20  # most that are listed


@dataclass(frozen=True, slots=True)
class Drawn:
    """A run with its name and colour on this page; alone: no other run beside it."""

    run: RunRecord
    name: str
    colour: str
    alone: bool

    def called(self, what: str) -> str:
        """The name of one of its curves."""
        return what if self.alone else f"{self.name}, {what}"

    @property
    def held_out_colour(self) -> str:
        return HELD_OUT if self.alone else self.colour


def curves(drawn: Sequence[Drawn]) -> Html:
    """Loss and bits per byte side by side, the small ones below."""
    stepped = [each for each in drawn if len(each.run.steps)]
    scored = [each for each in drawn if each.run.evaluations]
    if not stepped and not scored:
        return tag("p", "No step and no evaluation was recorded.", cls="nothing")
    x = _steps_range(drawn)
    loss = {id(each): stretched(each.run.steps.step, each.run.steps["loss"]) for each in stepped}
    bits, y = _bits_chart(scored, x), _loss_range(drawn, loss)
    charts = tag("div", _loss_chart(drawn, loss, x, y), bits, cls="pair" if bits else "single")
    small = [_small_chart(stepped, x, *each) for each in SMALL]
    return join(
        _key(drawn),
        charts,
        tag("div", *filter(None, small), cls="smalls"),
        _how_drawn(stepped, loss, y),
        *map(_along_the_way, drawn),
    )


def _steps_range(drawn: Sequence[Drawn]) -> Range:
    ends = [0.0]
    for each in drawn:
        steps = each.run.steps.step
        ends += [steps[0], steps[-1]] if len(steps) else []
        ends += _evaluated(each.run, "step")[0]
    return spanning(ends)


def _evaluated(run: RunRecord, name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the evaluations that have this number."""
    found = [(number(e, "step"), number(e, name)) for e in run.evaluations]
    pairs = [(step, value) for step, value in found if step is not None and value is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _key(drawn: Sequence[Drawn]) -> Html:
    if len(drawn) == 1:
        return legend([("training", TRAINING), ("held out", HELD_OUT)])
    return legend([(each.name, each.colour) for each in drawn])


def _loss_range(drawn: Sequence[Drawn], loss: dict[int, Curve]) -> Range:
    values: list[float] = []
    for each in drawn:
        if (curve := loss.get(id(each))) is not None:
            values += without_outliers([*curve.low, *curve.high])
        values += _evaluated(each.run, "nats_per_token")[1]
    return spanning(values, margin=0.04)


def _loss_chart(drawn: Sequence[Drawn], loss: dict[int, Curve], x: Range, y: Range) -> Html:
    series: list[Series] = []
    for each in drawn:
        if (curve := loss.get(id(each))) is not None:
            series += _lines(each.called("training"), each.colour, curve)
        at, held_out = _evaluated(each.run, "nats_per_token")
        if at:
            name, colour = each.called("held out"), each.held_out_colour
            series.append(Series(name, colour, at, held_out, "dots"))
    axes = Axes(title="Loss", x=x, y=y, x_name="update", y_unit="nats a token")
    return line_chart(series, axes)


def _lines(name: str, colour: str, curve: Curve) -> list[Series]:
    """The middle of a curve in front of all it goes through."""
    if curve.every > 1:
        behind = Series(name, colour, curve.x, curve.high, "band", curve.low, told=False)
    elif curve.smooth is not curve.median:
        behind = Series(name, colour, curve.x, curve.median, "faint", told=False)
    else:
        return [Series(name, colour, curve.x, curve.median)]
    return [behind, Series(name, colour, curve.x, curve.smooth)]


def _bits_chart(scored: Sequence[Drawn], x: Range) -> Html:
    series: list[Series] = []
    values: list[float] = []
    for each in scored:
        at, bits = _evaluated(each.run, "bits_per_byte")
        values += bits
        if at:
            name, colour = each.called("held out"), each.held_out_colour
            series.append(Series(name, colour, at, bits, "line", told=False))
            series.append(Series(name, colour, at, bits, "dots"))
    if not series:
        return Html()
    axes = Axes(title="Held-out text", x=x, y=spanning(values, margin=0.06), x_name="update",
                y_unit="bits a byte")  # fmt: skip
    return line_chart(series, axes)


def _small_chart(stepped: Sequence[Drawn], x: Range, column: str, title: str, unit: str) -> Html:
    series: list[Series] = []
    values: list[float] = []
    for each in stepped:
        curve = stretched(each.run.steps.step, each.run.steps[column], STRETCHES // 3)
        if any(map(math.isfinite, curve.median)):
            colour = TRAINING if each.alone else each.colour
            series.append(Series(each.called(title.lower()), colour, curve.x, curve.smooth))
            values += without_outliers(curve.smooth)
    if not series:
        return Html()
    y = spanning(values, margin=0.06, from_zero=True)
    axes = Axes(title=title, x=x, y=y, x_name="update", y_unit=unit, x_ticks=4, y_ticks=4,
                is_small=True)  # fmt: skip
    return line_chart(series, axes)


def _along_the_way(each: Drawn) -> Html:
    """What happened besides updates and evaluations, the latest last."""
    incidents = each.run.incidents
    if not incidents:
        return Html()
    head = "Along the way" if each.alone else f"Along the way of {each.name}"
    lines = [tag("li", _incident(incident)) for incident in incidents[-_INCIDENTS:]]
    if (left := len(incidents) - len(lines)) > 0:
        lines.insert(0, tag("li", f"{left:,} before these"))
    return tag("div", tag("b", head), tag("ul", *lines), cls="notice")


def _incident(incident: Mapping[str, Any]) -> str:
    name, step = text(incident, "event") or "an event without a name", number(incident, "step")
    after = "" if step is None else f"update {step:,.0f}: "
    message = text(incident, "message")
    return f"{after}{name}" + (f" - {message[:500]}" if message else "")


def _how_drawn(stepped: Sequence[Drawn], loss: dict[int, Curve], y: Range) -> Html:
    """What a reader must know about how much of the curves is on the page."""
    said: dict[str, list[str]] = {}
    for each in stepped:
        curve, whole = loss[id(each)], len(each.run.steps)
        if curve.every > 1:
            words = (
                f"{whole:,} updates are drawn as {len(curve):,} stretches of {curve.every:,}: the "
                "band reaches from the lowest to the highest loss of each, the line is their "
                "smoothed median."
            )
        elif curve.smooth is not curve.median:
            words = "The thin line is every update, the thick one is smoothed."
        else:
            words = "Every update is drawn."
        said.setdefault(words, []).append(each.name)
    lines = [
        words if len(said) == 1 else f"{', '.join(names)}: {words}" for words, names in said.items()
    ]
    if beyond := sum(value > y.high for curve in loss.values() for value in curve.high):
        lines.append(f"{beyond:,} points lie above the axis and are drawn at its top.")
    return tag("p", " ".join(lines), cls="note")
