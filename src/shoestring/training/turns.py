"""A run that trains one block of layers at a time: its plan, and its objective update by update.

`[turns]` divides the layers into blocks of neighbours that are trained in turns, the others frozen
(`InTurns`); `[denoise]` lets some updates denoise by the block alone. Which method takes turns
is not chosen by the planner then, and what goes with it is the first of a short list that fits
the budget: everything kept, the loss in chunks, layers run again, weights streamed. Every one is
simulated over a whole round of turns, with each kind of update.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import OutOfBudget, ShoestringError
from ..methods import METHODS, Method
from ..objectives.decoder_denoising import DecoderDenoising, Draw
from ..objectives.next_token import Batch
from ..objectives.scaffolding import layers_of_block, put_scaffolding
from ..ops.noise_levels import LogNormal, partition
from ..planner import Plan, Profile, simulate
from ..planner.budget import budget_bytes
from ..planner.made_for import MadeFor, Watched
from ..planner.plans import Row
from ..planner.ways import Way, apply_ways, optimizer_for
from ..stack import Span, Stack
from ..units import format_bytes
from .blockwise.task import generator_of
from .config import RunConfig
from .optimizer import OptimizerFactory
from .prepare import precision
from .step import LossFunction

Build = Callable[[], nn.Module]
NEXT, DENOISE, BOTH = "next token", "denoise", "both"
"""What an update minimises."""


def prepared(config: RunConfig, model: nn.Module) -> nn.Module:
    """The model as a run in turns trains it, in place. ConfigError where its layers cannot be
    divided so."""
    blocks = config.turns.blocks
    if blocks:
        layers_of_block(Stack.of(model), blocks)
    if config.denoise.mode != "off":
        put_scaffolding(model, blocks, config.denoise.condition_size)
    return model


# ---- the objective -----------------------------------------------------------------------------


class Objective:
    """The loss of every update of a run; draws are a function of seed, update and microbatch."""

    def __init__(self, config: RunConfig, plain: LossFunction, device: torch.device) -> None:
        """plain: the next-token loss."""
        self.config, self.plain, self.device = config, plain, device
        settings = config.denoise
        law = LogNormal(
            mean=settings.sigma_mean, std=settings.sigma_std,
            low=settings.sigma_min, high=settings.sigma_max,
        )  # fmt: skip
        parts = partition(law, config.turns.blocks or 1, overlap=settings.overlap)
        self.denoising = DecoderDenoising(partition=parts)

    def kind(self, step: int) -> str:
        """What update `step` (from 1) minimises."""
        settings = self.config.denoise
        if settings.mode == "mixed":
            return DENOISE if step % settings.every else NEXT
        return {"off": NEXT, "both": BOTH, "pure": DENOISE}[settings.mode]

    @property
    def kinds(self) -> list[str]:
        """What updates there are."""
        return sorted({self.kind(step) for step in range(1, self.config.denoise.every + 1)})

    def facts(self, step: int) -> dict[str, str]:
        """For an update's line of metrics: losses of different kinds are not to be compared."""
        return {"objective": self.kind(step)} if self.config.denoise.mode != "off" else {}

    def at(self, step: int) -> LossFunction:
        """The loss of an update; to be called once for each of its microbatches, in order."""
        parts = itertools.count()
        seed = self.config.run.seed

        def draw(block: int, count: int, length: int, width: int) -> Draw:
            generator = generator_of(seed, block, step, next(parts))
            return self.denoising.draw(block, count, length, width, generator)

        return self._loss(self.kind(step), draw)

    def rehearsed(self, kind: str) -> LossFunction:
        """The loss of such an update on fake tensors: nothing is drawn."""
        return self._loss(kind, lambda block, *sizes: Draw.blank(*sizes))

    def _loss(self, kind: str, draw: Callable[..., Draw]) -> LossFunction:
        if kind == NEXT:
            return self.plain

        def denoise(model: nn.Module, batch: Batch) -> Tensor:
            stack = Stack.of(model)
            block = active_block(stack, self.denoising.partition.blocks)
            rows, length = batch["input_ids"].shape
            width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
            drawn = draw(block, rows, length, width)
            with precision(self.config, self.device):
                given = {**batch, "use_cache": False}
                value = self.denoising.loss(model, given, block, drawn)  # type: ignore[arg-type]
            return value * self.config.denoise.weight

        if kind == DENOISE:
            return denoise
        return lambda model, batch: self.plain(model, batch) + denoise(model, batch)


def active_block(stack: Stack, blocks: int) -> int:
    """The block (1..B) whose weights are trained now, told by which require a gradient."""
    trained = [
        place for place, layer in enumerate(stack.blocks)
        if any(p.requires_grad for p in layer.parameters())
    ]  # fmt: skip
    found = {place // (len(stack) // blocks) + 1 for place in trained}
    assert len(found) == 1, f"blocks {sorted(found)} are trained at once"
    return found.pop()


# ---- the plan ----------------------------------------------------------------------------------


def plan_in_turns(
    config: RunConfig,
    build: Build,
    batch: Batch,
    *,
    methods: Sequence[str],
    objective: Objective,
    optimizer: OptimizerFactory,
    with_loss: Callable[[LossFunction], LossFunction],
) -> Plan:
    """The first of the ways to run it whose simulated peak is within run.budget.

    methods: names of those that may be used.  with_loss: what a step does to its loss.
    OutOfBudget when none fits, ConfigError and StackError for what cannot be trained so.
    """
    limit = None if config.run.budget == "none" else config.run.budget
    most = None if limit is None else budget_bytes(limit, None, objective.device)
    rows: list[Row] = []
    smallest: Plan | None = None
    for patches, redo in _candidates(config, methods):
        try:
            plan = _simulated(config, build, batch, patches, redo, objective, optimizer, with_loss)
        except ShoestringError:
            if not rows:
                raise  # turns themselves cannot be taken
            continue  # this machine or model does not take what was added
        rows.append(Row(plan.rows[0].name, plan.peak_bytes, None, plan.instant))
        if most is None or plan.peak_bytes <= most:
            return replace(plan, budget_bytes=most or plan.peak_bytes, rows=tuple(rows))
        if smallest is None or plan.peak_bytes < smallest.peak_bytes:
            smallest = plan
    assert smallest is not None
    assert most is not None
    raise OutOfBudget(
        f"nothing fits into {format_bytes(most)}: the smallest way to train in turns needs "
        f"{format_bytes(smallest.peak_bytes)}, decided in the {smallest.instant}",
        expected=f"a budget of at least {smallest.peak_bytes} bytes",
        hint="More turns.blocks, a smaller data.batch_size or data.sequence_length need less.",
        smallest_bytes=smallest.peak_bytes, instant=smallest.instant,
    )  # fmt: skip


def _candidates(
    config: RunConfig, methods: Sequence[str]
) -> Iterator[tuple[list[Way], Method | None]]:
    """(patches, what runs layers again or None), each needing less than the one before."""
    turns, known = config.turns, [METHODS[name] for name in methods]

    def first(fits: Callable[[Method], bool]) -> Method | None:
        return next((m for m in known if fits(m)), None)

    takes = next(m for m in METHODS.values() if m.promises.takes_turns)
    patches = [Way(takes.name, {"steps": turns.steps, "order": turns.order,
                                "seed": config.run.seed})]  # fmt: skip
    redo = first(lambda m: m.promises.rebuilds == "input")
    loss = first(lambda m: m.promises.applies_to == "loss")
    weights = first(lambda m: m.promises.applies_to == "weights" and not m.promises.changes_weights)
    yield patches, None
    if loss is not None:
        patches = [*patches, Way(loss.name)]
        yield patches, None
    if redo is not None:
        yield patches, redo
    if weights is not None:
        yield [*patches, Way(weights.name)], redo


def _simulated(
    config: RunConfig,
    build: Build,
    batch: Batch,
    patches: list[Way],
    redo: Method | None,
    objective: Objective,
    optimizer: OptimizerFactory,
    with_loss: Callable[[LossFunction], LossFunction],
) -> Plan:
    """A plan with the peak of the kind of update that needs most."""
    twins: list[nn.Module] = []
    spans: tuple[Span, ...] = ()

    def apply(twin: nn.Module) -> None:
        nonlocal patches, spans
        twins.append(twin)
        depth = len(Stack.of(twin))
        turns = {**patches[0].config, "layers": depth // config.turns.blocks}
        patches = [Way(patches[0].method, turns), *patches[1:]]
        spans = (Span(0, depth, redo.name if redo else "keep"),)
        apply_ways(twin, patches, spans)

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        return optimizer_for(twins[-1], patches, optimizer)(parameters)

    found: list[tuple[Profile, Watched]] = []
    for kind in objective.kinds:
        watched = Watched(with_loss(objective.rehearsed(kind)))
        profile = simulate(
            build, batch, apply=apply, optimizer=make, loss=watched, steps=1, later=True,
            accumulate=config.optim.accumulate, grad_clip=config.optim.grad_clip or 1.0,
        )  # fmt: skip
        found.append((profile, watched))
    profile, watched = max(found, key=lambda each: each[0].peak_bytes)
    twin = twins[-1]
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    name = " + ".join([*(way.method for way in patches), *([redo.name] if redo else [])])
    return Plan(
        budget_bytes=profile.peak_bytes, peak_bytes=profile.peak_bytes,
        by_category=profile.by_category, instant=profile.instant, step_seconds=None, spans=spans,
        patches=tuple(patches), rows=(Row(name, profile.peak_bytes, None, profile.instant),),
        blocks=len(Stack.of(twin)), model=type(twin).__name__, history=profile.history,
        made_for=MadeFor.of(twin, watched.shapes or {}), make=optimizer,
    )  # fmt: skip
