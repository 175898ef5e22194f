"""One step from instant to instant, by category: measured, and predicted beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .charts import Axes, Level, Series, area_chart, legend, swatch
from .curves import Range, spanning
from .markup import Html, join, tag
from .progress import Drawn
from .receipts import category_colour, size, stacking
from .run import dig, items, mapping, number
from .summary import summary_of

UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
FAR = 1.7
"""A budget this many times above the peak would flatten the picture and is only named."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step's instants. at: which ones; held: bytes by category at each; phases: (name, first
    instant); peak_bytes: the highest sum; is_cut: the step had more than was kept."""

    at: list[float]
    held: Mapping[str, list[float]]
    phases: list[tuple[str, float]]
    instants: int
    is_cut: bool

    def thinned(self, stretches: int) -> "Step":
        """The same with the highest and the lowest instant of at most so many stretches."""
        totals, n = self.totals, len(self.at)
        every = -(-n // stretches)
        kept = {0, n - 1}
        for start in range(0, n, every):
            part = range(start, min(start + every, n))
            kept |= {max(part, key=totals.__getitem__), min(part, key=totals.__getitem__)}
        order = sorted(kept)
        held = {name: [row[i] for i in order] for name, row in self.held.items()}
        return replace(self, at=[self.at[i] for i in order], held=held)

    @property
    def totals(self) -> list[float]:
        return [sum(column) for column in zip(*self.held.values(), strict=True)]

    @property
    def peak_bytes(self) -> float:
        return max(self.totals, default=0.0)

    @property
    def peak_phase(self) -> str:
        """In which phase the highest sum lies."""
        totals = self.totals
        at = self.at[totals.index(max(totals))]
        return next((name for name, start in reversed(self.phases) if start <= at), "")


def step_of(found: Any) -> Step | None:
    """A step as `Meter.history` tells it; None for anything else."""
    at = _numbers(dig(found, "at"))
    held = {str(k): _numbers(v) for k, v in mapping(found, "bytes").items()}
    if len(at) < 2 or not held or any(len(row) != len(at) for row in held.values()):
        return None
    if at != sorted(at) or at[0] == at[-1]:
        return None
    phases = []
    for each in items(found, "phases"):
        if isinstance(each, list) and len(each) == 2 and isinstance(each[0], str):
            index = number({"index": each[1]}, "index")
            if index is not None and 0 <= index < len(at):
                phases.append((each[0], at[int(index)]))
    phases.sort(key=lambda phase: phase[1])
    instants = int(number(found, "instants") or len(at))
    return Step(at, held, phases, instants, dig(found, "is_cut") is True)


def _numbers(found: Any) -> list[float]:
    values = [number({"x": value}, "x") for value in found] if isinstance(found, list) else []
    return [value for value in values if value is not None]


def memory(drawn: Sequence[Drawn]) -> Html:
    """Every run's step as measured and as predicted, all on one scale."""
    rows = []
    for each in drawn:
        measured = step_of(dig(each.run.memory, "measured"))
        predicted = step_of(dig(each.run.memory, "predicted") or dig(each.run.plan, "history"))
        if measured or predicted:
            rows.append((each, measured, predicted))
    steps = [step for _, *pair in rows for step in pair if step is not None]
    if not steps:
        return tag("p", "No step was recorded instant by instant.", cls="nothing")
    names = stacking(
        sorted({name for step in steps for name, row in step.held.items() if any(row)})
    )
    parts = [legend([(name, category_colour(name)) for name in names])]
    parts += [_pair(each, measured, predicted, names) for each, measured, predicted in rows]
    longest = max(step.instants for step in steps)
    parts.append(tag("p", _how_drawn(steps, longest), cls="note"))
    return join(*parts)


def _how_drawn(steps: Sequence[Step], longest: int) -> str:
    said = "Instants are counted in allocations, not in seconds."
    shown = max(len(step.at) for step in steps)
    if longest > shown:
        said += f" Of up to {longest:,} instants the {shown:,} highest and lowest are drawn."
    if any(step.is_cut for step in steps):
        said += " The step made more allocations than are kept; its end is missing."
    return said


def _pair(each: Drawn, measured: Step | None, predicted: Step | None, names: Sequence[str]) -> Html:
    summary = summary_of(each.run)
    budget, promised = summary.budget_bytes, summary.peak.promised
    top = max(step.peak_bytes for step in (measured, predicted) if step is not None)
    levels = []
    if budget is not None and top > 0 and budget <= FAR * top:
        levels.append(Level(f"budget {size(budget)}", "--budget", budget))
        top = max(top, budget)
    y, unit, scale = scale_of(top)
    levels = [replace(level, y=level.y / scale) for level in levels]
    charts = [
        step_chart(what, step, names, y, unit, scale, levels)
        for what, step in (("Measured", measured), ("Predicted", predicted))
        if step is not None
    ]
    said = []
    if budget is not None and not levels:
        said.append(f"The budget of {size(budget)} lies far above this picture.")
    if measured is None:
        said.append("This step was not measured.")
    if predicted is None:
        said.append("There is no prediction of its instants.")
    elif promised is not None and promised > 1.005 * predicted.peak_bytes:
        said.append(
            f"The promise of {size(promised)} also covers the first update, which makes "
            "the optimizer's states."
        )
    head = Html() if each.alone else tag("h3", swatch(each.colour), each.name)
    note = tag("p", " ".join(said), cls="note") if said else Html()
    return join(head, tag("div", *charts, cls="pair" if len(charts) == 2 else "single"), note)


def scale_of(top: float) -> tuple[Range, str, int]:
    """The axis of all pictures, its unit, and the unit's bytes."""
    scale, unit = next((pair for pair in UNITS if top >= pair[0]), UNITS[-1])
    return spanning([0.0, top / scale * 1.06], from_zero=True), unit, scale


def step_chart(
    what: str, step: Step, names: Sequence[str], y: Range, unit: str, scale: int,
    levels: Sequence[Level] = (), over: Html | None = None,
) -> Html:  # fmt: skip
    """One step from instant to instant, stacked by category. over: what lies over the picture."""
    series = [
        Series(name, category_colour(name), step.at, [value / scale for value in step.held[name]])
        for name in names
        if name in step.held
    ]
    phase = f", in the {step.peak_phase}" if step.peak_phase else ""
    axes = Axes(
        title=f"{what}: {size(step.peak_bytes)}{phase}",
        x=Range(step.at[0], step.at[-1]),
        y=y,
        x_name="allocations in one update",
        y_unit=unit,
        phases=step.phases,
        levels=levels,
        over=over or Html(),
    )
    return area_chart(series, axes)
