"""Every budget at once: the plans worth making, simulated, and the usual recipes beside them.

The curve of a model may have hundreds of choices. Those are taken whose loss would cost a reader
most (seconds, over the budgets that they answer), and each is simulated: its peak, by category
and from instant to instant, is the promise that `plan` makes for it, not the chain model's guess.
The answer is plain data, to be written down or drawn.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .chain import keep_all
from .choose import Choice, Planner, choice
from .fake import Profile
from .make import PlanFor
from .peers import recipes, simulated

POINTS = 16
"""Plans that are simulated, at most: each takes as long as a promise."""
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Point:
    """A plan or a recipe, simulated. Bytes; seconds a step, None where nothing was timed.

    factor: its time over that of keeping everything (by counted work where nothing was timed).
    modelled_bytes: what the chain model made of its peak.  history: as `Meter.history`.
    """

    name: str
    peak_bytes: int
    modelled_bytes: int
    by_category: Mapping[str, int]
    instant: str
    seconds: float | None
    factor: float
    spans: Sequence[Mapping[str, Any]]
    patches: Sequence[Mapping[str, Any]]
    note: str = ""
    fidelity: str = "exact"
    history: Mapping[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What fits into every budget.

    plans: peak rising, time falling, each the best of its peak among them.  recipes: by the same
    costs.  choices: how many the curve has, of which `plans` are the ones that matter.  curve:
    all of them as (bytes, factor), by the chain model.  budget_bytes: what was asked for, if
    anything was.
    """

    model: str
    blocks: int
    parameters: int
    trained: int
    batch: Mapping[str, Sequence[int]]
    device: str
    allow: str
    timed: bool
    budget_bytes: int | None
    plans: tuple[Point, ...]
    recipes: tuple[Point, ...]
    choices: int
    curve: tuple[tuple[int, float], ...]

    def data(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {"format": FORMAT, **asdict(self)}


def sweep(plans: PlanFor, budget_bytes: int | None = None, *, points: int = POINTS) -> Sweep:
    """The plans worth making, and the usual recipes beside them, each simulated.

    budget_bytes: a budget whose own plan is to be among them; left out where nothing fits it.
    """
    planner = plans.planner
    unit = _keeping_everything(planner)
    curve = planner.curve
    wanted = [curve[i] for i in thinned([(c.peak_bytes, c.seconds) for c in curve], points)]
    asked = [planner.smallest_bytes, *([] if budget_bytes is None else [budget_bytes])]
    wanted += [chosen for budget in asked if (chosen := planner.choose(budget)) is not None]
    found = {c.key: _point(planner, c, planner.promise(c), unit) for c in wanted}
    base = planner.base
    usual = [
        _point(planner, r.choice, simulated(planner, r), unit, r.name, r.note, r.fidelity)
        for r in recipes(planner)
    ]
    parameters = list(base.model.parameters())
    return Sweep(
        model=type(base.model).__name__, blocks=len(base.stack),
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        batch={k: list(v.shape) for k, v in base.batch.items() if hasattr(v, "shape")},
        device=str(base.device),
        allow=planner.allow if isinstance(planner.allow, str) else ", ".join(planner.allow),
        timed=planner.timed, budget_bytes=budget_bytes, plans=tuple(_best(list(found.values()))),
        recipes=tuple(usual), choices=len(curve),
        curve=tuple((c.peak_bytes, c.seconds / unit) for c in curve),
    )  # fmt: skip


def _keeping_everything(planner: Planner) -> float:
    """Its seconds, or work: what others are held against."""
    variant = planner.costs.variant((), timed=planner.timed)
    return choice(variant, keep_all(variant.chain)).seconds or 1.0


def _point(
    planner: Planner, found: Choice, promise: Profile, unit: float, name: str = "",
    note: str = "", fidelity: str = "exact",
) -> Point:  # fmt: skip
    return Point(
        name=name, note=note, fidelity=fidelity, peak_bytes=promise.peak_bytes,
        modelled_bytes=found.peak_bytes, by_category=dict(promise.by_category),
        instant=promise.instant, seconds=found.seconds if planner.timed else None,
        factor=found.seconds / unit, spans=[asdict(s) for s in found.spans],
        patches=[{"method": w.method, "config": dict(w.config)} for w in found.patches],
        history=promise.history,
    )  # fmt: skip


def _best(found: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both peak and time, by rising peak."""
    kept: list[Point] = []
    for each in sorted(found, key=lambda p: (p.peak_bytes, p.factor)):
        if not kept or each.factor < kept[-1].factor:
            kept.append(each)
    return kept


def thinned(curve: Sequence[tuple[float, float]], count: int) -> list[int]:
    """Which `count` points of a falling staircase to keep: the ends, and those without which a
    reader would lose most, in time lost times the stretch of budgets it is lost on.

    curve: (peak, time), peaks rising and times falling.
    """
    left = list(range(len(curve)))

    def loss(position: int) -> float:
        """Of leaving this one out: its budgets are then answered by the one before."""
        if not 0 < position < len(left) - 1:
            return math.inf
        (_, before), (start, mine), (end, _) = (curve[left[position + d]] for d in (-1, 0, 1))
        return (end - start) * (before - mine)

    while len(left) > max(count, 2):
        left.pop(min(range(len(left)), key=loss))
    return left
