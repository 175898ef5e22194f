"""Metrics to tensorboard, trackio or wandb, beside metrics.jsonl.

Each adapter is a few lines and imports its library when it is asked for. One that is not
installed is an error; one that fails, at its start or later, for want of a network or a disk, is
told once and left out: no run ends because of it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError
from .config import RunConfig

Numbers = dict[str, float]


class Tracker(Protocol):
    """Where numbers of a step go."""

    def log(self, numbers: Numbers, step: int) -> None:
        """Numbers by name, "train/loss" and the like."""

    def close(self) -> None:
        """No more will come."""


class TensorBoard:
    """Event files in `tensorboard/` of the run directory."""

    def __init__(self, config: RunConfig, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(directory / "tensorboard")

    def log(self, numbers: Numbers, step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A local trackio project; `trackio show` opens it."""

    def __init__(self, config: RunConfig, directory: Path) -> None:
        import trackio

        self._trackio: Any = trackio
        trackio.init(project=config.track.project, name=directory.name, config=_flat(config))

    def log(self, numbers: Numbers, step: int) -> None:
        self._trackio.log(numbers, step=step)

    def close(self) -> None:
        self._trackio.finish()


class Wandb:
    """A wandb run; WANDB_MODE=offline keeps it in the run directory."""

    def __init__(self, config: RunConfig, directory: Path) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=config.track.project, name=directory.name, dir=directory, config=_flat(config)
        )

    def log(self, numbers: Numbers, step: int) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


KINDS: dict[str, Callable[[RunConfig, Path], Tracker]] = {
    "tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb,
}  # fmt: skip


class Trackers:
    """All the trackers of a run. tell: called with an event's name and facts."""

    def __init__(self, config: RunConfig, directory: Path, tell: Callable[..., None]) -> None:
        self._tell = tell
        self._open: dict[str, Tracker] = {}
        for name in config.track.to:
            try:
                self._open[name] = _start(name, config, directory)
            except ConfigError:  # not installed, which is told before an hour is spent
                raise
            except Exception as error:
                self._tell_failed(name, error)

    def event(self, event: str, facts: Mapping[str, Any]) -> None:
        """The numbers of a step or an evaluation, to everybody."""
        numbers = _numbers(event, facts)
        for name, tracker in list(self._open.items()) if numbers else []:
            self._guarded(name, partial(tracker.log, numbers, int(facts["step"])))

    def close(self) -> None:
        """End all of them."""
        for name, tracker in list(self._open.items()):
            self._guarded(name, tracker.close)
        self._open.clear()

    def _guarded(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            # Whatever a tracker raises: a run is worth more than its curves elsewhere.
            self._open.pop(name, None)
            self._tell_failed(name, error)

    def _tell_failed(self, name: str, error: Exception) -> None:
        self._tell("tracker failed", tracker=name, message=str(error) or type(error).__name__)


def _start(name: str, config: RunConfig, directory: Path) -> Tracker:
    try:
        return KINDS[name](config, directory)
    except ImportError as error:
        raise ConfigError(
            f"track.to names {name!r}, which is not installed ({error})",
            expected="an installed tracker",
            hint=f"pip install 'shoestring[{name}]'",
        ) from error


def _numbers(event: str, facts: Mapping[str, Any]) -> Numbers:
    place = {"step": "train", "evaluation": "held_out"}.get(event)
    if place is None:
        return {}
    return {
        f"{place}/{name}": float(value)
        for name, value in facts.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def _flat(config: RunConfig) -> dict[str, Any]:
    sections = dataclasses.asdict(config)
    return {f"{s}.{name}": value for s, part in sections.items() for name, value in part.items()}
