"""Everything a run holds while it lasts: data, plan, model, optimizer, guards and its record.

How it gets into a checkpoint and out of one is in `resuming`, how it ends in `ending`.
"""

import contextlib
import functools
import gc
import shlex
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from ..allocator import is_tuned
from ..checkpoint import Checkpoint, Lock, verify
from ..data.tokenizer import tokenizer_digest
from ..errors import OutOfBudget, TrainingDiverged
from ..objectives.next_token import Batch
from ..planner import Plan
from ..planner.budget import CPU_MARGIN_TUNED, resident_bytes
from ..planner.division import Division
from ..report import memory_json
from ..rss import status_bytes
from ..units import format_bytes
from .checkpoints import (
    Checkpoints,
    check_same,
    identity,
    refuse_existing,
    refuse_lost,
    remove_run,
    same_sizes,
    saved_facts,
    saved_plan,
)
from .config import RunConfig
from .distributed import World
from .evaluate import HeldOut
from .guard import BudgetGuard, FiniteGuard, Measured
from .optimizer import optimizer_factory
from .out_of_memory import can_be_split, gave_up, held_by_category, release, said
from .planning import make_plan, rows_that_fit
from .prepare import Builder, loss_function, prepare_data
from .quality import measure_quality
from .receipt import describe_model, receipt_of
from .record import Progress, Record
from .resuming import restore_job
from .save import save_model
from .step import Updated, on_device
from .turns import Objective, prepared

SKIPS = 10
"""Updates in a row that may be left out when run.nonfinite is "skip"."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Position in the data and states of torch's generators."""

    position: int
    cpu: torch.Tensor
    cuda: torch.Tensor | None


class Job:
    """A run in progress. Made in the order plan, then weights: what cannot fit fails early.

    resume: go on from the newest checkpoint of the directory; where there is none yet, start.
    """

    def __init__(
        self, config: RunConfig, world: World, progress: Progress | None, *, resume: bool = False
    ) -> None:
        self.config, self.world = config, world
        self.record = Record(config, writes=world.is_first, progress=progress)
        self.checkpoints = Checkpoints(self.record.directory, config.checkpoint, self.record.tell)
        self.updates = 0
        self.has_begun = False
        self.split = 1
        self.skipped_in_a_row = 0
        self.seconds_before = 0.0
        self.evaluated: tuple[int, HeldOut] | None = None
        self.has_evaluated = False
        self.planned_anew = False
        self.saved: Checkpoint | None = None
        self.facts: dict[str, Any] = {}
        self.resumes = resume
        self._lock = Lock(self.record.directory) if world.is_first else contextlib.nullcontext()
        self.started = time.monotonic()
        self._began_training = self.started
        self.step_seconds: list[float] = []
        self.quality: dict[str, HeldOut | None] = {"before": None, "after": None}

    def __enter__(self) -> Self:
        self._lock.__enter__()
        if self.world.peers is not None:
            self.world.peers.hint = self._how_to_go_on
        try:
            self._find()
            self._prepare_data()
            self._plan()
            self._begin_writing()
            self._build()
            self._guard()
            if self.saved is not None:
                restore_job(self, self.saved, self.facts)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.checkpoints.wait()
        self.record.close()
        self._lock.__exit__(kind, error, trace)

    def _how_to_go_on(self) -> str | None:
        if not self.has_begun:
            return None
        directory = shlex.quote(str(self.record.directory))
        return (
            f"Start the group again with shoestring resume {directory}: it goes on from the newest "
            "checkpoint, with as many processes or others."
        )

    @property
    def was_resumed(self) -> bool:
        """Whether the run goes on from a checkpoint."""
        return self.saved is not None

    @property
    def seconds(self) -> float:
        """Of training so far, those before a resume included."""
        return self.seconds_before + time.monotonic() - self._began_training

    # ---- before the first step -------------------------------------------------------------

    def _find(self) -> None:
        """What the directory holds. Nothing in it is touched before the run is accepted."""
        if self.resumes:
            self.saved = self.checkpoints.find()
            if self.saved is not None:
                self.facts = saved_facts(self.saved)
            else:
                refuse_lost(self.record.directory)
        elif not self.config.run.replace and self.world.is_first:
            refuse_existing(self.record.directory)
        self.world.barrier()

    def _begin_writing(self) -> None:
        """The run is accepted: what stands in its way goes, and its files begin."""
        self.has_begun = True
        if self.world.is_first:
            store = self.checkpoints.store
            if self.config.run.replace:
                remove_run(self.record.directory)
            if self.saved is not None:
                store.set_aside(newer_than=self.saved.step)
            store.sweep()
        self.record.open(keep_bytes=self.facts.get("metrics_bytes", 0))
        if self.plan is not None:
            self.record.text("plan.json", self.plan.to_json() + "\n")

    def _prepare_data(self) -> None:
        self.data = prepare_data(self.config, self.world)
        self.batches = self.data.batches
        self.record.tell(
            "data",
            source=self.config.data.source,
            tokens=self.data.corpus.num_tokens,
            bytes=self.data.corpus.num_bytes,
            vocabulary=len(self.data.tokenizer),
            rows=len(self.batches.rows),
            rows_cut=self.batches.rows.num_cut if self.data.corpus.is_chat else 0,
        )
        self._builder = Builder(
            self.config.model,
            length=self.config.data.sequence_length,
            tokenizer=self.data.tokenizer,
            device=self.world.device,
            prepare=functools.partial(prepared, self.config),
        )
        # Weights are large: one process reads them.
        weights = self._builder.weights_digest() if self.world.is_first else ""
        self.identity = identity(
            self.config,
            corpus=self.data.corpus.digest,
            tokenizer=tokenizer_digest(self.data.tokenizer),
            shape=self._builder.shape(),
            weights=self.world.share(weights),
        )
        if self.saved is not None:
            check_same(self.identity, self.facts, self.saved)

    def _plan(self) -> None:
        with self.world.rehearsal() as division:
            self._plan_with(division)
        self.record.tell("plan", plan=self.plan, limit_bytes=self.limit_bytes)

    def _plan_with(self, division: Division | None) -> None:
        config, device = self.config, self.world.device
        self.loss = loss_function(config, device)
        self.objective = Objective(config, self.loss, device)
        self._make_optimizer = optimizer_factory(config.optim, device)
        rows = [i % len(self.batches.rows) for i in range(config.data.batch_size)]
        batch = on_device(self.batches.rows.batch(rows), device)
        if self.saved is not None and same_sizes(config, self.saved, self.world.size):
            # The same plan, not as good a one: another could sum in another order.
            self.plan = saved_plan(self.saved)
        else:
            self.planned_anew = self.saved is not None
            self.plan = make_plan(
                config,
                self._builder.sketch,
                batch,
                loss=self.loss,
                optimizer=self._make_optimizer,
                world=self.world,
                division=division,
                objective=self.objective,
            )
        self.limit_bytes = config.run.budget_bytes
        # A run in turns has a plan without a budget, too: a plan for none.
        if self.plan is not None and not (config.turns.blocks and config.run.budget == "none"):
            self.limit_bytes = self.limit_bytes or self.plan.budget_bytes
            self._check_still_fits(self.plan)
        self.data.held_out.batch = rows_that_fit(
            self._builder.sketch,
            batch,
            self.plan,
            loss=self.loss,
            optimizer=self._make_optimizer,
            limit=self.limit_bytes,
            division=division,
        )

    def _check_still_fits(self, plan: Plan) -> None:
        """A checkpoint's plan may meet a smaller budget than it was made for."""
        if self.limit_bytes is not None and plan.peak_bytes > self.limit_bytes:
            raise OutOfBudget(
                f"the plan needs {format_bytes(plan.peak_bytes)}",
                expected=f"at most the budget of {format_bytes(self.limit_bytes)}",
                hint="A run goes on with the plan it was started with: give it that budget, or "
                "start another run.",
                smallest_bytes=plan.peak_bytes,
                instant=plan.instant,
            )

    def _build(self) -> None:
        seed = self.config.run.seed
        torch.manual_seed(seed)

        # Weights that a checkpoint brings need not be read from anywhere else.
        def build() -> nn.Module:
            return self._builder.real(with_weights=self.saved is None, divided=self.world.shards)

        self.model = build() if self.plan is None else self.plan.build(build)
        if self.plan is not None:
            self.plan.apply(self.model)
        self.wrapped = self.world.wrap(self.model)
        if self.plan is None:
            self.optimizer = self._make_optimizer(list(self.model.parameters()))
        else:
            self.optimizer = self.plan.optimizer(self.model, self._make_optimizer)
        self.finite = FiniteGuard(self.model)
        # Equal weights everywhere, but every process drops out on its own.
        torch.manual_seed(seed + 1_000_003 * (self.world.rank + 1))
        self.record.tell("model", **describe_model(self.model))

    def _guard(self) -> None:
        maps_files = self.plan is not None and self.plan.maps_files
        self.budget = BudgetGuard(
            self.world.device,
            limit_bytes=self.limit_bytes if self.config.plan.guard else None,
            promised_bytes=self.plan.peak_bytes if self.plan else None,
            base_bytes=self._process_bytes(),
            slack=CPU_MARGIN_TUNED if is_tuned() and not maps_files else None,
        )

    def _process_bytes(self) -> int | None:
        """What the process holds besides tensors, and what of the data it may yet map."""
        gc.collect()
        try:
            resident = status_bytes("VmRSS")
        except OSError:
            return None
        mapped = int(self.data.corpus.ids.nbytes)
        return resident - resident_bytes(self.model, torch.device("cpu")) + mapped

    def exercise(self) -> None:
        """Evaluate and save once while nothing can be lost; what was saved is removed again."""
        self.record.tell("before")
        self.quality["before"] = measure_quality(self)
        trial = self.record.directory / ".exercise"
        try:
            receipt = receipt_of(self, "not begun", None)
            save_model(self.model, self.data.tokenizer, trial, receipt, world=self.world)
            if self.world.is_first:
                verify(trial)
        finally:
            if self.world.is_first:
                shutil.rmtree(trial, ignore_errors=True)

    # ---- while it runs ---------------------------------------------------------------------

    def begin(self) -> None:
        """The clock of training starts: reading and planning are not training."""
        self._began_training = time.monotonic()

    def mark(self) -> Mark:
        """Where data and generators are before a step, to go back to when nothing came of it."""
        cuda = self.world.device if self.world.device.type == "cuda" else None
        return Mark(
            self.batches.position,
            torch.get_rng_state(),
            torch.cuda.get_rng_state(cuda) if cuda else None,
        )

    def back_to(self, mark: Mark, *, position: bool = True) -> None:
        """As if the step had not been begun; position=False: its microbatches are at hand."""
        if position:
            self.batches.position = mark.position
        torch.set_rng_state(mark.cpu)
        if mark.cuda is not None:
            torch.cuda.set_rng_state(mark.cuda, self.world.device)

    def skip(self, step: int, error: TrainingDiverged) -> TrainingDiverged | None:
        """Leave out an update whose numbers were not finite; gives the error back after `SKIPS`."""
        self.skipped_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.run.nonfinite == "stop" or self.skipped_in_a_row > SKIPS:
            return error
        self.updates = step
        self.record.line("skipped", step=step, message=str(error))
        return None

    def go_back(self, saved: Checkpoint | None, facts: dict[str, Any]) -> None:
        """Model, optimizer and positions as a fresh process would make them: from a checkpoint, or
        from the run's own beginning."""
        # Made anew, and not beside the old ones, for which there may be no memory.
        del self.model, self.wrapped, self.optimizer, self.finite
        release(self.world.device)
        self.saved, self.facts = saved, facts
        if saved is not None and self.world.is_first:
            self.checkpoints.store.set_aside(newer_than=saved.step)
        self.record.cut_back(facts.get("metrics_bytes", 0))
        self.batches.position = self.updates = self.skipped_in_a_row = 0
        self.evaluated, self.has_evaluated, self.step_seconds = None, False, []
        self._build()
        if saved is not None:
            restore_job(self, saved, facts)

    def split_after(self, step: int, error: BaseException, microbatches: Sequence[Batch]) -> None:
        """Memory ran out in a step: cut its microbatches in half, once. OutOfBudget otherwise."""
        self.optimizer.zero_grad(set_to_none=True)
        release(self.world.device)
        held = held_by_category(self.model, self.optimizer)
        was_split, message = self.split > 1, said(error)
        # In a group the others are waiting inside the step, and cannot be told.
        if was_split or self.world.size > 1 or not can_be_split(microbatches, 2):
            raise gave_up(f"step {step}", held, message, was_split=was_split)
        self.split = 2
        self.record.line("out of memory", step=step, message=message, held=held, split=self.split)

    def watch(self, step: int) -> AbstractContextManager[Measured]:
        """Measures one step and holds it against the budget."""
        return self.budget.watch(
            f"step {step}",
            self.model,
            self.optimizer,
            tracked=self.budget.tracks(step),
            also=self.checkpoints.copied_tensors,
        )

    def log(self, step: int, lr: float, updated: Updated, measured: Measured) -> None:
        """One line of metrics for a step that was made."""
        self.updates = step
        self.skipped_in_a_row = 0
        if (history := self.budget.take_history()) is not None:
            predicted = self.plan.history if self.plan else None
            self.record.text("memory.json", memory_json(history, predicted))
        if not self.budget.tracks(step):
            self.step_seconds.append(measured.seconds)
        self.record.line(
            "step",
            step=step,
            loss=updated.loss,
            **self.objective.facts(step),
            lr=lr,
            norm=updated.norm,
            tokens=updated.tokens,
            tokens_per_s=updated.tokens / measured.seconds,
            seconds=measured.seconds,
            peak_bytes=measured.peak_bytes,
            by_category=measured.by_category,
        )
