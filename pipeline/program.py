"""One rank's part of a schedule, with all its bookkeeping done beforehand.

Every value that the rank makes or receives has a slot, a number, and so has what a block keeps of a
chunk. For each operation it is known which receives to post before it, which slots it reads, which
it reads for the last time, and where its outputs go. Running it then takes no search.
"""

from dataclasses import dataclass
from typing import NamedTuple

from pipeline.graph import Graph, Inputs, Operation, Value
from pipeline.placements.placement import Placement
from pipeline.plan import PlannedStep

# Receives are posted this many operations before they are needed, so that data moves meanwhile.
POST_AHEAD = 8

Receivers = tuple[tuple[int, int], ...]
"""Ranks, each with a message's place among those to it: (destination, tag)."""


class Receive(NamedTuple):
    """A value from another rank, and its place among the messages from there."""

    slot: int
    value: Value
    source: int
    tag: int


@dataclass(frozen=True)
class Instruction:
    """An operation and what is to do around it.

    `saved` is the slot of what the block keeps of the chunk. Before the operation, receives are
    posted and `awaited` slots filled. `inputs` gives the slots whose sum arrives at each port;
    `unused` are slots that nobody reads afterwards. Outputs are sent and kept by port. With
    `completes_gradient`, nothing more of the step is added to the block's gradient.
    """

    operation: Operation
    saved: int
    posts: tuple[Receive, ...]
    awaited: tuple[int, ...]
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    unused: tuple[int, ...]
    sends: tuple[tuple[str, Receivers], ...]
    kept: tuple[tuple[str, int], ...]
    completes_gradient: bool


@dataclass(frozen=True)
class Program:
    """A rank's instructions, in the order in which it runs them."""

    instructions: tuple[Instruction, ...]
    training: bool


def compile_program(planned: PlannedStep, placement: Placement, rank: int) -> Program:
    """Work out what a rank does in a planned step."""
    graph, operations = planned.graph, planned.schedule.operations[rank]
    first_use, last_use = _uses(graph, operations)
    slots = {value: slot for slot, value in enumerate(first_use)}
    saved = {key: slot for slot, key in enumerate(dict.fromkeys(op[1:] for op in operations))}
    posts = _posts(planned, first_use, slots, rank)
    sends = _sends(planned, rank)
    kept: dict[Operation, list[tuple[str, int]]] = {}
    for value, slot in slots.items():
        kept.setdefault(value.operation, []).append((value.port, slot))
    last_weights = {op.block: index for index, op in enumerate(operations) if op.kind == "W"}

    def instruction(index: int, operation: Operation) -> Instruction:
        values = dict.fromkeys(graph.values_in(operation))
        foreign = (v for v in values if placement.rank_of[v.operation.block] != rank)
        return Instruction(
            operation=operation,
            saved=saved[operation[1:]],
            posts=tuple(posts.get(index, ())),
            awaited=tuple(slots[value] for value in foreign if first_use[value] == index),
            inputs=_numbered(graph.inputs[operation], slots),
            unused=tuple(slots[value] for value in values if last_use[value] == index),
            sends=tuple((port, tuple(to)) for port, to in sends.get(operation, {}).items()),
            kept=tuple(kept.get(operation, ())),
            completes_gradient=last_weights.get(operation.block) == index,
        )

    made = tuple(instruction(index, operation) for index, operation in enumerate(operations))
    return Program(made, graph.training)


def _uses(
    graph: Graph, operations: tuple[Operation, ...]
) -> tuple[dict[Value, int], dict[Value, int]]:
    """Return at which operations, by index, each value is used first and last."""
    first: dict[Value, int] = {}
    last: dict[Value, int] = {}
    for index, operation in enumerate(operations):
        for value in graph.values_in(operation):
            first.setdefault(value, index)
            last[value] = index
    return first, last


def _numbered(inputs: Inputs, slots: dict[Value, int]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(
        (port, tuple(slots[value] for value in producers)) for port, producers in inputs.items()
    )


def _posts(
    planned: PlannedStep, first_use: dict[Value, int], slots: dict[Value, int], rank: int
) -> dict[int, list[Receive]]:
    """Return the receives to post before each operation, by its index.

    A receive is never posted after a later message of the same sender: the order of the posts is
    the order of the sends.
    """
    posts: dict[int, list[Receive]] = {}
    for (sender, receiver), values in planned.messages.items():
        if receiver != rank:
            continue
        due = first_use[values[-1]]
        dated: list[tuple[int, Receive]] = []
        for tag, value in reversed(list(enumerate(values))):
            due = min(due, first_use[value])
            dated.append((max(0, due - POST_AHEAD), Receive(slots[value], value, sender, tag)))
        for index, receive in reversed(dated):
            posts.setdefault(index, []).append(receive)
    return posts


def _sends(planned: PlannedStep, rank: int) -> dict[Operation, dict[str, list[tuple[int, int]]]]:
    """Return who gets each operation's outputs, by port."""
    sends: dict[Operation, dict[str, list[tuple[int, int]]]] = {}
    for (sender, receiver), values in planned.messages.items():
        if sender == rank:
            for tag, value in enumerate(values):
                ports = sends.setdefault(value.operation, {})
                ports.setdefault(value.port, []).append((receiver, tag))
    return sends
