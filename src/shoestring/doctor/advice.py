"""What would lower the peak, cheapest first, and by how much.

Where the step is known (the model, how it was called, its loss), a change is tried: the step is
simulated on fake tensors with it and without it, nothing is allocated, and the difference is what
it saves. Where it is not (a loss outside of the model), the lives of the tensors that a change
would take away are taken out of what was measured. No change is named that saves less than a
hundredth of the peak, and none that has nothing to do here.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import ShoestringError
from ..planner.given import Loss
from ..planner.make import factory_of
from ..planner.ways import Way, allowed, apply_ways, offer_for
from ..stack import Span
from ..units import format_bytes
from .capture import Call
from .diagnosis import Advice
from .facts import (
    accumulated,
    evaluations,
    gradients_in_forward,
    held_outputs,
    leak,
)
from .lives import Life
from .measured import (
    peak_with_blocks_run_again,
    peak_with_gradients_let_go,
    peak_without,
    without_logits,
)
from .system import process_advice
from .trial import Change, Trial
from .watch import Watch

WORTH = 100
"""A change is named from a hundredth of the peak on."""
STATES_SHARE = 5
"""Smaller states are looked at from a fifth of the peak in states on."""
CLOSE = 1.005
CLOSE_ENOUGH = 1.03
"""What a simulation may be off by before it is said."""
_LOSS_INSTANTS = ("loss", "loss backward")
_NORMS = ("_foreach_norm", "linalg_vector_norm")


@dataclass
class Case:
    """One patient: what was seen, the step that can be simulated, what was prescribed."""

    watch: Watch
    facts: Mapping[str, Any]
    trial: Trial | None
    base: int | None = None
    found: list[Advice] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)
    """What the simulated advice changes in the trial."""
    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """The peak that is to be lowered: of a whole step where it is known."""
        return max(self.base or 0, int(self.facts["peak_bytes"]))

    @property
    def instant(self) -> str:
        return str(self.facts["instant"])

    def after(self, simulated: int) -> int:
        """The peak that a simulated one means here: what the loop holds beyond a step (a leak,
        say) is there all the same."""
        assert self.base is not None
        return self.peak - self.base + simulated

    def is_worth(self, saving: int | None) -> bool:
        return saving is not None and saving > 0 and saving * WORTH >= self.peak

    def simulated(
        self, advice: Callable[[int, int], Advice], change: Change | None = None, **fields: Any
    ) -> bool:
        """Try a change; take the advice when it is worth it."""
        if self.trial is None or self.base is None:
            return False
        changed = self.trial.having(**fields)
        peak = changed.peak(*([change] if change is not None else []))
        if peak is None or not self.is_worth(self.base - peak):
            return False
        self.found.append(advice(self.base - peak, self.after(peak)))
        self.fields |= fields
        if change is not None:
            self.changes.append(change)
        return True

    def measured(self, peak: int, **words: str) -> bool:
        """Take an advice whose saving was measured by taking tensors out."""
        saving = int(self.facts["peak_bytes"]) - peak
        if self.watch.lives.is_cut or not self.is_worth(saving):
            return False
        self.found.append(Advice(**words, saving_bytes=saving, basis="measured", peak_bytes=peak))
        return True


def prescribe(
    watch: Watch,
    facts: Mapping[str, Any],
    lost: Sequence[Life],
    batch: Mapping[str, Any] | None,
    loss: Loss | None,
) -> dict[str, Any]:
    """{"advice", "step_bytes", "together_bytes", "notes"} of a Diagnosis."""
    case = Case(watch, facts, None)
    _prepare(case, batch, loss)
    if facts["peak_bytes"]:
        _leak(case, lost)
        _output(case, lost)
        for look in (_evaluation, _gradients, _cache, _fused, _allocator, _loss, _blocks,
                     _modules, _batch, _autocast, _states):  # fmt: skip
            look(case)
    together = None
    simulated = [each for each in case.found if each.basis == "simulated" and each.peak_bytes]
    if len(simulated) > 1 and case.trial is not None:
        peak = case.trial.having(**case.fields).peak(*case.changes)
        together = case.after(peak) if peak is not None else None
    if watch.lives.is_cut:
        case.notes.append("there were too many tensors to keep all; the peak's are all there")
    return {
        "advice": case.found, "step_bytes": case.base, "together_bytes": together,
        "notes": case.notes,
    }  # fmt: skip


def _prepare(case: Case, batch: Mapping[str, Any] | None, loss: Loss | None) -> None:
    """The step as a trial, and its simulated peak; a note where that cannot be."""
    watch = case.watch
    reason = _not_known(watch, loss)
    if reason is not None:
        case.notes.append(f"not simulated, only measured: {reason}")
        return
    assert watch.model is not None
    call = watch.call if isinstance(watch.call, Call) else Call({}, None)
    trial = Trial(
        model=watch.model, call=call, loss=loss, batch=batch if loss is not None else None,
        optimizer=watch.optimizers[0] if watch.optimizers else None,
        accumulate=accumulated(watch), clips=_clips(watch),
        keeps_gradients=gradients_in_forward(watch) > 0,
        keeps_output=loss is None and bool(held_outputs(watch)),
    )  # fmt: skip
    try:
        case.base = base = trial.run().peak_bytes
        case.trial = trial
        measured = int(case.facts["peak_bytes"])
        if measured > base * CLOSE_ENOUGH:
            case.notes.append(
                f"the step alone peaks at {format_bytes(base)} (simulated); the rest is held by "
                "the loop around it, and is not in what is simulated"
            )
    except Exception as error:  # whatever a model does on fake tensors, the diagnosis stands
        message = error.what if isinstance(error, ShoestringError) else str(error)
        first = (message.strip().splitlines() or [type(error).__name__])[0]
        case.notes.append(f"not simulated, only measured: {first}")
    if len(watch.optimizers) > 1:
        case.notes.append("several optimizers step; only the first is simulated")


def _not_known(watch: Watch, loss: Loss | None) -> str | None:
    if watch.model is None:
        return "no model was called"
    if loss is not None:
        return None
    if isinstance(watch.call, str):
        return watch.call
    if watch.calls_in_pieces:
        return "the parts of the model are called one by one (loss= and batch= would tell how)"
    failed = watch.has_loss is None
    if watch.has_loss is False or (failed and "labels" not in watch.call.arguments):
        return "the loss is not the model's own (loss= and batch= would tell it)"
    return None


def _clips(watch: Watch) -> bool:
    return any(life.operator in _NORMS and not life.module for life in watch.lives)


# ---- what costs nothing ------------------------------------------------------------------------


def _leak(case: Case, lost: Sequence[Life]) -> None:
    found = leak(case.watch, lost, int(case.facts["peak_bytes"]))
    if found is None:
        return
    first = found["tensors"][0]
    where = f"{first['operator']} in {first['module']}" if first["module"] else first["operator"]
    size = format_bytes(found["bytes_per_step"])
    case.found.append(
        Advice(
            name="leak",
            what=f"let go of what every step leaves behind (made by {where}, {first['dtype']} "
            f"{first['shape']}); it grows by {size} a step",
            how="losses.append(loss.item())      # numbers, not tensors, in lists and totals\n"
            "outputs.append(x.detach().cpu())  # if the tensor itself is wanted",
            cost="none", saving_bytes=found["bytes_per_step"], basis="measured",
        )
    )  # fmt: skip


def _evaluation(case: Case) -> None:
    kept = evaluations(case.watch)
    held = sum(life.nbytes for life in kept)
    if not case.is_worth(held):
        return
    case.found.append(
        Advice(
            name="no_grad", what="evaluate without gradients: a forward in evaluation mode keeps "
            "its activations for a backward that never comes",
            how="with torch.no_grad():\n    model(**batch)", cost="none", saving_bytes=held,
            basis="measured", peak_bytes=peak_without(case.watch, kept),
        )
    )  # fmt: skip


def _gradients(case: Case) -> None:
    held = gradients_in_forward(case.watch)
    if not held:
        return
    words = {
        "name": "set_to_none",
        "what": f"free the gradients before the forward ({format_bytes(held)} of the step before "
        "are there all through it)",
        "how": "optimizer.zero_grad(set_to_none=True)   # right after optimizer.step()",
        "cost": "none",
    }
    if not case.simulated(_advice(**words), keeps_gradients=False) and case.trial is None:
        case.measured(peak_with_gradients_let_go(case.watch), **words)


def _output(case: Case, lost: Sequence[Life]) -> None:
    kept = held_outputs(case.watch)
    if not kept or set(kept) & set(lost):
        return  # a leak is told as one
    held = format_bytes(sum(life.nbytes for life in kept))
    words = {
        "name": "output",
        "what": f"let go of the model's output before the backward ({held} stay alive through it "
        "because a variable holds them)",
        "how": "del output   # as soon as the loss is made; or: loss = model(**batch).loss",
        "cost": "none",
    }
    if not case.simulated(_advice(**words), keeps_output=False) and case.trial is None:
        case.measured(peak_without(case.watch, kept, after_forward=True), **words)


def _cache(case: Case) -> None:
    config = getattr(case.watch.model, "config", None)
    if not getattr(config, "use_cache", False):
        return

    def without(model: Any) -> None:
        model.config.use_cache = False

    case.simulated(
        _advice(
            name="use_cache", what="no key/value cache in training",
            how="model.config.use_cache = False", cost="none; generate() may still be told "
            "use_cache=True",
        ),
        without,
    )  # fmt: skip


def _fused(case: Case) -> None:
    optimizer = case.watch.optimizers[0] if case.watch.optimizers else None
    if optimizer is None or case.instant != "optimizer step" or case.watch.model is None:
        return
    defaults = optimizer.defaults
    if "fused" not in defaults or defaults["fused"]:
        return
    now = factory_of(optimizer)
    assert now is not None
    kind, settings = type(optimizer), {**defaults, "fused": True, "foreach": None}
    known = {k: v for k, v in settings.items() if k in _arguments(kind)}

    def fused(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return kind(parameters, **known)

    how = f"torch.optim.{kind.__name__}(model.parameters(), ..., fused=True)"
    advice = _advice(
        name="fused", what="update the weights in one kernel, without temporaries of their size",
        how=how, cost="none; the last bit of an update may differ",
    )  # fmt: skip
    if case.trial is not None:
        case.simulated(advice, factory=fused)
        return
    # The loss is not known, and does not matter: any one gives the same gradients' bytes.
    alone = Trial(
        model=case.watch.model, call=Call({}, None), optimizer=optimizer, batch={},
        loss=_any_loss,
    )  # fmt: skip
    before, after = alone.peak(), alone.having(factory=fused).peak()
    if before is None or after is None:
        return
    peak = int(case.facts["peak_bytes"])
    second = next((row["peak_bytes"] for row in case.facts["phases"][1:]), 0)
    saving = min(before - after, peak - second)
    if case.is_worth(saving):
        case.found.append(replace(advice(saving, peak - saving), basis="simulated"))


def _any_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return torch.stack([p.sum() for p in model.parameters() if p.requires_grad]).sum()


def _arguments(kind: type) -> list[str]:
    return list(inspect.signature(kind.__init__).parameters)  # type: ignore[misc]


def _allocator(case: Case) -> None:
    case.found += process_advice(case.facts, case.peak)


# ---- what costs time ---------------------------------------------------------------------------


def _loss(case: Case) -> None:
    """A loss that never holds all logits."""
    if case.watch.logits is None or not (
        case.instant in _LOSS_INSTANTS or case.facts["parts"]["logits"]
    ):
        return
    for method in allowed("exact"):
        if method.promises.applies_to != "loss":
            continue
        way = Way(method.name)
        advice = _advice(
            name=method.name, what="take the loss in chunks of tokens, so that the logits are "
            "never there all at once",
            how="import shoestring.methods\n" + _apply_line(way),
            cost="no product more, some time for the chunks; gradients equal up to the order of "
            "sums",
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


def _blocks(case: Case) -> None:
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
        "cost": f"{count} of {n} blocks run forward once more in every step; gradients are "
        "bit-identical",
    }
    if not case.simulated(_advice(**words), _running_again(redo, count)) and case.trial is None:
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


def _modules(case: Case) -> None:
    """Methods on modules, such as a feed-forward part in slices."""
    if case.instant == "optimizer step":
        return
    for method in allowed("exact"):
        if method.promises.applies_to == "module":
            way = Way(method.name)
            summary = (type(method).__doc__ or method.name).strip().splitlines()[0].rstrip(".")
            case.simulated(
                _advice(
                    name=method.name, what=f"{method.name}: {summary[:1].lower()}{summary[1:]}",
                    how="import shoestring.methods\n" + _apply_line(way),
                    cost="some time; gradients equal up to the order of sums",
                ),
                _putting(way),
            )  # fmt: skip


def _batch(case: Case) -> None:
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
        _advice(
            name="accumulate", what=f"batch {size} in two passes of {-(-size // 2)}",
            how="for half in halves:\n    (loss_of(half) / 2).backward()\noptimizer.step()",
            cost="less work at once; the gradient is the same where the halves count as many "
            "tokens, up to the order of sums (not with batch norms)",
        ),
        batch=tree_map(half, batch), accumulate=times,
    )  # fmt: skip


# ---- what changes the numbers ------------------------------------------------------------------


def _autocast(case: Case) -> None:
    trial = case.trial
    if trial is None or trial.call.autocast is not None or case.instant == "optimizer step":
        return
    if any(p.dtype is not torch.float32 for p in trial.model.parameters()):
        return
    device = case.watch.device
    case.simulated(
        _advice(
            name="autocast", what="compute in bfloat16",
            how=f'with torch.autocast("{device}", torch.bfloat16):\n    loss = ...',
            cost="other roundings: the losses are not those of before",
        ),
        autocast=torch.bfloat16,
    )  # fmt: skip


def _states(case: Case) -> None:
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


# ---- words -------------------------------------------------------------------------------------


def _advice(*, name: str, what: str, how: str, cost: str) -> Callable[[int, int], Advice]:
    """An advice that waits for its numbers: the saving, and the peak it leads to."""

    def advice(saving: int, peak: int) -> Advice:
        return Advice(
            name=name, what=what, how=how, cost=cost, saving_bytes=saving, basis="simulated",
            peak_bytes=peak,
        )  # fmt: skip

    return advice


def _putting(way: Way) -> Change:
    return lambda model: apply_ways(model, (way,), ())


def _running_again(way: Way, count: int) -> Change:
    return lambda model: apply_ways(model, (), (Span(0, count, way.method, way.config),))


def _apply_line(way: Way) -> str:
    how = f"how = shoestring.methods.method({way.method!r})"
    return f"{how}\nhow.apply(model, how.configure())"
