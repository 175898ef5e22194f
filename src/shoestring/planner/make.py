"""`plan` and `plan_config`: a model, a batch and a budget in bytes, a plan out."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError
from ..methods import MakeOptimizer
from .budget import budget_bytes
from .changes import out_of_budget
from .choose import Choice, Planner
from .cost import Step
from .division import Division
from .evaluation import Evaluate, copy_bytes
from .fake import class_of, config_of
from .given import refuse_other_kinds
from .made_for import MadeFor, Watched, in_parts
from .plans import Plan, Row
from .ways import Allow


def plan(
    model: Any,
    batch: Mapping[str, Any],
    *,
    budget: int | str,
    optimizer: Optimizer | MakeOptimizer | None = None,
    allow: Allow = "exact",
    loss: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor] | None = None,
    seconds: bool = True,
    autocast: torch.dtype | None = None,
    accumulate: int = 1,
    grad_clip: float | None = None,
    hands_over: Sequence[str] = (),
    evaluate: Evaluate | None = None,
    background_save: bool = False,
) -> Plan:
    """The fastest way to train `model` on `batch` within `budget` bytes of live tensors.

    model: a module (left untouched), a Hugging Face config or its path, or a callable that
    builds a module.  batch: tensors by name for `model(**batch)`, whose output has `.loss`; or
    give `loss(model, batch)`. Pass the largest batch that will come.
    budget: bytes, "6 GiB", or "auto" (what the device has free, less a margin).
    optimizer: an optimizer, or parameters -> optimizer; fused AdamW when left out.
    allow: "exact", "unbiased" or "structural"; "bitwise" for exact methods that reorder no sums
    (losses then equal those of the unplanned run bit for bit); or a list of method names.
    seconds: False skips all timing; the plan then has no step time.
    autocast, accumulate (forward and backward passes a step), grad_clip: as in the loop.
    hands_over: what the loop leaves to the plan: "optimizer", where it takes the optimizer from
    `plan.optimizer(model)` (it may then step inside backward, or keep its states elsewhere);
    "batch", where it calls `plan.backward(model, batch)` (which may run the batch in parts). With
    neither the loop stays as it is; a method that is named in `allow` counts as asked for.
    evaluate: what runs without gradients between steps, so that the promise covers it: its
    largest batch, scored by `loss` (without one, `model(**batch)`), or a function of the model,
    which makes its tensors itself, such as
    `lambda m: m(input_ids=torch.zeros(8, 512, dtype=torch.long))`.
    background_save: whether checkpoints are written by a thread from a copy of weights and
    optimizer states, which waits beside the steps (on CUDA on the host, where it is not counted).
    A copy is counted as large as without the plan's methods.

    Raises OutOfBudget (nothing fits: the smallest budget that does, the instant that decides,
    three changes that get there), ConfigError, StackError.
    """
    return planner(
        model, batch, optimizer=optimizer, allow=allow, loss=loss, seconds=seconds,
        autocast=autocast, accumulate=accumulate, grad_clip=grad_clip, hands_over=hands_over,
        evaluate=evaluate, background_save=background_save,
    )(budget)  # fmt: skip


def planner(
    model: Any,
    batch: Mapping[str, Any],
    *,
    optimizer: Optimizer | MakeOptimizer | None = None,
    allow: Allow = "exact",
    loss: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor] | None = None,
    seconds: bool = True,
    autocast: torch.dtype | None = None,
    accumulate: int = 1,
    grad_clip: float | None = None,
    hands_over: Sequence[str] = (),
    evaluate: Evaluate | None = None,
    background_save: bool = False,
    division: Division | None = None,
) -> "PlanFor":
    """As `plan`, for several budgets: measures once, then answers `planner(...)(budget)`.

    division: how the weights are divided over a group of processes, of which this is one.
    """
    make = factory_of(optimizer)
    if evaluate is not None and not (isinstance(evaluate, Mapping) or callable(evaluate)):
        raise ConfigError(
            f"evaluate is a {type(evaluate).__name__}",
            expected="a batch (tensors by name), or a function of the model",
        )
    step = Step(
        model=model, batch=batch, optimizer=make, loss=Watched(loss), autocast=autocast,
        accumulate=accumulate, grad_clip=grad_clip, evaluate=evaluate, division=division,
        beside=copy_bytes(model, make) if background_save else 0,
    )  # fmt: skip
    return PlanFor(Planner(step, allow=allow, seconds=seconds, hands_over=hands_over))


class PlanFor:
    """Plans of one model and batch, for any budget."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner

    @property
    def smallest_bytes(self) -> int:
        """The smallest budget that works."""
        return self.planner.smallest_bytes

    def limit_bytes(self, budget: int | str) -> int:
        """A budget in bytes: "auto" is what the device has free for this model."""
        given = self.planner.step.model
        device = self.planner.base.device
        return budget_bytes(budget, given if isinstance(given, nn.Module) else None, device)

    def __call__(self, budget: int | str) -> Plan:
        """The plan for a budget. Raises OutOfBudget."""
        limit = self.limit_bytes(budget)
        choice = self.planner.choose(limit)
        if choice is None:
            raise out_of_budget(self.planner, limit)
        return self._plan(choice, limit)

    def _plan(self, choice: Choice, limit: int) -> Plan:
        chosen = self.planner
        profile = chosen.promise(choice)
        rows = tuple(
            Row(name, c.peak_bytes, c.seconds if chosen.timed else None, instant)
            for name, c, instant in chosen.alternatives()
        )
        return Plan(
            budget_bytes=limit, peak_bytes=profile.peak_bytes, by_category=profile.by_category,
            instant=profile.instant, step_seconds=choice.seconds if chosen.timed else None,
            spans=choice.spans, patches=choice.patches,
            rows=rows, blocks=len(chosen.base.stack), model=type(chosen.base.model).__name__,
            history=profile.history, made_for=self._made_for(choice), make=chosen.step.make,
            loss=chosen.step.loss.loss if isinstance(chosen.step.loss, Watched) else None,
        )  # fmt: skip

    def _made_for(self, choice: Choice) -> MadeFor:
        watched = self.planner.step.loss
        assert isinstance(watched, Watched)
        parts = next((w.config["parts"] for w in choice.patches if w.applies_to == "batch"), 1)
        shapes = in_parts(watched.shapes or {}, parts)
        return MadeFor.of(self.planner.base.model, shapes, beside=self.planner.step.beside)


def factory_of(optimizer: Optimizer | MakeOptimizer | None) -> MakeOptimizer | None:
    """Parameters -> optimizer, from an optimizer that exists (same class and settings) or from
    a function."""
    if optimizer is None or not isinstance(optimizer, Optimizer):
        if optimizer is not None and not callable(optimizer):
            raise ConfigError(
                f"optimizer is a {type(optimizer).__name__}",
                expected="a torch.optim.Optimizer, or a function from parameters to one",
            )
        return optimizer
    kind = type(optimizer)
    known = inspect.signature(kind.__init__).parameters
    settings = {k: v for k, v in optimizer.defaults.items() if k in known}
    return lambda parameters: kind(parameters, **copy.copy(settings))


def plan_config(
    config: Any,
    *,
    batch_size: int,
    sequence_length: int,
    budget: int | str,
    **settings: Any,
) -> Plan:
    """A plan from a Hugging Face config alone (object, config.json or its directory): no weights
    are read, nothing is allocated but one block at a time for timing.

    The batch is token ids with labels and a mask that is not all ones, since a trivial mask
    would be dropped on the way and need less. Weights have the config's dtype, float32 where it
    names none; to plan for another, set `config.dtype`. Other settings as for `plan`.
    """
    return planner_for_config(
        config, batch_size=batch_size, sequence_length=sequence_length, **settings
    )(budget)


def planner_for_config(
    config: Any,
    *,
    batch_size: int,
    sequence_length: int,
    build: Callable[[], nn.Module] | None = None,
    **settings: Any,
) -> PlanFor:
    """As `plan_config`, for several budgets.

    build: makes what is trained in the place of the config's model (such as `adapters.lora`).
    """
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} = {value!r}", expected="a positive integer")
    ids = torch.zeros(batch_size, sequence_length, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": mask}
    config = config_of(config)
    if settings.get("loss") is None:
        refuse_other_kinds(class_of(config))
    return planner(build or config, batch, **settings)
