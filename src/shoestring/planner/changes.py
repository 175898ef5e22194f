"""When nothing fits: what decides, and the cheapest changes that would make it fit.

Every change is simulated, with the smallest plan of the model put in place; only those that
reach the budget are named, cheapest first: what changes training least comes first.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import OutOfBudget, ShoestringError
from ..stack import Span, Stack
from ..units import format_bytes
from .choose import Planner
from .cost import Step
from .in_place import bare
from .ways import FIDELITIES, HANDED_OVER, allowed, apply_ways

WANTED = 3
Attempt = tuple[str, Callable[[], int]]


@dataclass(frozen=True, slots=True)
class Change:
    """Something the user could do, and the smallest peak it leads to."""

    text: str
    peak_bytes: int

    def __str__(self) -> str:
        return f"{self.text} ({format_bytes(self.peak_bytes)})"


def out_of_budget(planner: Planner, budget: int) -> OutOfBudget:
    """The error that says what would do."""
    smallest = planner.smallest_bytes
    instant = planner.promise(planner.smallest).instant
    changes = [str(c) for c in fitting_changes(planner, budget)]
    advice = "; ".join(f"{i}. {c}" for i, c in enumerate(changes, 1))
    return OutOfBudget(
        f"nothing fits into {format_bytes(budget)}: the smallest plan needs "
        f"{format_bytes(smallest)} ({smallest} bytes), decided in the {instant}",
        expected=f"a budget of at least {smallest} bytes",
        hint=f"What would fit: {advice}." if changes
        else "No smaller batch, shorter sequence, lower precision or smaller model tried fits.",
        smallest_bytes=smallest, instant=instant, changes=changes,
    )  # fmt: skip


def fitting_changes(planner: Planner, budget: int) -> list[Change]:
    """The first changes, cheapest first, whose simulated peak is within the budget."""
    found: list[Change] = []
    for family, is_quick in _families(planner):
        if len(found) == WANTED:
            break
        change = (_mildest if is_quick else _first)(list(family), budget)
        if change is not None:
            found.append(change)
    return found


def _first(attempts: list[Attempt], budget: int) -> Change | None:
    """The first of attempts ordered by strength that fits: the stronger take longer to try."""
    for text, attempt in attempts:
        try:
            peak = attempt()
        except (ShoestringError, RuntimeError, ValueError, IndexError):
            continue
        if peak <= budget:
            return Change(text, peak)
    return None


def _mildest(attempts: list[Attempt], budget: int) -> Change | None:
    """The mildest of attempts ordered by strength that fits, None when the strongest does not."""
    try:
        if not attempts:
            return None
        *milder, (strongest, attempt) = attempts
        least = attempt()  # when not even this fits, the milder ones need no look
        for text, attempt in milder if least <= budget else []:
            peak = attempt()
            if peak <= budget:
                return Change(text, peak)
        return Change(strongest, least) if least <= budget else None
    except (ShoestringError, RuntimeError, ValueError, IndexError):
        return None  # this model does not take such a change


def _families(planner: Planner) -> Iterator[tuple[Iterator[Attempt], bool]]:
    """Stronger and stronger changes of one sort, and whether trying one is a simulation only."""
    step = planner.step
    yield _handing_over(planner), False
    yield _allowing(planner), False
    if step.autocast is None:
        lower = replace(step, autocast=torch.bfloat16)
        yield iter([("compute in bfloat16 (autocast)", lambda: _peak(planner, lower))]), True
    yield _shorter(planner, 0, "batch size"), True
    yield _shorter(planner, 1, "sequence length"), True
    yield _fewer_evaluated(planner), True
    stateless = replace(step, optimizer=_sgd)
    yield iter([("an optimizer without states (SGD)", lambda: _peak(planner, stateless))]), True
    yield _fewer_blocks(planner, step, ""), True
    smallest = _cut(step, 0, 1)
    yield _fewer_blocks(planner, smallest, " and batch size 1"), True
    yield _fewer_blocks(planner, replace(smallest, optimizer=_sgd), ", batch size 1 and SGD"), True


def _sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


def _peak(planner: Planner, step: Step) -> int:
    """Peak of another step with the smallest plan of this one."""
    return planner.simulated(planner.smallest, step).peak_bytes


def _handing_over(planner: Planner) -> Iterator[Attempt]:
    """More of the loop left to the plan."""
    over: tuple[str, ...] = planner.hands_over
    for each in HANDED_OVER:
        if each in over or planner.allow not in FIDELITIES:
            continue
        over = (*over, each)

        def attempt(over: tuple[str, ...] = over) -> int:
            other = Planner(planner.step, allow=planner.allow, seconds=False, hands_over=over)
            return other.smallest_bytes

        yield f"leave more to the plan: hands_over={over}", attempt


def _allowing(planner: Planner) -> Iterator[Attempt]:
    """Methods that were not allowed, but for those that train another function: who wants one
    names it."""
    now = {m.name for m in planner.methods}
    for fidelity in FIDELITIES[:-1]:
        more = {m.name for m in allowed(fidelity, hands_over=planner.hands_over)} - now
        if more:

            def attempt(level: str = fidelity) -> int:
                other = Planner(
                    planner.step, allow=level, seconds=False, hands_over=planner.hands_over
                )
                return other.smallest_bytes

            yield f"allow {fidelity!r} methods ({', '.join(sorted(more))})", attempt
            now |= more


def _shorter(planner: Planner, dimension: int, name: str) -> Iterator[Attempt]:
    """The batch halved again and again along a dimension."""
    size = _size(planner.step, dimension)
    shorter = size // 2
    while shorter >= 1:
        step = _cut(planner.step, dimension, shorter)
        yield f"{name} {size} -> {shorter}", lambda step=step: _peak(planner, step)  # type: ignore[misc]
        shorter //= 2


def _fewer_evaluated(planner: Planner) -> Iterator[Attempt]:
    """The batch of the evaluation halved again and again by rows."""
    step = planner.step
    if not isinstance(step.evaluate, Mapping):
        return
    whole = replace(step, batch=step.evaluate)
    size = rows = _size(whole, 0)
    while rows >= 2:
        rows //= 2
        fewer = replace(step, evaluate=_cut(whole, 0, rows).batch)
        yield f"evaluation batch size {size} -> {rows}", lambda fewer=fewer: _peak(planner, fewer)  # type: ignore[misc]


def _size(step: Step, dimension: int) -> int:
    """The batch's length along a dimension: that of the first tensor that has it."""
    sizes: list[int] = []
    tree_map_only(
        Tensor,
        lambda t: sizes.append(t.shape[dimension]) if t.dim() > dimension else None,
        dict(step.batch),
    )
    return sizes[0] if sizes else 0


def _cut(step: Step, dimension: int, length: int) -> Step:
    size = _size(step, dimension)

    def cut(tensor: Tensor) -> Tensor:
        fits = tensor.dim() > dimension and tensor.shape[dimension] == size
        return tensor.narrow(dimension, 0, min(length, size)).clone() if fits else tensor

    return replace(step, batch=tree_map_only(Tensor, cut, dict(step.batch)))


def _fewer_blocks(planner: Planner, step: Step, also: str) -> Iterator[Attempt]:
    """The stack halved again and again, every block spending as little as it can."""
    path, n = planner.base.stack.path, len(planner.base.stack)
    way = planner.offer.redo or planner.offer.kept[0]
    patches = planner.smallest.patches
    count = n // 2
    while count >= 2:

        def attempt(count: int = count) -> int:
            def put(model: nn.Module) -> Any:
                # Runners know the length of the stack, so this is only for plain stacks.
                bare(model)
                container: Any = model.get_submodule(path)
                del container[count:]
                apply_ways(model, patches, (Span(0, len(Stack.of(model)), way.method, way.config),))

            return step.simulate(put, patches).peak_bytes

        yield f"{n} -> {count} blocks{also}", attempt
        count //= 2
