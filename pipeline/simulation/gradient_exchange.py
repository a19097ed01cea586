"""What it takes to train replicas side by side: the rival that every pipeline has to beat.

Each replica takes its part of a batch's sentences, and the gradients are summed over replicas at
the end of the step. Dense gradients go around a ring (Patarasuk and Yuan 2009); of the embeddings
only the rows that a replica touched are sent to the others, unless whole tables are smaller.
"""

from dataclasses import replace

from model.network import BlockSpec
from model.precision import Precision
from pipeline.costs.operation_costs import BatchShape, Costs, Link
from pipeline.placements.placement import Placement
from pipeline.simulation.memory import num_parameters


def replica_costs(costs: Costs, num_replicas: int) -> Costs:
    """Return the costs of the largest part of a batch that one of R replicas gets."""
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


def gradient_exchange_s(placement: Placement, costs: Costs, num_replicas: int) -> tuple[float, int]:
    """Return how long the slowest rank needs to sum its gradients over R replicas, and its bytes.

    `costs` are those of one replica. Nothing is taken to run meanwhile: the time is fully exposed.
    """
    if num_replicas == 1:
        return 0.0, 0
    dense = [0] * placement.num_ranks
    sparse = [0] * placement.num_ranks
    for spec in placement.blocks(costs.model):
        rank = placement.rank_of[spec.name]
        if spec.kind == "embedding":
            table, rows = _embedding_bytes(spec, costs)
            # Rows go to every other replica as they are; a ring sends each number of a table twice.
            if rows * num_replicas < 2 * table:
                sparse[rank] += rows * (num_replicas - 1)
            else:
                dense[rank] += table
        else:
            dense[rank] += _dense_bytes(spec, costs)
    ring = (num_replicas - 1) / num_replicas
    per_rank = [
        (
            all_reduce_s(dense[rank], num_replicas, costs.link)
            + _gather_s(sparse[rank], num_replicas, costs.link),
            int(2 * ring * dense[rank]) + sparse[rank],
        )
        for rank in range(placement.num_ranks)
    ]
    return max(per_rank)


def _gather_s(num_bytes: int, num_replicas: int, link: Link) -> float:
    if not num_bytes:
        return 0.0
    return (num_replicas - 1) * link.latency_s + num_bytes / link.bytes_per_s


def _embedding_bytes(spec: BlockSpec, costs: Costs) -> tuple[int, int]:
    """Return the bytes of a whole table, and of the rows that a replica's part can touch."""
    model, batch = costs.model, costs.batch
    is_source = spec.side == "source"
    num_rows = model.source_vocabulary_size if is_source else model.target_vocabulary_size
    touched = min(num_rows, batch.num_sentences * batch.positions(spec.side))
    row_bytes = model.embedding_size * Precision(costs.precision).state.itemsize
    return num_rows * row_bytes, touched * row_bytes


def _dense_bytes(spec: BlockSpec, costs: Costs) -> int:
    return num_parameters(spec, costs.model) * Precision(costs.precision).state.itemsize
