"""`shoestring train RUN.toml`: trains inside the budget and leaves a run directory.

Every setting of the file is also a flag: `--optim.lr 1e-3` overrides the file. Under torchrun
only the first process speaks. A file with a table `[blockwise]` has flags of its own, among them
`--block N`, which trains that block alone.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from tyro.conf import Positional, arg

from ..errors import ConfigError
from ..training.blockwise.config import BlockwiseConfig, is_blockwise
from ..training.config import RunConfig
from .arguments import Common
from .terminal import Terminal

if TYPE_CHECKING:
    from ..training.loop import Run
    from .progress import Watcher


@dataclass(frozen=True, kw_only=True)
class Arguments(Common):
    """Train inside the budget, from a TOML file; every setting in it is a flag, too.

    A file with [blockwise] has flags of its own: shoestring train RUN.toml --help."""

    file: Annotated[Positional[str], arg(metavar="RUN.toml")]
    """The run's settings, such as RUN.toml."""
    config: Annotated[RunConfig, arg(name="")] = field(default_factory=RunConfig)
    """Overrides."""


@dataclass(frozen=True, kw_only=True)
class BlockArguments(Common):
    """Train one block, or all of them in turn; every setting of the file is a flag, too."""

    file: Annotated[Positional[str], arg(metavar="RUN.toml")]
    """The run's settings, with a table [blockwise]."""
    block: int | None = None
    """Train this block (1 has the highest noise) and no other; None = all, one in memory at a
    time."""
    ray: str | None = None
    """Train all blocks as jobs of Ray: local = on this machine, auto or host:port = a cluster."""
    config: Annotated[BlockwiseConfig, arg(name="")] = field(default_factory=BlockwiseConfig)
    """Overrides."""


def defaults(args: Sequence[str]) -> Arguments | BlockArguments:
    """What the flags start from: the file's settings."""
    asks = {"-h", "--help"} & set(args)
    word = _file(args)
    if word is not None and is_blockwise(Path(word)):
        return BlockArguments(file=word, config=BlockwiseConfig.load(Path(word)))
    if word is not None and any(each.partition("=")[0] == "--block" for each in args):
        raise ConfigError(
            f"--block is given, and {word} has no table [blockwise]",
            expected="a run whose blocks are trained apart",
        )
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
    for section in (*fields(BlockwiseConfig), *fields(RunConfig)):
        for each in fields(cast(Any, section.type)):
            name = each.name.replace("_", "-")
            for flag in {f"--{section.name}.{name}", f"--{section.name}.{each.name}"}:
                found[flag] = each.type
            found[f"--{section.name}.no-{name}"] = each.type
    return found


def run(arguments: Arguments | BlockArguments, terminal: Terminal) -> int:
    """Trains; exit code 0, or 130 when it was interrupted and has saved what there was."""
    if isinstance(arguments, BlockArguments):
        return run_blocks(arguments, terminal)
    from ..training.loop import train
    from .progress import Watcher

    if os.environ.get("RANK", "0") != "0":
        return finished(train(arguments.config), terminal)
    with Watcher(terminal, arguments.config.run) as watch:
        done = train(arguments.config, progress=watch)
    return finished(done, terminal, watch)


def run_blocks(arguments: BlockArguments, terminal: Terminal) -> int:
    """Trains one block or all of them."""
    from ..training.blockwise.every import train_every_block
    from ..training.blockwise.job import train_block

    def tell(event: dict[str, Any]) -> None:
        terminal.emit(event)
        if event["event"] == "step":
            terminal.note(
                f"block {event['block']}: update {event['step']} of {config.updates}, "
                f"loss {event['loss']:.4f}"
            )
        elif event["event"] == "skipped":
            terminal.say(f"block {event['block']}: passed over a checkpoint: {event['what']}")

    config, block = arguments.config, arguments.block
    if arguments.ray is not None:
        if block is not None:
            raise ConfigError(
                "--ray with --block", expected="one of the two: Ray trains all blocks"
            )
        from ..training.blockwise.on_ray import train_on_ray

        done = train_on_ray(config, address=arguments.ray, progress=tell)
    elif block is not None:
        done = [train_block(config, block, progress=tell)]
    else:
        done = train_every_block(config, progress=tell)
    for each in done:
        terminal.emit({"event": "done", "directory": str(each.directory), "receipt": each.receipt})
        held_out = each.receipt["held_out"] or {}
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in held_out.items())
        terminal.say(
            f"block {each.block} is {each.status} after {each.updates} updates, in "
            f"{each.directory}" + (f"; held out: {numbers}" if numbers else "")
        )
    is_whole = block is not None or len(done) == config.blockwise.blocks
    if is_whole and all(each.status == "finished" for each in done):
        when = "when all are there" if block is not None else "all are there"
        terminal.say(f"{when}: shoestring merge {shlex.quote(config.run.directory)}")
        return 0
    terminal.say("the same command goes on with it")
    return 130


def finished(done: "Run", terminal: Terminal, watch: "Watcher | None" = None) -> int:
    """Says how a run ended, and how to go on where it was interrupted; the exit code."""
    was_interrupted = done.receipt["status"] == "interrupted"
    if watch is not None:
        terminal.emit({"event": "done", "directory": str(done.directory), "receipt": done.receipt})
        terminal.say(watch.summary(done.receipt), f"the run is in {done.directory}")
        if was_interrupted:
            terminal.say(f"go on with: shoestring resume {shlex.quote(str(done.directory))}")
    return 130 if was_interrupted else 0
