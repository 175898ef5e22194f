"""`shoestring train RUN.toml`: trains inside the budget and leaves a run directory.

Every setting of the file is also a flag: `--optim.lr 1e-3` overrides the file. Under torchrun
only the first process speaks.
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from ..errors import ConfigError
from ..training.config import RunConfig
from .arguments import Common
from .terminal import Terminal

if TYPE_CHECKING:
    from ..training.loop import Run
    from .progress import Watcher


@dataclass(frozen=True, kw_only=True)
class Arguments(Common):
    """Train inside the budget, from a TOML file; every setting in it is a flag, too."""

    file: Annotated[Positional[str], arg(metavar="RUN.toml")]
    """The run's settings, such as RUN.toml."""
    config: Annotated[RunConfig, arg(name="")] = field(default_factory=RunConfig)
    """Overrides."""


def defaults(args: Sequence[str]) -> Arguments:
    """What the flags start from: the file's settings."""
    flags = {f"--{name}" for name in Common.__dataclass_fields__}
    for index, word in enumerate(args):
        takes_value = (
            index > 0 and args[index - 1].startswith("--") and args[index - 1] not in flags
        )
        if word in ("-h", "--help"):
            break
        if not word.startswith("-") and not takes_value:
            return Arguments(file=word, config=RunConfig.load(Path(word)))
    if {"-h", "--help"} & set(args):
        return Arguments(file="RUN.toml")
    raise ConfigError("train was given no settings", expected="shoestring train RUN.toml")


def run(arguments: Arguments, terminal: Terminal) -> int:
    """Trains; exit code 0, or 130 when it was interrupted and has saved what there was."""
    from ..training.loop import train
    from .progress import Watcher

    if os.environ.get("RANK", "0") != "0":
        return finished(train(arguments.config), terminal)
    with Watcher(terminal, arguments.config.run) as watch:
        done = train(arguments.config, progress=watch)
    return finished(done, terminal, watch)


def finished(done: "Run", terminal: Terminal, watch: "Watcher | None" = None) -> int:
    """Says how a run ended, and how to go on where it was interrupted; the exit code."""
    was_interrupted = done.receipt["status"] == "interrupted"
    if watch is not None:
        terminal.emit({"event": "done", "directory": str(done.directory), "receipt": done.receipt})
        terminal.say(watch.summary(done.receipt), f"the run is in {done.directory}")
        if was_interrupted:
            terminal.say(f"go on with: shoestring resume {shlex.quote(str(done.directory))}")
    return 130 if was_interrupted else 0
