"""Where tensors go when they leave memory, and how they come back.

From a CPU they go to a file, from a CUDA device to pinned memory of the host. A `Place` takes the
elements of a storage and returns what brings them back into a fresh tensor. Each takes care of its
own: slots of a file are used again when what they held is gone, and the file, which has no name,
vanishes with its last user, also when the process is killed.

Files are written and read by calls (`pwrite`, `pread`), never mapped: a full disk is an error that
says so, not a signal that ends the process. What is written passes through the page cache of the
system, which is its own to drop, not memory of the process.

Under fake tensors nothing is written: the tensor is gone, and a fresh one stands for it.
"""

import bisect
import collections
import ctypes
import errno
import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .effort import unseen_bytes
from .errors import SpillError
from .mapped import DIRECTORY_VARIABLE, spill_directory
from .units import format_bytes

ALIGNMENT = 4096
WRITTEN_MEANWHILE = 8
"""Bytes that an elementwise operator writes while one is moved, where nothing is timed: assumed,
about 1 GB/s to a disk against 8 to memory."""


class Away(Protocol):
    """The elements of one storage, out of memory."""

    def back(self) -> Tensor:
        """A fresh one-dimensional tensor of them."""

    def start(self) -> None:
        """They will be asked for soon."""

    def let_go(self) -> None:
        """From now on the memory they came from must be free."""


class Place(Protocol):
    """Somewhere tensors can go."""

    def put(self, flat: Tensor) -> Away:
        """The elements of a storage, one-dimensional."""


# ---- files -------------------------------------------------------------------------------------


class SpillFile:
    """A file without a name, and which parts of it are in use.

    SpillError when the disk takes no more or gives back less than it took.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.process = directory, os.getpid()
        try:
            descriptor, name = tempfile.mkstemp(prefix="shoestring-", dir=directory)
            Path(name).unlink()
        except OSError as error:
            raise _failed(error, f"no file can be made in {directory}") from None
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self.end = 0
        self._free: list[tuple[int, int]] = []  # (first, last) by place, neighbours merged
        self._lock = Lock()
        # Given back at any time, also while the lock is held by the same thread (a collection of
        # garbage in the middle of `take`), so only noted down here.
        self._returned: collections.deque[tuple[int, int]] = collections.deque()

    def take(self, nbytes: int) -> tuple[int, int]:
        """(first, last) of a free part: the first that is large enough, else at the end."""
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        with self._lock:
            self._settle()
            for place, (first, last) in enumerate(self._free):
                if last - first >= size:
                    rest = (first + size, last)
                    self._free[place : place + 1] = [rest] if rest[0] < last else []
                    return first, first + size
            first, self.end = self.end, self.end + size
            return first, self.end

    def give_back(self, part: tuple[int, int]) -> None:
        """A part is free again."""
        self._returned.append(part)

    def _settle(self) -> None:
        while self._returned:
            first, last = self._returned.popleft()
            place = bisect.bisect(self._free, (first, last))
            if place < len(self._free) and self._free[place][0] == last:
                last = self._free.pop(place)[1]
            if place and self._free[place - 1][1] == first:
                place -= 1
                first = self._free.pop(place)[0]
            self._free.insert(place, (first, last))
        if self._free and self._free[-1][1] == self.end:
            self.end = self._free.pop()[0]

    def write(self, first: int, flat: Tensor) -> None:
        """The bytes of a contiguous CPU tensor, at `first`."""
        self._whole(os.pwrite, _bytes_of(flat), first, "write")

    def read(self, first: int, flat: Tensor) -> None:
        """Into a contiguous CPU tensor, from `first` on."""
        self._whole(lambda fd, m, at: os.preadv(fd, [m], at), _bytes_of(flat), first, "read")

    def expect(self, part: tuple[int, int]) -> None:
        """This part will be read soon: the system may fetch it meanwhile."""
        if hasattr(os, "posix_fadvise"):
            first, last = part
            os.posix_fadvise(self.descriptor, first, last - first, os.POSIX_FADV_WILLNEED)

    def _whole(self, move: Callable[..., int], memory: memoryview, at: int, verb: str) -> None:
        """All bytes, however many go at a time."""
        done, wanted = 0, len(memory)
        while done < wanted:
            try:
                moved = move(self.descriptor, memory[done:], at + done)
                if moved == 0:
                    raise OSError(errno.EIO, "the file is shorter than what was written to it")
            except OSError as error:
                raise _failed(
                    error,
                    f"cannot {verb} {format_bytes(wanted)} ({wanted} bytes) of saved tensors, "
                    f"after {format_bytes(self.end)} in a temporary file in {self.directory}",
                ) from None
            done += moved


def _failed(error: OSError, what: str) -> SpillError:
    free = f"Free space there, or set {DIRECTORY_VARIABLE} to a directory on a larger disk"
    if error.errno == errno.EFBIG:
        free = f"Raise the limit on the size of files (ulimit -f), or set {DIRECTORY_VARIABLE}"
    return SpillError(
        f"{what}: {error.strerror or error}",
        expected="a disk with room for what the blocks save",
        hint=f"{free}; recomputing blocks needs no disk.",
    )


def _bytes_of(flat: Tensor) -> memoryview:
    """A contiguous tensor's memory. The tensor must outlive it."""
    assert flat.device.type == "cpu"
    assert flat.is_contiguous()
    if flat.numel() == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr())).cast("B")


class _OnDisk:
    """A part of a file."""

    __slots__ = ("__weakref__", "dtype", "file", "numel", "part")

    def __init__(self, file: SpillFile, flat: Tensor) -> None:
        self.numel, self.dtype = flat.numel(), flat.dtype
        self.file, self.part = file, file.take(flat.nbytes)
        file.write(self.part[0], flat)

    def __del__(self) -> None:
        if hasattr(self, "part"):
            self.file.give_back(self.part)

    def back(self) -> Tensor:
        flat = torch.empty(self.numel, dtype=self.dtype)
        unseen_bytes(WRITTEN_MEANWHILE * flat.nbytes)
        self.file.read(self.part[0], flat)
        return flat

    def start(self) -> None:
        self.file.expect(self.part)

    def let_go(self) -> None:
        pass


class FilePlace:
    """A file in a directory, made when the first tensor comes."""

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory
        self._file: SpillFile | None = None

    def put(self, flat: Tensor) -> Away:
        """Written when this returns. SpillError when the disk takes no more."""
        unseen_bytes(WRITTEN_MEANWHILE * flat.nbytes)
        if isinstance(flat, FakeTensor):
            return _Imagined(flat, 0)
        # A forked process shares the file, but not the account of its parts.
        if self._file is None or self._file.process != os.getpid():
            self._file = SpillFile(spill_directory(self.directory))
        return _OnDisk(self._file, flat)


# ---- host memory -------------------------------------------------------------------------------


class HostPlace:
    """Pinned memory of the host, reached on a stream beside the one that computes."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def put(self, flat: Tensor) -> Away:
        """The copy is on its way when this returns; its source is held until `let_go`."""
        unseen_bytes(flat.nbytes)
        if isinstance(flat, FakeTensor):
            return _Imagined(flat, 1)
        stream = self._streams.get(flat.device)
        if stream is None:
            stream = self._streams[flat.device] = torch.cuda.Stream(flat.device)
        return _OnHost(flat, stream)


class _OnHost:
    """A pinned copy, perhaps still being made, perhaps coming back already."""

    __slots__ = ("__weakref__", "coming", "device", "host", "made", "source", "stream")

    def __init__(self, flat: Tensor, stream: Any) -> None:
        self.device, self.stream = flat.device, stream
        self.coming: tuple[Tensor, Any] | None = None
        self.source: Tensor | None = flat
        self.host = torch.empty(flat.numel(), dtype=flat.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.host.copy_(flat, non_blocking=True)
            self.made = stream.record_event()

    def let_go(self) -> None:
        # What is computed from here on waits for the copy, so its source may be overwritten.
        if self.source is not None:
            torch.cuda.current_stream(self.device).wait_event(self.made)
            self.source = None

    def start(self) -> None:
        if self.source is None and self.coming is None:
            flat = torch.empty(self.host.numel(), dtype=self.host.dtype, device=self.device)
            # Its memory may have been somebody else's, who computes still.
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                flat.copy_(self.host, non_blocking=True)
                self.coming = flat, self.stream.record_event()

    def back(self) -> Tensor:
        if self.source is not None:
            return self.source
        self.start()
        assert self.coming is not None
        (flat, event), self.coming = self.coming, None
        torch.cuda.current_stream(self.device).wait_event(event)
        return flat

    def __del__(self) -> None:
        # Neither end of a copy that is under way may be given to somebody else.
        self.let_go()
        if self.coming is not None:
            torch.cuda.current_stream(self.device).wait_event(self.coming[1])


# ---- under fake tensors ------------------------------------------------------------------------


class _Imagined:
    """What stands for content under fake tensors: holds what the real one would hold in memory."""

    __slots__ = ("__weakref__", "ahead", "coming", "device", "dtype", "numel", "source")

    def __init__(self, flat: Tensor, ahead: int) -> None:
        self.numel, self.dtype, self.device = flat.numel(), flat.dtype, flat.device
        self.ahead = ahead  # whether copies are made while others compute
        self.source = flat if ahead else None
        self.coming: Tensor | None = None

    def let_go(self) -> None:
        self.source = None

    def start(self) -> None:
        if self.ahead and self.source is None and self.coming is None:
            self.coming = self._fresh()

    def back(self) -> Tensor:
        if self.source is not None:
            return self.source
        flat, self.coming = self.coming, None
        return self._fresh() if flat is None else flat

    def _fresh(self) -> Tensor:
        flat = torch.empty(self.numel, dtype=self.dtype, device=self.device)
        unseen_bytes((1 if self.ahead else WRITTEN_MEANWHILE) * flat.nbytes)
        return flat
