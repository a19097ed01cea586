"""One rank's part of a schedule, with all its bookkeeping done beforehand.

For each operation: which receives to post before it, how many later operations of this rank will
use each value it makes, and which ranks get one. Running it then takes no search.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.graph import Graph, Inputs, Operation, Value
from pipeline.placements.placement import Placement
from pipeline.plan import PlannedStep

# Receives are posted this many operations before they are needed, so that data moves meanwhile.
POST_AHEAD = 8


class Receive(NamedTuple):
    """A value from another rank, and its place among the messages from there."""

    value: Value
    source: int
    tag: int


class Send(NamedTuple):
    """An output port that goes to another rank, and its place among the messages to there."""

    port: str
    destination: int
    tag: int


@dataclass(frozen=True)
class Instruction:
    """An operation and what is to do around it.

    With the one that completes a block's gradient, nothing more of the step is added to that.
    """

    operation: Operation
    inputs: Inputs
    post: tuple[Receive, ...]
    sends: tuple[Send, ...]
    completes_gradient: bool


@dataclass(frozen=True)
class Program:
    """A rank's instructions, and how often this rank uses each value that it makes or receives."""

    instructions: tuple[Instruction, ...]
    num_uses: dict[Value, int]
    training: bool


def compile_program(planned: PlannedStep, placement: Placement, rank: int) -> Program:
    """Work out what a rank does in a planned step."""
    graph = planned.graph
    operations = planned.schedule.operations[rank]
    num_uses = Counter(value for op in operations for value in graph.values_in(op))
    sends: dict[Operation, list[Send]] = {}
    for (sender, receiver), values in planned.messages.items():
        if sender == rank:
            for tag, value in enumerate(values):
                sends.setdefault(value.operation, []).append(Send(value.port, receiver, tag))
    posts = _posts(planned, operations, rank)
    last_weights = {op.block: index for index, op in enumerate(operations) if op.kind == "W"}
    instructions = tuple(
        Instruction(
            operation,
            graph.inputs[operation],
            tuple(posts.get(index, ())),
            tuple(sends.get(operation, ())),
            last_weights.get(operation.block) == index,
        )
        for index, operation in enumerate(operations)
    )
    return Program(instructions, dict(num_uses), graph.training)


def _posts(
    planned: PlannedStep, operations: tuple[Operation, ...], rank: int
) -> dict[int, list[Receive]]:
    """Return the receives to post before each operation, by its index.

    A receive is never posted after a later message of the same sender: the order of the posts is
    the order of the sends.
    """
    first_use = _first_uses(planned.graph, operations)
    posts: dict[int, list[Receive]] = {}
    for (sender, receiver), values in planned.messages.items():
        if receiver != rank:
            continue
        due = len(operations)
        dated: list[tuple[int, Receive]] = []
        for tag, value in reversed(list(enumerate(values))):
            due = min(due, first_use[value])
            dated.append((max(0, due - POST_AHEAD), Receive(value, sender, tag)))
        for index, receive in reversed(dated):
            posts.setdefault(index, []).append(receive)
    return posts


def _first_uses(graph: Graph, operations: tuple[Operation, ...]) -> dict[Value, int]:
    first: dict[Value, int] = {}
    for index, operation in enumerate(operations):
        for value in graph.values_in(operation):
            first.setdefault(value, index)
    return first
