"""Everything a run holds while it lasts: data, plan, model, optimizer, guards and its record."""

import gc
import shutil
import statistics
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from ..allocator import is_tuned
from ..checkpoint import verify
from ..data.tokenizer import tokenizer_digest
from ..errors import OutOfBudget, ShoestringError
from ..planner.budget import CPU_MARGIN_TUNED, resident_bytes
from ..rss import status_bytes
from .config import RunConfig
from .distributed import World
from .evaluate import HeldOut, continuation
from .guard import BudgetGuard, FiniteGuard, Measured
from .optimizer import optimizer_factory
from .planning import make_plan, rows_that_fit
from .prepare import Builder, loss_function, precision, prepare_data
from .receipt import describe_model, environment, error_of
from .record import Progress, Record
from .save import model_card, save_model
from .step import Updated, on_device


@dataclass(frozen=True, slots=True)
class Run:
    """A run that ended. receipt: also in receipt.json; receipt["status"] says how it ended."""

    directory: Path
    model: nn.Module
    tokenizer: Any
    receipt: dict[str, Any]


class Job:
    """A run in progress. Made in the order plan, then weights: what cannot fit fails early."""

    def __init__(self, config: RunConfig, world: World, progress: Progress | None) -> None:
        self.config, self.world = config, world
        self.record = Record(config, writes=world.is_first, progress=progress)
        self.updates = 0
        self.was_interrupted = False
        self._started = time.monotonic()
        self._step_seconds: list[float] = []
        self._evaluated: tuple[int, HeldOut] | None = None
        self._quality: dict[str, HeldOut | None] = {"before": None, "after": None}

    def __enter__(self) -> Self:
        try:
            self._prepare_data()
            self._plan()
            self._build()
        except BaseException:
            self.record.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.record.close()

    # ---- before the first step -------------------------------------------------------------

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

    def _plan(self) -> None:
        config, device = self.config, self.world.device
        self.loss = loss_function(config, device)
        self._builder = Builder(
            config.model,
            length=config.data.sequence_length,
            tokenizer=self.data.tokenizer,
            device=device,
        )
        self._make_optimizer = optimizer_factory(config.optim, device)
        rows = [i % len(self.batches.rows) for i in range(config.data.batch_size)]
        batch = on_device(self.batches.rows.batch(rows), device)
        self.plan = make_plan(
            config,
            self._builder.sketch,
            batch,
            loss=self.loss,
            optimizer=self._make_optimizer,
            world=self.world,
        )
        self.limit_bytes = config.run.budget_bytes
        if self.plan is not None:
            self.limit_bytes = self.limit_bytes or self.plan.budget_bytes
            self.record.text("plan.json", self.plan.to_json() + "\n")
        self.data.held_out.batch = rows_that_fit(
            self._builder.sketch, batch, self.plan, loss=self.loss, limit=self.limit_bytes
        )
        self.record.tell("plan", plan=self.plan, limit_bytes=self.limit_bytes)

    def _build(self) -> None:
        seed = self.config.run.seed
        torch.manual_seed(seed)
        self.model = self._builder.real()
        if self.plan is not None:
            self.plan.apply(self.model)
        self.optimizer = self._make_optimizer(self.model.parameters())
        self.finite = FiniteGuard(self.model)
        self.wrapped = self.world.wrap(self.model)
        # Equal weights everywhere, but every process drops out on its own.
        torch.manual_seed(seed + 1_000_003 * (self.world.rank + 1))
        self.record.tell("model", **describe_model(self.model))
        self._budget = BudgetGuard(
            self.world.device,
            limit_bytes=self.limit_bytes if self.config.plan.guard else None,
            promised_bytes=self.plan.peak_bytes if self.plan else None,
            base_bytes=self._process_bytes(),
            slack=CPU_MARGIN_TUNED if is_tuned() else None,
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
        self._quality["before"] = self.evaluate()
        if self.world.is_first:
            trial = self.record.directory / ".exercise"
            try:
                save_model(self.model, self.data.tokenizer, trial, card="")
                verify(trial)
            finally:
                shutil.rmtree(trial, ignore_errors=True)

    # ---- while it runs ---------------------------------------------------------------------

    def watch(self, step: int) -> AbstractContextManager[Measured]:
        """Measures one step and holds it against the budget."""
        return self._budget.watch(
            f"step {step}", self.model, self.optimizer, tracked=self._budget.tracks(step)
        )

    def log(self, step: int, lr: float, updated: Updated, measured: Measured) -> None:
        """One line of metrics for a step that was made."""
        self.updates = step
        if not self._budget.tracks(step):
            self._step_seconds.append(measured.seconds)
        self.record.line(
            "step",
            step=step,
            loss=updated.loss,
            lr=lr,
            norm=updated.norm,
            tokens=updated.tokens,
            tokens_per_s=updated.tokens / measured.seconds,
            seconds=measured.seconds,
            peak_bytes=measured.peak_bytes,
            by_category=measured.by_category,
        )

    def evaluate(self) -> HeldOut:
        """Held-out loss, and a sample when the config wants one; inside the budget."""
        where = f"evaluation after step {self.updates}"
        with self._budget.watch(
            where, self.model, self.optimizer, tracked=self.updates == 0
        ) as measured:
            with precision(self.config, self.world.device):
                result = self.data.held_out.score(self.model)
            sample = self._sample() if self.world.is_first else None
        self.record.line(
            "evaluation", step=self.updates, **result.to_json(), seconds=measured.seconds
        )
        if sample is not None:
            self.record.tell("sample", step=self.updates, **sample)
        self._evaluated = (self.updates, result)
        return result

    def _sample(self) -> dict[str, str] | None:
        count = self.config.evaluate.sample_tokens
        if not count:
            return None
        tokenizer = self.data.tokenizer
        prompt = self.data.prompt.to(self.world.device)
        new = continuation(
            self.model,
            prompt,
            num_tokens=count,
            seed=self.config.run.seed,
            end=tokenizer.eos_token_id,
        )
        return {"prompt": tokenizer.decode(prompt[0]), "text": tokenizer.decode(new[0])}

    # ---- the end ---------------------------------------------------------------------------

    def finish(self, status: str) -> Run:
        """Evaluate (unless interrupted), save the model, write the receipt."""
        if status == "finished":
            step, result = self._evaluated or (-1, None)
            self._quality["after"] = result if step == self.updates else self.evaluate()
        receipt = self._save(status)
        return Run(self.record.directory, self.model, self.data.tokenizer, receipt)

    def stop(self, error: ShoestringError) -> None:
        """Save what the updates before an error have made, with the error in the receipt."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.updates:
            self._save("over budget" if isinstance(error, OutOfBudget) else "diverged", str(error))

    def _save(self, status: str, error: str | None = None) -> dict[str, Any]:
        if self.plan is not None:
            self.plan.restore(self.model)
        receipt = self._receipt(status, error)
        if self.world.is_first:
            directory = self.record.directory / "model"
            save_model(self.model, self.data.tokenizer, directory, card=model_card(receipt))
            self.record.file("receipt.json", receipt)
            self.record.tell("saved", directory=str(directory))
        self.world.barrier()
        return receipt

    def _receipt(self, status: str, error: str | None) -> dict[str, Any]:
        promised = self.plan.peak_bytes if self.plan else None
        promised_s = self.plan.step_seconds if self.plan else None
        measured = self._budget.peak_bytes
        measured_s = statistics.median(self._step_seconds) if self._step_seconds else None
        return {
            "status": status,
            "error": error,
            "steps": self.updates,
            "seed": self.config.run.seed,
            "processes": self.world.size,
            "model": describe_model(self.model),
            "data": {
                "source": self.config.data.source,
                "digest": self.data.corpus.digest,
                "tokenizer": tokenizer_digest(self.data.tokenizer),
                "tokens": self.data.corpus.num_tokens,
                "epochs": self.batches.epoch,
            },
            "memory": {
                "budget_bytes": self.limit_bytes,
                "promised_bytes": promised,
                "measured_bytes": measured,
                "error": error_of(promised, measured),
                "promised_by_category": dict(self.plan.by_category) if self.plan else None,
                "measured_by_category": self._budget.by_category,
                "rss_growth_bytes": self._budget.rss_peak_bytes,
            },
            "seconds": {
                "promised_step": promised_s,
                "measured_step": measured_s,
                "error": error_of(promised_s, measured_s),
                "total": time.monotonic() - self._started,
            },
            "methods": self.plan.methods if self.plan else [],
            "quality": {
                when: result.to_json() if result else None for when, result in self._quality.items()
            },
            **environment(self.world.device),
        }
