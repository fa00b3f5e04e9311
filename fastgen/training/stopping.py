"""Signals: the first SIGINT or SIGTERM lets the step end and is saved; a second one ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal that nothing waits for: before the first step, or the second one. ``signal`` is its number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


class StopRequest:
    """A context in which SIGINT and SIGTERM raise Stopped, and within `waiting()` set ``signal`` at first instead.

    Contexts may lie within one another; signals reach the innermost. Outside the main thread, where Python lets
    nobody handle signals, and for signals that are ignored (nohup), it changes nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._waits = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.getsignal(n) for n in SIGNALS}
            for number, handler in self._before.items():
                if handler is not signal.SIG_IGN:
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def waiting(self) -> StopRequest:
        """From here on somebody looks at ``signal`` after each step."""
        self._waits = True
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._waits or self.signal is not None:
            raise Stopped(number)
        self.signal = number
        text = f"\n{signal.Signals(number).name}: the step ends and is saved first; once more ends at once\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())  # not print, which the signal may have come into the middle of
