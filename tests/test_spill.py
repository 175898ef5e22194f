"""Where tensors go when they leave memory: files and their parts."""

import gc
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from shoestring.errors import SpillError
from shoestring.meter import Meter
from shoestring.spill import ALIGNMENT, FilePlace, SpillFile


def spilled() -> int:
    """Open files of ours."""
    links = [each for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    return sum("shoestring-" in str(each.readlink()) for each in links)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.int64]
)
def test_what_comes_back_from_a_file_is_equal_and_fresh(tmp_path, dtype):
    place = FilePlace(str(tmp_path))
    x = torch.randn(5001).to(dtype)
    away = place.put(x)
    away.start()
    first, second = away.back(), away.back()
    assert torch.equal(first, x)
    assert torch.equal(second, x)
    assert first.dtype is dtype
    assert len({t.data_ptr() for t in (x, first, second)}) == 3


def test_nothing_is_left_in_the_directory_and_the_file_closes_with_its_last_user(tmp_path):
    before = spilled()
    place = FilePlace(str(tmp_path))
    assert spilled() == before  # nothing came yet
    away = place.put(torch.ones(2000))
    assert list(tmp_path.iterdir()) == []
    assert spilled() == before + 1
    del place
    assert torch.equal(away.back(), torch.ones(2000))
    del away
    gc.collect()
    assert spilled() == before


def test_parts_are_used_again_and_the_file_does_not_grow(tmp_path):
    place = FilePlace(str(tmp_path))
    for size in (3000, 9000, 5000, 9000, 100, 9000):
        kept = [place.put(torch.full((size,), float(k))) for k in range(4)]
        assert [float(each.back()[-1]) for each in kept] == [0, 1, 2, 3]
        del kept
    assert place._file is not None
    assert os.fstat(place._file.descriptor).st_size <= 4 * (36000 + ALIGNMENT)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40000)), max_size=60))
def test_parts_in_use_never_overlap(tmp_path_factory, moves):
    file = SpillFile(tmp_path_factory.getbasetemp())
    used: list[tuple[int, int]] = []
    for takes, number in moves:
        if takes or not used:
            part = file.take(number)
            assert part[1] - part[0] >= number
            assert all(part[1] <= a or b <= part[0] for a, b in used)
            used.append(part)
        else:
            file.give_back(used.pop(number % len(used)))
    for part in used:
        file.give_back(part)
    assert file.take(1)[0] == 0  # all of it was free, and in one piece


def test_a_forked_process_writes_to_a_file_of_its_own(tmp_path):
    place = FilePlace(str(tmp_path))
    away = place.put(torch.zeros(2000))
    child = os.fork()
    if child == 0:
        place.put(torch.ones(2000))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(away.back(), torch.zeros(2000))


def test_under_fake_tensors_nothing_is_written_and_a_fresh_tensor_comes_back(tmp_path):
    place = FilePlace(str(tmp_path / "nowhere"))
    with FakeTensorMode(), Meter() as meter:
        x = torch.ones(4096)
        away = place.put(x)
        del x
        gone = meter.tracker.live_bytes
        back = away.back()
        there = meter.tracker.live_bytes
    assert (gone, there) == (0, back.nbytes)


def test_a_file_cut_short_behind_our_back_is_an_error(tmp_path):
    place = FilePlace(str(tmp_path))
    away = place.put(torch.ones(5000))
    assert place._file is not None
    os.ftruncate(place._file.descriptor, 100)
    with pytest.raises(SpillError, match=r"cannot read 19\.5 KiB \(20000 bytes\).*shorter"):
        away.back()
