"""What a run leaves behind: config.toml, plan.json, metrics.jsonl, receipt.json.

One writer, the first process; the others hold a record that writes nothing. Each line of
metrics.jsonl is flushed when written, so a killed run keeps all lines but the last. What is
written is also given to `progress`, as one dict with an "event".
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from ..checkpoint import write_text
from ..errors import CheckpointError
from .config import RunConfig

Progress = Callable[[dict[str, Any]], None]


class Record:
    """The files of a run directory, and whoever watches."""

    def __init__(
        self, config: RunConfig, *, writes: bool = True, progress: Progress | None = None
    ) -> None:
        self.directory = Path(config.run.directory)
        self._writes = writes
        self._progress = progress if writes else None
        self._metrics: TextIO | None = None
        if writes:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                write_text(self.directory / "config.toml", config.to_toml())
                self._metrics = (self.directory / "metrics.jsonl").open("w", encoding="utf-8")
            except OSError as error:
                raise CheckpointError(
                    f"the run directory {self.directory} cannot be written: {error}",
                    hint="Set run.directory to another place.",
                ) from error

    def tell(self, event: str, **facts: Any) -> None:
        """Give an event to the progress function only."""
        if self._progress is not None:
            self._progress({"event": event, **facts})

    def line(self, event: str, **facts: Any) -> None:
        """One line of metrics.jsonl, and an event."""
        if self._metrics is not None:
            finite = {name: _finite(value) for name, value in facts.items()}
            self._metrics.write(json.dumps({"event": event, **finite}) + "\n")
            self._metrics.flush()
        self.tell(event, **facts)

    def text(self, name: str, content: str) -> None:
        """One text file of the directory, replaced whole."""
        if self._writes:
            write_text(self.directory / name, content)

    def file(self, name: str, content: Any) -> None:
        """One JSON file of the directory, replaced whole."""
        self.text(name, json.dumps(content, indent=1) + "\n")

    def close(self) -> None:
        """Close metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
