"""Lets calls that arrive in several threads run one after another, in the order of their numbers.

Ray takes a result apart and puts the next call's arguments together in the thread of the call. In
one thread that time lies between two steps; in several, the next call waits with everything ready.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Turns numbered from 0; each is taken once."""

    def __init__(self) -> None:
        self._next = 0
        self._changed = threading.Condition()

    @contextmanager
    def take(self, number: int) -> Iterator[None]:
        """Wait until all turns before this one have ended; the next begins where the block ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._next == number)
        try:
            yield
        finally:
            with self._changed:
                self._next += 1
                self._changed.notify_all()
