"""Tensors in a mapped file: not counted, not resident once released, never lost."""

import errno
import gc
import mmap
import os
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from shoestring import mapped
from shoestring.errors import SpillError
from shoestring.mapped import MappedFile, filesystem, release, room, spill_directory
from shoestring.meter import Tracker
from shoestring.planner.quick import QuickFakeMode
from shoestring.rss import status_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.int64]
MIB = 1 << 20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (4, 5), (2, 0, 3)])
def test_tensors_hold_what_is_written_and_do_not_overlap(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    file = MappedFile(3 * max(1, room(shape, dtype)), tmp_path)
    made = [file.tensor(shape, dtype) for _ in range(3)]
    assert all(t.shape == shape and t.dtype == dtype and not t.any() for t in made)
    for number, each in enumerate(made):
        each.fill_(number + 1)
    for each in made:
        release(each)
    assert all((each == number + 1).all() for number, each in enumerate(made))
    assert list(tmp_path.iterdir()) == []  # it has no name


def test_they_are_not_counted_and_their_copies_are(tmp_path: Path) -> None:
    with Tracker() as tracker:
        inside = MappedFile(4096, tmp_path).tensor((10, 10), torch.float32)
        inside.add_(1)
        assert tracker.live_bytes == 0
        copy = inside * 2
        assert tracker.live_bytes == copy.nbytes


def test_under_fake_tensors_nothing_is_written_and_the_same_is_counted() -> None:
    with QuickFakeMode(), Tracker() as tracker:
        # No disk has this much: room is not even asked for.
        inside = MappedFile(1 << 60).tensor((1 << 28, 1 << 28), torch.float32)
        assert isinstance(inside, FakeTensor)
        inside.add_(1)
        release(inside)
        assert tracker.live_bytes == 0
        copy = inside[:10, :10] * 2
        assert tracker.live_bytes == copy.nbytes


def test_released_pages_leave_memory(tmp_path: Path) -> None:
    file = MappedFile(64 * MIB, tmp_path)
    made = file.tensor((16 * MIB,), torch.float32)
    before = status_bytes("RssFile")
    made.fill_(3)
    touched = status_bytes("RssFile")
    release(made)
    assert touched - before >= 63 * MIB
    assert status_bytes("RssFile") - before <= MIB
    assert made[0] == made[-1] == 3


def test_the_file_lives_as_long_as_its_last_tensor(tmp_path: Path) -> None:
    def in_file() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    gc.collect()
    opened = len(list(Path("/proc/self/fd").iterdir()))
    file = MappedFile(2 * mmap.PAGESIZE, tmp_path)
    one, other = file.tensor((7,), torch.float32), file.tensor((7,), torch.float32)
    del file, one
    other.fill_(5)
    assert in_file() == 1
    view = other[2:]
    del other
    assert view.tolist() == [5.0] * 5
    del view
    assert in_file() == 0
    assert len(list(Path("/proc/self/fd").iterdir())) == opened


def test_more_than_there_is_room_for_is_refused(tmp_path: Path) -> None:
    file = MappedFile(mmap.PAGESIZE, tmp_path)
    file.tensor((1,), torch.uint8)
    with pytest.raises(SpillError, match=r"a tensor of 4.0 KiB in a mapped file that has 0 B left"):
        file.tensor((1,), torch.uint8)


def test_a_disk_without_room_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SpillError, match=r"cannot take 1048576.0 TiB .*are free"):
        MappedFile(1 << 60, tmp_path)


def test_a_disk_that_fills_meanwhile_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SpillError, match="No space left on device"):
        MappedFile(4096, tmp_path)


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpillError, match="there is no directory"):
        MappedFile(4096, tmp_path / "none")


def test_a_directory_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "filesystem", lambda path: "tmpfs")
    with pytest.raises(SpillError, match=r"lies in memory \(tmpfs\)"):
        MappedFile(4096, tmp_path)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
def test_the_kind_of_a_file_system_is_told() -> None:
    assert filesystem(Path("/dev/shm")) == "tmpfs"


def test_the_directory_is_given_or_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOESTRING_SPILL_DIR", str(tmp_path))
    assert spill_directory() == tmp_path
    (tmp_path / "other").mkdir()
    assert spill_directory(tmp_path / "other") == tmp_path / "other"
