"""One configuration: planned before anything of it exists, then built, planned into and trained."""

import time
from typing import Any

import torch
from configurations import ALLOWED, Configuration
from torch import Tensor, nn

from shoestring.meter import Meter, allocator_peak
from shoestring.planner import Plan, planner
from shoestring.planner.given import own_loss
from shoestring.planner.make import PlanFor

STEPS = 2


def examine(configuration: Configuration, *, seed: int, profiled: bool) -> list[dict[str, Any]]:
    """A row for every budget. Nothing is run to plan: no seconds are taken either."""
    allow, over = ALLOWED[configuration.allow]
    torch.manual_seed(seed)
    batch = configuration.batch()
    started = time.perf_counter()
    plans = planner(
        configuration.build, batch, optimizer=configuration.make, allow=allow, seconds=False,
        hands_over=over, **configuration.settings,
    )  # fmt: skip
    chosen = {name: plans(budget) for name, budget in budgets(plans).items()}
    seconds = time.perf_counter() - started
    rows = []
    for name, plan in chosen.items():
        torch.manual_seed(seed)
        meter, allocated = measure(configuration, plan, batch, profiled=profiled)
        predicted, measured = plan.peak_bytes, meter.peak_bytes
        rows.append({
            "configuration": configuration.name, "family": configuration.family,
            "allow": configuration.allow, "budget": name, "budget_bytes": plan.budget_bytes,
            "predicted_bytes": predicted, "measured_bytes": measured,
            "error_percent": round(100 * (predicted - measured) / measured, 4),
            "within_budget": measured <= plan.budget_bytes,
            "predicted_instant": plan.instant, "measured_instant": meter.instant,
            "off_by_category": off(plan, meter), "allocator_bytes": allocated,
            "methods": used(plan), "prediction_seconds": round(seconds / len(chosen), 2),
        })  # fmt: skip
    return rows


def budgets(plans: PlanFor) -> dict[str, int]:
    """The smallest, and half way from there to the largest plan; one where they are the same."""
    low, curve = plans.smallest_bytes, plans.planner.curve
    high = plans.planner.promise(curve[-1]).peak_bytes
    return {"smallest": low, **({"middle": (low + high) // 2} if high > low else {})}


def measure(
    configuration: Configuration, plan: Plan, batch: dict[str, Tensor], *, profiled: bool
) -> tuple[Meter, int | None]:
    """The real steps under the meter; and a further one under the profiler, plus what existed."""
    model = plan.build(configuration.build)
    model.train()
    plan.apply(model, larger="error")
    optimizer = plan.optimizer(model)
    parts = configuration.settings.get("accumulate", 1)
    clip = configuration.settings.get("grad_clip")

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with configuration.computing():  # the forward alone, as torch advises
            value = own_loss(model, batch)
        return value / parts if parts > 1 else value

    def step() -> None:
        for _ in range(parts):
            plan.backward(model, batch, loss=loss)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with Meter(model, optimizer) as meter:
        meter.tracker.assign("other", batch.values())
        for _ in range(STEPS):
            step()
    allocated = meter.end_bytes + allocator_peak(step) if profiled else None
    plan.restore(model)
    return meter, allocated


def off(plan: Plan, meter: Meter) -> dict[str, int]:
    """Predicted less measured at the peak, by category."""
    found = {k: v - meter.by_category.get(k, 0) for k, v in plan.by_category.items()}
    return {k: v for k, v in found.items() if v}


def used(plan: Plan) -> list[str]:
    """Names of the methods, each once."""
    return list(dict.fromkeys(each["method"] for each in plan.methods))
