"""Arguments of the verbs: what all of them share, and how tyro reads them."""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import tyro
from tyro.conf import FlagCreatePairsOff

from ..errors import ConfigError

T = TypeVar("T")
_BOX = re.compile(r"[\u2500-\u257f]")  # the frame that tyro draws around its messages
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, kw_only=True)
class Common:
    """Flags of every verb."""

    json: FlagCreatePairsOff[bool] = False
    """JSON on stdout, one object or one a line; text for people goes to stderr."""
    debug: FlagCreatePairsOff[bool] = False
    """Show the traceback behind an error."""


def parse(kind: type[T], verb: str, args: Sequence[str], default: T | None = None) -> T:
    """The arguments of a verb. ConfigError for bad ones; SystemExit(0) after printing help."""
    said = io.StringIO()
    start = tyro.MISSING_NONPROP if default is None else default
    try:
        with contextlib.redirect_stderr(said):
            value = tyro.cli(kind, prog=f"shoestring {verb}", args=args, default=start)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_plain(said.getvalue())) from None
    sys.stderr.write(said.getvalue())
    return value


def _plain(boxed: str) -> str:
    """tyro's message without title, frame and colours."""
    lines = [_BOX.sub("", _ESCAPES.sub("", line)).strip() for line in boxed.splitlines()]
    return "\n".join(line for line in lines[1:] if line)
