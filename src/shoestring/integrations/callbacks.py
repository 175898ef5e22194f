"""Callbacks for Hugging Face's Trainer: one that measures what was promised, and one that plans.

`plan_trainer` puts the first one in. `PlanCallback` is for those who can only pass callbacks; it
sees less of the trainer, so it may do less.
"""

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from ..errors import ConfigError
from ..meter import Meter
from ..methods import Method
from ..planner import Plan, Verification, plan
from ..planner.made_for import Larger
from ..planner.ways import Allow
from .conflicts import autocast_of, refuse_arguments, refuse_checkpointing, usable
from .looking import largest_batch, undisturbed
from .optimizers import Remade, inner
from .stand_in import BESIDE, loss_of_trainer, with_waiting

log = logging.getLogger("shoestring")


class Measuring(TrainerCallback):
    """Runs the first steps under the meter and holds their peak against the plan's promise.

    Each step by itself: what is fetched, saved and evaluated between two steps is no part of it,
    nor is a data set that lies in memory.
    """

    def __init__(self, chosen: Plan, steps: int) -> None:
        self.plan, self.steps = chosen, steps
        self.verification: Verification | None = None
        self._meter: Meter | None = None
        self._highest: Meter | None = None
        self._left = steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A new run is measured anew."""
        self.close()
        self._highest, self._left = None, self.steps

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """One of the first steps goes under the meter."""
        if self._left > 0:
            self._meter = Meter(model, optimizer)
            self._meter.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """It comes out again; the last one says what was found."""
        meter = self.close()
        if meter is None:
            return
        if self._highest is None or meter.peak_bytes > self._highest.peak_bytes:
            self._highest = meter
        self._left -= 1
        if self._left > 0:
            return
        peak = self._highest.peak_bytes
        self.verification = Verification(self.plan.peak_bytes, peak)
        state.log_history.append(
            {
                "step": state.global_step,
                "planned_peak_bytes": self.plan.peak_bytes,
                "measured_peak_bytes": peak,
            }
        )
        self._tell(self._highest)

    def _tell(self, meter: Meter) -> None:
        assert self.verification is not None
        if meter.peak_bytes <= self.plan.peak_bytes:
            log.info("peak of the first steps: %s", self.verification)
            return
        planned = self.plan.by_category
        over = {k: v - planned.get(k, 0) for k, v in meter.by_category.items()}
        more = ", ".join(f"{k} +{v:,} bytes" for k, v in over.items() if v > 0)
        log.warning(
            "the first steps took more than promised: %s (in the %s: %s)",
            self.verification, meter.instant, more,
        )  # fmt: skip

    def close(self) -> Meter | None:
        """Switch the meter off, wherever training ended."""
        meter, self._meter = self._meter, None
        if meter is not None:
            meter.__exit__(None, None, None)
        return meter


class PlanCallback(TrainerCallback):
    """Plans when training begins: `Trainer(..., callbacks=[PlanCallback(budget="6 GiB")])`.

    A callback does not see how the trainer computes its loss, and the optimizer is made already,
    so only methods for blocks and modules are used, and the loss has to be the model's own: for
    all else call `plan_trainer`. The plan is in `callback.plan`, and stays in the model.
    Settings as for `plan_trainer`.
    """

    def __init__(
        self,
        *,
        budget: int | str,
        allow: Allow = "exact",
        batch: Mapping[str, Any] | None = None,
        seconds: bool = True,
        larger: Larger = "warn",
    ) -> None:
        self.budget, self.allow, self.batch = budget, allow, batch
        self.seconds, self.larger = seconds, larger
        self.plan: Plan | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None,
        train_dataloader: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Plan, and put the plan in place."""
        refuse_arguments(args)
        refuse_checkpointing(model)
        if args.label_smoothing_factor:
            raise ConfigError(
                "label smoothing is computed outside of the model, where a callback cannot see it",
                hint="Call shoestring.integrations.plan_trainer(trainer, ...) instead.",
            )
        optimizer = inner(optimizer)
        trained = [p for p in model.parameters() if p.requires_grad]
        with undisturbed():
            batch = self.batch or largest_batch(train_dataloader)
            batch = {k: v.to(args.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            steps = args.gradient_accumulation_steps
            others = steps - 1 + (args.device.type == "cpu")
            chosen = plan(
                model,
                with_waiting(
                    batch, items=None, others=others, beside=BESIDE + 12 * len(trained)
                ),
                budget=self.budget, allow=usable(self.allow, _why_not), seconds=self.seconds,
                optimizer=Remade(optimizer, trained),
                loss=loss_of_trainer(_own_loss, autocast_of(args), convert=False),
                autocast=autocast_of(args), accumulate=steps,
                grad_clip=args.max_grad_norm if args.max_grad_norm > 0 else float("inf"),
            )  # fmt: skip
        chosen.apply(model, larger=self.larger)
        self.plan = chosen
        log.info("%s", chosen)


def _why_not(method: Method) -> str | None:
    if method.promises.applies_to in ("span", "module"):
        return None
    return (
        f"a callback cannot use what applies to the {method.promises.applies_to}; plan_trainer can"
    )


def _own_loss(model: nn.Module, inputs: dict[str, Any], items: Any) -> Tensor:
    output = model(**inputs)
    loss: Tensor = output["loss"] if isinstance(output, dict) else output[0]
    return loss
