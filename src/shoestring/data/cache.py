"""Things that cost time to compute and can be thrown away: trained tokenizers, encoded text.

An entry is a directory named by the hash of what it was made from. It is written beside its place
and renamed when it is complete, so a reader sees a whole entry or none, and two processes that
make the same entry at once both end up with one of the two equal copies. No pickle anywhere.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError

_VARIABLE = "SHOESTRING_CACHE"


def default_cache() -> Path:
    """`$SHOESTRING_CACHE`, or a folder `shoestring` where this system keeps caches."""
    if chosen := os.environ.get(_VARIABLE):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "shoestring")


def entry_name(*parts: str) -> str:
    """A directory name that stands for `parts`; no two different lists share one."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part.encode()
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


@contextlib.contextmanager
def new_entry(target: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes `target`, replacing nothing that is already there.

    On any error it is removed. DataError when the cache cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        yield temporary
        for path in temporary.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        _publish(temporary, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise _unwritable(target, error) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, target: Path) -> None:
    try:
        temporary.rename(target)
    except OSError:
        # A rename onto a full directory fails: somebody else made the same entry meanwhile.
        if not target.exists():
            raise


def _unwritable(target: Path, error: OSError) -> DataError:
    return DataError(
        f"the cache {target.parent} cannot be written ({error.strerror or error})",
        expected="a folder with free space that I may write",
        hint=f"Set the environment variable {_VARIABLE} to another folder.",
    )
