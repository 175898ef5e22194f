"""`shoestring merge RUN [RUN ...]`: puts blocks that were trained apart together as one model.

Each argument is a run directory with its block-N folders, or the folder of a single block that came
from another machine. Blocks that do not belong together are told apart before anything is written.
"""

import json
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
    from ..training.blockwise.merging import FACTS, bound_of, merge, own_bits_of

    into = Path(arguments.to) if arguments.to else None
    place = merge([Path(each) for each in arguments.directories], into)
    facts = json.loads((place / FACTS).read_text(encoding="utf-8"))
    bits, own = bound_of(facts), own_bits_of(facts)
    told = {"model": str(place), "bits_per_byte": bits}
    terminal.emit(told if own is None else {**told, "block_1_bits_per_byte": own})
    terminal.say(f"the model is in {place}")
    if bits is not None:
        terminal.say(f"held-out text: {bits:.4f} bits per byte, the sum of the blocks' parts")
    if own is not None:
        terminal.say(
            f"held-out text: {own:.4f} bits per byte by block 1's own next-token predictions; the "
            "chain of the blocks has no likelihood"
        )
    return 0
