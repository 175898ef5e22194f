"""`shoestring report RUN [RUN ...]`: one self-contained page of a run, or of several together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..units import format_bytes
from .arguments import Common
from .terminal import Terminal


@dataclass(frozen=True, kw_only=True)
class Arguments(Common):
    """Make one self-contained page of a run, or of several over one another."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN")]
    """Run directories."""
    out: str = ""
    """File to write; empty = report.html in the run, or here when there are several runs."""


def run(arguments: Arguments, terminal: Terminal) -> int:
    """Writes the page; exit code 0."""
    from ..report import write_report

    out = Path(arguments.out) if arguments.out else None
    path = write_report([Path(each) for each in arguments.runs], out)
    size = path.stat().st_size
    terminal.emit({"report": str(path), "bytes": size, "runs": list(arguments.runs)})
    terminal.say(f"{path} ({format_bytes(size)})")
    return 0
