"""List scheduling: an order found by running the graph in simulated time.

Whenever a rank is free it takes, of the operations whose inputs have arrived, the one of highest
priority. Deferred weight gradients are taken only when nothing else is there. The W of one block
run in the same sequence under every placement, so that a parameter's gradient is always summed in
one order.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.graph import Operation
from pipeline.schedules.priorities import Priority
from pipeline.simulation.timed_graph import TimedGraph, Wires

# What ends within this share of a step's work counts as at the same time: sums of the same costs in
# another order differ in their last bits.
SAME_TIME = 1e-9


@dataclass(frozen=True)
class ListSchedule:
    """Each rank's operation numbers in their order, and the time at which the last one ends."""

    order: list[list[int]]
    end_s: float


def list_schedule(
    timed: TimedGraph,
    priorities: Sequence[Priority],
    *,
    defer_weights: bool = True,
    most_in_flight: Sequence[int] | None = None,
) -> ListSchedule:
    """Run the graph with priorities by operation number, lowest first.

    W come after everything else that a rank could do, or before it when they are not deferred.
    `most_in_flight` bounds, by rank, how many microbatches are begun there and not yet run back.
    """
    gate = _Gate(timed, most_in_flight) if most_in_flight is not None else None
    return _ListRun(timed, priorities, gate, weight_place=1 if defer_weights else -1).to_end()


def weight_sequence(operation: Operation) -> tuple[int, int]:
    """Return the place of a W among those of its block: microbatches in order, chunks back."""
    return operation.microbatch, -operation.chunk


def upward_ranks(timed: TimedGraph) -> list[float]:
    """Return, by number, the seconds from an operation's start to the end of all that follows.

    That is the longest way through the graph with messages on it (Topcuoglu et al. 2002, HEFT).
    """
    ranks = [0.0] * len(timed.seconds)
    for index in reversed(range(len(ranks))):
        longest = 0.0
        sends, link = timed.sends[index], timed.link
        for follower in timed.numbered.followers[index]:
            way = ranks[follower]
            num_bytes = sends.get(timed.rank[follower], 0) if sends else 0
            if num_bytes and timed.rank[follower] != timed.rank[index]:
                way += link.latency_s + num_bytes / link.bytes_per_s
            longest = max(longest, way)
        ranks[index] = timed.seconds[index] + longest
    return ranks


class _Gate:
    """Holds back forward operations of microbatches that a rank may not begin yet.

    Microbatches are let in in their order, and the first that is not through everywhere is let in
    everywhere, so something can always run.
    """

    def __init__(self, timed: TimedGraph, most_in_flight: Sequence[int]) -> None:
        assert min(most_in_flight) >= 1
        self._operations, self._rank = timed.numbered.operations, timed.rank
        self._num_open = list(most_in_flight)
        self._held: dict[tuple[int, int], list[int]] = {}
        self._num_gradients: dict[tuple[int, int], int] = {}
        for rank, operation in zip(self._rank, self._operations, strict=True):
            if operation.kind == "I":
                key = rank, operation.microbatch
                self._num_gradients[key] = self._num_gradients.get(key, 0) + 1
        self._next_through = [0] * timed.num_ranks

    def holds(self, index: int) -> bool:
        """Keep an operation that must wait, and say so."""
        operation, rank = self._operations[index], self._rank[index]
        if operation.kind != "F" or operation.microbatch < self._num_open[rank]:
            return False
        self._held.setdefault((rank, operation.microbatch), []).append(index)
        return True

    def released_by(self, index: int) -> list[int]:
        """Return the operations that need not wait any more when this one has run."""
        operation, rank = self._operations[index], self._rank[index]
        if operation.kind != "I":
            return []
        self._num_gradients[rank, operation.microbatch] -= 1
        released: list[int] = []
        while self._num_gradients.get((rank, self._next_through[rank])) == 0:
            self._next_through[rank] += 1
            released += self._held.pop((rank, self._num_open[rank]), [])
            self._num_open[rank] += 1
        return released


class _ListRun:
    """The ranks in simulated time: events are operations that end or become ready."""

    def __init__(
        self,
        timed: TimedGraph,
        priorities: Sequence[Priority],
        gate: _Gate | None,
        weight_place: int,
    ) -> None:
        self._timed, self._gate = timed, gate
        operations = timed.numbered.operations
        self._num_missing = [len(needs) for needs in timed.numbered.needs]
        self._next_weight = self._chain_weights()
        self._keys = [
            (weight_place if operation.kind == "W" else 0, *priority, index)
            for index, (operation, priority) in enumerate(zip(operations, priorities, strict=True))
        ]
        self._ready_s = [0.0] * len(operations)
        self._ready: list[list[tuple[float, ...]]] = [[] for _ in range(timed.num_ranks)]
        self._busy = [False] * timed.num_ranks
        # Ranks that may have something to start: only these are looked at.
        self._changed: set[int] = set()
        self._events: list[tuple[float, int, bool]] = []
        self._wires = Wires(timed.link)
        self._order: list[list[int]] = [[] for _ in range(timed.num_ranks)]
        self._tolerance_s = SAME_TIME * sum(timed.seconds)

    def to_end(self) -> ListSchedule:
        for index, num_missing in enumerate(self._num_missing):
            if not num_missing:
                self._make_ready(index)
        self._start_all(0.0)
        now = 0.0
        while self._events:
            now = self._happen()
            self._start_all(now)
        assert sum(map(len, self._order)) == len(self._keys), "some operation never became ready"
        return ListSchedule(self._order, now)

    def _chain_weights(self) -> dict[int, int]:
        """Let each W of a block wait for the one before it; return who waits for whom."""
        of_block: dict[str, list[int]] = {}
        operations = self._timed.numbered.operations
        for index, operation in enumerate(operations):
            if operation.kind == "W":
                of_block.setdefault(operation.block, []).append(index)
        chain: dict[int, int] = {}
        for weights in of_block.values():
            weights.sort(key=lambda index: weight_sequence(operations[index]))
            for before, after in pairwise(weights):
                chain[before] = after
                self._num_missing[after] += 1
        return chain

    def _happen(self) -> float:
        """Take all events of the next time, and of the times that are the same but for rounding."""
        first, now = self._events[0][0], self._events[0][0]
        while self._events and self._events[0][0] <= first + self._tolerance_s:
            now, index, ended = heapq.heappop(self._events)
            if ended:
                rank = self._timed.rank[index]
                self._busy[rank] = False
                self._changed.add(rank)
                self._deliver(index, now)
            else:
                self._make_ready(index)
        return now

    def _deliver(self, index: int, now: float) -> None:
        timed = self._timed
        rank = timed.rank[index]
        arrival = {
            receiver: self._wires.arrival(rank, receiver, num_bytes, now)
            for receiver, num_bytes in timed.sends[index].items()
        }
        for follower in timed.numbered.followers[index]:
            self._supply(follower, arrival.get(timed.rank[follower], now), now)
        if index in self._next_weight:
            self._supply(self._next_weight[index], now, now)
        for released in self._gate.released_by(index) if self._gate else ():
            self._push(released)

    def _supply(self, index: int, when: float, now: float) -> None:
        self._ready_s[index] = max(self._ready_s[index], when)
        self._num_missing[index] -= 1
        if self._num_missing[index]:
            return
        if self._ready_s[index] <= now:
            self._make_ready(index)
        else:
            heapq.heappush(self._events, (self._ready_s[index], index, False))

    def _make_ready(self, index: int) -> None:
        if self._gate is None or not self._gate.holds(index):
            self._push(index)

    def _push(self, index: int) -> None:
        rank = self._timed.rank[index]
        heapq.heappush(self._ready[rank], self._keys[index])
        self._changed.add(rank)

    def _start_all(self, now: float) -> None:
        """Give each free rank its next operation.

        Those that take no time are run first, everywhere: what they make is there at once, and may
        be more urgent than what a rank would take without it.
        """
        changed: set[int] = set()
        while self._changed:
            rank = min(self._changed)
            self._changed.remove(rank)
            changed.add(rank)
            self._run_instant(rank, now)
        for rank in sorted(changed):
            ready = self._ready[rank]
            if ready and not self._busy[rank]:
                index = int(heapq.heappop(ready)[-1])
                self._busy[rank] = True
                self._order[rank].append(index)
                end = now + self._timed.seconds[index]
                heapq.heappush(self._events, (end, index, True))

    def _run_instant(self, rank: int, now: float) -> None:
        ready, seconds = self._ready[rank], self._timed.seconds
        while ready and not self._busy[rank] and not seconds[int(ready[0][-1])]:
            index = int(heapq.heappop(ready)[-1])
            self._order[rank].append(index)
            self._deliver(index, now)
