"""`shoestring resume RUN`: goes on with a run from its newest good checkpoint, bit for bit.

The directory may have been moved or renamed. What may differ from before is edited in its
config.toml; what may not is an error that names it.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..errors import ConfigError
from .arguments import Common
from .terminal import Terminal


@dataclass(frozen=True, kw_only=True)
class Arguments(Common):
    """Go on with a run that ended early, or for longer than was planned."""

    directory: Annotated[Positional[str], arg(metavar="RUN")]
    """The run's directory."""
    steps: int | None = None
    """Updates in all, in place of run.steps."""
    minutes: float | None = None
    """Minutes of training in all, in place of run.minutes."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"--steps {self.steps} cannot be used", expected="1 or more")
        if self.minutes is not None and not self.minutes >= 0:
            raise ConfigError(f"--minutes {self.minutes} cannot be used", expected="0 or more")


def run(arguments: Arguments, terminal: Terminal) -> int:
    """Trains on; exit code 0, or 130 when it was interrupted and has saved what there was."""
    from ..training.checkpoints import config_of
    from ..training.loop import resume
    from .progress import Watcher
    from .train import finished

    directory = Path(arguments.directory)
    steps, minutes = arguments.steps, arguments.minutes
    if os.environ.get("RANK", "0") != "0":
        return finished(resume(directory, steps=steps, minutes=minutes), terminal)
    with Watcher(terminal, config_of(directory).run) as watch:
        done = resume(directory, steps=steps, minutes=minutes, progress=watch)
    return finished(done, terminal, watch)
