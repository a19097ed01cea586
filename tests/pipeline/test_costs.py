"""Costs count what the paper's model costs, and their files come back as they were."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.batching import ChunkSize
from model.errors import UserError
from model.network import ModelConfig, network_blocks
from pipeline.costs.arithmetic import arithmetic_costs, scaled
from pipeline.costs.file import load_costs, save_costs
from pipeline.costs.operation_costs import BatchShape, CostsError, Link, OperationCost, WorkSizes
from pipeline.graph import Operation, build_graph
from tests.pipeline.plans import small_model

PAPER = ModelConfig(160_000, 80_000)


def test_arithmetic_of_the_papers_model() -> None:
    costs = arithmetic_costs(PAPER, flop_per_s=2.0)
    million = 1e6 * 128 * 29
    for spec in network_blocks(PAPER, 4):
        expected = {"projection": 4, "recurrence": 4, "softmax": 20}.get(spec.kind, 0)
        for kind in ("F", "I", "W"):
            assert costs.whole_block_s(spec, kind) == pytest.approx(expected * million)
    # 32M multiply-adds a source position and 112M a target position, three times over.
    assert costs.one_device_s() == pytest.approx(3 * (32 + 112) * million)


def test_logits_made_twice_cost_a_third_more_all_of_it_in_the_input_gradient() -> None:
    costs = arithmetic_costs(PAPER)
    spec = next(spec for spec in network_blocks(PAPER, 4) if spec.kind == "softmax")
    twice = replace(spec, recomputes=True)
    once_s = costs.whole_block_s(spec, "F")
    for kind, factor in (("F", 1), ("I", 3), ("W", 0), ("FIW", 4)):
        assert costs.whole_block_s(twice, kind) == pytest.approx(factor * once_s)
        assert costs.fused().whole_block_s(twice, kind) == pytest.approx(factor * once_s)


def test_costs_from_the_time_of_a_step_on_one_device() -> None:
    assert arithmetic_costs(PAPER, one_device_step_s=4.4).one_device_s() == pytest.approx(4.4)
    assert arithmetic_costs(PAPER).one_device_s() == pytest.approx(1.0)


def test_a_cost_grows_with_positions_sentences_and_words() -> None:
    cost = OperationCost(fixed_s=1.0, position_s=0.5, token_s=0.25, token_word_s=0.125)
    assert cost.seconds(ChunkSize.full(2, 4), 3) == 1.0 + 1.0 + 2.0 + 3.0
    assert cost.seconds(ChunkSize.full(2, 0), 3) == 0.0
    assert cost.seconds(ChunkSize.full(0, 4), 3) == 0.0


def test_fused_costs_move_weights_into_the_input_gradient() -> None:
    costs = scaled(arithmetic_costs(PAPER), 2.0, families=("recurrence",))
    fused = costs.fused()
    assert fused.one_device_s() == pytest.approx(costs.one_device_s())
    assert fused.operations["recurrence", "W"] == OperationCost()
    assert fused.operations["recurrence", "I"].token_s == pytest.approx(
        2 * costs.operations["recurrence", "I"].token_s
    )


def test_sizes_follow_the_cuts_and_the_shapes_of_values() -> None:
    model = small_model()
    graph = build_graph(network_blocks(model, 2), 2, 2, training=True)
    sizes = WorkSizes(graph, model, BatchShape(5, 7, 3), "bfloat16")
    source = Operation("F", "encoder.1.recurrence", 0, 0)
    assert sizes.chunk(source) == ChunkSize.full(4, 3)
    assert sizes.chunk(Operation("F", "decoder.1.recurrence", 1, 1)) == ChunkSize.full(1, 2)
    assert sizes.value_bytes(source, "output") == 4 * 3 * 5 * 2
    assert sizes.value_bytes(source, "cell") == 3 * 5 * 4
    assert sizes.value_bytes(Operation("F", "encoder.0.projection", 0, 0), "gates") == 480


def test_costs_come_back_from_their_file(tmp_path: Path) -> None:
    for link in (Link(), Link(1e-5, 1e9, "sender")):
        costs = arithmetic_costs(PAPER, one_device_step_s=4.4, link=link, precision="bfloat16")
        save_costs(tmp_path / "deep" / "costs.json", costs)
        assert load_costs(tmp_path / "deep" / "costs.json") == costs


def test_costs_of_another_model_are_refused() -> None:
    with pytest.raises(CostsError, match="num_layers 4, not 5; measure them again"):
        arithmetic_costs(PAPER).check(replace(PAPER, num_layers=5))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "baton schedule"}, "no baton costs file"),
        ({"version": 99}, "version 99 .* reads version 1"),
        ({"operations": {"softmax": {"F": {"fixed_s": -1}}}}, "fixed_s is -1.0"),
        ({"operations": {"softmax": {"F": {"seconds": 1}}}}, "damaged"),
        ({"link": {"latency_s": 0, "bytes_per_s": 0, "shared_by": "pair"}}, "link is"),
        ({"link": {"latency_s": 0, "bytes_per_s": 1, "shared_by": "all"}}, "shared_by is 'all'"),
        ({"model": {}}, "damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "costs.json"
    save_costs(path, arithmetic_costs(PAPER))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CostsError, match=words):
        load_costs(path)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CostsError, match="cannot read"):
        load_costs(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("costs")
    with pytest.raises(CostsError, match="is not JSON"):
        load_costs(tmp_path / "text.json")


@pytest.mark.parametrize(
    ("softmax", "words"),
    [(None, "no costs for F, I, W of the family softmax"), ({"F": {}, "I": {}}, "no costs for W")],
)
def test_a_file_without_a_family_is_refused(
    tmp_path: Path, softmax: dict[str, Any] | None, words: str
) -> None:
    path = tmp_path / "costs.json"
    save_costs(path, arithmetic_costs(PAPER))
    content = json.loads(path.read_text())
    del content["operations"]["softmax"]
    if softmax is not None:
        content["operations"]["softmax"] = softmax
    path.write_text(json.dumps(content))
    with pytest.raises(CostsError, match=words):
        load_costs(path)


def test_a_costs_file_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / ("x" * 250)).mkdir()
    for path in (tmp_path, tmp_path / "file" / "costs.json", tmp_path / ("y" * 255)):
        with pytest.raises(UserError, match="cannot write the costs file .*; name another file"):
            save_costs(path, arithmetic_costs(PAPER))
    assert not list(tmp_path.glob("*.part"))


def test_costs_are_fitted_to_another_batch_and_vocabulary() -> None:
    smaller = replace(PAPER, source_vocabulary_size=100, target_vocabulary_size=200)
    fitted = arithmetic_costs(PAPER).fitted_to(smaller, 7, "float32")
    assert (fitted.model, fitted.batch) == (smaller, BatchShape(7, 29, 29))
    with pytest.raises(CostsError, match="precision float32, not of training.precision=float64"):
        fitted.fitted_to(PAPER, 7, "float64")
