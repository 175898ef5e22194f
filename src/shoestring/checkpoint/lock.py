"""One process at a time in a run directory.

The operating system holds the lock and lets it go when the process ends, however it ends: a run
that was killed leaves nothing to clean up.
"""

import errno
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Self

from ..errors import CheckpointError
from .directory import make_directory, unwritable
from .held import hold

_NAME = ".lock"


class Lock:
    """Held while entered. CheckpointError when another process has the directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        path = self.directory / _NAME
        try:
            make_directory(self.directory)
            # What is written here must not go where a link in somebody's directory points.
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            descriptor = os.open(path, flags, 0o644)
        except OSError as error:
            if error.errno == errno.ELOOP and path.is_symlink():
                raise _no_file(path, "a symbolic link") from error
            raise unwritable(self.directory, error) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise _no_file(path, "a pipe or a device")
        try:
            hold(descriptor)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                os.close(descriptor)
                raise unwritable(path, error) from error  # a file system without locks, say
            owner = os.read(descriptor, 64).decode(errors="replace").strip()
            os.close(descriptor)
            raise CheckpointError(
                f"{self.directory} is in use by another process ({owner or 'unknown'})",
                expected="one run at a time in a directory",
                hint="Wait until it ends, or give another run.directory.",
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()}".encode())
        self._descriptor = descriptor
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The file stays: to remove it would take the name from under a process that waits.
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _no_file(path: Path, found: str) -> CheckpointError:
    return CheckpointError(f"{path} is {found}", expected="a file", hint="Remove it.")
