"""What the control groups around a process let it have, by the system's own files. No torch here.

Source: the kernel's documentation of cgroup v2 (memory.max, memory.current, memory.stat) and v1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class Group:
    """A control group with a limit. path: as the system names it; bytes."""

    path: str
    limit_bytes: int
    used_bytes: int
    left_bytes: int
    """File cache that can be dropped counts as left. Negative where more is used."""


def enclosing(process: str = "self", root: Path = Path("/")) -> Iterator[Group]:
    """Every group with a limit around a process (its number, or "self"), from the inside out, as
    far as they are visible. root stands in for / in tests."""
    try:
        lines = (root / "proc" / process / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base = root / "sys/fs/cgroup"
        names = ("memory.max", "memory.current", "inactive_file")
        if "memory" in controllers.split(","):
            base = base / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        elif controllers:
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts), -1, -1):
            group = _read(base.joinpath(*parts[:depth]), "/" + "/".join(parts[:depth]), *names)
            if group is not None:
                yield group


def _read(folder: Path, path: str, limit: str, usage: str, cache: str) -> Group | None:
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        stat = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return None
    if most == "max" or int(most) >= _NO_LIMIT:
        return None
    droppable = next((int(s.split()[1]) for s in stat if s.split()[0] == cache), 0)
    return Group(path, int(most), used, int(most) - used + droppable)
