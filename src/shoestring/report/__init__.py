"""Reports: one self-contained page out of what runs leave behind.

write_report([Path("runs/mine")])                    # runs/mine/report.html
write_report([Path("runs/a"), Path("runs/b")])       # report.html, the runs over one another
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, ShoestringError
from .page import page
from .run import RunRecord, read_run

__all__ = ["RunRecord", "memory_json", "page", "read_run", "write_report"]

NAME = "report.html"


def write_report(directories: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of one run into its directory, or of several into the current one; or to
    `out`. Returns where it is. CheckpointError for what is no run, or cannot be written."""
    from ..checkpoint import write_text  # reaches torch, which reading a run does not need

    if not directories:
        raise ConfigError("a report was asked for of no run", expected="one run directory or more")
    runs = [read_run(Path(directory)) for directory in directories]
    if out is None:
        out = runs[0].directory / NAME if len(runs) == 1 else Path(NAME)
    elif out.is_dir():
        raise ConfigError(f"{out} is a directory", expected="the name of a file to write")
    try:
        text = page(runs)
    except ValueError as error:
        # Whatever somebody wrote into a run's files is no reason for a traceback.
        if isinstance(error, ShoestringError):
            raise
        raise CheckpointError(
            f"no page can be made of {', '.join(run.name for run in runs)}: {error}",
            expected="run directories as `shoestring train` makes them",
        ) from error
    write_text(out, text)
    return out


def memory_json(measured: Mapping[str, Any], predicted: Mapping[str, Any] | None) -> str:
    """The text of a run's memory.json: one update from instant to instant, by category.

    measured: `Meter.history`.  predicted: `Plan.history`.
    """
    return json.dumps({"measured": measured, "predicted": predicted}) + "\n"
