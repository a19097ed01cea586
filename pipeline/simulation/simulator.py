"""Predicts a step: when every operation of a schedule starts and ends, given what things cost.

Each rank runs its list in order, and an operation starts when the rank is free and its messages are
there. Sends cost the rank no time. With replicas, all run the same lists, and a block's gradient is
summed over them from the end of its last W on, beside the operations that are left. Nothing else
happens between two operations, so what a real run takes beyond this is orchestration.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from model.network import BlockSpec
from pipeline.costs.operation_costs import Costs, Link
from pipeline.graph import Graph, Operation
from pipeline.placements.placement import Placement
from pipeline.schedules.schedule import Schedule
from pipeline.simulation.gradient_exchange import (
    TimedExchange,
    exchange_bytes,
    exchange_memory_bytes,
    replica_costs,
    time_exchanges,
)
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

    `timeline` is that of the replica with the largest share of the batch, `exchanges` its sums of
    gradients over replicas, by rank. `one_device_s` is the time of the same training step on one
    device, `peak_memory_bytes` what a rank holds at most (see `pipeline.simulation.memory`),
    `bytes_sent` counts each rank's messages and its part in the sums, which is `sum_bytes`.
    `mean_share` is an average replica's part of the largest share: below 1 where a batch cannot be
    shared out evenly.
    """

    timeline: tuple[tuple[TimedOperation, ...], ...]
    one_device_s: float
    peak_memory_bytes: tuple[int, ...]
    bytes_sent: tuple[int, ...]
    num_replicas: int = 1
    exchanges: tuple[tuple[TimedExchange, ...], ...] = ()
    sum_bytes: tuple[int, ...] = ()
    mean_share: float = 1.0

    @property
    def num_ranks(self) -> int:
        """The ranks of one replica."""
        return len(self.timeline)

    @property
    def num_devices(self) -> int:
        """The ranks of all replicas."""
        return self.num_ranks * self.num_replicas

    @cached_property
    def compute_s(self) -> float:
        """The end of the last operation."""
        return max((timed.end_s for rank in self.timeline for timed in rank), default=0.0)

    @cached_property
    def step_seconds(self) -> float:
        """The end of the last operation, or of the last sum over replicas if that is later."""
        ends = (exchange.end_s for rank in self.exchanges for exchange in rank)
        return max(self.compute_s, max(ends, default=0.0))

    @property
    def exchange_s(self) -> float:
        """The exposed part of the sums over replicas: what they add to the step."""
        return self.step_seconds - self.compute_s

    @property
    def speedup(self) -> float:
        """How many times faster than one device."""
        return self.one_device_s / self.step_seconds if self.step_seconds else 1.0

    @property
    def efficiency(self) -> float:
        """The speedup for each device."""
        return self.speedup / self.num_devices

    @cached_property
    def busy_s(self) -> tuple[float, ...]:
        """Each rank's time in operations, in the replica with the largest share."""
        return tuple(sum(timed.end_s - timed.start_s for timed in rank) for rank in self.timeline)

    @property
    def idle_s(self) -> tuple[float, ...]:
        """Each rank's time without an operation, up to the end of the step."""
        return tuple(self.step_seconds - busy for busy in self.busy_s)

    @property
    def bubble_fraction(self) -> float:
        """The idle share of the time of all ranks of all replicas."""
        total = self.num_ranks * self.step_seconds
        return 1.0 - self.mean_share * sum(self.busy_s) / total if total else 0.0

    @property
    def all_bytes_sent(self) -> int:
        """What all ranks of all replicas send; messages go with a replica's share."""
        in_sums = sum(self.sum_bytes)
        messages = self.mean_share * (sum(self.bytes_sent) - in_sums)
        return round(self.num_replicas * (messages + in_sums))


def simulate(
    schedule: Schedule,
    graph: Graph,
    placement: Placement,
    costs: Costs,
    *,
    num_replicas: int = 1,
) -> Simulation:
    """Run a valid schedule in simulated time, on the largest share of the batch.

    `costs` are those of the whole batch, whatever the number of replicas.
    """
    share = replica_costs(costs, num_replicas)
    times = step_times(schedule, graph, placement, share, num_replicas)
    return simulation_of(times, schedule, graph, placement, costs, num_replicas)


def simulation_of(
    times: "StepTimes",
    schedule: Schedule,
    graph: Graph,
    placement: Placement,
    costs: Costs,
    num_replicas: int,
) -> Simulation:
    """Return what follows from the times of a step; `costs` are those of the whole batch."""
    share = replica_costs(costs, num_replicas)
    peaks = list(peak_memory_bytes(schedule, graph, placement, share))
    sums = [0] * placement.num_ranks
    for spec in graph.blocks if graph.training else ():
        rank = placement.rank_of[spec.name]
        peaks[rank] += exchange_memory_bytes(spec, share, num_replicas)
        sums[rank] += exchange_bytes(spec, share, num_replicas)
    messages = bytes_sent(times.timed)
    return Simulation(
        timeline=times.timeline(),
        one_device_s=costs.one_device_s(),
        peak_memory_bytes=tuple(peaks),
        bytes_sent=tuple(map(sum, zip(messages, sums, strict=True))),
        num_replicas=num_replicas,
        exchanges=times.exchanges,
        sum_bytes=tuple(sums),
        mean_share=costs.batch.num_sentences / (num_replicas * share.batch.num_sentences),
    )


@dataclass(frozen=True)
class StepTimes:
    """When things happen in a step: each rank's operation numbers in order, their starts, sums."""

    timed: TimedGraph
    order: list[list[int]]
    starts: list[float]
    exchanges: tuple[tuple[TimedExchange, ...], ...]

    @property
    def step_s(self) -> float:
        """The end of the last operation or sum."""
        compute_s = max(map(sum, zip(self.starts, self.timed.seconds, strict=True)), default=0.0)
        return max([compute_s, *(rank[-1].end_s for rank in self.exchanges if rank)])

    def end_on_free_link_s(self) -> float:
        """Return when the last operation would end if messages took no time."""
        starts = start_times(replace(self.timed, link=Link()), self.order)
        return max(map(sum, zip(starts, self.timed.seconds, strict=True)), default=0.0)

    def timeline(self) -> tuple[tuple[TimedOperation, ...], ...]:
        """Return each rank's operations with their starts and ends."""
        return tuple(tuple(self._timed_operation(index) for index in rank) for rank in self.order)

    def _timed_operation(self, index: int) -> TimedOperation:
        start_s = self.starts[index]
        operation = self.timed.numbered.operations[index]
        return TimedOperation(operation, start_s, start_s + self.timed.seconds[index])


def step_times(
    schedule: Schedule, graph: Graph, placement: Placement, costs: Costs, num_replicas: int = 1
) -> StepTimes:
    """Return the times of a step; `costs` are those of one replica.

    This is the part of `simulate` that a search over many layouts needs.
    """
    timed = time_graph(graph, placement, costs)
    number = graph.numbered.number
    order = [[number[operation] for operation in rank] for rank in schedule.operations]
    starts = start_times(timed, order)
    exchanges = tuple(
        time_exchanges(_completed(timed, rank, starts, graph), costs, num_replicas)
        for rank in (order if num_replicas > 1 else ())
    )
    return StepTimes(timed, order, starts, exchanges)


def _completed(
    timed: TimedGraph, order: Sequence[int], starts: Sequence[float], graph: Graph
) -> list[tuple[BlockSpec, float]]:
    """Return a rank's blocks with the ends of their last W, in that order."""
    ends: dict[str, float] = {}
    for index in reversed(order):
        operation = timed.numbered.operations[index]
        if operation.kind == "W":
            ends.setdefault(operation.block, starts[index] + timed.seconds[index])
    return [(graph.spec_of[block], end_s) for block, end_s in reversed(ends.items())]


def bytes_sent(timed: TimedGraph) -> list[int]:
    """Return the bytes of each rank's messages in a step, in any order of its operations."""
    totals = [0] * timed.num_ranks
    for rank, sends in zip(timed.rank, timed.sends, strict=True):
        totals[rank] += sum(sends.values())
    return totals


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
