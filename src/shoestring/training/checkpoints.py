"""When a run saves itself, and how it finds itself again.

Saving: every so many updates or minutes, and when a run ends early. In the background a copy is
written while training goes on. A checkpoint that cannot be written is told and tried again at the
next occasion: the older ones are still there.

Finding: the newest checkpoint that verifies, held against the run's settings. What decides the
network, the text and the arithmetic has to be what it was; everything else may change.
"""

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import Checkpoint, Store
from ..errors import CheckpointError, ConfigError
from ..planner import Plan
from .config import CheckpointConfig, RunConfig
from .out_of_memory import is_out_of_memory
from .receipt import library_version
from .snapshot import STATE, Snapshot

FORMAT = 2
"""Of state.json. 1 had neither the fields of the model's config nor the machine."""
_WEIGHTS = "model.name (its weights)"
_INCIDENTAL = {
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache",
    "return_dict", "output_hidden_states", "output_attentions", "id2label", "label2id",
    "problem_type",
}  # fmt: skip
"""Fields of a transformers config that change nothing of what is computed in training."""
_CONFIG, _PLAN = "config.toml", "plan.json"
Tell = Callable[..., None]


class Checkpoints:
    """The checkpoints of one run. tell: called with an event's name and facts."""

    def __init__(self, directory: Path, settings: CheckpointConfig, tell: Tell) -> None:
        self.store = Store(directory / "checkpoints", keep=settings.keep)
        self.settings = settings
        self.saved_step = 0
        self._tell = tell
        self._saved_at = time.monotonic()
        self._writer: threading.Thread | None = None
        self._copy: Snapshot | None = None
        self._outcome: Exception | dict[str, Any] | None = None

    # ---- when ------------------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        """Whether this process wants a checkpoint after this step."""
        if self._writer is not None and not self._writer.is_alive():
            self.wait()
        every, minutes = self.settings.every, self.settings.minutes
        return bool(
            (every and step % every == 0)
            or (minutes and time.monotonic() - self._saved_at >= 60 * minutes)
        )

    # ---- saving ----------------------------------------------------------------------------

    def save(
        self, step: int, snapshot: Snapshot, texts: dict[str, str], *, is_last: bool = False
    ) -> None:
        """Write a checkpoint, or start to.

        One that cannot be written is told, as event "checkpoint failed"; the last one of a run
        raises CheckpointError.
        """
        self.wait()
        self._saved_at = time.monotonic()
        texts = {**texts, **snapshot.texts()}
        if self.settings.background and not is_last and (copy := _copied(snapshot)) is not None:
            self._copy = copy
            self._writer = threading.Thread(
                target=self._write, args=(step, self._copy, texts), name="checkpoint"
            )
            self._writer.start()
            return
        self._write(step, snapshot, texts)
        self._report(raising=is_last)

    def wait(self) -> None:
        """Let a checkpoint that is being written in the background be finished."""
        if self._writer is not None:
            self._writer.join()
            self._writer = self._copy = None
            self._report(raising=False)

    @property
    def copied_tensors(self) -> list[Tensor]:
        """The copy that is being written now: memory that the run holds besides its own."""
        if self._copy is None:
            return []
        parts = self._copy.tensors.values()
        return [tensor for part in parts for tensor in part.values() if isinstance(tensor, Tensor)]

    def _write(self, step: int, snapshot: Snapshot, texts: dict[str, str]) -> None:
        started = time.monotonic()
        try:
            path = self.store.save(step, tensors=snapshot.tensors, texts=texts)
        except Exception as error:
            # Out of memory too: this may be a thread of its own, where nobody else would hear.
            kind = f"{type(error).__name__}: {error}"
            wrapped = CheckpointError(f"step {step} cannot be saved: {kind}")
            self._outcome = error if isinstance(error, CheckpointError) else wrapped
            return
        self._outcome = {
            "step": step, "path": str(path), "bytes": snapshot.nbytes,
            "seconds": time.monotonic() - started,
        }  # fmt: skip

    def _report(self, *, raising: bool) -> None:
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, Exception):
            if raising:
                raise outcome
            self._tell("checkpoint failed", message=str(outcome))
        elif outcome is not None:
            self.saved_step = outcome["step"]
            self._tell("checkpoint", **outcome)

    # ---- finding ---------------------------------------------------------------------------

    def find(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, None when the run never wrote one.

        CheckpointError when there are some and none is good.
        """
        saved, wrong = self.store.newest()
        for message in wrong:
            self._tell("checkpoint passed over", message=message)
        if saved is None:
            if wrong:
                raise CheckpointError(
                    f"no checkpoint in {self.store.directory} can be used: {'; '.join(wrong)}",
                    expected="one whose files match its manifest",
                    hint="Restore one from a backup, or start again with --run.replace.",
                )
            return None
        self.saved_step = saved.step
        return saved


def _copied(snapshot: Snapshot) -> Snapshot | None:
    """A copy to write from, None where there is no memory for one."""
    try:
        return snapshot.copied()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def refuse_lost(directory: Path) -> None:
    """CheckpointError for a run that ended once and has no checkpoint any more."""
    place = directory / "checkpoints"
    if (place.is_symlink() and not place.exists()) or _made_updates(directory / "receipt.json"):
        raise lost(directory)


def lost(directory: Path) -> CheckpointError:
    """What to say when a run cannot go on because somebody took its checkpoints away."""
    return CheckpointError(
        f"the checkpoints of {directory} are gone",
        expected="checkpoints/ of the run, where it left them",
        hint="Put them back; shoestring train with --run.replace starts anew.",
    )


def _made_updates(receipt: Path) -> bool:
    """Whether a run that ended had made any; one that cannot be read is taken for such."""
    try:
        return bool(json.loads(receipt.read_text(encoding="utf-8"))["steps"])
    except FileNotFoundError:
        return False
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return True


def remove_run(directory: Path) -> None:
    """Remove what an earlier run left in a directory; what is not a run's stays."""
    for name in ("checkpoints", "model"):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in ("receipt.json", "report.html", "memory.json", "plan.json"):
        (directory / name).unlink(missing_ok=True)


def same_sizes(config: RunConfig, saved: Checkpoint, processes: int) -> bool:
    """Whether a saved plan is about updates as large as those to come, of as many processes where
    these divide what there is."""
    then = RunConfig.load(saved.path / _CONFIG)

    def parts(each: RunConfig, processes: int) -> int:
        return processes if each.run.sharding != "none" else 1

    if parts(then, int(saved_facts(saved).get("processes", 1))) != parts(config, processes):
        return False

    def sizes(each: RunConfig) -> tuple[Any, ...]:
        return (
            each.data.batch_size,
            each.optim.accumulate,
            each.checkpoint.background,
            each.run.budget == "none",
        )

    return sizes(then) == sizes(config)


def refuse_existing(directory: Path) -> None:
    """ConfigError when a directory already holds a run."""
    left = [name for name in ("checkpoints", "receipt.json") if (directory / name).exists()]
    metrics = directory / "metrics.jsonl"
    if left or (metrics.exists() and metrics.stat().st_size):
        raise ConfigError(
            f"{directory} already holds a run ({', '.join(left) or metrics.name})",
            expected="a directory without one",
            hint=f"shoestring resume {directory} goes on with it; give another run.directory, or "
            "run.replace = true to lose it and start anew.",
        )


def texts_of(config: RunConfig, plan: Plan | None) -> dict[str, str]:
    """What a checkpoint repeats of the run directory, so that it can be used without it."""
    texts = {_CONFIG: config.to_toml()}
    return texts | {_PLAN: plan.to_json() + "\n"} if plan is not None else texts


def saved_facts(saved: Checkpoint) -> dict[str, Any]:
    """The JSON part of a checkpoint. CheckpointError for one of another format."""
    facts = saved.json(STATE)
    version = facts.get("format") if isinstance(facts, dict) else None
    if not isinstance(version, int) or not 1 <= version <= FORMAT:
        newer = isinstance(version, int) and version > FORMAT
        raise CheckpointError(
            f"{saved.path} has format {version!r}",
            expected=f"1 to {FORMAT}",
            hint="It was written by a newer Shoestring: upgrade this one." if newer else None,
        )
    if not isinstance(facts.get("identity"), dict) or not isinstance(
        facts.get("metrics_bytes"), int
    ):
        raise CheckpointError(
            f"{saved.path} is not of a training run", expected="a checkpoint that train wrote"
        )
    return dict(facts)


def saved_plan(saved: Checkpoint) -> Plan | None:
    """The plan that the checkpoint's steps were made with."""
    return Plan.from_json(saved.text(_PLAN)) if (saved.path / _PLAN).exists() else None


def config_of(directory: Path) -> RunConfig:
    """The settings of the run in a directory: config.toml, or the copy in its newest checkpoint.

    CheckpointError when there is no run.
    """
    file = directory / _CONFIG
    if file.is_file():
        return RunConfig.load(file)
    saved, _ = Store(directory / "checkpoints").newest()
    if saved is None:
        what = "holds no run" if directory.is_dir() else "does not exist"
        raise CheckpointError(
            f"{directory} {what}",
            expected="a run directory with config.toml or checkpoints/",
            hint="shoestring train RUN.toml starts one.",
        )
    return RunConfig.load(saved.path / _CONFIG)


def identity(
    config: RunConfig,
    *,
    corpus: str,
    tokenizer: str,
    shape: Mapping[str, Any],
    weights: str,
) -> dict[str, Any]:
    """By dotted name, what may not change between a checkpoint and the run that goes on from it.

    shape: fields of the model's config.  corpus, tokenizer, weights: digests.
    """
    model = dataclasses.asdict(config.model)
    if model["name"]:
        model["name"] = Path(model["name"]).name  # a moved directory is the same model
    return {
        **{f"model.{name}": value for name, value in model.items()},
        "data.source (its text)": corpus,
        "data.tokenizer": tokenizer,
        "data.sequence_length": config.data.sequence_length,
        "run.seed": config.run.seed,
        "precision.compute": config.precision.compute,
        "optim.name": config.optim.name,
        "run.allow": config.run.allow,
        "plan.only": config.plan.only,
        "plan.never": config.plan.never,
        **_flat("model.config", {k: v for k, v in shape.items() if k not in _INCIDENTAL}),
        _WEIGHTS: weights,
        **_of_turns(config),
    }


def _of_turns(config: RunConfig) -> dict[str, Any]:
    """What a run in turns may not change between a checkpoint and what goes on from it."""
    if not config.turns.blocks:
        return {}
    tables = {
        "turns": dataclasses.asdict(config.turns),
        "denoise": dataclasses.asdict(config.denoise),
    }
    return {f"{name}.{key}": v for name, table in tables.items() for key, v in table.items()}


def _flat(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    parts = (_flat(f"{name}.{key}", inner) for key, inner in value.items())
    return {key: inner for part in parts for key, inner in part.items()}


def check_same(mine: dict[str, Any], facts: dict[str, Any], saved: Checkpoint) -> None:
    """ConfigError naming the first setting that is not what it was.

    What only one of the two has says nothing where they come from different versions.
    """
    # Through JSON, as the saved one went: tuples become lists.
    mine, theirs = json.loads(json.dumps(mine)), facts["identity"]
    names = [*mine, *(name for name in theirs if name not in mine)]
    if facts.get("machine", {}).get("transformers") != library_version("transformers"):
        names = [name for name in mine if name in theirs]
    if mine[_WEIGHTS] == "none":  # gone, or never read: the checkpoint brings its own
        names = [name for name in names if name != _WEIGHTS]
    for name in names:
        if mine.get(name) != theirs.get(name):
            raise ConfigError(
                f"{name} is {mine.get(name)!r} now, and was {theirs.get(name)!r} when "
                f"{saved.path} was saved",
                expected="what decides the network, the text and the arithmetic as it was",
                hint="Set it back, or start another run in another run.directory.",
            )
