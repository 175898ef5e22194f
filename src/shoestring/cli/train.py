"""`shoestring train RUN.toml`: trains inside the budget and leaves a run directory.

Every setting of the file is also a flag: `--optim.lr 1e-3` overrides the file. Under torchrun
only the first process speaks.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

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
    asks = {"-h", "--help"} & set(args)
    word = _file(args)
    if word is not None and (not asks or Path(word).is_file()):
        return Arguments(file=word, config=RunConfig.load(Path(word)))
    if asks:
        return Arguments(file="RUN.toml")
    raise ConfigError("train was given no settings", expected="shoestring train RUN.toml")


def _file(args: Sequence[str]) -> str | None:
    """The word that is the file: the first that is no flag's value and looks like one."""
    kinds = {f"--{name}": bool for name in Common.__dataclass_fields__} | _kinds()
    flag, free = "", []
    for before, word in zip(("", *args), args, strict=False):
        if word.startswith("-"):
            flag = word
        elif not _takes_value(before, kinds):
            free.append((flag, word))
    looks = [(f, w) for f, w in free if w.endswith(".toml") or Path(w).is_file()] or free[:1]
    if not looks:
        return None
    flag, word = looks[0]
    if str(kinds.get(flag, "")).endswith(", ...]"):
        raise ConfigError(
            f"{word} stands after {flag}, which takes all that follows",
            expected=f"shoestring train {word} {flag} ...",
        )
    return word


def _takes_value(word: str, kinds: Mapping[str, Any]) -> bool:
    return word.startswith("--") and "=" not in word and kinds.get(word) is not bool


def _kinds() -> dict[str, Any]:
    """What each flag of a setting is made of."""
    found: dict[str, Any] = {}
    for section in fields(RunConfig):
        for each in fields(cast(Any, section.type)):
            name = each.name.replace("_", "-")
            for flag in {f"--{section.name}.{name}", f"--{section.name}.{each.name}"}:
                found[flag] = each.type
            found[f"--{section.name}.no-{name}"] = each.type
    return found


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
