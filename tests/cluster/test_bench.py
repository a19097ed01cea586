"""The bench: cases are planned and predicted, and run on real actors with emulated devices."""

from dataclasses import replace

import pytest

from cluster.commands.bench import _lines, _result
from cluster.pipeline_bench import (
    PAPER_CASE,
    PAPER_MODEL,
    BenchSettings,
    Case,
    best,
    cases,
    measure,
    predict,
)
from model.network import ModelConfig
from pipeline.costs.operation_costs import BatchShape, Link

SMALL = BenchSettings(
    num_devices=2,
    model=ModelConfig(11, 13, num_layers=2, hidden_size=5, embedding_size=6),
    batch=BatchShape(6, 5, 4),
    flop_per_s=1e6,
    num_steps=1,
    num_warmup_steps=1,
)


def test_the_papers_own_schedule_is_predicted_as_its_arithmetic_says() -> None:
    assert predict(PAPER_CASE, BenchSettings()).simulation.speedup == pytest.approx(2.40, rel=0.01)


def test_the_three_best_are_three_placements_in_their_order() -> None:
    settings = BenchSettings()
    found = best([predict(case, settings) for case in cases(8)], 3)
    speedups = [prediction.simulation.speedup for prediction in found]
    assert len({prediction.case.name for prediction in found}) == 3
    assert speedups == sorted(speedups, reverse=True)
    assert speedups[0] > 7.4


def test_a_device_alone_takes_the_papers_time_for_its_model_and_more_for_a_deeper_one() -> None:
    assert BenchSettings().costs().one_device_s() == pytest.approx(4.4)
    deeper = BenchSettings(model=replace(PAPER_MODEL, num_layers=8))
    assert deeper.costs().one_device_s() == pytest.approx(4.4 * (144 + 64) / 144)


def test_data_parallelism_is_free_only_on_free_links() -> None:
    case = cases(8)[-1]
    assert case.name == "data_parallel"
    assert predict(case, BenchSettings()).simulation.speedup == pytest.approx(8.0)
    slow = BenchSettings(link=Link(1e-4, 1e9))
    assert 1.0 < predict(case, slow).simulation.speedup < 8.0


@pytest.mark.parametrize(("num_devices", "replicas"), [(8, []), (12, []), (16, [2]), (32, [4])])
def test_pipelines_side_by_side_are_tried_on_more_devices(
    num_devices: int, replicas: list[int]
) -> None:
    found = [c.replicas for c in cases(num_devices) if c.replicas > 1 and c.name != "data_parallel"]
    assert found == replicas


@pytest.mark.parametrize("shared_memory", [True, False])
def test_real_actors_run_several_placements_one_after_another(
    ray_cluster: None, shared_memory: bool
) -> None:
    settings = replace(SMALL, shared_memory=shared_memory)
    wanted = [PAPER_CASE, Case("split", "deferred_weights", 2, 2), cases(2)[-1]]
    predictions = [predict(case, settings) for case in wanted]
    measured = list(measure(predictions, settings))
    assert [found.case for found in measured] == wanted
    for found, prediction in zip(measured, predictions, strict=True):
        assert found.measured_speedup > 0.0
        if found.case.replicas == 1:
            assert found.bytes_sent == sum(prediction.simulation.bytes_sent)
        assert found.busy_s > 0.0
    result = _result(settings, "a machine", measured)
    assert result["shared_memory"] is shared_memory
    assert [entry["name"] for entry in result["placements"]] == ["paper", "split", "data_parallel"]
    assert result["placements"][1]["microbatches"] == 2
    assert any(line.startswith("split") for line in _lines(settings, "a machine", measured))
