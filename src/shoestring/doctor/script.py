"""Somebody's script, run in a child process under the doctor. No torch here."""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def examine_script(
    script: str, arguments: Sequence[str], *, steps: int, stdout: Any = None
) -> dict[str, Any]:
    """What was seen of `python script arguments...`, up to `steps` steps after the first.

    {"status": "seen" (the steps are over) | "ended" (the script is, before) | "failed" |
    "interrupted" | "killed", "steps": optimizer steps made, "diagnosis": JSON or None, "message":
    what happened, for people, or None when all went well}.
    stdout: where the script's own goes. ConfigError for a file that is not there.
    """
    path = Path(script)
    if not path.is_file():
        raise ConfigError(
            f"there is no script {script!r}" if not path.exists() else f"{script!r} is no file",
            expected="a Python file that trains something",
        )
    with tempfile.TemporaryDirectory(prefix="shoestring-doctor-") as folder:
        out = Path(folder) / "seen.json"
        command = [sys.executable, "-m", "shoestring.doctor.child", str(out), str(steps), script]
        child = subprocess.Popen([*command, *arguments], stdout=stdout)
        interrupted = _wait(child)
        record = _read(out)
    if interrupted:
        record["status"] = "interrupted"
    elif child.returncode:
        record["status"] = "killed"
    record["message"] = _message(script, record, child.returncode)
    return record


def _wait(child: "subprocess.Popen[bytes]") -> bool:
    """Until it ends; whether Ctrl-C came. The terminal sends that to the child as well, which
    then has the time to tell what it has seen; a second one ends it."""
    try:
        child.wait()
        return False
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):
            child.wait()
            return True
        child.kill()
        child.wait()
        return True


def _read(out: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(out.read_text())
    except (OSError, ValueError):
        record = {"status": "failed", "steps": 0, "diagnosis": None}
    return record


def _message(script: str, record: dict[str, Any], returncode: int) -> str | None:
    status, steps = record["status"], record["steps"]
    if status == "killed":
        return f"{script} was ended by {_signal(returncode)}{_last(record)}"
    if status == "interrupted":
        return f"interrupted after {steps} optimizer steps"
    if status == "failed":
        error = record.get("error", "it could not be started")
        return f"{script} failed after {steps} optimizer steps: {error}"
    if record.get("code"):
        return f"{script} ended with exit code {record['code']} after {steps} optimizer steps"
    if record.get("not_diagnosed"):
        return f"what was seen of {script} could not be told: {record['not_diagnosed']}"
    if record["diagnosis"] is None:
        return f"{script} ended without making a tensor of torch, so there is nothing to tell"
    if not steps:
        return (
            f"{script} ended without a step of an optimizer (torch.optim.Optimizer.step); what "
            "was seen is of the whole script"
        )
    return None


def _signal(returncode: int) -> str:
    if returncode > 0:
        return f"exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    why = " (on Linux, what the system does when memory runs out)" if name == "SIGKILL" else ""
    return name + why


def _last(record: dict[str, Any]) -> str:
    last = record.get("last")
    if last is None:
        return ""
    from ..units import format_bytes

    parts = sorted(last["parts"].items(), key=lambda item: -item[1])
    held = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in parts if nbytes)
    return (
        f" in the {last['phase']}, after {record['steps']} optimizer steps; when that began, "
        f"{format_bytes(last['live_bytes'])} of tensors were alive: {held}"
    )
