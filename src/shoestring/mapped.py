"""Tensors in a mapped file: used like any other, written out by the system when memory is short.

One unlinked temporary file, mapped once. What is handed out lies in it, page by page, and is not
counted by a Tracker (`meter.leave_out`). `release` gives the pages of a tensor back at once; its
values stay in the file and come back when they are touched. The file goes with the last tensor
that lies in it. Under a FakeTensorMode there is no file: tensors are fake, and marked alike.
"""

import mmap
import os
import shutil
import tempfile
import weakref
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager

from .errors import SpillError
from .meter import leave_out
from .units import format_bytes

DIRECTORY_VARIABLE = "SHOESTRING_SPILL_DIR"
_IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_MOUNTS = Path("/proc/self/mountinfo")


class MappedFile:
    """Room for tensors outside memory.

    nbytes: how much; see `room`.  directory: where; by default that of the environment variable
    SHOESTRING_SPILL_DIR, or else the system's for temporary files.

    SpillError when the directory cannot be used, lies in memory itself (tmpfs), or has not
    `nbytes` left: the room is taken at once, so that no later write can fail.
    """

    def __init__(self, nbytes: int, directory: str | os.PathLike[str] | None = None) -> None:
        self.nbytes = pages(nbytes)
        self._used = 0
        self._map: mmap.mmap | None = None
        place = spill_directory(directory)  # what cannot be done is not to be planned either
        if detect_fake_mode() is None and self.nbytes:
            self._map = _mapped(place, self.nbytes)

    @property
    def left(self) -> int:
        """Bytes that were not handed out yet."""
        return self.nbytes - self._used

    def tensor(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of zeros in the file, left out of every Tracker's count.

        SpillError when what is left is too small.
        """
        start, size = self._used, room(shape, dtype)
        if size > self.left:
            raise SpillError(
                f"a tensor of {format_bytes(size)} in a mapped file that has "
                f"{format_bytes(self.left)} left",
                expected=f"no more than the {format_bytes(self.nbytes)} that it was made for",
                hint="Make it with the sum of room(shape, dtype) over all tensors.",
            )
        self._used += size
        made = self._at(start, prod(shape), dtype)
        leave_out([made])  # before anything is done to it: a Tracker counts what it sees
        if self._map is not None and size:
            _PLACES[made.untyped_storage()] = (self._map, start, size)
        return made.view(shape)

    def _at(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        mode = detect_fake_mode()
        if mode is not None:
            # Made as the mode makes its own, past a Tracker, which would count it first.
            with in_kernel_invocation_manager(mode):
                empty = torch.empty(count, dtype=dtype, device="meta")
            return FakeTensor(mode, empty, torch.device("cpu"))
        if count == 0:
            return torch.zeros(0, dtype=dtype)
        assert self._map is not None, "a file that was made under fake tensors"
        # The storage holds the mapping, so that it lives as long as its last tensor.
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start)


# Where the storages of mapped tensors lie: (mapping, start, bytes).
_PLACES: "weakref.WeakKeyDictionary[torch.UntypedStorage, tuple[mmap.mmap, int, int]]" = (
    weakref.WeakKeyDictionary()
)


def release(tensor: Tensor) -> None:
    """Give the pages under a mapped tensor back to the system. Its values stay: they are read
    from the file when next touched. Nothing happens to other tensors."""
    _advise(tensor, "MADV_DONTNEED")


def will_need(tensor: Tensor) -> None:
    """Ask for the pages under a mapped tensor, without waiting. Nothing happens to others."""
    _advise(tensor, "MADV_WILLNEED")


def _advise(tensor: Tensor, advice: str) -> None:
    place = _PLACES.get(tensor.untyped_storage())
    if place is not None:
        mapping, start, size = place
        mapping.madvise(getattr(mmap, advice), start, size)


def room(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> int:
    """Bytes that a tensor takes in a mapped file: whole pages."""
    return pages(prod(shape) * dtype.itemsize)


def pages(nbytes: int) -> int:
    """`nbytes`, rounded up to whole pages."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def spill_directory(directory: str | os.PathLike[str] | None = None) -> Path:
    """Where tensors outside memory go: the directory given, SHOESTRING_SPILL_DIR, or the system's.

    SpillError when it is not a directory, or one that lies in memory.
    """
    path = Path(directory or os.environ.get(DIRECTORY_VARIABLE) or tempfile.gettempdir())
    if not path.is_dir():
        raise SpillError(
            f"there is no directory {path} for tensors outside memory",
            expected="a directory on a disk",
            hint=f"Make it, or name another one in {DIRECTORY_VARIABLE}.",
        )
    kind = filesystem(path)
    if kind in _IN_MEMORY:
        raise SpillError(
            f"{path} lies in memory ({kind}), so what is put there would save none",
            expected="a directory on a disk",
            hint=f"Name one in {DIRECTORY_VARIABLE}.",
        )
    return path


def filesystem(path: Path) -> str | None:
    """The kind of file system a path lies on ("ext4", "tmpfs"), where Linux tells."""
    try:
        device, lines = path.stat().st_dev, _MOUNTS.read_text().splitlines()
    except OSError:
        return None
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return None


def _mapped(directory: Path, nbytes: int) -> mmap.mmap:
    if not hasattr(os, "posix_fallocate") or not hasattr(mmap, "MADV_DONTNEED"):
        raise SpillError(
            "mapped files need posix_fallocate and madvise, which this system does not have",
            expected="Linux",
        )
    free = shutil.disk_usage(directory).free
    if nbytes > free:  # asked first: to find out by taking it would fill the disk for a moment
        raise _no_room(directory, nbytes, f"{format_bytes(free)} are free")
    try:
        # Has no name from the start, or none from now on: nothing is left behind by a kill.
        with tempfile.TemporaryFile(prefix="shoestring-", dir=directory) as file:
            # A write to a mapped page that the disk has no room for kills the process (SIGBUS).
            os.posix_fallocate(file.fileno(), 0, nbytes)
            return mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        raise _no_room(directory, nbytes, error.strerror or str(error)) from error


def _no_room(directory: Path, nbytes: int, why: str) -> SpillError:
    return SpillError(
        f"cannot take {format_bytes(nbytes)} in {directory} for a mapped file: {why}",
        expected="a directory that can be written, with that much room",
        hint=f"Name another one in {DIRECTORY_VARIABLE}.",
    )
