"""Ctrl-C and SIGTERM as a flag that a run looks at when it can stop, not as a bolt of lightning.

A signal only raises a flag. Whoever waits or loops calls `check`, which then raises, so that no
file or connection is left half done. A second signal is Python's usual KeyboardInterrupt.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from model.errors import UserError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(UserError):  # noqa: N818 - the user's wish, not a mistake
    """The user, or the machine's owner, wants the run to end."""


class Interruption:
    """Whether an end was asked for, and by what."""

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None

    def request(self, by: signal.Signals = signal.SIGTERM) -> None:
        """Ask for an end, as the signal would."""
        self._signal = by

    def check(self) -> None:
        """Raise Interrupted if an end was asked for."""
        if self._signal is not None:
            raise Interrupted(f"stopped by {self._signal.name}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt
        self.request(signal.Signals(number))


@contextmanager
def watch_signals() -> Iterator[Interruption]:
    """Turn SIGINT and SIGTERM into an Interruption while the block runs.

    Python lets only the main thread handle signals; in another one none are watched.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: signal.signal(number, interruption._handle) for number in _SIGNALS}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
