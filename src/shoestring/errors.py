"""Every error a user can meet: what was given, what was expected, what to do next.

One base class, few children. Each child also derives from the builtin that a caller would
expect to catch, and carries the exit code the command line ends with.
"""

import difflib
from collections.abc import Iterable


class ShoestringError(Exception):
    """Base of all errors raised on purpose.

    what: what happened, with the actual value.  expected: what would have been fine.
    hint: what to do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, expected: object = None, hint: str | None = None) -> None:
        self.what = what
        self.expected = expected
        self.hint = hint
        super().__init__(self._message())

    def _message(self) -> str:
        text = self.what
        if self.expected is not None:
            text += f"; expected {self.expected}"
        if self.hint:
            text += f". {self.hint}"
        return text


class ConfigError(ShoestringError, ValueError):
    """A setting, flag or argument that cannot be used."""

    exit_code = 2


class DataError(ShoestringError, ValueError):
    """Data that is missing, empty, unreadable or does not match the tokenizer."""

    exit_code = 2


class StackError(ShoestringError, ValueError):
    """A model whose stack of blocks cannot be placed, or is used in a way it cannot be run."""

    exit_code = 2


class OutOfBudget(ShoestringError, MemoryError):
    """Nothing fits, or a measured step did not keep to its budget.

    smallest_bytes: the smallest budget that would do.  instant: the moment that decides
    (such as "loss backward").  changes: the cheapest changes that get there.
    """

    exit_code = 3

    def __init__(
        self,
        what: str,
        *,
        expected: object = None,
        hint: str | None = None,
        smallest_bytes: int | None = None,
        instant: str | None = None,
        changes: Iterable[str] = (),
    ) -> None:
        self.smallest_bytes = smallest_bytes
        self.instant = instant
        self.changes = tuple(changes)
        super().__init__(what, expected=expected, hint=hint)


class TrainingDiverged(ShoestringError, ArithmeticError):
    """NaN or infinity in the loss or a gradient; raised before the update is made."""


class StreamOverflow(ShoestringError, OverflowError):
    """A fixed-point stream left its range."""


class ReplayMismatch(ShoestringError, RuntimeError):
    """A replayed block did not give what it gave in forward."""


class CheckpointError(ShoestringError, OSError):
    """Saved state that cannot be written, read or verified."""


class SpillError(ShoestringError, OSError):
    """Tensors that cannot be moved out of memory or brought back: no room on the disk, or a
    directory of no use."""


class PeerLost(ShoestringError, ConnectionError):
    """Another process of the group is gone. rank: which one."""

    def __init__(
        self, what: str, *, rank: int, expected: object = None, hint: str | None = None
    ) -> None:
        self.rank = rank
        super().__init__(what, expected=expected, hint=hint)


def closest(name: str, known: Iterable[str]) -> str | None:
    """A hint naming the nearest known name, or None when nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else None


def nearest_divisors(count: int, wanted: int) -> str:
    """The one or two divisors of `count` next to `wanted`, for a message."""
    known = [n for n in range(1, count + 1) if count % n == 0]
    below, above = [n for n in known if n < wanted], [n for n in known if n > wanted]
    return " or ".join(map(str, [*below[-1:], *above[:1]]))
