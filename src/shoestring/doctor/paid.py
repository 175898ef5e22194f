"""Advice that costs time, or changes the numbers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..methods import Method, method
from ..planner.ways import Way, allowed, apply_ways, offer_for
from ..stack import Span
from .case import Case, simulated_advice
from .diagnosis import Advice
from .lives import Life
from .measured import peak_with_blocks_run_again, without_logits
from .trial import Change
from .watch import Watch

STATES_SHARE = 5
"""Smaller states are looked at from a fifth of the peak in states on."""
CLOSE = 1.005
_LOSS_INSTANTS = ("loss", "loss backward")


# ---- what costs time ---------------------------------------------------------------------------


def loss(case: Case) -> None:
    """A loss that never holds all logits."""
    if case.watch.logits is None or not (
        case.instant in _LOSS_INSTANTS or case.facts["parts"]["logits"]
    ):
        return
    for each in allowed("exact"):
        if each.promises.applies_to != "loss":
            continue
        way = Way(each.name)
        advice = simulated_advice(
            name=each.name, what="take the loss in chunks of tokens, so that the logits are "
            "never there all at once",
            how="import shoestring.methods\n" + _apply_line(way),
            cost=f"no product more, some time for the chunks; {_exactness(each)}",
        )  # fmt: skip
        if case.simulated(advice, _putting(way)):
            return
    if case.trial is None:
        case.measured(
            without_logits(case.watch), name="linear_cross_entropy",
            what="take the loss in chunks of tokens, so that the logits are never there all at "
            "once",
            how="from shoestring.ops.chunked_loss import linear_cross_entropy\n"
            "loss = linear_cross_entropy(hidden, head.weight, targets)   # hidden: before the head",
            cost="no product more, some time for the chunks; gradients equal up to the order of "
            "sums",
        )  # fmt: skip


def blocks(case: Case) -> None:
    """Early blocks run again: they are worth more than late ones, and the last one nothing."""
    stack = case.watch.stack
    if stack is None or case.instant == "optimizer step" or len(stack) < 2:
        return
    if any(executor is not None for executor in stack.executors):
        case.notes.append("the blocks are run by a plan or a method already")
        return
    redo = offer_for(stack, allowed("exact")).redo
    if redo is None:
        return
    rows = case.facts["blocks"] or []
    if not any(row["retained_bytes"] for row in rows):
        return
    n = len(stack)

    def peak_of(count: int) -> int | None:
        if case.trial is not None:
            return case.trial.peak(_running_again(redo, count))
        return peak_with_blocks_run_again(case.watch, count)

    base = case.base if case.trial is not None else int(case.facts["peak_bytes"])
    least = peak_of(n - 1)
    if least is None or base is None or not case.is_worth(base - least):
        return
    count = _fewest(peak_of, least, base, n, rows) if case.trial is not None else next(
        k for k in range(1, n) if (peak_of(k) or base) <= least * CLOSE
    )  # fmt: skip
    words = {
        "name": redo.method,
        "what": f"run blocks 0 to {count - 1} of {n} again in backward instead of keeping their "
        "inside (early ones save more, the last one nothing)",
        "how": "from shoestring import Span, Stack\nfrom shoestring.methods import apply_spans\n"
        f"apply_spans(Stack.of(model), [Span(0, {count}, {redo.method!r})])\n"
        "# or, to choose under a budget: shoestring.plan(model, batch, budget=...).apply(model)",
        "cost": f"{count} of {n} blocks run forward once more in every step; "
        f"{_exactness(method(redo.method))}",
    }
    if (
        not case.simulated(simulated_advice(**words), _running_again(redo, count))
        and case.trial is None
    ):
        case.measured(peak_of(count) or base, **words)


def _fewest(
    peak_of: Callable[[int], int | None], least: int, base: int, n: int, rows: Sequence[Any]
) -> int:
    """The fewest early blocks that lead to (almost) the least peak, begun at a guess."""
    each = sorted(row["retained_bytes"] for row in rows)[len(rows) // 2]
    count = min(n - 1, max(1, -(-(base - least) // max(each, 1))))
    for _ in range(4):
        if count == n - 1:
            break
        peak = peak_of(count)
        if peak is not None and peak <= least * CLOSE:
            return count
        count += 1
    return n - 1


def modules(case: Case) -> None:
    """Methods on modules, such as a feed-forward part in slices."""
    if case.instant == "optimizer step":
        return
    for each in allowed("exact"):
        if each.promises.applies_to == "module":
            way = Way(each.name)
            summary = (type(each).__doc__ or each.name).strip().splitlines()[0].rstrip(".")
            case.simulated(
                simulated_advice(
                    name=each.name, what=f"{each.name}: {summary[:1].lower()}{summary[1:]}",
                    how="import shoestring.methods\n" + _apply_line(way),
                    cost=f"some time; {_exactness(each)}",
                ),
                _putting(way),
            )  # fmt: skip


def batch(case: Case) -> None:
    """The batch in two halves."""
    if case.trial is None or case.instant == "optimizer step":
        return
    batch = case.trial.batch or case.trial.call.batch()
    tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()]
    size = tensors[0].shape[0] if tensors else 1
    if size < 2:
        return

    def half(value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.dim() and value.shape[0] == size
        return value[: -(-size // 2)].clone() if fits else value

    times = case.trial.accumulate * 2
    case.simulated(
        simulated_advice(
            name="accumulate", what=f"batch {size} in two passes of {-(-size // 2)}",
            how="for half in halves:\n    (loss_of(half) / 2).backward()\noptimizer.step()",
            cost="less work at once; the gradient is the same where the halves count as many "
            "tokens, up to the order of sums (not with batch norms)",
        ),
        batch=tree_map(half, batch), accumulate=times,
    )  # fmt: skip


# ---- what changes the numbers ------------------------------------------------------------------


def autocast(case: Case) -> None:
    trial = case.trial
    if trial is None or trial.call.autocast is not None or case.instant == "optimizer step":
        return
    if any(p.dtype is not torch.float32 for p in trial.model.parameters()):
        return
    device = case.watch.device
    case.simulated(
        simulated_advice(
            name="autocast", what="compute in bfloat16",
            how=f'with torch.autocast("{device}", torch.bfloat16):\n    loss = ...',
            cost="other roundings: the losses are not those of before",
        ),
        autocast=torch.bfloat16,
    )  # fmt: skip


def states(case: Case) -> None:
    """Smaller optimizer states."""
    states = int(case.facts["parts"]["optimizer"])
    if states * STATES_SHARE < int(case.facts["peak_bytes"]):
        return
    full = sum(life.nbytes for life in _full_states(case.watch))
    if case.is_worth(full // 2):
        case.found.append(
            Advice(
                name="bf16_states", what="optimizer states in bfloat16 instead of float32",
                how="# torch.optim keeps states in the dtype of the weights: take a library whose\n"
                "# optimizer has states of its own dtype (8 bits would save three quarters)",
                cost="rounded states; another optimizer", saving_bytes=full // 2,
                basis="measured",
            )
        )  # fmt: skip


def _full_states(watch: Watch) -> Iterator[Life]:
    for life in watch.lives.at(watch.peak_instant(), watch.device):
        if life.category == "optimizer" and life.dtype == "float32" and life.nbytes > 1024:
            yield life


# ---- methods -----------------------------------------------------------------------------------


def _exactness(how: Method) -> str:
    """What a method promises of the gradients."""
    if how.promises.grade == "bitwise":
        return "gradients are bit-identical"
    return "gradients equal up to the order of sums"


def _putting(way: Way) -> Change:
    return lambda model: apply_ways(model, (way,), ())


def _running_again(way: Way, count: int) -> Change:
    return lambda model: apply_ways(model, (), (Span(0, count, way.method, way.config),))


def _apply_line(way: Way) -> str:
    how = f"how = shoestring.methods.method({way.method!r})"
    return f"{how}\nhow.apply(model, how.configure())"
