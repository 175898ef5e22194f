"""Kernels in C, compiled where they run, with the system's compiler, when first asked for.

`library()` is what is compiled of the sources here, or None: then `reason()` says why, and what
calls it computes without. Nothing here raises; no compiler is no mistake. `SHOESTRING_NATIVE=0`
turns it off, `CC` names another compiler.

What was compiled is kept in `$XDG_CACHE_HOME/shoestring` (`~/.cache/shoestring`), under a hash of
the sources, the flags, the compiler and the processor, so that a home shared by machines holds one
for each. It is written whole or not at all, and carries its own checksum: what was cut short is
compiled anew rather than run. The folder has to be the user's alone: code that others could have
written is not loaded.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from pathlib import Path

_SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".c", ".h"))
_ALWAYS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-shared", "-fPIC")
_TRIED = (
    ("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",),
    ("-mcpu=native",), ("-fopenmp",), (),
)  # fmt: skip
_SECONDS = 120  # for a compiler
_DIGEST = 32  # bytes of a checksum

_lock = threading.Lock()
_found: dict[tuple[str, ...], ctypes.CDLL | str] = {}


def library(*flags: str) -> ctypes.CDLL | None:
    """The compiled source, with further flags; None where that cannot be. Tried once a process."""
    found = _outcome(flags)
    return None if isinstance(found, str) else found


def reason(*flags: str) -> str | None:
    """Why `library` is None; None where it is not."""
    found = _outcome(flags)
    return found if isinstance(found, str) else None


def forget() -> None:
    """Try anew when next asked."""
    with _lock:
        _found.clear()


class _CannotError(Exception):
    """Says why there is no library."""


# RuntimeError: of a user without a home. AttributeError: of a library without our functions.
_EXPECTED = (
    _CannotError, OSError, subprocess.SubprocessError, ValueError, RuntimeError, AttributeError
)  # fmt: skip


def _outcome(flags: tuple[str, ...]) -> ctypes.CDLL | str:
    with _lock:
        if flags not in _found:
            try:
                _found[flags] = _loaded(flags)
            except _EXPECTED as error:
                _found[flags] = str(error) or type(error).__name__
        return _found[flags]


def _loaded(flags: tuple[str, ...]) -> ctypes.CDLL:
    if os.environ.get("SHOESTRING_NATIVE") == "0":
        raise _CannotError("switched off by SHOESTRING_NATIVE=0")
    if ctypes.sizeof(ctypes.c_void_p) != 8 or os.name != "posix":
        raise _CannotError("kernels are for POSIX and pointers of 8 bytes")
    compiler = _compiler()
    version = _run([*compiler, "--version"]).stdout
    folder, source = _folder(), b"|".join(path.read_bytes() for path in _SOURCES)
    said = ""
    for tried in _TRIED:
        all_flags = (*_ALWAYS, *tried, *flags)
        parts = (source, " ".join([*compiler, *all_flags]).encode(), version, _processor())
        path = folder / f"row_code-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:32]}.so"
        if not _intact(path):
            done = _compile([*compiler, *all_flags], path)
            if done.returncode:
                said = said or done.stderr.decode(errors="replace").strip()[:500]
                continue
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:  # such as no library of OpenMP
            said = said or str(error)
            continue
        _ = library.row_code_level  # it is what it should be
        return library
    raise _CannotError(f"{compiler[0]} does not compile the kernels: {said}")


def _compiler() -> list[str]:
    given = os.environ.get("CC")
    if given:
        words = shlex.split(given)
        if not words or shutil.which(words[0]) is None:
            raise _CannotError(f"no compiler: CC = {given!r} is no program")
        return words
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    raise _CannotError("no compiler: none of cc, gcc, clang is on the PATH, and CC is not set")


def _run(words: list[str]) -> subprocess.CompletedProcess[bytes]:
    # In English, so that the same compiler says the same, whatever the user's language.
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(
        words, capture_output=True, check=False, timeout=_SECONDS, env=environment,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


@functools.cache
def _processor() -> bytes:
    """What "native" stands for."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        lines = []
    kinds = (b"model name", b"flags", b"Features", b"CPU part")
    told = sorted({line for line in lines if line.startswith(kinds)})
    return b"|".join([platform.machine().encode(), platform.processor().encode(), *told])


def _folder() -> Path:
    """The folder for what was compiled, made where it is not there; the user's alone."""
    given = Path(os.environ.get("XDG_CACHE_HOME") or "")
    home = given if given.is_absolute() else Path.home() / ".cache"  # as its standard has it
    folder = home / "shoestring"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(folder)
    return folder


def _check_owner(path: Path) -> None:
    """For code that others could have written."""
    found = path.lstat()
    kind = "folder" if path.suffix != ".so" else "file"
    if stat.S_ISLNK(found.st_mode):
        raise _CannotError(f"{path} is a link; expected a {kind}")
    if found.st_uid != os.getuid():
        raise _CannotError(f"{path} belongs to user {found.st_uid}; expected {os.getuid()}")
    if found.st_mode & 0o022:
        raise _CannotError(f"others may write to {path}; expected a {kind} of the user alone")


def _intact(path: Path) -> bool:
    """A file that is there and ends in the checksum of the rest."""
    if not path.exists():
        return False
    _check_owner(path)
    content = path.read_bytes()
    return hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]


def _compile(words: list[str], path: Path) -> subprocess.CompletedProcess[bytes]:
    """To the path, by renaming, so that a file there is always whole."""
    handle, made = tempfile.mkstemp(dir=path.parent, prefix="making-", suffix=".so")
    os.close(handle)
    at = Path(made)
    try:
        sources = [str(source) for source in _SOURCES if source.suffix == ".c"]
        done = _run([*words, *sources, "-o", made, "-lm"])
        if done.returncode == 0:
            content = at.read_bytes()
            if not content:
                raise _CannotError(f"{words[0]} says it is done, but wrote nothing")
            # A loader reads what the header of the file speaks of; the checksum lies behind that.
            at.write_bytes(content + hashlib.sha256(content).digest())
            at.chmod(0o700)
            at.replace(path)
    finally:
        at.unlink(missing_ok=True)
    return done
