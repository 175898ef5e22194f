"""`shoestring merge RUN [RUN ...]`: puts blocks that were trained apart together as one model.

Each argument is a run directory with its block-N folders, or the folder of a single block that came
from another machine. Blocks that do not belong together are told apart before anything is written.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from .arguments import Common
from .terminal import Terminal


@dataclass(frozen=True, kw_only=True)
class Arguments(Common):
    """Put blocks that were trained apart together as one model."""

    directories: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN")]
    """Run directories, or folders of single blocks."""
    to: str = ""
    """Where the model goes; empty = model/ in the first directory."""


def run(arguments: Arguments, terminal: Terminal) -> int:
    """Merges; exit code 0."""
    from ..training.blockwise.merging import merge

    into = Path(arguments.to) if arguments.to else None
    place = merge([Path(each) for each in arguments.directories], into)
    terminal.emit({"model": str(place)})
    terminal.say(f"the model is in {place}")
    return 0
