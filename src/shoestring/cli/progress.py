"""What a run looks like while it lasts: stages, a live line, and a summary at the end.

A `Watcher` is given to `training.loop.train` as its progress function. On a terminal the line is
drawn again and again; elsewhere a line is written every few seconds. With --json every event is
one line on stdout.
"""

import json
import time
from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from ..training.config import JobConfig
from ..units import format_bytes, format_seconds
from .terminal import Terminal

_STAGES = {
    "start": "reading, encoding and splitting the data",
    "data": "planning: one block at a time is measured",
    "plan": "building the model",
    "before": "held-out loss before training",
}
_INCIDENTS = {
    "resumed": "going on after update {step}",
    "other machine": "{message}: the numbers may differ in their last bits from here on",
    "skipped": "update {step} left out: {message}",
    "out of memory": "step {step}: no more memory ({message}); going on with smaller parts",
    "checkpoint passed over": "a checkpoint cannot be used: {message}",
    "checkpoint failed": "no checkpoint this time, the older ones stay: {message}",
    "tracker failed": "{tracker} gets no more numbers: {message}",
    "report failed": "no report.html: {message}",
}
_LINE_EVERY_S = 10.0
_SMOOTH = 0.9


class Watcher:
    """Shows events as they come. Keeps the latest of each kind in `.last`."""

    def __init__(self, terminal: Terminal, settings: JobConfig) -> None:
        self.terminal, self.settings = terminal, settings
        self.last: dict[str, dict[str, Any]] = {}
        self.before: dict[str, Any] | None = None
        self.peak_bytes = 0
        self._shown: Any = None
        self._task: Any = None
        self._first_step_at = self._line_at = 0.0
        self._loss = self._speed = 0.0

    def __enter__(self) -> Self:
        self._stage("start")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hide()

    def __call__(self, event: dict[str, Any]) -> None:
        """Take one event of the loop."""
        kind = event["event"]
        self.last[kind] = event
        if kind == "step":
            self._step(event)
        elif kind in _STAGES:
            self._stage(kind)
        elif kind == "evaluation":
            self._evaluation(event)
        elif kind in _INCIDENTS:
            self.terminal.note(_INCIDENTS[kind].format(**event))
        if kind == "plan":
            plan = event["plan"]
            if plan is not None:
                event = {**event, "plan": json.loads(plan.to_json(history=False))}
                self.show_plan(plan)
        self.terminal.emit(event)

    def show_plan(self, plan: Any) -> None:
        """What will be done, beside the usual schemes."""
        self.terminal.note(str(plan), "", str(plan.table()), "")

    def _stage(self, kind: str) -> None:
        self._hide()
        if self.terminal.progress.is_terminal:
            self._shown = self.terminal.progress.status(_STAGES[kind])
            self._shown.start()
        else:
            self.terminal.note(f"{_STAGES[kind]} ...")

    def _hide(self) -> None:
        if self._shown is not None:
            self._shown.stop()
            self._shown = self._task = None

    def _evaluation(self, event: dict[str, Any]) -> None:
        if self.before is None:
            self.before = event
            self._hide()
        self.terminal.note(
            f"held-out loss after {event['step']} updates: {event['nats_per_token']:.3f} nats a "
            f"token, {event['bits_per_byte']:.3f} bits a byte"
        )

    def _step(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        if not self._first_step_at:
            self._first_step_at = now - event["seconds"]
            self._loss, self._speed = event["loss"], event["tokens_per_s"]
        self._loss += (1 - _SMOOTH) * (event["loss"] - self._loss)
        self._speed += (1 - _SMOOTH) * (event["tokens_per_s"] - self._speed)
        self.peak_bytes = max(self.peak_bytes, event["peak_bytes"] or 0)
        done, left = self._share_done(event["step"], now)
        if self.terminal.progress.is_terminal:
            self._draw(event["step"], done, self._line(left))
        elif now - self._line_at > _LINE_EVERY_S or done >= 1:
            self._line_at = now
            self.terminal.note(f"step {event['step']}  {self._line(left)}")

    def _share_done(self, step: int, now: float) -> tuple[float, float]:
        """(share of the run, seconds left), by steps or by the clock, whichever ends it."""
        spent = max(now - self._first_step_at, 1e-9)
        share = step / self.settings.steps
        if self.settings.minutes:
            share = max(share, spent / (60 * self.settings.minutes))
        share = min(share, 1.0)
        return share, spent * (1 - share) / share

    def _line(self, left: float) -> str:
        peak = f"peak {format_bytes(self.peak_bytes) if self.peak_bytes else '-'}"
        if limit := self.last.get("plan", {}).get("limit_bytes"):
            peak += f" of {format_bytes(limit)}"
        return (
            f"loss {self._loss:.3f}  {self._speed:,.0f} tokens/s  {format_seconds(left)} left  "
            f"{peak}"
        )

    def _draw(self, step: int, share: float, line: str) -> None:
        if self._task is None:
            self._hide()
            self._shown = Progress(
                TextColumn("step {task.fields[step]}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[line]}"),
                console=self.terminal.progress,
            )
            self._task = self._shown.add_task("", total=1.0, step=step, line=line)
            self._shown.start()
        self._shown.update(self._task, completed=share, step=step, line=line)

    def summary(self, receipt: dict[str, Any]) -> Table:
        """Promised and measured, side by side."""
        memory, seconds, quality = receipt["memory"], receipt["seconds"], receipt["quality"]
        table = Table(title=f"{receipt['status']} after {receipt['steps']} updates")
        for column in ("", "promised", "measured", "error"):
            table.add_column(column, justify="left" if not column else "right")
        table.add_row(
            "peak of live tensors", _or_dash(memory["promised_bytes"], format_bytes),
            _or_dash(memory["measured_bytes"], format_bytes), _percent(memory["error"]),
        )  # fmt: skip
        table.add_row(
            "seconds an update", _or_dash(seconds["promised_step"], format_seconds),
            _or_dash(seconds["measured_step"], format_seconds), _percent(seconds["error"]),
        )  # fmt: skip
        for when in ("before", "after"):
            bits = quality[when]["bits_per_byte"] if quality[when] else None
            table.add_row(f"held-out bits a byte, {when}", "", _or_dash(bits, "{:.3f}".format), "")
        return table


def _or_dash(value: float | None, show: Any) -> str:
    return "-" if value is None else str(show(value))


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{error:+.1%}"
