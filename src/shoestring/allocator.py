"""C allocator settings that keep a process's memory close to the tensors it holds. No torch here.

glibc raises its mmap threshold (up to 32 MiB) as soon as a large block is freed; from then on
large tensors live in the heap and freed ones are not returned to the system. Setting any of its
thresholds by hand switches that off. It reads them when a process starts, so they have to be in
the environment before: the command line restarts itself with them, `make` sets them.

Source: mallopt(3), "Environment variables" and M_MMAP_THRESHOLD.
"""

import ctypes
import os
from pathlib import Path

SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
# Any one of these, set by hand, keeps the threshold from growing.
_SWITCHES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
_OTHERS = ("jemalloc", "tcmalloc", "mimalloc")


def tuned_environment() -> dict[str, str]:
    """Variables to start a process with; empty where glibc's allocator is not in use.

    What the user set already is kept.
    """
    if _reason_not() is not None:
        return {}
    return {name: os.environ.get(name, value) for name, value in SETTINGS.items()}


def is_tuned() -> bool:
    """Whether this process was started with settings that keep memory close to the tensors."""
    if _reason_not() is not None:
        return False
    started_with = _environment_at_start()
    return any(started_with.get(name) for name in _SWITCHES)


def release() -> bool:
    """Give back to the system what glibc's allocator holds of freed memory, between two phases of
    other sizes (training and evaluation); says whether there was any. Elsewhere nothing is done.

    Tensors stay where they are; the next ones pay for fresh pages. With the settings above there is
    next to nothing to give back. Source: malloc_trim(3).
    """
    if _reason_not() is not None:
        return False
    return bool(ctypes.CDLL(None).malloc_trim(0))


def explain() -> str:
    """One sentence for people: whether the settings are in force, and if not, why."""
    reason = _reason_not()
    if reason is not None:
        return f"allocator settings do not apply: {reason}"
    if is_tuned():
        return "glibc allocator tuned: freed memory goes back to the system"
    settings = " ".join(f"{name}={value}" for name, value in SETTINGS.items())
    return (
        "glibc allocator not tuned: the process may keep a third more than its tensors; "
        f"start it with {settings}"
    )


def _reason_not() -> str | None:
    """Why the settings would do nothing here, or None when they would."""
    try:
        library = os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError, OSError):
        library = None
    if not library:
        return "this system's C library is not glibc"
    preloaded = os.environ.get("LD_PRELOAD", "")
    for name in _OTHERS:
        if name in preloaded:
            return f"{name} is preloaded"
    return None


def _environment_at_start() -> dict[str, str]:
    """The environment this process began with; later changes to os.environ have no effect."""
    try:
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return dict(os.environ)
    pairs = (entry.decode(errors="replace").partition("=") for entry in entries if entry)
    return {name: value for name, _, value in pairs}
