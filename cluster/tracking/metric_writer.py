"""The thread that carries points from the driver to a tracking store without making it wait.

A point is first appended to a local JSONL file, the spool, which is the truth about a run; the
thread reads the spool from a remembered offset and sends batches. So memory is bounded, a store
that is away for hours loses nothing, and a run that is resumed sends what its last life could not.
A batch may be sent twice (after a lost answer); a store keeps identical points once.

This file knows nothing of MLflow: `send` and `beat` are functions, which makes it testable alone.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.tracking.metric_spool import Point, Spool

logger = logging.getLogger(__name__)

MAX_PENDING_DELIVERIES = 100


class RefusedError(Exception):
    """The store answered and will never accept this; sending it again is useless."""


@dataclass(frozen=True)
class Delivery:
    """One thing other than a metric that is sent when the store is there, such as an artifact."""

    name: str
    send: Callable[[], None]


@dataclass(frozen=True)
class DeliveryReport:
    """What reached the store by the end; everything that did not is in `spool`, except files.

    `unsent_points` counts points that never left, `refused_points` those that the store declined,
    `unsent_deliveries` names the artifacts, `closed` tells whether the final status was recorded.
    """

    sent_points: int
    unsent_points: int
    refused_points: int
    unsent_deliveries: tuple[str, ...]
    closed: bool
    spool: Path

    @property
    def complete(self) -> bool:
        """Whether everything arrived."""
        lost = self.unsent_points or self.refused_points or self.unsent_deliveries
        return self.closed and not lost


class MetricWriter:
    """The one thread that talks to the store for a run.

    `send` delivers a batch of points or raises: `RefusedError` if that is for ever, anything else
    if it may work later. `beat` tells the store that the run lives. `add` and `deliver` return at
    once, whatever the store does.
    """

    def __init__(
        self,
        spool: Spool,
        send: Callable[[Sequence[Point]], None],
        beat: Callable[[], None],
        *,
        interval_s: float = 1.5,
        heartbeat_s: float = 30.0,
        max_backoff_s: float = 30.0,
    ) -> None:
        self._spool = spool
        self._send = send
        self._beat = beat
        self._interval_s = interval_s
        self._heartbeat_s = heartbeat_s
        self._max_backoff_s = max_backoff_s
        self._deliveries: deque[Delivery] = deque()
        self._dropped: list[str] = []
        self._stop = threading.Event()
        self._deadline = math.inf
        self._last: Callable[[], None] | None = None
        self._closed = False
        self._num_sent = 0
        self._num_refused = 0
        self._failures = 0
        self._next_beat = time.monotonic() + heartbeat_s
        # A daemon, so that a store which hangs cannot keep a finished program alive.
        self._thread = threading.Thread(target=self._run, name="metric-writer", daemon=True)
        self._thread.start()

    def add(self, points: Sequence[Point]) -> None:
        """Record points in the spool; the thread finds them there."""
        self._spool.append(points)

    def deliver(self, delivery: Delivery) -> None:
        """Queue something else to send; beyond the bound the oldest is dropped, and said so."""
        self._deliveries.append(delivery)
        if len(self._deliveries) > MAX_PENDING_DELIVERIES:
            self._drop(self._deliveries.popleft(), "too many wait")

    def close(self, last: Callable[[], None], *, timeout_s: float = 30.0) -> DeliveryReport:
        """Send what is left, then call `last`; return within about `timeout_s` in any case."""
        self._last = last
        # The last call gets a share of the time even when the points do not go through.
        self._deadline = time.monotonic() + 0.7 * timeout_s
        self._stop.set()
        self._thread.join(timeout_s)
        self._spool.close()
        return DeliveryReport(
            sent_points=self._num_sent,
            unsent_points=self._spool.num_unsent(),
            refused_points=self._num_refused,
            unsent_deliveries=(*self._dropped, *(d.name for d in list(self._deliveries))),
            closed=self._closed,
            spool=self._spool.path,
        )

    def _run(self) -> None:
        while not self._stop.wait(self._pause_s()):
            self._turn()
        # The end is near, so the growing pause no longer applies.
        pause_s = min(self._interval_s, 1.0)
        while not self._turn() and time.monotonic() + pause_s < self._deadline:
            time.sleep(pause_s)
        self._closed = self._last is not None and self._attempt(self._last)

    def _pause_s(self) -> float:
        backoff_s = self._interval_s * 2.0 ** min(self._failures, 10)
        return float(min(backoff_s, self._max_backoff_s))

    def _turn(self) -> bool:
        """Send everything that waits; return False at the first thing that fails for now."""
        try:
            sent = self._send_points() and self._send_deliveries()
        except OSError as error:
            logger.warning("metrics cannot be read from %s: %s", self._spool.path, error)
            sent = False
        if sent and time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + self._heartbeat_s
            sent = self._attempt(self._beat)
        return sent

    def _send_points(self) -> bool:
        while True:
            kept = self._spool.take_memory()
            if kept and not self._send_batch(kept):
                self._spool.give_back(kept)
                return False
            points, end = self._spool.read()
            if not points:
                return True
            if not self._send_batch(points):
                return False
            self._spool.commit(end)

    def _send_batch(self, points: Sequence[Point]) -> bool:
        """Send once; a batch that the store refuses counts as done, or it would block the rest."""
        refused = False

        def send() -> None:
            nonlocal refused
            try:
                self._send(points)
            except RefusedError as error:
                refused = True
                logger.warning("%d metrics were refused: %s", len(points), error)

        done = self._attempt(send)
        self._num_sent += len(points) if done and not refused else 0
        self._num_refused += len(points) if refused else 0
        return done

    def _send_deliveries(self) -> bool:
        while self._deliveries:
            delivery = self._deliveries[0]
            try:
                done = self._attempt(delivery.send, reraise=RefusedError)
            except RefusedError as error:
                self._drop(delivery, str(error))
                done = True
            if not done:
                return False
            # `deliver` may have dropped it meanwhile.
            if self._deliveries and self._deliveries[0] is delivery:
                self._deliveries.popleft()
        return True

    def _attempt(
        self, call: Callable[[], None], *, reraise: type[Exception] | tuple[()] = ()
    ) -> bool:
        """Call once and keep count of failures: the pause grows, and the user is told once."""
        try:
            call()
        except reraise:
            raise
        except Exception as error:
            # Whatever a client library raises, the thread must live on and try again.
            self._failures += 1
            if self._failures == 1:
                logger.warning(
                    "the tracking store is away (%s); metrics go on into %s and are sent later",
                    _first_line(error),
                    self._spool.path,
                )
            return False
        if self._failures:
            logger.info("the tracking store is back after %d failed attempts", self._failures)
        self._failures = 0
        return True

    def _drop(self, delivery: Delivery, reason: str) -> None:
        self._dropped.append(delivery.name)
        logger.warning("%s was not sent to the tracking store: %s", delivery.name, reason)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:300] if lines else type(error).__name__
