"""The plan of a run, made before the model exists, and what an evaluation may take.

In a group of processes the first one's plan is everybody's: what was timed differs between them.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError, OutOfBudget
from ..methods import method
from ..objectives.next_token import Batch
from ..planner import Plan, PlanFor, planner
from ..planner.budget import automatic
from ..planner.division import Division
from ..planner.evaluation import evaluation_profile
from ..planner.ways import allowed
from ..units import format_bytes
from .config import RunConfig
from .distributed import World
from .optimizer import OptimizerFactory
from .step import LossFunction
from .turns import InTurnsPlanner, Objective

Build = Callable[[], nn.Module]


def make_plan(
    config: RunConfig,
    build: Build,
    batch: Batch,
    *,
    loss: LossFunction,
    optimizer: OptimizerFactory,
    world: World,
    division: Division | None = None,
    objective: Objective | None = None,
) -> Plan | None:
    """The plan for a model that `build` makes, or None where run.budget is "none" and all weights
    are trained at once.

    objective: of a run in turns.

    OutOfBudget when nothing fits.
    """
    if config.turns.blocks:
        assert objective is not None
        return InTurnsPlanner(
            config=config, build=build, batch=_with_waiting(batch, config), objective=objective,
            methods=_methods_beside_turns(config, world), optimizer=optimizer,
            with_loss=_as_in_update,
        ).plan()  # fmt: skip
    if config.plan.file:
        chosen = Plan.from_json(read_plan(config.plan.file))
        refuse_other_weights(config.plan.file, chosen)
        return chosen
    if config.run.budget == "none":
        return None
    text = ""
    if world.is_first:
        plans = plans_of_run(
            config, build, batch, loss=loss, optimizer=optimizer, world=world, division=division
        )
        text = plans(budget_of_run(config, world)).to_json()
    return Plan.from_json(world.share(text))


def plans_of_run(
    config: RunConfig,
    build: Build,
    batch: Batch,
    *,
    loss: LossFunction,
    optimizer: OptimizerFactory,
    world: World,
    seconds: bool = True,
    division: Division | None = None,
) -> PlanFor:
    """The plans of a run for any budget, whatever its own and its plan.file are.

    division: from `World.rehearsal`, which has to last as long as plans are asked for.
    """
    # DDP keeps gradients in its buckets from step to step; a second microbatch finds those of the
    # first, which is the same to the planner.
    keeps = world.size > 1 and not world.shards
    return planner(
        build,
        _with_waiting(batch, config),
        optimizer=optimizer,
        allow=_methods(config, world),
        hands_over=() if world.size > 1 else HANDED_OVER,
        loss=_as_in_update(loss),
        seconds=seconds,
        accumulate=max(config.optim.accumulate, 2 if keeps else 1),
        # Whether or not they are clipped, the norm of all gradients is taken.
        grad_clip=config.optim.grad_clip or 1.0,
        division=division,
        background_save=config.checkpoint.background,
    )


_WAITING = "waiting"


def _with_waiting(batch: Batch, config: RunConfig) -> Batch:
    """The batch with the others of its update, which lie in memory while it is learned from. On
    CUDA they wait on the host, where no budget counts them."""
    if next(iter(batch.values())).device.type != "cpu":
        return batch
    others = {
        f"{_WAITING} {i} {name}": tensor.clone()
        for i in range(1, config.optim.accumulate)
        for name, tensor in batch.items()
    }
    return {**batch, **others}


def _as_in_update(loss: LossFunction) -> LossFunction:
    """The loss with what `step.update` does to it, to the last byte: it is weighted, and its
    value is kept to the end of the step."""
    values = []

    def weighted(model: nn.Module, batch: Batch) -> torch.Tensor:
        mean = loss(model, {k: v for k, v in batch.items() if not k.startswith(_WAITING)})
        values.append(mean.detach())
        return mean * 1.0

    return weighted


def rows_that_fit(
    build: Build,
    batch: Batch,
    chosen: Plan | None,
    *,
    loss: LossFunction,
    optimizer: OptimizerFactory,
    limit: int | None,
    division: Division | None = None,
) -> int:
    """How many rows of `batch` an evaluation can score at once within `limit` bytes.

    Weights and optimizer states stay where they are meanwhile. OutOfBudget when not even one.
    """
    rows = len(batch["input_ids"])
    if limit is None:
        return rows
    peak = 0
    while rows:
        part = {name: tensor[:rows] for name, tensor in batch.items()}
        peak = evaluation_bytes(
            build, part, chosen, loss=loss, optimizer=optimizer, division=division
        )
        if peak <= limit:
            return rows
        rows //= 2
    raise OutOfBudget(
        f"scoring one held-out row needs {format_bytes(peak)}",
        expected=f"at most the budget of {format_bytes(limit)}",
        hint="Set run.budget higher or data.sequence_length lower.",
        smallest_bytes=peak,
        instant="evaluation",
    )


def evaluation_bytes(
    build: Build,
    batch: Batch,
    chosen: Plan | None,
    *,
    loss: LossFunction,
    optimizer: OptimizerFactory,
    division: Division | None = None,
) -> int:
    """Predicted peak of scoring `batch`: a forward of a fake twin, the optimizer's states, and a
    copy that is being saved."""
    twins: list[nn.Module] = []

    def apply(model: nn.Module) -> None:
        twins.append(model)
        if chosen is not None:
            chosen.apply(model)
        if division is not None:
            division.divide(model)

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        return optimizer(parameters) if chosen is None else chosen.optimizer(twins[0], optimizer)

    beside = chosen.made_for.beside if chosen is not None and chosen.made_for is not None else 0
    return evaluation_profile(
        build, batch, apply=apply, optimizer=make, loss=loss, beside=beside
    ).peak_bytes


def budget_of_run(config: RunConfig, world: World) -> int | str:
    """run.budget as one process has it: what is free is shared by those of one machine."""
    if config.run.budget != "auto":
        return config.run.budget
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world.device.type == "cpu" else 1
    return "auto" if sharers == 1 else automatic(0, world.device) // sharers


HANDED_OVER = ("optimizer",)
"""What the loop leaves to the plan. The batch is not: optim.accumulate says how it is cut."""


def _methods(config: RunConfig, world: World) -> str | list[str]:
    """What the planner may use: run.allow, narrowed by plan.only and plan.never. In a group of
    processes weights stay where everybody has them."""
    only, never = config.plan.only, config.plan.never
    allowed([*only, *never])  # names nobody knows are an error
    over = HANDED_OVER if world.size == 1 else ()
    # A run saves the model that its config names, and adapters are none of it.
    without = {"adapters"} if world.size == 1 else {"adapters", "weights"}
    names = [
        each.name
        for each in allowed(config.run.allow, hands_over=over)
        if each.promises.applies_to not in without
    ]
    if not only and not never and len(names) == len(allowed(config.run.allow, hands_over=over)):
        return config.run.allow
    for name in only:
        if method(name).promises.applies_to == "adapters":
            raise ConfigError(
                f"plan.only names {name!r}, which trains others than the model's weights: a run "
                "saves the model that its config names",
                expected="methods for the model's own weights",
                hint="Plan with it in a loop of your own.",
            )
        if name not in names:
            raise ConfigError(
                f"plan.only names {name!r}, which run.allow = {config.run.allow!r} forbids",
                expected=f"some of {names}",
            )
    return [name for name in only or names if name not in never]


def _methods_beside_turns(config: RunConfig, world: World) -> list[str]:
    """As `_methods`, of those that go with turns."""
    names = _methods(config, world)
    return [m.name for m in allowed(names)] if isinstance(names, str) else names


def refuse_other_weights(file: str, plan: Plan) -> None:
    """ConfigError for a plan that trains other weights than the model's own: a run saves the model
    that its config names, and what they learned would be lost."""
    for way in plan.patches:
        if way.applies_to == "adapters" or way.promises.for_frozen:
            raise ConfigError(
                f"plan.file = {file!r} has {way.method!r}: a run saves the model that its config "
                "names, and what was learned beside it would be lost",
                expected="a plan without",
                hint="Apply this plan in a loop of your own.",
            )


_ALONE = {
    "weights": "it puts the weights where one process has all of them",
    "optimizer": "the optimizer steps as it is, once gradients are summed over the group",
}
"""By what a method applies to: why a group of processes cannot use it."""


def refuse_in_group(config: RunConfig, world: World) -> None:
    """ConfigError for a method that is asked for and cannot be used by this group of processes."""
    if world.size == 1:
        return
    if config.turns.blocks:
        raise ConfigError(
            f"turns.blocks = {config.turns.blocks} in a group of {world.size} processes",
            expected="a single process",
        )
    asked = [("plan.only", name) for name in config.plan.only]
    if config.plan.file:
        plan = Plan.from_json(read_plan(config.plan.file))
        asked += [(f"plan.file = {config.plan.file!r}", way.method) for way in plan.patches]
    setting = f"a group of {world.size} processes"
    if world.shards:
        setting = f"run.sharding = {config.run.sharding!r} over {world.size} processes"
    for where, name in asked:
        if why := _ALONE.get(method(name).promises.applies_to):
            raise ConfigError(
                f"{where} names {name!r}, which cannot be combined with {setting}: {why}",
                expected="methods of blocks, of the loss and of modules only",
                hint="Leave it out, or train in one process.",
            )


def read_plan(file: str) -> str:
    """The text of plan.file. ConfigError when it cannot be read."""
    path = Path(file)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"plan.file = {str(path)!r} cannot be read: {error}") from None
