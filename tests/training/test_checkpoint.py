"""A saved directory is whole or absent, and damage is named."""

import os
from pathlib import Path

import pytest

from shoestring import checkpoint
from shoestring.errors import CheckpointError


def save(path: Path, text: str) -> None:
    with checkpoint.atomic_directory(path) as directory:
        (directory / "a.txt").write_text(text)
        (directory / "deep").mkdir()
        (directory / "deep" / "b.txt").write_text(text * 2)


def test_a_saved_directory_verifies_and_leaves_nothing_beside_it(tmp_path):
    save(tmp_path / "model", "one")
    save(tmp_path / "model", "two")
    assert checkpoint.verify(tmp_path / "model")
    assert (tmp_path / "model" / "deep" / "b.txt").read_text() == "twotwo"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_an_interrupted_save_leaves_the_old_one(tmp_path, interruption):
    save(tmp_path / "model", "one")

    def half_a_save():
        with checkpoint.atomic_directory(tmp_path / "model") as directory:
            (directory / "a.txt").write_text("half")
            raise interruption

    with pytest.raises(interruption):
        half_a_save()
    assert checkpoint.verify(tmp_path / "model")
    assert (tmp_path / "model" / "a.txt").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_every_system_call_of_a_save_may_be_the_last(tmp_path):
    """Die at the n-th rename or fsync, for every n: what is found is the old one or the new."""
    calls = 0
    for deadline in range(1, 100):
        place = tmp_path / str(deadline)
        save(place / "model", "one")
        process = os.fork()
        if process == 0:
            _die_at(deadline)
            save(place / "model", "two")
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
        found = checkpoint.newest_complete(place / "model")
        assert checkpoint.verify(found)
        assert (found / "a.txt").read_text() in ("one", "two")
        if not died:
            assert (place / "model" / "a.txt").read_text() == "two"
            break
        calls += 1
        save(place / "model", "three")
        assert (place / "model" / "a.txt").read_text() == "three"
        assert [path.name for path in place.iterdir()] == ["model"]
    assert calls >= 6


def _die_at(deadline: int) -> None:
    count = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == deadline:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    os.fsync = counted(os.fsync)
    os.rename = counted(os.rename)


def test_one_flipped_bit_is_found_and_the_file_named(tmp_path):
    save(tmp_path / "model", "one")
    damaged = tmp_path / "model" / "deep" / "b.txt"
    content = bytearray(damaged.read_bytes())
    content[2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"b\.txt does not match its checksum"):
        checkpoint.verify(tmp_path / "model")


def test_a_missing_and_a_short_file_are_named(tmp_path):
    save(tmp_path / "model", "one")
    (tmp_path / "model" / "a.txt").write_text("on")
    with pytest.raises(CheckpointError, match=r"a\.txt has 2 bytes; expected 3 bytes"):
        checkpoint.verify(tmp_path / "model")
    (tmp_path / "model" / "a.txt").unlink()
    with pytest.raises(CheckpointError, match=r"a\.txt is missing"):
        checkpoint.verify(tmp_path / "model")


def test_a_damaged_manifest_is_an_error_and_a_missing_one_is_not(tmp_path):
    save(tmp_path / "model", "one")
    (tmp_path / "model" / checkpoint.MANIFEST).write_text('{"files": [1')
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.verify(tmp_path / "model")
    (tmp_path / "model" / checkpoint.MANIFEST).unlink()
    assert not checkpoint.verify(tmp_path / "model")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(CheckpointError, match=r"Cannot write .*model"),
        checkpoint.atomic_directory(tmp_path / "file" / "model"),
    ):
        pass


def test_text_is_replaced_whole(tmp_path):
    checkpoint.write_text(tmp_path / "note.json", "one")
    checkpoint.write_text(tmp_path / "note.json", "two")
    assert (tmp_path / "note.json").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["note.json"]
