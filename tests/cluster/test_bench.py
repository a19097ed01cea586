"""The bench: cases are planned and predicted, and run on real actors with emulated devices."""

from dataclasses import replace

import pytest

from cluster.commands.bench import _lines, _result
from cluster.pipeline_bench import (
    CASES,
    PAPER_CASE,
    BenchSettings,
    Case,
    best,
    data_parallel,
    measure,
    predict,
)
from model.network import ModelConfig
from pipeline.costs.operation_costs import BatchShape, Link

SMALL = BenchSettings(
    num_devices=2,
    model=ModelConfig(11, 13, num_layers=2, hidden_size=5, embedding_size=6),
    batch=BatchShape(6, 5, 4),
    one_device_step_s=0.05,
    num_steps=1,
    num_warmup_steps=1,
)


def test_the_papers_own_schedule_is_predicted_as_its_arithmetic_says() -> None:
    assert predict(PAPER_CASE, BenchSettings()).simulation.speedup == pytest.approx(2.40, rel=0.01)


def test_the_three_best_are_three_placements_in_their_order() -> None:
    settings = BenchSettings()
    found = best([predict(case, settings) for case in CASES], 3)
    speedups = [prediction.simulation.speedup for prediction in found]
    assert len({prediction.case.name for prediction in found}) == 3
    assert speedups == sorted(speedups, reverse=True)
    assert speedups[0] > 7.4


def test_data_parallelism_is_free_only_on_free_links() -> None:
    assert data_parallel(BenchSettings()).simulated_speedup == pytest.approx(8.0)
    slow = BenchSettings(link=Link(1e-4, 1e9))
    assert 1.0 < data_parallel(slow).simulated_speedup < 8.0


@pytest.mark.parametrize("shared_memory", [True, False])
def test_real_actors_run_several_placements_one_after_another(
    ray_cluster: None, shared_memory: bool
) -> None:
    settings = replace(SMALL, shared_memory=shared_memory)
    cases = [PAPER_CASE, Case("split", "deferred_weights", 2, 2)]
    predictions = [predict(case, settings) for case in cases]
    measured = list(measure(predictions, settings))
    assert [found.case for found in measured] == cases
    for found, prediction in zip(measured, predictions, strict=True):
        assert found.measured_speedup is not None
        assert found.bytes_sent == sum(prediction.simulation.bytes_sent)
        assert found.busy_s > 0.0
    result = _result(settings, "a machine", measured)
    assert result["shared_memory"] is shared_memory
    assert [entry["name"] for entry in result["placements"]] == ["paper", "split"]
    assert result["placements"][1]["microbatches"] == 2
    assert any(line.startswith("split") for line in _lines(settings, "a machine", measured))
