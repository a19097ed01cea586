"""Predicts a step: when every operation of a schedule starts and ends, given what things cost.

Each rank runs its list in order, and an operation starts when the rank is free and its messages are
there. Sends cost the rank no time. Nothing else happens between two operations, so what a real run
takes beyond this is orchestration.
"""

from dataclasses import dataclass
from functools import cached_property

from pipeline.costs.operation_costs import Costs
from pipeline.graph import Graph, Operation
from pipeline.placements.placement import Placement
from pipeline.schedules.schedule import Schedule
from pipeline.simulation.memory import peak_memory_bytes
from pipeline.simulation.timed_graph import TimedGraph, Wires, time_graph


@dataclass(frozen=True)
class TimedOperation:
    """An operation with its start and end, in seconds after the step's start."""

    operation: Operation
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Simulation:
    """The predicted step: the timeline of every rank, and what follows from it.

    `one_device_s` is the time of the same training step on one device, `peak_memory_bytes` what a
    rank holds at most (see `pipeline.simulation.memory`), `bytes_sent` counts each rank's messages.
    """

    timeline: tuple[tuple[TimedOperation, ...], ...]
    one_device_s: float
    peak_memory_bytes: tuple[int, ...]
    bytes_sent: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        """The ranks of one replica."""
        return len(self.timeline)

    @cached_property
    def step_seconds(self) -> float:
        """The end of the last operation."""
        return max((timed.end_s for rank in self.timeline for timed in rank), default=0.0)

    @property
    def speedup(self) -> float:
        """How many times faster than one device."""
        return self.one_device_s / self.step_seconds if self.step_seconds else 1.0

    @property
    def efficiency(self) -> float:
        """The speedup for each rank."""
        return self.speedup / self.num_ranks

    @cached_property
    def busy_s(self) -> tuple[float, ...]:
        """Each rank's time in operations."""
        return tuple(sum(timed.end_s - timed.start_s for timed in rank) for rank in self.timeline)

    @property
    def idle_s(self) -> tuple[float, ...]:
        """Each rank's time without an operation, up to the end of the step."""
        return tuple(self.step_seconds - busy for busy in self.busy_s)

    @property
    def bubble_fraction(self) -> float:
        """The idle share of all ranks' time."""
        total = self.num_ranks * self.step_seconds
        return sum(self.idle_s) / total if total else 0.0


def simulate(schedule: Schedule, graph: Graph, placement: Placement, costs: Costs) -> Simulation:
    """Run a valid schedule in simulated time."""
    timed = time_graph(graph, placement, costs)
    order = [[graph.numbered.number[op] for op in rank] for rank in schedule.operations]
    starts = start_times(timed, order)
    return Simulation(
        timeline=tuple(
            tuple(
                TimedOperation(
                    timed.numbered.operations[index],
                    starts[index],
                    starts[index] + timed.seconds[index],
                )
                for index in rank
            )
            for rank in order
        ),
        one_device_s=costs.one_device_s(),
        peak_memory_bytes=peak_memory_bytes(schedule, graph, placement, costs),
        bytes_sent=bytes_sent(timed),
    )


def bytes_sent(timed: TimedGraph) -> tuple[int, ...]:
    """Return the bytes that each rank sends in a step, in any order of its operations."""
    totals = [0] * timed.num_ranks
    for rank, sends in zip(timed.rank, timed.sends, strict=True):
        totals[rank] += sum(sends.values())
    return tuple(totals)


def start_times(timed: TimedGraph, order: list[list[int]]) -> list[float]:
    """Return when each operation starts, by number, if every rank keeps its order.

    What shares a wire is sent by one rank, in its order, so each rank can be followed on its own as
    far as its inputs are known.
    """
    run = _Run(timed, order)
    runnable = list(range(len(order)))
    while runnable:
        runnable.extend(run.follow(runnable.pop()))
    assert run.finished(), "the schedule never ends; validate it first"
    return run.start_s


class _Run:
    """The simulated ranks, each at some place of its list."""

    def __init__(self, timed: TimedGraph, order: list[list[int]]) -> None:
        self._timed, self._order = timed, order
        self._place = [0] * len(order)
        self._free_s = [0.0] * len(order)
        self._wires = Wires(timed.link)
        self._num_missing = [len(needs) for needs in timed.numbered.needs]
        self._ready_s = [0.0] * len(timed.seconds)
        self.start_s = [0.0] * len(timed.seconds)

    def finished(self) -> bool:
        return all(place == len(rank) for place, rank in zip(self._place, self._order, strict=True))

    def follow(self, rank: int) -> set[int]:
        """Run a rank until an input is missing; return the ranks that may go on by that."""
        order, reached = self._order[rank], set()
        while self._place[rank] < len(order):
            index = order[self._place[rank]]
            if self._num_missing[index]:
                break
            start = max(self._free_s[rank], self._ready_s[index])
            end = start + self._timed.seconds[index]
            self.start_s[index], self._free_s[rank] = start, end
            self._place[rank] += 1
            reached |= self._deliver(index, end)
        reached.discard(rank)
        return reached

    def _deliver(self, index: int, end: float) -> set[int]:
        """Make an operation known to those that need it, when its messages arrive."""
        timed, reached = self._timed, set()
        rank = timed.rank[index]
        arrival = {
            receiver: self._wires.arrival(rank, receiver, num_bytes, end)
            for receiver, num_bytes in timed.sends[index].items()
        }
        for follower in timed.numbered.followers[index]:
            receiver = timed.rank[follower]
            when = arrival.get(receiver, end)
            if when > self._ready_s[follower]:
                self._ready_s[follower] = when
            self._num_missing[follower] -= 1
            if not self._num_missing[follower]:
                reached.add(receiver)
        return reached
