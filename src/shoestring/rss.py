"""Peak resident memory of this process, where the system tells. No torch here."""

from pathlib import Path

_PROC = Path("/proc/self")


class RssPeak:
    """The high-water mark of resident memory between `start` and `read`.

    Linux only: writing 5 to /proc/self/clear_refs resets the mark that VmHWM shows.
    """

    def __init__(self) -> None:
        self._message: str | None = "RssPeak.start was not called"

    def start(self) -> None:
        """Reset the mark; where that cannot be done, `read` will say why."""
        try:
            (_PROC / "clear_refs").write_text("5")
            self._message = None
        except OSError as error:
            self._message = f"peak resident memory is not available on this system ({error})"

    def read(self) -> tuple[int | None, str | None]:
        """(bytes, None), or (None, the reason)."""
        if self._message is not None:
            return None, self._message
        return status_bytes("VmHWM"), None


def status_bytes(name: str) -> int:
    """A field of /proc/self/status in bytes, such as VmHWM (peak) or VmRSS (now)."""
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no field {name}")
