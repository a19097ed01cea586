"""Whether ranks that wait for each other's sends and receives ever get to their ends.

With *buffered* sends a rank goes on at once. With *rendezvous* sends it waits, message by message,
until the receiver takes it, right before the operation that uses it first. With *batched* ones the
sends behind an operation and the receives before the next start together, and the rank goes on when
all of them are done.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipeline.graph import Graph, Operation, Value

Sends = Literal["buffered", "rendezvous", "batched"]


class Message(NamedTuple):
    """A value on its way from rank to rank."""

    sender: int
    receiver: int
    value: Value


@dataclass(frozen=True)
class Blocked:
    """A rank that waits for ever for its peer to `missing` ("send" or "receive") a value."""

    rank: int
    peer: int
    missing: str
    value: Value


def find_blocked_rank(
    operations: Sequence[Sequence[Operation]],
    messages: Mapping[tuple[int, int], Sequence[Value]],
    graph: Graph,
    sends: Sends,
) -> Blocked | None:
    """Let the ranks exchange their messages; return one that never ends, or None.

    The orders must be right for buffered sends, so that only messages can hold a rank up.
    """
    assert sends != "buffered"
    exchanges = [
        _exchanges(rank, of_rank, messages, graph, sends) for rank, of_rank in enumerate(operations)
    ]
    place = [0] * len(exchanges)
    num_open = [len(steps[0]) if steps else 0 for steps in exchanges]
    offered: set[Message] = set()
    arrived = list(range(len(exchanges)))
    while arrived:
        rank = arrived.pop()
        if place[rank] == len(exchanges[rank]):
            continue
        for message in exchanges[rank][place[rank]]:
            if message not in offered:
                offered.add(message)
                continue
            for end in (message.sender, message.receiver):
                num_open[end] -= 1
                if not num_open[end]:
                    place[end] += 1
                    if place[end] < len(exchanges[end]):
                        num_open[end] = len(exchanges[end][place[end]])
                    arrived.append(end)
    return _first_blocked(exchanges, place, offered)


def _exchanges(
    rank: int,
    operations: Sequence[Operation],
    messages: Mapping[tuple[int, int], Sequence[Value]],
    graph: Graph,
    sends: Sends,
) -> list[list[Message]]:
    """Return what a rank exchanges, in its order; it waits for the end of each before the next."""
    outgoing: dict[Operation, list[Message]] = {}
    incoming: dict[Value, Message] = {}
    for (sender, receiver), values in messages.items():
        for value in values:
            if sender == rank:
                outgoing.setdefault(value.operation, []).append(Message(sender, receiver, value))
            elif receiver == rank:
                incoming[value] = Message(sender, receiver, value)
    steps: list[list[Message]] = []
    behind: list[Message] = []
    for operation in operations:
        taken = dict.fromkeys(graph.values_in(operation))
        before = [incoming.pop(value) for value in taken if value in incoming]
        steps.extend(_cut([*behind, *before], sends))
        behind = outgoing.get(operation, [])
    steps.extend(_cut(behind, sends))
    return steps


def _cut(exchanged: list[Message], sends: Sends) -> list[list[Message]]:
    if sends == "batched":
        return [exchanged] if exchanged else []
    return [[message] for message in exchanged]


def _first_blocked(
    exchanges: list[list[list[Message]]], place: list[int], offered: set[Message]
) -> Blocked | None:
    for rank, steps in enumerate(exchanges):
        if place[rank] == len(steps):
            continue
        at_peers = {
            message
            for peer, others in enumerate(exchanges)
            if peer != rank and place[peer] < len(others)
            for message in others[place[peer]]
        }
        for message in steps[place[rank]]:
            done_by_peer = any(
                message in step
                for step in exchanges[_peer(rank, message)][: place[_peer(rank, message)]]
            )
            if message in offered and message not in at_peers and not done_by_peer:
                missing = "receive" if message.sender == rank else "send"
                return Blocked(rank, _peer(rank, message), missing, message.value)
    return None


def _peer(rank: int, message: Message) -> int:
    return message.receiver if message.sender == rank else message.sender
