"""SIGTERM and SIGINT request a stop: the run finishes its step and saves a checkpoint. A second signal ends at once."""

from __future__ import annotations

import signal
from types import FrameType

EXIT_STOPPED = 75  # EX_TEMPFAIL: run again with --resume


class StopRequest:
    """Callable: returns whether a signal came. Create it in the main thread."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before = {s: signal.signal(s, self._take) for s in (signal.SIGTERM, signal.SIGINT)}

    def __call__(self) -> bool:
        return self.received is not None

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        """Record the signal; a second one ends the process."""
        self.received = signal.Signals(number)
        self.restore()
