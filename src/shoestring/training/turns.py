"""A run that trains one block of layers at a time: its plan, and its objective update by update.

`[turns]` divides the layers into blocks of neighbours that are trained in turns, the others frozen
(`InTurns`); `[denoise]` lets some updates denoise by the block alone. Which method takes turns
is not chosen by the planner then, and what goes with it is the first of a short list that fits
the budget: everything kept, the loss in chunks, layers run again, weights streamed. Every one is
simulated over a whole round of turns, with each kind of update.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import OutOfBudget, ShoestringError
from ..methods import METHODS
from ..objectives.decoder_denoising import DecoderDenoising, Draw
from ..objectives.next_token import Batch
from ..objectives.scaffolding import layers_of_block, put_scaffolding
from ..ops.noise_levels import LogNormal, partition
from ..planner import Plan, Profile, simulate
from ..planner.budget import budget_bytes
from ..planner.fake import fake_model
from ..planner.made_for import MadeFor, Watched
from ..planner.plans import Row
from ..planner.quick import QuickFakeMode
from ..planner.ways import Way, apply_ways, optimizer_for
from ..stack import Span, Stack
from ..units import format_bytes
from .config import RunConfig
from .draws import generator_of
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


@dataclass(frozen=True, kw_only=True, slots=True)
class InTurnsPlanner:
    """Plans a run in turns. build: makes its model.  methods: names of those that may be used.
    with_loss: what a step does to its loss."""

    config: RunConfig
    build: Build
    batch: Batch
    methods: Sequence[str]
    objective: Objective
    optimizer: OptimizerFactory
    with_loss: Callable[[LossFunction], LossFunction]

    def plan(self) -> Plan:
        """The first of the ways to run it whose simulated peak is within run.budget.

        OutOfBudget when none is, ConfigError and StackError for what cannot be trained so.
        """
        limit = self.config.run.budget
        most = None if limit == "none" else budget_bytes(limit, None, self.objective.device)
        weights = 0 if most is None else self.weights_bytes()
        possible: list[tuple[Way, ...]] = []
        rows: list[Row] = []
        for ways in self.candidates():
            moves = any(way.applies_to == "weights" for way in ways)
            if most is not None and weights > most and not moves:
                possible.append(ways)  # no need to look at the rest of what it takes
                continue
            try:
                plan = self.simulated(ways, most)
            except ShoestringError:
                if not possible:
                    raise  # turns themselves cannot be taken
                continue  # this machine or model does not take what was added
            possible.append(ways)
            rows += plan.rows
            if most is None or plan.peak_bytes <= most:
                return replace(plan, budget_bytes=most or plan.peak_bytes, rows=tuple(rows))
        assert most is not None
        smallest = self.simulated(possible[-1], None)
        raise OutOfBudget(
            f"nothing fits into {format_bytes(most)}: the smallest way to train in turns needs "
            f"{format_bytes(smallest.peak_bytes)}, decided in the {smallest.instant}",
            expected=f"a budget of at least {smallest.peak_bytes} bytes",
            hint="More turns.blocks, a smaller data.batch_size or data.sequence_length need less.",
            smallest_bytes=smallest.peak_bytes, instant=smallest.instant,
        )  # fmt: skip

    def weights_bytes(self) -> int:
        """Of the whole model."""
        return sum(each.nbytes for each in fake_model(self.build, QuickFakeMode()).parameters())

    def candidates(self) -> Iterator[tuple[Way, ...]]:
        """Each needs less than the one before, and more time. Patches, turns first, then how
        layers are run, if not as they are."""
        turns, known = self.config.turns, [METHODS[name] for name in self.methods]
        takes = next(m for m in METHODS.values() if m.promises.takes_turns)
        settings = {"steps": turns.steps, "order": turns.order, "seed": self.config.run.seed}
        ways: tuple[Way, ...] = (Way(takes.name, settings),)
        yield ways
        for fits in (
            lambda m: m.promises.applies_to == "loss",
            lambda m: m.promises.rebuilds == "input",
            lambda m: m.promises.applies_to == "weights" and not m.promises.changes_weights,
        ):
            if (found := next((m for m in known if fits(m)), None)) is not None:
                ways = (*ways, Way(found.name))
                yield ways

    def simulated(self, ways: Sequence[Way], most: int | None) -> Plan:
        """A plan with the peak of the kind of update that needs most, over a round of turns. Of
        the first that needs more than `most` where one does."""
        placed: list[_Placed] = []

        def apply(twin: nn.Module) -> None:
            placed.append(_Placed.of(twin, ways, self.config.turns.blocks))
            apply_ways(twin, placed[-1].patches, placed[-1].spans)

        def make(parameters: list[nn.Parameter]) -> Optimizer:
            return optimizer_for(placed[-1].twin, placed[-1].patches, self.optimizer)(parameters)

        found: list[tuple[Profile, Watched]] = []
        optim = self.config.optim
        for kind in self.objective.kinds:
            watched = Watched(self.with_loss(self.objective.rehearsed(kind)))
            profile = simulate(
                self.build, self.batch, apply=apply, optimizer=make, loss=watched, steps=1,
                later=True, accumulate=optim.accumulate, grad_clip=optim.grad_clip or 1.0,
            )  # fmt: skip
            found.append((profile, watched))
            if most is not None and profile.peak_bytes > most:
                break
        profile, watched = max(found, key=lambda each: each[0].peak_bytes)
        row = Row(" + ".join(way.method for way in ways), profile.peak_bytes, None, profile.instant)
        twin, patches, spans = placed[-1].twin, placed[-1].patches, placed[-1].spans
        for parameter in twin.parameters():
            parameter.requires_grad_(True)
        return Plan(
            budget_bytes=profile.peak_bytes, peak_bytes=profile.peak_bytes,
            by_category=profile.by_category, instant=profile.instant, step_seconds=None,
            spans=spans, patches=patches, rows=(row,), blocks=len(Stack.of(twin)),
            model=type(twin).__name__, history=profile.history,
            made_for=MadeFor.of(twin, watched.shapes or {}), make=self.optimizer,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Placed:
    """A fake twin, and what is put into it."""

    twin: nn.Module
    patches: tuple[Way, ...]
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, twin: nn.Module, ways: Sequence[Way], blocks: int) -> "_Placed":
        """The ways, with as many layers a turn as this stack's blocks have."""
        depth = len(Stack.of(twin))
        turns, *others = ways
        span = next((w.method for w in others if w.applies_to == "span"), "keep")
        turns = Way(turns.method, {**turns.config, "layers": depth // blocks})
        patches = (turns, *(way for way in others if way.applies_to != "span"))
        return cls(twin, patches, (Span(0, depth, span),))
