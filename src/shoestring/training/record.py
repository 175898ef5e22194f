"""What a run leaves behind: config.toml, plan.json, metrics.jsonl, receipt.json.

One writer, the first process; the others hold a record that writes nothing. Each line of
metrics.jsonl is flushed when written, so a killed run keeps all lines but the last; a run that
goes on from a checkpoint first cuts off what came after it. What is written is also given to
`progress`, as one dict with an "event".
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from ..checkpoint import write_text
from ..checkpoint.directory import unwritable
from ..errors import CheckpointError
from .config import RunConfig
from .trackers import Trackers

Progress = Callable[[dict[str, Any]], None]


class Record:
    """The files of a run directory, and whoever watches."""

    def __init__(
        self, config: RunConfig, *, writes: bool = True, progress: Progress | None = None
    ) -> None:
        self.directory = Path(config.run.directory)
        self._config = config
        self._writes = writes
        self._progress = progress if writes else None
        self._metrics: BinaryIO | None = None
        self._trackers: Trackers | None = None

    def open(self, *, keep_bytes: int = 0) -> None:
        """Start writing; of an earlier metrics.jsonl that many bytes are kept."""
        if not self._writes:
            return
        path = self.directory / "metrics.jsonl"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            # What repeats the run must not remove it.
            run = dataclasses.replace(self._config.run, replace=False)
            config = dataclasses.replace(self._config, run=run)
            write_text(self.directory / "config.toml", config.to_toml())
            had = path.stat().st_size if path.exists() else 0
            if path.is_symlink():
                raise OSError("metrics.jsonl is a symbolic link")
            self._metrics = path.open("r+b" if had else "wb")
            self._metrics.truncate(min(keep_bytes, had))
            self._metrics.seek(0, 2)
        except OSError as error:
            raise CheckpointError(
                f"the run directory {self.directory} cannot be written: {error}",
                hint="Set run.directory to another place.",
            ) from error
        self._trackers = Trackers(self._config, self.directory, self.tell)

    @property
    def num_bytes(self) -> int:
        """Size of metrics.jsonl now."""
        return self._metrics.tell() if self._metrics is not None else 0

    def lines(self, event: str) -> list[dict[str, Any]]:
        """What was written so far of one event, earlier lives of the run included."""
        if self._metrics is None:
            return []
        content = (self.directory / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
        found = []
        for line in content.splitlines():
            with contextlib.suppress(ValueError):  # a line that a crash cut short
                found.append(json.loads(line))
        return [line for line in found if isinstance(line, dict) and line.get("event") == event]

    def sync(self) -> None:
        """Have the system put on disk what was written, before a checkpoint counts on it."""
        if self._metrics is not None:
            try:
                os.fsync(self._metrics.fileno())
            except OSError as error:
                raise unwritable(self.directory / "metrics.jsonl", error) from error

    def cut_back(self, num_bytes: int) -> None:
        """Take back the lines of metrics.jsonl after so many bytes: those steps are made again."""
        if self._metrics is not None:
            self._metrics.truncate(num_bytes)
            self._metrics.seek(0, 2)

    def tell(self, event: str, **facts: Any) -> None:
        """Give an event to the progress function only."""
        if self._progress is not None:
            self._progress({"event": event, **facts})

    def line(self, event: str, **facts: Any) -> None:
        """One line of metrics.jsonl, and an event."""
        if self._metrics is not None:
            finite = {name: _finite(value) for name, value in facts.items()}
            line = json.dumps({"event": event, **finite}) + "\n"
            try:
                self._metrics.write(line.encode())
                self._metrics.flush()
            except OSError as error:
                raise unwritable(self.directory / "metrics.jsonl", error) from error
        if self._trackers is not None:
            self._trackers.event(event, facts)
        self.tell(event, **facts)

    def text(self, name: str, content: str) -> None:
        """One text file of the directory, replaced whole."""
        if self._writes:
            write_text(self.directory / name, content)

    def close(self) -> None:
        """Close metrics.jsonl and the trackers."""
        if self._trackers is not None:
            self._trackers.close()
            self._trackers = None
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # what could not be written was told before
                self._metrics.close()
            self._metrics = None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
