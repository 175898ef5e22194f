"""What would lower the peak, cheapest first, and by how much.

Where the step is known (the model, how it was called, its loss), a change is tried: the step is
simulated on fake tensors with it and without it, nothing is allocated, and the difference is what
it saves. Where it is not (a loss outside of the model), the lives of the tensors that a change
would take away are taken out of what was measured. No change is named that saves less than a
hundredth of the peak, and none that has nothing to do here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ShoestringError
from ..planner.given import Loss
from ..units import format_bytes
from . import free, paid
from .capture import Call
from .case import Case
from .facts import accumulated, gradients_in_forward, held_outputs
from .lives import Life
from .trial import Trial
from .watch import Watch

CLOSE_ENOUGH = 1.03
"""What a simulation may be off by before it is said."""
_NORMS = ("_foreach_norm", "linalg_vector_norm")


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
        free.leak(case, lost)
        free.output(case, lost)
        for look in (free.evaluation, free.gradients, free.cache, free.fused, free.allocator,
                     paid.loss, paid.blocks, paid.modules, paid.batch, paid.autocast,
                     paid.states):  # fmt: skip
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
