"""A graph with its operations as numbers, for what walks over all of them: policies, simulator.

Numbers follow the order of the graph, in which every operation stands behind what it needs, so a
loop over the numbers is a loop in topological order.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.graph import Graph, Operation


@dataclass(frozen=True)
class NumberedGraph:
    """The edges of a graph by operation number.

    `needs` are the operations that must run before one, `followers` the same edges from the other
    end; `takes` names each value that an operation takes by its producer and port.
    """

    operations: tuple["Operation", ...]
    number: dict["Operation", int]
    needs: tuple[tuple[int, ...], ...]
    followers: tuple[tuple[int, ...], ...]
    takes: tuple[tuple[tuple[int, str], ...], ...]


def number_graph(graph: "Graph") -> NumberedGraph:
    """Give each operation of a graph a number; `Graph.numbered` keeps the result."""
    operations = graph.operations
    number = {operation: index for index, operation in enumerate(operations)}
    takes = tuple(
        tuple((number[producer], port) for producer, port in graph.values_in(operation))
        for operation in operations
    )
    needs = tuple(
        _needs(operation, taken, number) for operation, taken in zip(operations, takes, strict=True)
    )
    followers: list[list[int]] = [[] for _ in operations]
    for index, before in enumerate(needs):
        for need in before:
            assert need < index, "the graph's order is not topological"
            followers[need].append(index)
    return NumberedGraph(operations, number, needs, tuple(map(tuple, followers)), takes)


def _needs(
    operation: "Operation", taken: tuple[tuple[int, str], ...], number: dict["Operation", int]
) -> tuple[int, ...]:
    """Return producers of inputs, and I's F or W's I, each once."""
    producers = dict.fromkeys(producer for producer, _ in taken)
    if operation.kind == "I":
        producers[number[operation._replace(kind="F")]] = None
    elif operation.kind == "W":
        producers[number[operation._replace(kind="I")]] = None
    return tuple(producers)
