"""Ctrl-C and SIGTERM: before training at once, during it after the step; a second one at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class Interruption:
    """While entered, SIGINT and SIGTERM set `.asked`, and raise KeyboardInterrupt unless it is the
    first and `.waits` is set. In another thread than the main one they are left as they are."""

    def __init__(self) -> None:
        self.asked = self.waits = False
        self._before: dict[signal.Signals, signal.Handlers | object] = {}

    def __enter__(self) -> Self:
        # Python lets only the main thread install a handler.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        at_once = self.asked or not self.waits
        # Kept, too: Python drops what is raised within a destructor.
        self.asked = True
        if at_once:
            raise KeyboardInterrupt
