"""Advice that costs nothing: habits of the loop, flags, the allocator."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..planner.make import factory_of
from ..units import format_bytes
from .capture import Call
from .case import Case, simulated_advice
from .diagnosis import Advice
from .facts import evaluations, gradients_in_forward, held_outputs
from .facts import leak as leak_of
from .lives import Life
from .measured import peak_with_gradients_let_go, peak_without
from .system import process_advice
from .trial import Trial


def leak(case: Case, lost: Sequence[Life]) -> None:
    found = leak_of(case.watch, lost, int(case.facts["peak_bytes"]))
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


def evaluation(case: Case) -> None:
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


def gradients(case: Case) -> None:
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
    if not case.simulated(simulated_advice(**words), keeps_gradients=False) and case.trial is None:
        case.measured(peak_with_gradients_let_go(case.watch), **words)


def output(case: Case, lost: Sequence[Life]) -> None:
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
    if not case.simulated(simulated_advice(**words), keeps_output=False) and case.trial is None:
        case.measured(peak_without(case.watch, kept, after_forward=True), **words)


def cache(case: Case) -> None:
    config = getattr(case.watch.model, "config", None)
    if not getattr(config, "use_cache", False):
        return

    def without(model: Any) -> None:
        model.config.use_cache = False

    case.simulated(
        simulated_advice(
            name="use_cache", what="no key/value cache in training",
            how="model.config.use_cache = False", cost="none; generate() may still be told "
            "use_cache=True",
        ),
        without,
    )  # fmt: skip


def fused(case: Case) -> None:
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
    advice = simulated_advice(
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


def allocator(case: Case) -> None:
    case.found += process_advice(case.facts, case.peak)
