"""What it takes to sum gradients over replicas: bytes, seconds, and when each block's sum can run.

Each replica takes its share of a batch's sentences. A block's gradient is complete when the last of
its W has run, and its sum over replicas then goes on beside the rest of the step, over a link of
its own. Dense gradients go around a ring (Patarasuk and Yuan 2009). Of an embedding only the rows
that a replica used are sent to the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from model.network import BlockSpec
from model.precision import Precision
from pipeline.costs.operation_costs import BatchShape, Costs, Link
from pipeline.placements.placement import Placement
from pipeline.simulation.memory import num_parameters


@dataclass(frozen=True)
class TimedExchange:
    """The sum of a block's gradient over replicas, in seconds after the step's start."""

    block: str
    start_s: float
    end_s: float


def replica_costs(costs: Costs, num_replicas: int) -> Costs:
    """Return the costs of the largest share of a batch that one of R replicas gets."""
    if num_replicas == 1:
        return costs
    batch = costs.batch
    num_sentences = -(-batch.num_sentences // num_replicas)
    shape = BatchShape(num_sentences, batch.source_positions, batch.target_positions)
    return replace(costs, batch=shape)


def all_reduce_s(num_bytes: int, num_replicas: int, link: Link) -> float:
    """Return the seconds that a ring needs to sum a gradient over R replicas.

    Every replica sends 2 (R - 1) / R of the bytes, in 2 (R - 1) messages.
    """
    if num_replicas == 1 or not num_bytes:
        return 0.0
    num_messages = 2 * (num_replicas - 1)
    return num_messages * (link.latency_s + num_bytes / num_replicas / link.bytes_per_s)


def all_gather_s(num_bytes: int, num_replicas: int, link: Link) -> float:
    """Return the seconds until every one of R replicas has what each of them gives."""
    if num_replicas == 1 or not num_bytes:
        return 0.0
    return (num_replicas - 1) * (link.latency_s + num_bytes / link.bytes_per_s)


def block_exchange_s(spec: BlockSpec, costs: Costs, num_replicas: int) -> float:
    """Return the seconds of a block's sum; `costs` are those of one replica."""
    if spec.kind == "embedding":
        return all_gather_s(_row_bytes(spec, costs), num_replicas, costs.link)
    return all_reduce_s(_dense_bytes(spec, costs), num_replicas, costs.link)


def exchange_bytes(spec: BlockSpec, costs: Costs, num_replicas: int) -> int:
    """Return the bytes that one replica sends for a block; `costs` are those of one replica."""
    if spec.kind == "embedding":
        return (num_replicas - 1) * _row_bytes(spec, costs)
    return 2 * (num_replicas - 1) * _dense_bytes(spec, costs) // num_replicas


def exchange_memory_bytes(spec: BlockSpec, costs: Costs, num_replicas: int) -> int:
    """Return what a replica holds for a block's sum beside its own gradient.

    Rows of all replicas lie there until the update; dense gradients are summed where they are.
    """
    if num_replicas == 1 or spec.kind != "embedding":
        return 0
    return num_replicas * _row_bytes(spec, costs)


def time_exchanges(
    completed: Sequence[tuple[BlockSpec, float]], costs: Costs, num_replicas: int
) -> tuple[TimedExchange, ...]:
    """Return when each block's sum runs on a rank, one after another on the rank's own link.

    `completed` has the rank's blocks with the end of their last W, in that order.
    """
    exchanges: list[TimedExchange] = []
    free_s = 0.0
    for spec, ready_s in completed:
        seconds = block_exchange_s(spec, costs, num_replicas)
        start_s = max(free_s, ready_s)
        free_s = start_s + seconds
        exchanges.append(TimedExchange(spec.name, start_s, free_s))
    return tuple(exchanges)


def gradient_exchange_s(placement: Placement, costs: Costs, num_replicas: int) -> tuple[float, int]:
    """Return how long the slowest rank's sums take if nothing runs beside them, and its bytes.

    `costs` are those of one replica.
    """
    seconds, num_bytes = [0.0] * placement.num_ranks, [0] * placement.num_ranks
    for spec in placement.blocks(costs.model):
        rank = placement.rank_of[spec.name]
        seconds[rank] += block_exchange_s(spec, costs, num_replicas)
        num_bytes[rank] += exchange_bytes(spec, costs, num_replicas)
    return max(zip(seconds, num_bytes, strict=True))


def _row_bytes(spec: BlockSpec, costs: Costs) -> int:
    """Return the bytes of the rows of a table that a replica can use at most."""
    model, batch = costs.model, costs.batch
    is_source = spec.side == "source"
    num_rows = model.source_vocabulary_size if is_source else model.target_vocabulary_size
    used = min(num_rows, batch.num_sentences * batch.positions(spec.side))
    return used * model.embedding_size * Precision(costs.precision).state.itemsize


def _dense_bytes(spec: BlockSpec, costs: Costs) -> int:
    return num_parameters(spec, costs.model) * Precision(costs.precision).state.itemsize
