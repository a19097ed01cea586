"""Recorded steps on one clock, each beside what its schedule could have made of it.

The simulated step has the mean time that a block's F, I or W took in the recorded one, and free
messages. So what the recorded step takes beyond it is transport, orchestration and the unevenness
of operation times.

Ranks of one node read the same clock (CLOCK_MONOTONIC). Between nodes the clocks are set equal at
the moment at which the ranks leave the sum of the gradients' norms: none leaves it before all have
entered. That is as exact as the network's answer to a small message, not better.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from pipeline.graph import Graph, Kind
from pipeline.placements.placement import Placement
from pipeline.plan import Plan
from pipeline.schedules.schedule import Schedule
from pipeline.simulation.simulator import TimedOperation, start_times
from pipeline.simulation.timed_graph import time_graph
from pipeline.timeline.recording import RankRecord

SimulatedRanks = tuple[tuple[TimedOperation, ...], ...]


@dataclass(frozen=True)
class RankFigures:
    """How a rank spent the time from the step's first operation to its last; all add up to it.

    `between_s` is what lay between operations and was no wait: sending, freeing, bookkeeping.
    `outside_s` came before the rank's first operation, or after its last one. A bubble is the share
    of the time without an operation.
    """

    busy_s: float
    wait_s: float
    between_s: float
    outside_s: float
    executed_bubble: float
    simulated_bubble: float


@dataclass(frozen=True)
class StepTimeline:
    """A step as it ran and as it is simulated, in seconds after its first operation's start.

    `clock_s` is that start on rank 0's node.
    """

    step: int
    clock_s: float
    executed: tuple[RankRecord, ...]
    simulated: SimulatedRanks
    replica: int = 0

    @property
    def executed_s(self) -> float:
        """The end of the last operation as it ran; the update comes after it."""
        return max(op.end_s for rank in self.executed for op in rank.operations)

    @property
    def simulated_s(self) -> float:
        """The end of the last operation as it is simulated."""
        return max(timed.end_s for rank in self.simulated for timed in rank)

    @property
    def executed_bubble(self) -> float:
        """The idle share of all ranks' time."""
        return fmean(figures.executed_bubble for figures in self.figures())

    @property
    def simulated_bubble(self) -> float:
        """The idle share of all ranks' simulated time."""
        return fmean(figures.simulated_bubble for figures in self.figures())

    def figures(self) -> list[RankFigures]:
        """Return the figures of every rank, in their order."""
        return [
            _figures(record, self.executed_s, timed, self.simulated_s)
            for record, timed in zip(self.executed, self.simulated, strict=True)
        ]


def waits(record: RankRecord) -> list[tuple[float, float]]:
    """Return when a rank waited before each of its operations, from the step's start on.

    A wait ends where the operation starts; of one that began before the step, or in which the rank
    did something else too, only what fits behind the operation before is counted.
    """
    spans, free_s = [], 0.0
    for op in record.operations:
        spans.append((max(free_s, min(op.start_s, op.start_s - op.wait_s)), op.start_s))
        free_s = op.end_s
    return spans


def build_timelines(
    plan: Plan,
    steps: Mapping[int, Sequence[RankRecord]],
    nodes: Sequence[str] | None = None,
    *,
    replica: int = 0,
) -> list[StepTimeline]:
    """Put the records of some steps, by number and rank, on one clock, and simulate each.

    `nodes` names the node of every rank; without it all ranks are on one.
    """
    offsets = clock_offsets(list(steps.values()), nodes or [""] * plan.num_ranks)
    return [_step(plan, step, steps[step], offsets, replica) for step in sorted(steps)]


def clock_offsets(steps: Sequence[Sequence[RankRecord]], nodes: Sequence[str]) -> list[float]:
    """Return what to add to each rank's times to have them on the clock of rank 0's node.

    On each node the rank counts that is the first to leave the sum; of several steps, the median.
    """

    def left_s(records: Sequence[RankRecord], node: str) -> float:
        return min(r.met_s for r, at in zip(records, nodes, strict=True) if at == node)

    offset_of = {
        node: median(left_s(records, nodes[0]) - left_s(records, node) for records in steps)
        for node in set(nodes)
    }
    return [offset_of[node] for node in nodes]


def simulate_recorded(
    schedule: Schedule, graph: Graph, placement: Placement, records: Sequence[RankRecord]
) -> SimulatedRanks:
    """Run a schedule in simulated time with the mean times of a record, and free messages."""
    taken: dict[tuple[Kind, str], list[float]] = {}
    for record in records:
        for op in record.operations:
            key = op.operation.kind, op.operation.block
            taken.setdefault(key, []).append(op.end_s - op.start_s)
    mean_s = {key: fmean(times) for key, times in taken.items()}
    operations, number = graph.numbered.operations, graph.numbered.number
    timed = replace(
        time_graph(graph, placement, None),
        seconds=[mean_s[operation.kind, operation.block] for operation in operations],
    )
    starts = start_times(timed, [[number[op] for op in rank] for rank in schedule.operations])
    return tuple(
        tuple(
            TimedOperation(op, starts[number[op]], starts[number[op]] + timed.seconds[number[op]])
            for op in rank
        )
        for rank in schedule.operations
    )


def _step(
    plan: Plan, step: int, records: Sequence[RankRecord], offsets: Sequence[float], replica: int
) -> StepTimeline:
    planned = plan.training
    moved = [_moved(record, by) for record, by in zip(records, offsets, strict=True)]
    start_s = min(record.operations[0].start_s for record in moved)
    return StepTimeline(
        step,
        start_s,
        tuple(_moved(record, -start_s) for record in moved),
        simulate_recorded(planned.schedule, planned.graph, plan.placement, records),
        replica,
    )


def _moved(record: RankRecord, by_s: float) -> RankRecord:
    return RankRecord(
        tuple(
            op._replace(start_s=op.start_s + by_s, end_s=op.end_s + by_s)
            for op in record.operations
        ),
        record.meet_s + by_s,
        record.met_s + by_s,
        record.end_s + by_s,
    )


def _figures(
    record: RankRecord,
    executed_s: float,
    simulated: Sequence[TimedOperation],
    simulated_s: float,
) -> RankFigures:
    busy_s = sum(op.end_s - op.start_s for op in record.operations)
    spans = waits(record)
    wait_s = sum(stop - start for start, stop in spans)
    outside_s = spans[0][0] + executed_s - record.operations[-1].end_s
    simulated_busy_s = sum(timed.end_s - timed.start_s for timed in simulated)
    return RankFigures(
        busy_s=busy_s,
        wait_s=wait_s,
        between_s=executed_s - busy_s - wait_s - outside_s,
        outside_s=outside_s,
        executed_bubble=_idle_share(busy_s, executed_s),
        simulated_bubble=_idle_share(simulated_busy_s, simulated_s),
    )


def _idle_share(busy_s: float, total_s: float) -> float:
    return 1.0 - busy_s / total_s if total_s else 0.0
