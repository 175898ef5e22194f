"""A checksum for every file of a directory, and one for the list itself.

Format 2 is a JSON object in canonical form, a line feed, and the SHA-256 of all that in hex, so
that no bit of the manifest can change unseen either. Format 1, which has no checksum of its own,
is still read. A manifest may come from anywhere: names that leave the directory, links, absurd
sizes and everything else out of the ordinary are refused before a file is opened.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..units import format_bytes

MANIFEST = "manifest.json"
FORMAT = 2
_READABLE = (1, 2)
_LARGEST_MANIFEST = 16 << 20
_MOST_FILES = 100_000
_LARGEST_FILE = 1 << 50
_HEX = re.compile(r"[0-9a-f]{64}")
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


@dataclass(frozen=True, slots=True)
class Entry:
    """What a file was when it was written."""

    bytes: int
    sha256: str


def write_manifest(directory: Path, known: Mapping[str, str] | None = None) -> None:
    """Write the manifest of every file below `directory`.

    known: SHA-256 by name of files that were hashed while they were written.
    """
    known = known or {}
    files = {
        name: {
            "bytes": (directory / name).stat().st_size,
            "sha256": known.get(name) or sha256(directory / name),
        }
        for name in _names(directory)
    }
    body = json.dumps({"files": files, "format": FORMAT}, indent=1, sort_keys=True) + "\n"
    text = body + hashlib.sha256(body.encode()).hexdigest() + "\n"
    (directory / MANIFEST).write_bytes(text.encode())


def read_manifest(directory: Path) -> dict[str, Entry] | None:
    """The entries by name, None when there is no manifest. CheckpointError for a bad one."""
    path = directory / MANIFEST
    if path.is_symlink():
        raise _bad(path, "it is a symbolic link")
    if not path.exists():
        return None
    if not path.is_file():
        raise _bad(path, "it is no file")  # to read a pipe would wait for ever
    try:
        if path.stat().st_size > _LARGEST_MANIFEST:
            raise _bad(path, f"it has {format_bytes(path.stat().st_size)}")
        return _parse(path, path.read_bytes())
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _bad(path, str(error)) from error
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def verify(directory: str | Path) -> bool:
    """Hold every file against the manifest. False when there is none; CheckpointError on damage.

    Files that the manifest does not name are left alone: a user may add a note to a model.
    """
    directory = Path(directory)
    entries = read_manifest(directory)
    if entries is None:
        return False
    for name, entry in entries.items():
        _verify_file(directory, name, entry)
    return True


def sha256(path: Path) -> str:
    """Of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(path: Path, content: bytes) -> dict[str, Entry]:
    body, has_own, own = content.rstrip(b"\n").rpartition(b"\n}\n")
    if has_own:
        body += b"\n}\n"
        if content != body + own + b"\n" or hashlib.sha256(body).hexdigest().encode() != own:
            raise _bad(path, "it does not match its own checksum")
    else:
        body = content
    found: Any = json.loads(body.decode())
    if not isinstance(found, dict):
        raise _bad(path, f"it is a {type(found).__name__}")
    version = found.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(
            f"{path} has format {version}", expected=f"at most {FORMAT}",
            hint="It was written by a newer Shoestring: upgrade this one.",
        )  # fmt: skip
    if version not in _READABLE or isinstance(version, bool) or (version == 1) is bool(has_own):
        raise _bad(path, f"its format is {version!r}")
    files = found.get("files")
    if not isinstance(files, dict) or len(files) > _MOST_FILES:
        raise _bad(path, "it lists no files" if not isinstance(files, dict) else "too many files")
    return {_checked_name(path, name): _entry(path, name, entry) for name, entry in files.items()}


def _checked_name(path: Path, name: str) -> str:
    """The name, when it is one of a file below the directory on every system."""
    parts = name.split("/")
    good = (
        0 < len(name) <= 1024
        and name.isprintable()
        and not any(c in name for c in '\\:*?"<>|')
        and all(0 < len(p) <= 255 and not p.endswith((".", " ")) for p in parts)
        and not any(_RESERVED.fullmatch(p) for p in parts)
        and name != MANIFEST
    )
    if not good:
        raise _bad(path, f"it names {name[:80]!r}")
    return name


def _entry(path: Path, name: str, entry: Any) -> Entry:
    if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
        raise _bad(path, f"its entry for {name} is not a size and a checksum")
    size, digest = entry["bytes"], entry["sha256"]
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _LARGEST_FILE:
        raise _bad(path, f"{name} would have {size!r} bytes")
    if not isinstance(digest, str) or not _HEX.fullmatch(digest):
        raise _bad(path, f"the checksum of {name} is {str(digest)[:80]!r}")
    return Entry(size, digest)


def _verify_file(directory: Path, name: str, entry: Entry) -> None:
    file = directory / name
    for place in (file, *file.relative_to(directory).parents):
        # A link could lead anywhere, and what it leads to could change behind our back.
        if (directory / place).is_symlink() and directory / place != directory:
            raise CheckpointError(f"{directory / place} is a symbolic link", expected="a file")
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing", expected=format_bytes(entry.bytes),
            hint="The directory is incomplete.",
        )  # fmt: skip
    try:
        actual = file.stat().st_size
        digest = sha256(file) if actual == entry.bytes else ""
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if actual != entry.bytes:
        raise CheckpointError(f"{file} has {actual} bytes", expected=f"{entry.bytes} bytes")
    if digest != entry.sha256:
        raise CheckpointError(
            f"{file} does not match its checksum",
            expected=f"sha256 {entry.sha256}",
            hint="The file changed after it was written: copy it again or train again.",
        )


def _names(directory: Path) -> list[str]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    names = (path.relative_to(directory).as_posix() for path in paths)
    return sorted(name for name in names if name != MANIFEST)


def _bad(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read ({why})",
        expected=f"a manifest of format {' or '.join(map(str, _READABLE))}",
        hint="The directory is damaged.",
    )
