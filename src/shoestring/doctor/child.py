"""The process in which somebody's script runs under the doctor.

`python -m shoestring.doctor.child OUT STEPS SCRIPT [ARGUMENT ...]`

The script runs as `python script.py` would run it: its folder is the first place to import from,
it is `__main__`, and its arguments are its own. The steps of its optimizers are found by torch's
hooks. Everything is watched from the beginning, so that memory that runs out before the first
step is seen, too; what is told is of the steps after the first where there are any. After the
last one that was asked for the script is ended as by `sys.exit()`. What was seen goes into a file,
as JSON: the diagnosis at the end, and before that, at each phase, what is alive, for the case that
the process is killed.
"""

import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import ShoestringError
from .context import Doctor
from .watch import Watch

FIRST = 1
"""Steps that are let pass: optimizer states and much else is made in the first."""


class _Enough(SystemExit):
    """The watched steps are over."""


class Examination:
    """One run of a script, and what is written down of it."""

    def __init__(self, out: Path, steps: int) -> None:
        self.out, self.steps = out, steps
        self.record: dict[str, Any] = {"status": "running", "steps": 0, "diagnosis": None}
        self.doctor = Doctor(warm_up=FIRST, on_phase=self.note)

    def stepped(self, *_: Any) -> None:
        """An optimizer has stepped."""
        assert self.doctor.watch is not None
        self.record["steps"] = self.doctor.watch.steps_in_all
        if self.record["steps"] >= FIRST + self.steps:
            raise _Enough

    def note(self, watch: Watch) -> None:
        """What is alive now."""
        ledger = watch.tracker.ledger
        self.record["last"] = {
            "phase": watch.tracker.phase, "live_bytes": ledger.live,
            "parts": dict(ledger.by_category),
        }  # fmt: skip
        self.write()

    def write(self) -> None:
        """Whole or not at all: the process may be killed."""
        fresh = self.out.with_suffix(".new")
        fresh.write_text(json.dumps(self.record))
        fresh.replace(self.out)

    def run(self, script: str, arguments: list[str]) -> None:
        """The script to its end, whatever that is."""
        from torch.optim.optimizer import register_optimizer_step_post_hook

        sys.argv = [script, *arguments]
        sys.path[0] = str(Path(script).resolve().parent)
        self.doctor.__enter__()
        hook = register_optimizer_step_post_hook(self.stepped)
        error: BaseException | None = None
        try:
            runpy.run_path(script, run_name="__main__")
            self.record["status"] = "ended"
        except _Enough:
            self.record["status"] = "seen"
        except SystemExit as stop:
            self.record |= {"status": "ended", "code": _code(stop)}
        except KeyboardInterrupt as interrupt:
            self.record["status"], error = "interrupted", interrupt
        except BaseException as failure:
            trace = _from(failure.__traceback__, script)
            traceback.print_exception(type(failure), failure, trace)
            text = (str(failure).strip().splitlines() or [""])[0]
            message = f"{type(failure).__name__}: {text}".rstrip(": ")
            self.record |= {"status": "failed", "error": message}
            error = failure
        hook.remove()
        self.doctor.__exit__(type(error) if error else None, error, None)
        self.diagnose(error)

    def diagnose(self, error: BaseException | None) -> None:
        self.write()  # in case that this is not lived to see the end
        if error is not None:
            error.__traceback__ = None  # and with it what the script's frames hold
        try:
            diagnosis = self.doctor.diagnosis
            if diagnosis.peak_bytes:
                self.record["diagnosis"] = diagnosis.to_json()
        except (ShoestringError, MemoryError, RuntimeError, KeyboardInterrupt) as failure:
            self.record["not_diagnosed"] = f"{type(failure).__name__}: {failure}"
        self.write()


def _from(trace: TracebackType | None, script: str) -> TracebackType | None:
    """The part of a traceback that begins in the script; our own frames are not its business."""
    while trace is not None and trace.tb_frame.f_code.co_filename != script:
        trace = trace.tb_next
    return trace


def _code(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    sys.stderr.write(f"{stop.code}\n")  # as Python does
    return 1


def main() -> None:
    out, steps, script, *arguments = sys.argv[1:]
    examination = Examination(Path(out), int(steps))
    examination.run(script, arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit(): threads that the script left behind would be waited for.
    os._exit(0)


if __name__ == "__main__":
    main()
