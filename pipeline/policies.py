"""How an order is chosen: policies, each a function from graph and placement to a schedule.

A policy here ranks all operations by a priority, takes a single order of the whole graph that
respects its edges (Kahn's algorithm with a heap), and gives each rank its part of it. Such a
schedule cannot deadlock: the operation that comes first in the whole order can always run. The
priorities do not look at the placement, so a parameter's gradient is summed in the same order
wherever its block is.
"""

import heapq
from collections.abc import Callable

from model.errors import UserError
from pipeline.graph import Graph, Operation
from pipeline.placement import Placement
from pipeline.schedule import Schedule

Policy = Callable[[Graph, Placement], Schedule]
Priority = tuple[int, ...]


def fill_drain(graph: Graph, placement: Placement) -> Schedule:
    """Run all forward operations, then all others in reverse (Huang et al. 2019, GPipe).

    Microbatch after microbatch, and all chunks of a block before the next block of the rank.
    """
    place = _places(graph)

    def priority(operation: Operation) -> Priority:
        forward = (operation.microbatch, place[operation.block], operation.chunk)
        return _mirrored(operation, forward)

    return in_priority_order(graph, placement, priority)


def wavefront(graph: Graph, placement: Placement) -> Schedule:
    """Run along the diagonals of layer and chunk, forward, then the same way back.

    All forward operations of the softmax come before its first input gradient: going back and forth
    chunk by chunk would hold up the decoder.
    """
    place = _places(graph)
    num_layers = 1 + max(spec.layer for spec in graph.blocks if spec.kind == "recurrence")

    def priority(operation: Operation) -> Priority:
        spec = graph.spec_of[operation.block]
        depth = num_layers if spec.kind in ("softmax", "loss") else spec.layer
        side = 0 if spec.side == "source" else 1
        diagonal = (2 * operation.microbatch + side) * graph.num_chunks + depth + operation.chunk
        return _mirrored(operation, (diagonal, place[operation.block], operation.chunk))

    return in_priority_order(graph, placement, priority)


POLICIES: dict[str, Policy] = {"fill_drain": fill_drain, "wavefront": wavefront}


def named_policy(name: str) -> Policy:
    """Return a policy by name, or raise a UserError that lists the names."""
    if name not in POLICIES:
        known = ", ".join(POLICIES)
        raise UserError(f"pipeline.policy={name!r} is unknown; use one of {known}")
    return POLICIES[name]


def in_priority_order(
    graph: Graph, placement: Placement, priority: Callable[[Operation], Priority]
) -> Schedule:
    """Order the whole graph, lowest priority first among what can run, and cut it by rank."""
    operations = graph.operations
    number = {operation: index for index, operation in enumerate(operations)}
    num_missing = [0] * len(operations)
    followers: list[list[int]] = [[] for _ in operations]
    for index, operation in enumerate(operations):
        for need in graph.needs(operation):
            followers[number[need]].append(index)
            num_missing[index] += 1
    priorities = [priority(operation) for operation in operations]
    ready = [(priorities[index], index) for index, num in enumerate(num_missing) if num == 0]
    heapq.heapify(ready)
    by_rank: list[list[Operation]] = [[] for _ in range(placement.num_ranks)]
    while ready:
        _, index = heapq.heappop(ready)
        by_rank[placement.rank_of[operations[index].block]].append(operations[index])
        for follower in followers[index]:
            num_missing[follower] -= 1
            if num_missing[follower] == 0:
                heapq.heappush(ready, (priorities[follower], follower))
    return Schedule(tuple(tuple(rank) for rank in by_rank))


def _places(graph: Graph) -> dict[str, int]:
    return {spec.name: place for place, spec in enumerate(graph.blocks)}


def _mirrored(operation: Operation, forward: Priority) -> Priority:
    """Put forward operations first; the others in reverse, W right behind its I."""
    if operation.kind == "F":
        return (0, *forward)
    return (1, *(-part for part in forward), 0 if operation.kind == "I" else 1)
