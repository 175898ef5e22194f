"""Which studies there are, and what each of them brings: one module `command` in its folder.

The list is read for `--help` and by `shoestring study` alone, so nothing heavy is imported here.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from .verdict import Verdict

SIZES = ("full", "quick", "tiny")
Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Listed:
    """asks: what it is about, in one line.  folder: below this package.  options: of the verb, that
    it takes."""

    asks: str
    folder: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Shown:
    """What a terminal is shown: a table, and lines below it."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    lines: Sequence[str] = field(default_factory=tuple)


class Command(Protocol):
    """What the module `command` of a study has."""

    def run(
        self, directory: Path, size: str, told: Told, options: Mapping[str, str]
    ) -> dict[str, Any]:
        """Run what is not there yet; returns the result as plain JSON."""

    def verdicts(self, result: Mapping[str, Any]) -> list[Verdict]:
        """Of every claim."""

    def write_page(self, result: Mapping[str, Any], out: Path) -> Path:
        """The result as a page of its own."""

    def shown(self, result: Mapping[str, Any]) -> Shown:
        """The result in a terminal."""


STUDIES = {
    "compressed-context": Listed(
        "what a compressed context loses, in KL, needles, copies and in steps",
        "compressed_context",
    ),
    "diffusion-blocks": Listed(
        "what training block by block costs and saves, against the arms its paper left out",
        "diffusion_blocks", options=("digits",),
    ),
}  # fmt: skip


def command_of(name: str) -> Command:
    """The study of that name; imports what it needs."""
    module = importlib.import_module(f".{STUDIES[name].folder}.command", __package__)
    return cast(Command, module)
