"""Another process's memory, as far as the system tells it. No torch here.

Which tensors it holds cannot be seen from outside: neither Python up to 3.13 nor torch tells one
process about the objects of another.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ShoestringError

WHY_NOT_MORE = (
    "what is weights, gradients or activations cannot be seen from outside a process; run it with "
    "`shoestring doctor --script FILE`, or put `with shoestring.Doctor():` around a step"
)
_FIELDS = {
    "VmRSS": "rss_bytes", "RssAnon": "anonymous_bytes", "RssFile": "file_bytes",
    "RssShmem": "shared_bytes", "VmSwap": "swap_bytes", "VmHWM": "peak_bytes",
}  # fmt: skip
_NO_LIMIT = 1 << 60


def process_totals(pid: int, root: Path = Path("/")) -> dict[str, Any]:
    """{"pid", "name", bytes by `rss_bytes`, `anonymous_bytes`, ..., "cgroups"}.

    cgroups: [{"path", "limit_bytes", "used_bytes", "left_bytes"}] for each enclosing group that
    has a limit, the tightest first; file cache that can be dropped counts as left.
    root stands in for / in tests. ConfigError when there is no such process, ShoestringError
    when it may not be read or the system has no /proc.
    """
    if pid < 1:
        raise ConfigError(f"--pid {pid} is no process", expected="a positive number")
    if not (root / "proc/self/status").exists():
        raise ShoestringError(
            "this system has no /proc, so other processes cannot be seen", expected="Linux"
        )
    folder = root / "proc" / str(pid)
    try:
        lines = (folder / "status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        raise ConfigError(
            f"there is no process {pid}", expected="the number of one that runs now"
        ) from None
    except OSError as error:
        raise ShoestringError(
            f"process {pid} may not be read ({error.strerror})",
            hint="Ask as the user it belongs to.",
        ) from None
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    if "VmRSS" not in status:
        raise ConfigError(
            f"process {pid} ({status.get('Name', '?').strip()}) has no memory of its own",
            expected="a process that still runs, and is no thread of the kernel",
        )
    found: dict[str, Any] = {"pid": pid, "name": status["Name"].strip()}
    for field, name in _FIELDS.items():
        found[name] = int(status[field].split()[0]) * 1024 if field in status else None
    found["cgroups"] = sorted(_groups(root, folder), key=lambda group: group["left_bytes"])
    return found


def _groups(root: Path, folder: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = (folder / "cgroup").read_text().splitlines()
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
            group = _group(base.joinpath(*parts[:depth]), "/" + "/".join(parts[:depth]), *names)
            if group is not None:
                yield group


def _group(folder: Path, path: str, limit: str, usage: str, cache: str) -> dict[str, Any] | None:
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        stat = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return None
    if most == "max" or int(most) >= _NO_LIMIT:
        return None
    droppable = next((int(s.split()[1]) for s in stat if s.split()[0] == cache), 0)
    left = max(0, int(most) - used + droppable)
    return {"path": path, "limit_bytes": int(most), "used_bytes": used, "left_bytes": left}
