"""Directories that are either whole or not there, with a checksum for every file.

A directory is written beside its final place, hashed file by file into `manifest.json`, flushed
to the disk and renamed. What stood at the final place goes only after the new one is complete,
so a crash at any moment leaves a directory whose manifest verifies. Nothing is ever unpickled:
weights are safetensors, everything else is text.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import CheckpointError
from .units import format_bytes

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 20


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary directory that becomes `path` when the body ends well.

    When the body raises, the temporary directory is removed and whatever stood at `path` stays
    untouched. CheckpointError when the disk is full or cannot be written.
    """
    final = Path(path)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        # What a killed process left behind; a run has one writer, so nobody is using it.
        for stale in final.parent.glob(f".{final.name}.new-*"):
            shutil.rmtree(stale, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.new-", dir=final.parent))
    except OSError as error:
        raise _unwritable(final, error) from error
    try:
        yield temporary
        # mkdtemp makes the directory private to its owner; what others may read is for umask.
        temporary.chmod(0o777 & ~_umask())
        write_manifest(temporary)
        _flush_tree(temporary)
        _swap(temporary, final)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise _unwritable(final, error) from error
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
        raise _unwritable(final, error) from error


def write_manifest(directory: Path) -> None:
    """Hash every file below `directory` (sha256) into its manifest, with sizes in bytes."""
    files = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": _sha256(directory / name)}
        for name in _names(directory)
    }
    text = json.dumps({"format": 1, "files": files}, indent=1, sort_keys=True)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def verify(directory: str | Path) -> bool:
    """Hold every file against the manifest. False when there is none; CheckpointError on damage.

    Files that the manifest does not name are left alone: a user may add a note to a model.
    """
    directory = Path(directory)
    manifest = directory / MANIFEST
    if not manifest.exists():
        return False
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{manifest} cannot be read ({error})", hint="The directory is damaged."
        ) from error
    for name, (size, digest) in expected.items():
        _verify_file(directory / name, size, digest)
    return True


def newest_complete(path: str | Path) -> Path:
    """`path`, or where a crash between the two renames of a replacement left its old content."""
    final = Path(path)
    old = _old(final)
    return old if not final.exists() and old.exists() else final


def _verify_file(file: Path, size: int, digest: str) -> None:
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing", expected=format_bytes(size), hint="The directory is incomplete."
        )
    actual = file.stat().st_size
    if actual != size:
        raise CheckpointError(f"{file} has {actual} bytes", expected=f"{size} bytes")
    if _sha256(file) != digest:
        raise CheckpointError(
            f"{file} does not match its checksum",
            expected=f"sha256 {digest}",
            hint="The file changed after it was written: copy it again or train again.",
        )


def _names(directory: Path) -> list[str]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    names = (path.relative_to(directory).as_posix() for path in paths)
    return sorted(name for name in names if name != MANIFEST)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


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


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    if error.errno == errno.ENOSPC:
        free = format_bytes(shutil.disk_usage(path.parent).free)
        return CheckpointError(f"No room to write {path}: {free} free", hint="Free some space.")
    return CheckpointError(f"Cannot write {path}: {error}", hint="Choose another directory.")
