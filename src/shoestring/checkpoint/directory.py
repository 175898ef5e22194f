"""Directories that are either whole or not there, with a checksum for every file.

A directory is written beside its final place, hashed file by file into `manifest.json`, flushed
to the disk and renamed. What stood at the final place goes only after the new one is complete,
so a crash at any moment leaves a directory whose manifest verifies. Nothing is ever unpickled:
weights are safetensors, everything else is text.
"""

import contextlib
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import CheckpointError
from ..units import format_bytes
from .held import hold
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
        make_directory(final.parent)
        # What a killed process left behind; a run has one writer, so nobody is using it.
        for stale in final.parent.glob(f".{glob.escape(final.name)}.new-*"):
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
    """Write a small text file so that a reader sees the old text or the new, never a part.

    Any number of writers may do so at once: each has a file of its own until it is renamed.
    """
    try:
        content = text.encode()
    except UnicodeError as error:
        raise CheckpointError(
            f"Cannot write {path}: {error}", expected="text that UTF-8 can hold"
        ) from error
    write_bytes(path, content)


def write_bytes(path: str | Path, content: bytes) -> None:
    """The same for a small file of any content."""
    final = Path(path)
    temporary: Path | None = None
    try:
        _sweep_files(final)
        descriptor, temporary = _own_file(final)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            # mkstemp makes the file private to its owner; what others may read is for umask.
            temporary.chmod(0o666 & ~_umask())
            os.fsync(file.fileno())
            if os.name != "nt":  # still held, so that nobody takes it for a leftover
                temporary.replace(final)
        if os.name == "nt":  # where nothing open can be renamed
            temporary.replace(final)
        temporary = None
        _flush(final.parent)
    except OSError as error:
        raise unwritable(final, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def make_directory(path: Path) -> None:
    """Make a directory and what is missing above it, so that a power cut takes none of them."""
    made = []
    place = path
    while not place.exists() and place != place.parent:
        made.append(place)
        place = place.parent
    path.mkdir(parents=True, exist_ok=True)
    for each in reversed(made):
        # A directory may let its entries be made and not be read: it is then not ours to flush.
        with contextlib.suppress(PermissionError):
            _flush(each.parent)


def newest_complete(path: str | Path) -> Path:
    """`path`, or where a crash between the two renames of a replacement left its old content."""
    final = Path(path)
    old = _old(final)
    return old if not final.exists() and old.exists() else final


def _own_file(final: Path) -> tuple[int, Path]:
    """A new file beside `final`, open and held."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f".{final.name}.new-", dir=final.parent)
        with contextlib.suppress(OSError):  # a file system without locks has no sweep either
            hold(descriptor)
        if os.name == "nt" or os.fstat(descriptor).st_nlink:
            return descriptor, Path(name)
        os.close(descriptor)  # swept away by another writer before it was held


def _sweep_files(final: Path) -> None:
    """Remove what killed writers of `final` left behind; a living one holds its file."""
    for stale in final.parent.glob(f".{glob.escape(final.name)}.new-*"):
        with contextlib.suppress(OSError):
            if stale.is_symlink() or not stale.is_file():
                continue  # nothing that a writer makes
            descriptor = os.open(stale, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                hold(descriptor)  # OSError: its writer is alive
                if os.name != "nt":
                    stale.unlink()
            finally:
                os.close(descriptor)
            if os.name == "nt":  # where the system itself refuses to remove what is open
                stale.unlink()


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
        return CheckpointError(f"No room to write {path}: {_free(path)}", hint="Free some space.")
    return CheckpointError(f"Cannot write {path}: {error}", hint="Choose another directory.")


def _free(path: Path) -> str:
    """The room on the disk of `path`, of which nothing need exist yet."""
    for place in path.absolute().parents:
        with contextlib.suppress(OSError):
            return f"{format_bytes(shutil.disk_usage(place).free)} free"
    return "the disk is full"
