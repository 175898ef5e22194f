"""Where a verb's words go: results, progress, JSON and errors.

Without --json, results are for people, on stdout, and progress is on stderr. With --json, stdout
carries JSON alone and everything for people goes to stderr.
"""

import json
import math
import sys
from typing import Any

from rich.console import Console, RenderableType

from ..errors import OutOfBudget
from ..units import format_bytes


class Terminal:
    """Output of one command. json: whether stdout is for a machine."""

    def __init__(self, *, json: bool = False) -> None:
        self.json = json
        self.progress = Console(stderr=True, highlight=False)
        self.results = self.progress if json else Console(highlight=False)

    def say(self, *parts: RenderableType) -> None:
        """Part of the result, for people."""
        for part in parts:
            self.results.print(part, markup=False, soft_wrap=isinstance(part, str))

    def note(self, *parts: RenderableType) -> None:
        """What is going on, for people."""
        for part in parts:
            self.progress.print(part, markup=False, soft_wrap=isinstance(part, str))

    def emit(self, record: dict[str, Any]) -> None:
        """One line of JSON on stdout; nothing without --json. NaN and infinity become null."""
        if self.json:
            sys.stdout.write(json.dumps(_finite(record), allow_nan=False) + "\n")
            sys.stdout.flush()

    def complain(self, message: str) -> None:
        """What went wrong, for people."""
        self.progress.print(f"error: {message}", style="red", markup=False, soft_wrap=True)

    def error(self, error: BaseException, *, code: int) -> None:
        """What went wrong: a message, and with --json also an object with the exit code."""
        kind, message = type(error).__name__, str(error) or type(error).__name__
        record: dict[str, Any] = {"kind": kind, "message": message, "exit_code": code}
        self.complain(message)
        if isinstance(error, OutOfBudget):
            record |= _budget_details(error)
            self._note_budget(error)
        self.emit({"error": record})

    def _note_budget(self, error: OutOfBudget) -> None:
        if error.smallest_bytes is not None:
            self.note(f"  smallest budget that works: {format_bytes(error.smallest_bytes)}")
        if error.instant:
            self.note(f"  the instant that decides: {error.instant}")
        for change in error.changes:
            self.note(f"  would help: {change}")


def _budget_details(error: OutOfBudget) -> dict[str, Any]:
    return {
        "smallest_bytes": error.smallest_bytes,
        "instant": error.instant,
        "changes": list(error.changes),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
