"""The graph's edges, one by one in a small case, and that every operation is there."""

from collections import Counter

from model.network import network_blocks
from pipeline.graph import Graph, Operation, Value, build_graph
from tests.pipeline.plans import small_model


def graph_of(num_layers: int, num_microbatches: int = 1, num_chunks: int = 2) -> Graph:
    blocks = network_blocks(small_model(num_layers=num_layers), num_shards=2)
    return build_graph(blocks, num_microbatches, num_chunks, training=True)


def wired(graph: Graph, kind: str, block: str, chunk: int) -> dict[str, list[tuple[str, int]]]:
    """Return, by input port, the producers as "kind block.port" and chunk."""
    operation = next(o for o in graph.inputs if o[:2] == (kind, block) and o.chunk == chunk)
    return {
        port: [(f"{v.operation.kind} {v.operation.block}/{v.port}", v.operation.chunk) for v in vs]
        for port, vs in graph.inputs[operation].items()
    }


def test_forward_edges() -> None:
    graph = graph_of(2)
    assert wired(graph, "F", "source_embedding", 0) == {}
    assert wired(graph, "F", "encoder.0.projection", 1) == {
        "input": [("F source_embedding/output", 1)]
    }
    assert wired(graph, "F", "decoder.1.projection", 1) == {
        "input": [("F decoder.0.recurrence/output", 1)]
    }
    assert wired(graph, "F", "encoder.1.recurrence", 0) == {
        "gates": [("F encoder.1.projection/gates", 0)]
    }
    assert wired(graph, "F", "decoder.1.recurrence", 1) == {
        "gates": [("F decoder.1.projection/gates", 1)],
        "hidden": [("F decoder.1.recurrence/hidden", 0)],
        "cell": [("F decoder.1.recurrence/cell", 0)],
    }
    assert wired(graph, "F", "softmax.1", 0) == {"input": [("F decoder.1.recurrence/output", 0)]}
    assert wired(graph, "F", "loss", 1) == {
        "statistics.0": [("F softmax.0/statistics", 1)],
        "statistics.1": [("F softmax.1/statistics", 1)],
    }


def test_the_decoder_starts_with_the_last_states_of_the_same_encoder_layer() -> None:
    assert wired(graph_of(2), "F", "decoder.1.recurrence", 0) == {
        "gates": [("F decoder.1.projection/gates", 0)],
        "hidden": [("F encoder.1.recurrence/hidden", 1)],
        "cell": [("F encoder.1.recurrence/cell", 1)],
    }


def test_gradient_edges() -> None:
    graph = graph_of(2)
    assert wired(graph, "I", "softmax.1", 1) == {"log_normalizer": [("F loss/log_normalizer", 1)]}
    assert wired(graph, "I", "decoder.1.recurrence", 1) == {
        "output": [("I softmax.0/input", 1), ("I softmax.1/input", 1)],
    }
    assert wired(graph, "I", "decoder.0.recurrence", 0) == {
        "output": [("I decoder.1.projection/input", 0)],
        "hidden": [("I decoder.0.recurrence/hidden", 1)],
        "cell": [("I decoder.0.recurrence/cell", 1)],
    }
    assert wired(graph, "I", "decoder.1.projection", 0) == {
        "gates": [("I decoder.1.recurrence/gates", 0)]
    }
    assert wired(graph, "I", "target_embedding", 1) == {
        "output": [("I decoder.0.projection/input", 1)]
    }


def test_only_states_lead_back_into_the_top_of_the_encoder() -> None:
    graph = graph_of(2)
    assert wired(graph, "I", "encoder.1.recurrence", 1) == {
        "hidden": [("I decoder.1.recurrence/hidden", 0)],
        "cell": [("I decoder.1.recurrence/cell", 0)],
    }
    assert wired(graph, "I", "encoder.0.recurrence", 1) == {
        "output": [("I encoder.1.projection/input", 1)],
        "hidden": [("I decoder.0.recurrence/hidden", 0)],
        "cell": [("I decoder.0.recurrence/cell", 0)],
    }


def test_weight_gradients_wait_for_their_own_input_gradient_only() -> None:
    graph = graph_of(1)
    operation = Operation("W", "encoder.0.projection", 0, 1)
    assert graph.inputs[operation] == {}
    assert graph.needs(operation) == (operation._replace(kind="I"),)


def test_every_block_has_its_operations_once_for_each_microbatch_and_chunk() -> None:
    graph = graph_of(2, num_microbatches=3, num_chunks=4)
    counts = Counter((operation.kind, operation.block) for operation in graph.operations)
    for spec in graph.blocks:
        assert counts["F", spec.name] == 12
        for kind in ("I", "W"):
            assert counts[kind, spec.name] == (0 if spec.kind == "loss" else 12)


def test_a_graph_without_training_has_forward_operations_only() -> None:
    blocks = network_blocks(small_model())
    graph = build_graph(blocks, 2, 3, training=False)
    assert {operation.kind for operation in graph.operations} == {"F"}
    assert len(graph.operations) == 6 * len(blocks)


def test_microbatches_meet_nowhere() -> None:
    graph = graph_of(2, num_microbatches=2)
    for operation in graph.operations:
        values: list[Value] = list(graph.values_in(operation))
        assert all(value.operation.microbatch == operation.microbatch for value in values)


def test_operations_read_well_in_errors() -> None:
    operation = Operation("I", "decoder.1.recurrence", 0, 2)
    assert str(operation) == "I decoder.1.recurrence (microbatch 0, chunk 2)"
