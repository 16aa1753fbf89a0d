"""Ctrl-C and friends as a request: finish the step, save, leave.

    with Interrupts() as interrupts:
        for step in steps:
            ...
            if interrupts.signal:       # SIGINT, SIGTERM or SIGUSR1 came
                save(); break

A second Ctrl-C does not wait. Batch systems send SIGTERM or SIGUSR1 before the end of a job.
"""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupts:
    """Notes the first of `SIGNALS` while it is open; only the main thread can open it.

    Args:
        on_first: called with the signal when it comes, to tell the user that it was heard.
    """

    def __init__(self, on_first: Callable[[signal.Signals], None] | None = None) -> None:
        self.signal: signal.Signals | None = None
        self._on_first = on_first
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        first = self.signal is None
        self.signal = self.signal or signal.Signals(number)
        if first and self._on_first is not None:
            self._on_first(self.signal)
