"""`shoestring study NAME`: a published claim, run again at desk scale with its control arm."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from tyro.conf import FlagCreatePairsOff, Positional, arg

from ..errors import ConfigError, closest
from .arguments import Common
from .terminal import Terminal

STUDIES = {
    "compressed-context": "what a compressed context loses, in KL, needles, copies and in steps",
}


@dataclass(frozen=True, kw_only=True)
class Arguments(Common):
    """Run a published claim again, with the control arm it left out; alone: what there is."""

    name: Annotated[Positional[str], arg(metavar="NAME")] = ""
    """Which study; empty = list them."""
    directory: str = ""
    """Where result, model and page are kept; empty = runs/study-NAME. Run again, a study goes on
    where it was."""
    quick: FlagCreatePairsOff[bool] = False
    """About two minutes instead of three quarters of an hour: less text, fewer caches, one seed."""
    tiny: FlagCreatePairsOff[bool] = False
    """A few seconds, to see that it runs; its numbers mean nothing."""

    def __post_init__(self) -> None:
        if self.name and self.name not in STUDIES:
            raise ConfigError(
                f"{self.name!r} is not a study", expected=f"one of {', '.join(STUDIES)}",
                hint=closest(self.name, STUDIES),
            )  # fmt: skip
        if self.quick and self.tiny:
            raise ConfigError("--quick and --tiny do not go together", expected="one of them")


def run(arguments: Arguments, terminal: Terminal) -> int:
    """Lists the studies, or runs one; exit code 0 when it ran, whatever the verdicts are."""
    if not arguments.name:
        listed = Table(box=None, show_header=False, pad_edge=False)
        for name, text in STUDIES.items():
            listed.add_row(name, text)
        terminal.say(listed)
        terminal.emit({"studies": STUDIES})
        return 0
    from ..studies.compressed_context import claims, page, study

    kind = "quick" if arguments.quick else "tiny" if arguments.tiny else "full"
    size = {"quick": study.QUICK, "tiny": study.TINY, "full": study.FULL}[kind]
    default = f"runs/study-{arguments.name}" + ("" if kind == "full" else f"-{kind}")
    directory = Path(arguments.directory or default)
    result = study.run_study(directory, size, told=terminal.note)
    judged = claims.verdicts(result)
    path = page.write_page(result, directory / "study.html")
    terminal.say(*_shown(result, judged), f"{path}")
    terminal.emit({
        "study": arguments.name, "directory": str(directory), "page": str(path),
        "verdicts": [each.to_json() for each in judged], "result": result,
    })  # fmt: skip
    return 0


def _shown(result: dict[str, Any], judged: list[Any]) -> list[Any]:
    from ..studies.compressed_context.claims import Rows

    rows = Rows(result)
    missing = rows.missing(result)
    found = Table(box=None, pad_edge=False)
    for name in ("", "bytes a token", "KL", "needles", "copied", "1 hop", "4 hops"):
        found.add_column(name, justify="right" if name else "left")
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        cells = [
            format(spread.mean, how) if (spread := rows.get(part, name, key)) else ""
            for part, key, how in (
                ("english", "bytes_per_token", ",.0f"), ("english", "kl", ".4f"),
                ("english", "needles", ".0%"), ("english", "copied", ".0%"),
                ("chains", "hops_1", ".1%"), ("chains", "hops_4", ".1%"),
            )
        ]  # fmt: skip
        why = missing.get(name)
        found.add_row(name, *([why, *[""] * 5] if why else cells))
    for part, why in result.get("left_out", {}).items():
        found.add_row(f"{part} was left out", why)
    return [found, "", *(f"{each.verdict}: {each.claim}" for each in judged)]
