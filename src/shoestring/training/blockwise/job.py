"""One block: made without the others, trained, saved, and gone on with bit for bit.

A block's folder, `DIRECTORY/block-N`, holds config.toml, metrics.jsonl, checkpoints/ (weights,
optimizer states and what merge compares), table/ where there is one, and receipt.json. Nothing in
it is of any other block, so that it can be made on another machine and copied.

Starting a job that was started before goes on from its newest good checkpoint; one that has made
all its updates is left as it is.
"""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from ...checkpoint import Checkpoint, Lock, Store, atomic_directory, write_text
from ...checkpoint.tensors import write_tensors
from ...errors import CheckpointError, ConfigError, TrainingDiverged
from ...meter import Meter
from ...methods import apply_spans
from ...stack import Span, Stack
from ..distributed import World, pick_device
from ..interruption import Interruption
from ..optimizer import clip_, gradient_norm, optimizer_factory, set_learning_rate
from ..receipt import environment
from ..schedule import learning_rate
from ..snapshot import MODEL, STATE, Snapshot, restore
from .config import BlockwiseConfig
from .handed import file_digest, stands_on
from .task import Task, fresh, task_of

Progress = Callable[[dict[str, Any]], None]
TABLE = "table.safetensors"
LINES = 200
"""Lines of metrics.jsonl a block's training is told in, about."""


@dataclass(frozen=True, slots=True)
class Trained:
    """How a job ended: finished, paused (its turn was over) or interrupted. asked: whether it was
    asked to stop, which a block that had made its last update cannot show otherwise."""

    directory: Path
    block: int
    updates: int
    status: str
    receipt: dict[str, Any]
    asked: bool = False


def train_block(
    config: BlockwiseConfig,
    block: int,
    *,
    task: Task | None = None,
    until: int | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train block 1..B to its last update, or to update `until`.

    task: the data, where they were read before.  progress: called with one dict for every event.
    ConfigError for a block that there is not and for settings that are not those its checkpoint was
    made with; TrainingDiverged before an update with numbers that are not finite.
    """
    _check_block(config, block)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    with Interruption() as interruption, Job(config, block, task, progress) as job:
        interruption.waits = True
        last = min(config.updates, until or config.updates)
        while job.updates < last and not interruption.asked:
            if job.updates == config.run.steps:
                job.begin_chain()
            job.update()
            every = config.run.save_every
            if every and job.updates % every == 0 and job.updates < last:
                job.save()
        if job.updates > job.saved:
            job.save()
        done = job.end(interrupted=interruption.asked and job.updates < config.updates)
        return dataclasses.replace(done, asked=interruption.asked)


def _check_block(config: BlockwiseConfig, block: int) -> None:
    blocks = config.blockwise.blocks
    if isinstance(block, bool) or block not in range(1, blocks + 1):
        raise ConfigError(f"block {block}", expected=f"1 to blockwise.blocks = {blocks}")


class Job:
    """A block in training. What cannot be done is said before any weight is made."""

    def __init__(
        self, config: BlockwiseConfig, block: int, task: Task | None, progress: Progress | None
    ) -> None:
        self.config, self.block = config, block
        self.directory = folder_of(Path(config.run.directory), block)
        self.store = Store(self.directory / "checkpoints", keep=config.run.keep)
        self.world = World(rank=0, size=1, device=pick_device(config.run.device))
        self.updates = self.saved = 0
        self.peak: dict[str, Any] | None = None
        self.seconds = 0.0
        self._task, self._progress = task, progress
        self._here = 0
        self._lock = Lock(self.directory)

    def __enter__(self) -> Self:
        self._lock.__enter__()
        try:
            self._open()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.__exit__(kind, error, trace)

    def _open(self) -> None:
        self.task = (self._task or task_of(self.config)).to(self.world.device)
        if self.config.run.replace:
            remove(self.directory)
        self.store.sweep()
        found, wrong = newest(self.store)
        for each in wrong:
            self.tell("skipped", what=each)
        self.identity = self.task.identity()
        facts = found.json(STATE) if found else None
        chained = found is not None and found.step > self.config.run.steps
        self.before = self.task.stands_on(self.block, chained=chained)
        if facts is not None:
            assert found is not None
            check_same(self.identity, facts, f"when {found.path} was saved")
            self._check_before(facts)
            self._check_goes_on(found, facts)
        self.model = fresh(self.task, self.block, self.world.device)
        self.net = self.model.block(self.block)
        make = optimizer_factory(self.config.optim, self.world.device)
        self.optimizer = make(list(self.net.parameters()))
        if found is not None and facts is not None:
            restore(found, self.net, self.optimizer, self.world)
            self.updates = self.saved = found.step
            self.seconds, self.peak = facts["seconds"], facts["peak"]
        within = self.config.blockwise.within
        if within != "keep":
            layers = len(self.net.layers)
            apply_spans(Stack.of(self.net), [Span(start=0, stop=layers, method=within)])
        self._begin_files()

    def _begin_files(self) -> None:
        # What repeats the run must not remove it.
        run = dataclasses.replace(self.config.run, replace=False)
        text = dataclasses.replace(self.config, run=run).to_toml()
        write_text(self.directory / "config.toml", text)
        table = self.task.table
        if table is not None:
            with atomic_directory(self.directory / "table", known := {}) as temporary:
                known[TABLE] = write_tensors(temporary / TABLE, {"table": table})
        self.task.begin_files(self.directory)
        path = self.directory / "metrics.jsonl"
        kept = [line for line in _lines(path) if line["step"] <= self.updates]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.tell(
            "begin", step=self.updates, layers=len(self.net.layers),
            parameters=sum(p.numel() for p in self.net.parameters()),
        )  # fmt: skip

    def _check_before(self, facts: dict[str, Any]) -> None:
        if facts.get("before") != self.before:
            raise ConfigError(
                f"block {self.block} was trained on a block {self.block - 1} that is not the one "
                f"in {self.directory.parent} now",
                expected="the blocks that it was trained on",
                hint="Train it again: run.replace with --block.",
            )

    def _check_goes_on(self, found: Checkpoint, facts: dict[str, Any]) -> None:
        """ConfigError for fewer updates than were made, and for further ones with other draws."""
        if found.step > self.config.updates:
            raise ConfigError(
                f"{self.config.updates} updates of block {self.block}, which has made {found.step}",
                expected=f"{found.step} or more", hint="run.replace starts it anew.",
            )  # fmt: skip
        if found.step < self.config.updates and "training" in facts:
            there = {"identity": facts["training"]}
            check_same(training_of(self.config), there, f"when {found.path} was saved")

    def begin_chain(self) -> None:
        """What updates along the chain need. ConfigError where the block before is not finished;
        what was trained is then saved."""
        if self.updates > self.saved:
            self.save()
        self.before = self.task.stands_on(self.block, chained=True)

    def update(self) -> None:
        """One update. TrainingDiverged before anything is changed."""
        started = time.monotonic()
        self._here += 1
        # The second update here is the first with states and everything loaded; where there are two
        # kinds of updates, the third is of the other one.
        if self._here in (2, 3):
            with Meter(self.net, self.optimizer) as meter:
                loss, norm, lr = self._update()
            if self._here == 2 or self.peak is None or meter.peak_bytes > self.peak["bytes"]:
                self.peak = {"bytes": meter.peak_bytes, "by_category": meter.by_category}
        else:
            loss, norm, lr = self._update()
        self.updates += 1
        self.seconds += time.monotonic() - started
        if self.updates % max(1, self.config.updates // LINES) == 0 or self.updates == 1:
            line = {"step": self.updates, "loss": loss, "norm": norm, "lr": lr}
            with (self.directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.tell("step", **line)

    def _update(self) -> tuple[float, float, float]:
        settings, step = self.config.optim, self.updates + 1
        lr = self._learning_rate(step)
        set_learning_rate(self.optimizer, lr)
        losses = []
        for part in range(settings.accumulate):
            loss = self.task.step_loss(self.net, self.block, step, part) / settings.accumulate
            loss.backward()
            losses.append(loss.detach())
        parameters = list(self.net.parameters())
        norm = gradient_norm(parameters).to(losses[0].device)
        total, size = torch.stack([torch.stack(losses).sum(), norm]).tolist()
        if not (math.isfinite(total) and math.isfinite(size)):
            self.optimizer.zero_grad(set_to_none=True)
            raise TrainingDiverged(
                f"block {self.block}, update {step}: loss {total}, gradients of norm {size}",
                expected="finite numbers",
                hint="Nothing was updated. Lower optim.lr, lengthen the warm-up or clip harder.",
            )
        clip_(parameters, size, settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, size, lr

    def _learning_rate(self, step: int) -> float:
        """Updates along the chain have the same schedule once more, lower."""
        config, steps = self.config, self.config.run.steps
        if step <= steps:
            return learning_rate(config.schedule, step, peak=config.optim.lr, steps=steps)
        more = config.blockwise.chain_steps
        peak = config.optim.lr * config.blockwise.chain_rate
        return learning_rate(config.schedule, step - steps, peak=peak, steps=more)

    def save(self) -> None:
        """A checkpoint of the block as it is."""
        snapshot = Snapshot.of(
            self.net, self.optimizer, self.world,
            block=self.block, step=self.updates, steps=self.config.updates,
            before=self.before, identity=self.identity, seed=self.config.run.seed,
            training=training_of(self.config),
            seconds=self.seconds, peak=self.peak,
        )  # fmt: skip
        texts = {**snapshot.texts(), "config.toml": self.config.to_toml()}
        path = self.store.save(self.updates, tensors=snapshot.tensors, texts=texts)
        self.saved = self.updates
        self.tell("checkpoint", step=self.updates, path=str(path))

    def end(self, *, interrupted: bool) -> Trained:
        """Evaluates where the block is finished, and writes the receipt."""
        is_done = self.updates >= self.config.updates
        if is_done:
            self._hand_over()
        status = "interrupted" if interrupted else "finished" if is_done else "paused"
        receipt = {
            "status": status,
            "block": self.block,
            "updates": self.updates,
            "seconds": self.seconds,
            "parameters": sum(p.numel() for p in self.net.parameters()),
            "peak": self.peak,
            "held_out": self._held_out() if is_done else None,
            "identity": self.identity,
            "seed": self.config.run.seed,
            **environment(self.world.device),
        }
        write_text(self.directory / "receipt.json", json.dumps(receipt, indent=1) + "\n")
        self.tell("end", status=status, step=self.updates, held_out=receipt["held_out"])
        return Trained(self.directory, self.block, self.updates, status, receipt)

    def _hand_over(self) -> None:
        if not self.task.hands_over(self.block):
            return
        found, _ = newest(self.store)
        assert found is not None
        of = stands_on(self.before, file_digest(found.path, MODEL))
        self.task.hand_over(self.net, self.block, of)

    def _held_out(self) -> dict[str, float] | None:
        """Held-out numbers of the finished block; those it has where nothing was done here."""
        path = self.directory / "receipt.json"
        if not self._here and path.is_file():
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                known = {}
            if known.get("status") == "finished" and known.get("updates") == self.updates:
                return dict(known["held_out"])
        return self.task.evaluate(self.net, self.block)

    def tell(self, event: str, **facts: Any) -> None:
        """Whoever watches."""
        if self._progress is not None:
            self._progress({"event": event, "block": self.block, **facts})


def folder_of(directory: Path, block: int) -> Path:
    """Where a block is kept."""
    return directory / f"block-{block}"


def newest(store: Store) -> tuple[Checkpoint | None, list[str]]:
    """(The newest good checkpoint, None where none was ever written; what is wrong with those
    passed over.)

    CheckpointError where there are some and none is good, and for one of anything but a block.
    """
    found, wrong = store.newest()
    if found is None and wrong:
        raise CheckpointError(
            f"no checkpoint in {store.directory} can be used: {'; '.join(wrong)}",
            expected="one whose files match its manifest",
            hint="Restore one from a backup, or start the block again with run.replace.",
        )
    if found is not None and not isinstance(found.json(STATE).get("block"), int):
        raise CheckpointError(
            f"{found.path} is not of a block", expected="a checkpoint of block-wise training"
        )
    return found, wrong


def training_of(config: BlockwiseConfig) -> dict[str, Any]:
    """What decides the updates of a block and its identity does not have: an unfinished block goes
    on with it only. How many updates there are may change, and how layers are run."""
    beside = ("chain_steps", "chain_rate", "within", "table", "context")
    blockwise = dataclasses.asdict(config.blockwise)
    return {
        "run.seed": config.run.seed,
        "data.batch_size": config.data.batch_size,
        "optim": dataclasses.asdict(config.optim),
        "schedule": dataclasses.asdict(config.schedule),
        "blockwise": {name: v for name, v in blockwise.items() if name not in beside},
    }


def check_same(
    mine: dict[str, Any], facts: dict[str, Any], when: str, *, hint: str | None = None
) -> None:
    """ConfigError naming the first thing in which two identities differ."""
    mine = json.loads(json.dumps(mine))  # as the saved one went: tuples become lists
    name, here, there = next(differences(mine, facts["identity"]), ("", None, None))
    if name:
        raise ConfigError(
            f"{name} is {here!r} now, and was {there!r} {when}",
            expected="what decides the network, the noise levels and the data as it was",
            hint=hint or "Set it back, or give another run.directory.",
        )


def differences(mine: Any, theirs: Any, name: str = "") -> Any:
    """(dotted name, mine, theirs) of all that differs."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in dict.fromkeys([*mine, *theirs]):
            inner = f"{name}.{key}" if name else str(key)
            yield from differences(mine.get(key), theirs.get(key), inner)
    elif mine != theirs:
        yield name, mine, theirs


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a crash may have cut the last one short."""
    found = []
    if path.is_file() and not path.is_symlink():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and isinstance(value.get("step"), int):
                found.append(value)
    return found


def remove(directory: Path) -> None:
    """What an earlier training of the block left; what is not of it stays."""
    for name in ("checkpoints", "table", "handed", "context"):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in ("metrics.jsonl", "receipt.json", "attempts.jsonl"):
        (directory / name).unlink(missing_ok=True)
