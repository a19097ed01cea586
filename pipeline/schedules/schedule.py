"""Schedules as data: for every rank, the operations in the order in which it runs them.

The messages between ranks follow from the order and the placement, so a schedule does not list
them. `validate` refuses every schedule that would compute something wrong or never end;
`pipeline.simulation.memory` refuses those that keep too much.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from model.errors import UserError
from pipeline.graph import Graph, Operation, Value
from pipeline.placements.placement import Placement
from pipeline.schedules.exchange import Sends, find_blocked_rank


class ScheduleError(UserError):
    """A schedule does not run its graph: an operation is missing, twice, misplaced or stuck."""


@dataclass(frozen=True)
class Schedule:
    """The ordered operations of every rank, by rank."""

    operations: tuple[tuple[Operation, ...], ...]

    def forward_only(self) -> "Schedule":
        """Return the same order without gradients, as it runs in an evaluation."""
        return Schedule(
            tuple(tuple(op for op in rank if op.kind == "F") for rank in self.operations)
        )


Pair = tuple[int, int]


def messages(
    schedule: Schedule, graph: Graph, placement: Placement
) -> dict[Pair, tuple[Value, ...]]:
    """Return the values that go from rank to rank, by (sender, receiver), as the sender makes them.

    A value goes to a rank once, however many operations need it there.
    """
    destinations: dict[Value, set[int]] = {}
    for operation in graph.inputs:
        rank = placement.rank_of[operation.block]
        for value in graph.values_in(operation):
            if placement.rank_of[value.operation.block] != rank:
                destinations.setdefault(value, set()).add(rank)
    values_of: dict[Operation, list[Value]] = {}
    for value in destinations:
        values_of.setdefault(value.operation, []).append(value)
    sent: dict[Pair, list[Value]] = {}
    for sender, operations in enumerate(schedule.operations):
        for operation in operations:
            for value in sorted(values_of.get(operation, [])):
                for receiver in sorted(destinations[value]):
                    sent.setdefault((sender, receiver), []).append(value)
    return {pair: tuple(values) for pair, values in sorted(sent.items())}


def validate(
    schedule: Schedule, graph: Graph, placement: Placement, *, sends: Sends = "buffered"
) -> None:
    """Raise ScheduleError, which names an operation, unless the schedule runs the whole graph.

    By default sends do not block, as in the transports here. Then receives in the order of the
    sends cannot add a deadlock: a message waits only for what its sender does before it anyway.
    Other ways to send, under which fewer schedules end, are in `pipeline.schedules.exchange`.
    """
    if len(schedule.operations) != placement.num_ranks:
        raise ScheduleError(
            f"the schedule is for {len(schedule.operations)} ranks and placement "
            f"{placement.name!r} has {placement.num_ranks}; make it for this placement"
        )
    _check_each_once(schedule, graph)
    _check_ranks(schedule, placement)
    _check_progress(schedule, graph)
    if sends != "buffered":
        _check_exchange(schedule, graph, placement, sends)


def _check_each_once(schedule: Schedule, graph: Graph) -> None:
    counts = Counter(operation for rank in schedule.operations for operation in rank)
    for operation, count in counts.items():
        if operation not in graph.inputs:
            raise ScheduleError(f"{operation} is scheduled but is no operation of this step")
        if count > 1:
            raise ScheduleError(f"{operation} is scheduled {count} times; schedule it once")
    for operation in graph.inputs:
        if operation not in counts:
            raise ScheduleError(f"{operation} is scheduled on no rank; schedule it once")


def _check_ranks(schedule: Schedule, placement: Placement) -> None:
    for rank, operations in enumerate(schedule.operations):
        for operation in operations:
            owner = placement.rank_of[operation.block]
            if owner != rank:
                raise ScheduleError(
                    f"{operation} is scheduled on rank {rank} but its block is on rank {owner}"
                )


def _check_progress(schedule: Schedule, graph: Graph) -> None:
    """Let the ranks run until none can go on; every one must then be at its end."""
    done: set[Operation] = set()
    places = [0] * len(schedule.operations)
    waiting: dict[Operation, list[int]] = {}
    runnable = list(range(len(places)))
    while runnable:
        rank = runnable.pop()
        operations = schedule.operations[rank]
        while places[rank] < len(operations):
            operation = operations[places[rank]]
            missing = next((need for need in graph.needs(operation) if need not in done), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            done.add(operation)
            places[rank] += 1
            runnable.extend(waiting.pop(operation, ()))
    _refuse_stuck(schedule, waiting)


def _check_exchange(schedule: Schedule, graph: Graph, placement: Placement, sends: Sends) -> None:
    sent = messages(schedule, graph, placement)
    blocked = find_blocked_rank(schedule.operations, sent, graph, sends)
    if blocked is not None:
        raise ScheduleError(
            f"with {sends} sends the schedule never ends: rank {blocked.rank} waits for rank "
            f"{blocked.peer} to {blocked.missing} {blocked.value.port!r} of "
            f"{blocked.value.operation}; change the order, or use sends that do not block"
        )


def _refuse_stuck(schedule: Schedule, waiting: Mapping[Operation, list[int]]) -> None:
    if not waiting:
        return
    missing, (rank, *_) = next(iter(waiting.items()))
    raise ScheduleError(
        f"the schedule never ends: rank {rank} waits for {missing}, which runs only after what "
        f"waits for it ({len(waiting)} such waits); change the order"
    )
