"""Which operation goes first among those that could run: priorities, lowest first.

Each function gives a priority for every operation of a graph, in the graph's order.
"""

from collections.abc import Callable

from pipeline.graph import Graph, Operation

Priority = tuple[float, ...]


def block_after_block(graph: Graph) -> list[Priority]:
    """Forward microbatch by microbatch, all chunks of a block before the next; then all back."""
    place = _places(graph)
    return [
        _mirrored(operation, (operation.microbatch, place[operation.block], operation.chunk))
        for operation in graph.operations
    ]


def diagonals(graph: Graph) -> list[Priority]:
    """Forward along the diagonals of layer and chunk, through all microbatches; then all back."""
    place, diagonal = _places(graph), _diagonal_of(graph)

    def priority(operation: Operation) -> Priority:
        later = 2 * operation.microbatch * graph.num_chunks
        forward = (later + diagonal(operation), place[operation.block], operation.chunk)
        return _mirrored(operation, forward)

    return [priority(operation) for operation in graph.operations]


def first_microbatch_first(graph: Graph) -> list[Priority]:
    """Diagonals, forward before back, and back in the same sequence of microbatches as forward."""
    place, diagonal = _places(graph), _diagonal_of(graph)

    def priority(operation: Operation) -> Priority:
        way = diagonal(operation), place[operation.block], operation.chunk
        if operation.kind == "F":
            return (0, operation.microbatch, *way)
        return (1, operation.microbatch, *(-part for part in way))

    return [priority(operation) for operation in graph.operations]


def back_before_next_microbatch(graph: Graph) -> list[Priority]:
    """All of a microbatch, forward and back, before anything of the next; along diagonals."""
    return [
        (operation.microbatch, way, *rest)
        for operation, (way, _, *rest) in zip(
            graph.operations, first_microbatch_first(graph), strict=True
        )
    ]


def newest_chunk_first(graph: Graph) -> list[Priority]:
    """Layers along diagonals before the softmax; the softmax starts with the newest chunk it has.

    Then the last chunk's gradient, where the way back begins, does not wait for a backlog of
    earlier chunks, which fill the softmax ranks' time later.
    """
    layers = first_microbatch_first(graph)

    def priority(operation: Operation, of_layer: Priority) -> Priority:
        if graph.spec_of[operation.block].kind in ("softmax", "loss"):
            return (1, operation.microbatch, -operation.chunk, operation.kind != "F")
        return (0, *of_layer)

    return [
        priority(operation, of_layer)
        for operation, of_layer in zip(graph.operations, layers, strict=True)
    ]


def _places(graph: Graph) -> dict[str, int]:
    return {spec.name: place for place, spec in enumerate(graph.blocks)}


def _diagonal_of(graph: Graph) -> Callable[[Operation], int]:
    """Return the diagonal of an operation within its microbatch; the softmax is above all layers.

    All F of the softmax come before its first I in what is made of this: going back and forth chunk
    by chunk would hold up the decoder.
    """
    num_layers = 1 + max(spec.layer for spec in graph.blocks if spec.kind == "recurrence")
    start: dict[str, int] = {}
    for spec in graph.blocks:
        depth = num_layers if spec.kind in ("softmax", "loss") else spec.layer
        start[spec.name] = depth + (0 if spec.side == "source" else graph.num_chunks)
    return lambda operation: start[operation.block] + operation.chunk


def _mirrored(operation: Operation, forward: Priority) -> Priority:
    """Put forward operations first; the others in reverse, W right behind its I."""
    if operation.kind == "F":
        return (0, *forward)
    return (1, *(-part for part in forward), 0 if operation.kind == "I" else 1)
