"""How an order is chosen: policies, each a function from graph, placement and costs to a schedule.

There are two ways. `fill_drain` and `wavefront` take a single order of the whole graph and give
each rank its part of it, whatever things cost; such a schedule does not depend on the placement
otherwise. The others run the graph in simulated time (`pipeline.schedules.list_scheduling`), since
what fills a rank's idle time depends on the costs. In both, the operations of all ranks have one
common order in which they can run, so no schedule deadlocks.
"""

import heapq
from collections.abc import Sequence
from typing import Protocol

from model.errors import UserError
from pipeline.costs.operation_costs import Costs
from pipeline.graph import Graph, Operation
from pipeline.placements.placement import Placement
from pipeline.schedules.list_scheduling import ListSchedule, list_schedule, upward_ranks
from pipeline.schedules.priorities import (
    Priority,
    back_before_next_microbatch,
    block_after_block,
    diagonals,
    first_microbatch_first,
    newest_chunk_first,
)
from pipeline.schedules.schedule import Schedule
from pipeline.simulation.timed_graph import TimedGraph, time_graph


class Policy(Protocol):
    """Makes a schedule; without costs every operation takes the same time and messages none."""

    def __call__(
        self, graph: Graph, placement: Placement, *, costs: Costs | None = None
    ) -> Schedule:
        """Return a valid schedule of the graph; the same arguments give the same schedule."""


def fill_drain(graph: Graph, placement: Placement, *, costs: Costs | None = None) -> Schedule:
    """Run all forward operations, then all others in reverse (Huang et al. 2019, GPipe).

    Microbatch after microbatch, and all chunks of a block before the next block of the rank.
    """
    return in_priority_order(graph, placement, block_after_block(graph))


def wavefront(graph: Graph, placement: Placement, *, costs: Costs | None = None) -> Schedule:
    """Run along the diagonals of layer and chunk, forward, then the same way back."""
    return in_priority_order(graph, placement, diagonals(graph))


def one_forward_one_backward(
    graph: Graph, placement: Placement, *, costs: Costs | None = None
) -> Schedule:
    """Run a microbatch back as soon as it can go (Narayanan et al. 2019, PipeDream's 1F1B).

    A rank begins no more microbatches before it has finished one than there are stages from it to
    the loss, so what it keeps does not grow with their number. W runs right behind its I.
    """
    timed = time_graph(graph, placement, costs)
    found = list_schedule(
        timed,
        back_before_next_microbatch(graph),
        defer_weights=False,
        most_in_flight=stages_to_loss(graph, timed) if graph.training else None,
    )
    return _schedule(timed, found)


def deferred_weights(graph: Graph, placement: Placement, *, costs: Costs | None = None) -> Schedule:
    """Run along diagonals, and W only when a rank has nothing else to do (zero-bubble's idea).

    See Qi et al. 2023, "Zero bubble pipeline parallelism".
    """
    timed = time_graph(graph, placement, costs)
    return _schedule(timed, list_schedule(timed, first_microbatch_first(graph)))


def priority_list(graph: Graph, placement: Placement, *, costs: Costs | None = None) -> Schedule:
    """Try several priorities, the longest way to the end among them, and keep the fastest order.

    W runs only when a rank has nothing else to do. On a tie the first priority is kept.
    """
    timed = time_graph(graph, placement, costs)
    tried = [
        list_schedule(timed, priorities)
        for priorities in (
            first_microbatch_first(graph),
            newest_chunk_first(graph),
            longest_way_first(timed),
        )
    ]
    return _schedule(timed, min(tried, key=lambda found: found.end_s))


POLICIES: dict[str, Policy] = {
    "fill_drain": fill_drain,
    "wavefront": wavefront,
    "1f1b": one_forward_one_backward,
    "deferred_weights": deferred_weights,
    "priority_list": priority_list,
}


def named_policy(name: str) -> Policy:
    """Return a policy by name, or raise a UserError that lists the names."""
    if name not in POLICIES:
        known = ", ".join(POLICIES)
        raise UserError(f"pipeline.policy={name!r} is unknown; use one of {known}")
    return POLICIES[name]


def in_priority_order(
    graph: Graph, placement: Placement, priorities: Sequence[Priority]
) -> Schedule:
    """Order the whole graph, lowest priority first among what can run, and cut it by rank.

    This is Kahn's algorithm with a heap; `priorities` are in the graph's order.
    """
    numbered = graph.numbered
    num_missing = [len(needs) for needs in numbered.needs]
    ready = [(priorities[index], index) for index, num in enumerate(num_missing) if num == 0]
    heapq.heapify(ready)
    by_rank: list[list[Operation]] = [[] for _ in range(placement.num_ranks)]
    while ready:
        _, index = heapq.heappop(ready)
        operation = numbered.operations[index]
        by_rank[placement.rank_of[operation.block]].append(operation)
        for follower in numbered.followers[index]:
            num_missing[follower] -= 1
            if num_missing[follower] == 0:
                heapq.heappush(ready, (priorities[follower], follower))
    return Schedule(tuple(tuple(rank) for rank in by_rank))


def longest_way_first(timed: TimedGraph) -> list[Priority]:
    """Return priorities by the critical path; among equals the earlier microbatch goes first."""
    return [
        (-upward, operation.microbatch)
        for upward, operation in zip(upward_ranks(timed), timed.numbered.operations, strict=True)
    ]


def stages_to_loss(graph: Graph, timed: TimedGraph) -> list[int]:
    """Return, by rank, how many stages a microbatch passes from there to the end of its way.

    A stage is a change of rank on the longest way forward through the blocks. What the target side
    can do before anything has come from the encoder does not make a rank an early one.
    """
    numbered, rank = timed.numbered, timed.rank
    depth = [0] * len(rank)
    for index, operation in enumerate(numbered.operations):
        if operation.kind == "F":
            depth[index] = max(
                (depth[need] + (rank[need] != rank[index]) for need in numbered.needs[index]),
                default=0,
            )
    deepest = max(depth)
    shallowest = [deepest] * timed.num_ranks
    for index, operation in enumerate(numbered.operations):
        early = depth[index] == 0 and graph.spec_of[operation.block].side == "target"
        if operation.kind == "F" and not early:
            shallowest[rank[index]] = min(shallowest[rank[index]], depth[index])
    return [1 + deepest - least for least in shallowest]


def _schedule(timed: TimedGraph, found: ListSchedule) -> Schedule:
    operations = timed.numbered.operations
    return Schedule(tuple(tuple(operations[index] for index in rank) for rank in found.order))
