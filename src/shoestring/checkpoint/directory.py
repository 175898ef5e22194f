"""Directories that are either whole or not there, with a checksum for every file.

A directory is written beside its final place, hashed file by file into `manifest.json`, flushed
to the disk and renamed. What stood at the final place goes only after the new one is complete,
so a crash at any moment leaves a directory whose manifest verifies. Nothing is ever unpickled:
weights are safetensors, everything else is text.
"""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import CheckpointError
from ..units import format_bytes
from .manifest import write_manifest


@contextlib.contextmanager
def atomic_directory(path: str | Path, known: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Yield an empty temporary directory that becomes `path` when the body ends well.

    When the body raises, the temporary directory is removed and whatever stood at `path` stays
    untouched. CheckpointError when the disk is full or cannot be written.

    known: SHA-256 by name of files that the body hashes while it writes them; filled meanwhile.
    """
    final = Path(path)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        # What a killed process left behind; a run has one writer, so nobody is using it.
        for stale in final.parent.glob(f".{final.name}.new-*"):
            shutil.rmtree(stale, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.new-", dir=final.parent))
    except OSError as error:
        raise unwritable(final, error) from error
    try:
        yield temporary
        # mkdtemp makes the directory private to its owner; what others may read is for umask.
        temporary.chmod(0o777 & ~_umask())
        write_manifest(temporary, known)
        _flush_tree(temporary)
        _swap(temporary, final)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise unwritable(final, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a small text file so that a reader sees the old text or the new, never a part."""
    final = Path(path)
    temporary = final.with_name(f".{final.name}.new")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(final)
        _flush(final.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(final, error) from error


def newest_complete(path: str | Path) -> Path:
    """`path`, or where a crash between the two renames of a replacement left its old content."""
    final = Path(path)
    old = _old(final)
    return old if not final.exists() and old.exists() else final


def _swap(temporary: Path, final: Path) -> None:
    # A directory cannot be renamed over a full one, so the old one steps aside first; a reader
    # that comes in between finds it through `newest_complete`.
    old = _old(final)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    temporary.rename(final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _old(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def _flush_tree(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        _flush(path)


def _flush(path: Path) -> None:
    """fsync a file, or a directory where the system has such a thing."""
    if path.is_dir() and os.name == "nt":
        return
    # Windows refuses to flush a file that was opened for reading only.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def unwritable(path: Path, error: OSError) -> CheckpointError:
    """What to say when the system refuses to write `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = format_bytes(shutil.disk_usage(path.parent).free)
        return CheckpointError(f"No room to write {path}: {free} free", hint="Free some space.")
    return CheckpointError(f"Cannot write {path}: {error}", hint="Choose another directory.")
