"""Ctrl-C during training: the first one asks to stop after the step, the second one stops now."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class Interruption:
    """While entered, SIGINT sets `.asked`. In another thread than the main one it does nothing."""

    def __init__(self) -> None:
        self.asked = False
        self._before: signal.Handlers | object = None
        self._installed = False

    def __enter__(self) -> Self:
        # Python lets only the main thread install a handler.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._before)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
