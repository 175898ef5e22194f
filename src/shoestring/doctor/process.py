"""Another process's memory, as far as the system tells it. No torch here.

Which tensors it holds cannot be seen from outside: neither Python up to 3.13 nor torch tells one
process about the objects of another.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..cgroups import enclosing
from ..errors import ConfigError, ShoestringError

WHY_NOT_MORE = (
    "what is weights, gradients or activations cannot be seen from outside a process; run it with "
    "`shoestring doctor --script FILE`, or put `with shoestring.Doctor():` around a step"
)
_FIELDS = {
    "VmRSS": "rss_bytes", "RssAnon": "anonymous_bytes", "RssFile": "file_bytes",
    "RssShmem": "shared_bytes", "VmSwap": "swap_bytes", "VmHWM": "peak_bytes",
}  # fmt: skip


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
    groups = [
        {**asdict(group), "left_bytes": max(0, group.left_bytes)}
        for group in enclosing(str(pid), root)
    ]
    found["cgroups"] = sorted(groups, key=lambda group: group["left_bytes"])
    return found
