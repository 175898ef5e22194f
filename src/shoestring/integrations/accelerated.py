"""Plans in loops written with Accelerate.

    plan = shoestring.integrations.plan_accelerated(
        accelerator, model, batch, budget="6 GiB", optimizer=make_optimizer, grad_clip=1.0
    )
    plan.apply(model)                                   # before or after prepare
    model, optimizer, loader = accelerator.prepare(model, plan.optimizer(model), loader)

`shoestring.plan` with what the accelerator does to a step: it runs the model, and only the model,
in mixed precision, hands its output back in float32, adds up gradients, and fetches a batch ahead.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError
from ..methods import MakeOptimizer, Method
from ..planner import Plan, plan
from ..planner.given import Loss, own_loss
from ..planner.ways import Allow
from .conflicts import refuse_checkpointing, usable
from .looking import undisturbed
from .optimizers import Remade, inner
from .stand_in import BESIDE, loss_of_trainer, with_waiting

_DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def plan_accelerated(
    accelerator: Any,
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    budget: int | str,
    optimizer: Optimizer | MakeOptimizer | None = None,
    allow: Allow = "exact",
    loss: Loss | None = None,
    seconds: bool = True,
    grad_clip: float | None = None,
) -> Plan:
    """The plan for a loop around `accelerator`; `plan.apply(model)` puts it in place.

    model: before or after `accelerator.prepare`.  batch: the largest that will come.
    optimizer: one that exists, prepared or not, or parameters -> optimizer.
    budget, allow, loss, seconds: as for `shoestring.plan`.  grad_clip: as in
    `accelerator.clip_grad_norm_`; None when the loop does not clip.

    ConfigError for what a plan does not go with; OutOfBudget when nothing fits.
    """
    _refuse_conflicts(accelerator)
    refuse_checkpointing(model)
    dtype = _DTYPES[accelerator.mixed_precision]
    compute = loss or own_loss
    if isinstance(optimizer, Optimizer):
        optimizer = Remade(inner(optimizer), [p for p in model.parameters() if p.requires_grad])
    device = accelerator.device
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    ahead = 1 if device.type == "cpu" else 0
    methods = usable(allow, lambda method: _why_not(accelerator, method, grad_clip))
    with undisturbed():
        return plan(
            model, with_waiting(batch, items=None, others=ahead, beside=BESIDE),
            budget=budget, optimizer=optimizer, allow=methods, seconds=seconds,
            loss=loss_of_trainer(
                lambda m, inputs, items: compute(m, inputs), dtype, convert=dtype is not None
            ),
            autocast=dtype, accumulate=accelerator.gradient_accumulation_steps,
            grad_clip=grad_clip,
        )  # fmt: skip


def _why_not(accelerator: Any, method: Method, grad_clip: float | None) -> str | None:
    """Why a loop with this accelerator cannot use a method; None when it can."""
    promises = method.promises
    if promises.applies_to == "batch":
        return "accelerator.backward gets each batch whole; let accelerator.accumulate add up "\
               "smaller ones"  # fmt: skip
    if promises.applies_to == "weights" or promises.changes_weights:
        return "accelerator.prepare moves the weights by itself"
    if promises.frees_gradients:
        if accelerator.mixed_precision == "fp16":
            return "it steps within backward, where gradients are still scaled (fp16); use bf16"
        if accelerator.gradient_accumulation_steps > 1:
            return "it steps within backward, so gradient_accumulation_steps has to be 1"
        if grad_clip is not None:
            return "it steps within backward, before gradients can be clipped"
    return None


def _refuse_conflicts(accelerator: Any) -> None:
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if accelerator.num_processes > 1 or kind != "NO":
        raise ConfigError(
            f"{accelerator.num_processes} processes ({kind}) do not go with a plan: it is for one "
            "that holds the weights whole",
            hint="Launch without accelerate launch, or with --num_processes 1.",
        )
    if accelerator.mixed_precision not in _DTYPES:
        raise ConfigError(
            f"mixed_precision={accelerator.mixed_precision!r} cannot be planned for",
            expected=f"one of {list(_DTYPES)}",
        )
    backend = getattr(accelerator.state, "dynamo_plugin", None)
    backend = getattr(getattr(backend, "backend", None), "value", "NO")
    if str(backend).upper() != "NO":
        raise ConfigError(
            f"dynamo_backend={backend!r} does not go with a plan: a compiled step has another "
            "peak than a planned one",
            hint="Leave dynamo_backend out.",
        )
