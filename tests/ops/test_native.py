"""Without a compiler, or with a broken one, there is no kernel and no error, only a reason."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shoestring.errors import ConfigError
from shoestring.ops import native, row_kernel

SOURCE = Path(native.__file__).parents[3]
QUICK = ("-O0", "-DROW_CODE_PORTABLE")  # to compile


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, and nothing remembered from or for others."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SHOESTRING_NATIVE", raising=False)
    native.forget()
    yield tmp_path / "cache" / "shoestring"
    native.forget()


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """The one file that was compiled, in a folder; skipped where none can be."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        native.forget()
        if native.library(*QUICK) is None:
            pytest.skip(f"no compiler: {native.reason(*QUICK)}")
    return folder / "shoestring"


@pytest.fixture
def compiled(once, cache):
    """A copy of that file, in the cache."""
    shutil.copytree(once, cache)
    (path,) = cache.iterdir()
    return path


def script(tmp_path, text):
    """A compiler, for `CC`."""
    path = tmp_path / "some cc"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return f"'{path}'"


def test_it_can_be_switched_off(monkeypatch, cache):
    monkeypatch.setenv("SHOESTRING_NATIVE", "0")
    assert native.library(*QUICK) is None
    assert "SHOESTRING_NATIVE" in native.reason(*QUICK)
    assert not row_kernel.available()
    assert not cache.exists()


def test_no_compiler_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native.library(*QUICK) is None
    assert "PATH" in native.reason(*QUICK)


def test_a_compiler_that_is_not_there_is_a_reason(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    assert native.library(*QUICK) is None
    assert "no-such-compiler" in native.reason(*QUICK)
    monkeypatch.setenv("CC", "'")
    native.forget()
    assert native.library(*QUICK) is None


def test_a_compiler_that_fails_is_a_reason_and_asked_once(monkeypatch, tmp_path, cache):
    monkeypatch.setenv(
        "CC", script(tmp_path, f"echo x >>{tmp_path}/asked; echo broken >&2; exit 1")
    )
    for _ in range(3):
        assert native.library(*QUICK) is None
        assert "broken" in native.reason(*QUICK)
    assert (tmp_path / "asked").read_text().count("x") == 1 + len(native._TRIED)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("does", [":", "echo nonsense", 'echo nonsense >"$out"', ': >"$out"'])
def test_a_compiler_that_only_says_it_is_done_is_a_reason(monkeypatch, tmp_path, does):
    text = f'while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done\n[ -z "$out" ] || {does}'
    monkeypatch.setenv("CC", script(tmp_path, text))
    assert native.library(*QUICK) is None
    assert native.reason(*QUICK)


def test_without_a_kernel_calls_say_why(monkeypatch):
    monkeypatch.setenv("SHOESTRING_NATIVE", "0")
    row_kernel._functions.cache_clear()
    with pytest.raises(ConfigError, match="switched off"):
        row_kernel.level()


def test_what_was_compiled_is_used_again(monkeypatch, compiled):
    before = compiled.stat().st_mtime_ns
    assert native.library(*QUICK) is not None
    assert native.reason(*QUICK) is None
    assert compiled.stat().st_mtime_ns == before
    assert [compiled] == list(compiled.parent.iterdir())
    assert compiled.stat().st_mode & 0o077 == 0
    assert compiled.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("kept", [0, 3000, -1])
def test_what_was_cut_short_is_compiled_anew(compiled, kept):
    whole = compiled.read_bytes()
    compiled.unlink()  # it is loaded: its pages may not change
    compiled.write_bytes(whole[:kept])
    compiled.chmod(0o700)
    assert native.library(*QUICK) is not None
    assert _whole(compiled)


def test_what_was_changed_is_compiled_anew(compiled):
    content = bytearray(compiled.read_bytes())
    content[len(content) // 2] ^= 1
    compiled.unlink()
    compiled.write_bytes(content)
    compiled.chmod(0o700)
    assert native.library(*QUICK) is not None
    assert _whole(compiled)


def _whole(path):
    content = path.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def test_a_folder_that_others_may_write_to_is_refused(compiled):
    compiled.parent.chmod(0o777)
    assert native.library(*QUICK) is None
    assert "others may write" in native.reason(*QUICK)


def test_a_file_that_others_may_write_to_is_refused(compiled):
    compiled.chmod(0o722)
    assert native.library(*QUICK) is None
    assert "others may write" in native.reason(*QUICK)


def test_a_folder_of_another_user_is_refused(compiled, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert native.library(*QUICK) is None
    assert "belongs to user" in native.reason(*QUICK)


def test_a_link_for_a_folder_is_refused(compiled, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "shoestring").symlink_to(compiled.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert native.library(*QUICK) is None
    assert "link" in native.reason(*QUICK)


def test_a_file_for_a_folder_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native.library(*QUICK) is None
    assert native.reason(*QUICK)


def test_other_flags_are_another_file(compiled):
    assert native.library("-O0") is not None
    assert len(list(compiled.parent.iterdir())) == 2


def test_processes_may_compile_at_the_same_time(compiled):
    compiled.unlink()
    code = f"from shoestring.ops import native; raise SystemExit(native.reason(*{QUICK}))"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert [compiled] == list(compiled.parent.iterdir())
    assert _whole(compiled)
