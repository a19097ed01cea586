"""An iterator that a thread runs ahead of whoever reads it, by a bounded number of items."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
_POLL_S = 0.2


class Prefetch(Generic[Item]):
    """The items of `source` in order; at most `depth` wait. An error of the source is raised here.

    Call `close` when no more items are wanted: the thread then ends at its next item. `check` is
    called while waiting; what it raises ends the wait.
    """

    def __init__(
        self, source: Iterator[Item], depth: int, check: Callable[[], None] = lambda: None
    ) -> None:
        self._source = source
        self._check = check
        self._queue: queue.Queue[tuple[Item] | BaseException | None] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        """Return itself: the items can be read once."""
        return self

    def __next__(self) -> Item:
        """Return the next item, waiting for it if need be."""
        if self._closed.is_set():
            raise StopIteration
        found = self._wait()
        if isinstance(found, tuple):
            return found[0]
        self._closed.set()
        if found is None:
            raise StopIteration
        raise found

    def _wait(self) -> tuple[Item] | BaseException | None:
        while True:
            self._check()
            try:
                return self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                continue

    def close(self) -> None:
        """Read no more."""
        self._closed.set()

    def join(self, timeout_s: float) -> bool:
        """Wait until the thread has ended; returns whether it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        end: BaseException | None = None
        try:
            for item in self._source:
                if not self._put((item,)):
                    return
        except BaseException as error:
            # It belongs to the reader, whatever it is.
            end = error
        self._put(end)

    def _put(self, entry: tuple[Item] | BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(entry, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False
