"""What a run directory holds, read for a report: whatever is there, and what is missing.

A run may have been killed at any moment, or written by hand: every file may be absent, cut off
or hold something else than it should. Nothing of that stops the report. What cannot be used is
left out and named in `missing`, for the page to say.
"""

import dataclasses
import json
import math
import tomllib
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

FILES = ("config.toml", "metrics.jsonl", "plan.json", "receipt.json")
"""What makes a directory a run: any of these."""
_EXPECTED = ("step", "evaluation", "sample")
COLUMNS = ("loss", "lr", "norm", "tokens_per_s", "seconds", "peak_bytes")


@dataclass(frozen=True, slots=True)
class Steps:
    """Numbers of the steps, one row each, in order; NaN where a number is missing."""

    step: array = field(default_factory=lambda: array("d"))
    columns: Mapping[str, array] = field(
        default_factory=lambda: {name: array("d") for name in COLUMNS}
    )

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, name: str) -> array:
        return self.columns[name]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run. config, plan, receipt, memory: as read, empty where there is none; take from them
    with `dig`, `number` and `text`. incidents: events that no smooth run has, such as that it
    was resumed. last_step: the update of the last line of a step, which may be neither the highest
    nor that of the receipt. missing: what a reader should know is not there."""

    directory: Path
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    receipt: Mapping[str, Any]
    memory: Mapping[str, Any]
    steps: Steps
    last_step: float | None
    evaluations: tuple[Mapping[str, Any], ...]
    samples: tuple[Mapping[str, Any], ...]
    incidents: tuple[Mapping[str, Any], ...]
    missing: tuple[str, ...]

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.directory.name or str(self.directory)

    @property
    def went_on(self) -> bool:
        """Whether updates were made after the receipt was written, and no receipt since."""
        at = number(self.receipt, "steps")
        return at is not None and self.last_step is not None and self.last_step > at


def read_run(directory: Path) -> RunRecord:
    """Everything a run left. CheckpointError for a directory that is no run."""
    directory = directory.absolute()
    _require_run(directory)
    missing: list[str] = []

    def read(name: str, parse: Callable[[str], Any], meaning: str) -> Mapping[str, Any]:
        return _read(directory / name, parse, meaning, missing)

    receipt = read("receipt.json", json.loads, "the run has not ended, or was killed before it did")
    config = read("config.toml", tomllib.loads, "the settings are not known")
    plan = read("plan.json", json.loads, _why_no_plan(config))
    memory = read("memory.json", json.loads, "it is written after the second step")
    steps, last_step, events = _metrics(directory / "metrics.jsonl", missing)
    record = RunRecord(
        directory=directory,
        config=config,
        plan=plan,
        receipt=receipt,
        memory=memory,
        steps=steps,
        last_step=last_step,
        evaluations=tuple(_by_step(events, "evaluation")),
        samples=tuple(_by_step(events, "sample")),
        incidents=tuple(each for each in events if each.get("event") not in _EXPECTED),
        missing=tuple(missing),
    )
    if not record.went_on:
        return record
    at = number(receipt, "steps") or 0.0
    stale = (
        f"receipt.json is of an earlier stop, at update {at:,.0f}: the run went on after this "
        f"receipt, to update {last_step:,.0f}, and has not ended, or was killed before it did."
    )
    return dataclasses.replace(record, missing=(stale, *missing))


def _why_no_plan(config: Mapping[str, Any]) -> str:
    budget = text(config, "run", "budget")
    if budget == "none":
        return "nothing was planned (run.budget = none)"
    if budget is None:
        return "nothing was planned, or the file was removed"
    return "nothing was planned before the run stopped, or the file was removed"


def dig(value: Any, *path: str) -> Any:
    """What lies at a path of keys; None where there is none."""
    for key in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def number(value: Any, *path: str) -> float | None:
    """A finite number at a path of keys; None for anything else."""
    found = dig(value, *path)
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    try:
        value = float(found)
    except OverflowError:  # an integer beyond any float
        return None
    return value if math.isfinite(value) else None


def text(value: Any, *path: str) -> str | None:
    """A string at a path of keys; None for anything else."""
    found = dig(value, *path)
    return found if isinstance(found, str) else None


def mapping(value: Any, *path: str) -> Mapping[str, Any]:
    """An object at a path of keys; an empty one for anything else."""
    found = dig(value, *path)
    return found if isinstance(found, Mapping) else {}


def items(value: Any, *path: str) -> list[Any]:
    """A list at a path of keys; an empty one for anything else."""
    found = dig(value, *path)
    return found if isinstance(found, list) else []


def _require_run(directory: Path) -> None:
    expected = "a run directory, with metrics.jsonl and receipt.json, as `shoestring train` makes"
    if not directory.exists():
        raise CheckpointError(
            f"{directory} does not exist", expected=expected, hint=_near(directory.parent)
        )
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is no directory", expected=expected, hint=_near(directory.parent)
        )
    # A model directory has files of its own, but none of these.
    if not any((directory / name).is_file() for name in FILES):
        raise CheckpointError(
            f"{directory} is no run: it has none of {', '.join(FILES)}",
            expected=expected,
            hint=_near(directory.parent, *sorted(directory.glob("*/"))),
        )


def _near(*places: Path) -> str | None:
    """A hint naming the first of these places that is a run."""
    for place in places:
        if (place / "metrics.jsonl").is_file():
            return f"Did you mean {place}?"
    return None


def _read(
    path: Path, parse: Callable[[str], Any], meaning: str, missing: list[str]
) -> Mapping[str, Any]:
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing.append(f"There is no {path.name}: {meaning}.")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        missing.append(f"{path.name} cannot be read ({_brief(error)}).")
        return {}
    if not isinstance(found, Mapping):
        missing.append(f"{path.name} holds a {type(found).__name__} where an object was expected.")
        return {}
    return found


def _metrics(path: Path, missing: list[str]) -> tuple[Steps, float | None, list[Mapping[str, Any]]]:
    """The steps as columns, the step of the last line, and all other events. A step that was
    made twice, before and after a run went on from a checkpoint, counts as it was made last."""
    rows: dict[float, tuple[float, ...]] = {}
    events: list[Mapping[str, Any]] = []
    bad: list[int] = []
    last: float | None = None
    count = 0
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for count, line in enumerate(file, start=1):
                event = _event(line)
                if event is None:
                    bad.append(count)
                elif event.get("event") != "step":
                    events.append(event)
                elif (step := number(event, "step")) is not None:
                    last = step
                    rows[step] = tuple(_or_nan(event, name) for name in COLUMNS)
    except OSError as error:
        missing.append(f"metrics.jsonl cannot be read ({_brief(error)}): there are no curves.")
    if bad == [count]:
        missing.append("The last line of metrics.jsonl was cut off and is left out.")
    elif bad:
        missing.append(
            f"{len(bad):,} of the {count:,} lines of metrics.jsonl cannot be read and are left "
            f"out, the first of them line {bad[0]:,}."
        )
    steps = _columns(rows)
    if rows and (without := sum(map(math.isnan, steps["loss"]))):
        missing.append(f"{without:,} of the {len(steps):,} steps have no finite loss.")
    return steps, last, events


def _event(line: str) -> Mapping[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, Mapping) else None


def _or_nan(event: Mapping[str, Any], name: str) -> float:
    found = number(event, name)
    return math.nan if found is None else found


def _columns(rows: Mapping[float, tuple[float, ...]]) -> Steps:
    order = sorted(rows)
    columns = {
        name: array("d", (rows[step][index] for step in order))
        for index, name in enumerate(COLUMNS)
    }
    return Steps(array("d", order), columns)


def _by_step(events: list[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    """Events of a kind in the order of their steps; of several at one step the last."""
    found = {}
    for event in events:
        if event.get("event") == kind and (step := number(event, "step")) is not None:
            found[step] = event
    return [found[step] for step in sorted(found)]


def _brief(error: Exception) -> str:
    first = str(error).partition("\n")[0]
    return first[:200] or type(error).__name__
