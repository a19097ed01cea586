"""Measured costs: what the fit finds, and that measurements of a tiny model are complete."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.batching import ChunkSize
from model.network import ModelConfig, network_blocks
from pipeline.costs.file import load_costs, save_costs
from pipeline.costs.operation_costs import FAMILIES, BatchShape, OperationCost
from pipeline.costs.profiling import Sample, fit, full_batch, measure_costs, measure_link

MODEL = ModelConfig(20, 24, num_layers=2, hidden_size=6, embedding_size=5)
SHAPE = BatchShape(8, 5, 4)
SIZES = [(ChunkSize.full(k, b), v) for k in (1, 4, 8) for b in (32, 128) for v in (1000, 4000)]
seconds = st.floats(min_value=1e-9, max_value=1e-3)


def samples_of(cost: OperationCost) -> list[Sample]:
    return [Sample(size, words, cost.seconds(size, words)) for size, words in SIZES]


@given(fixed=seconds, position=seconds, token=seconds, word=seconds)
def test_a_fit_predicts_what_it_was_made_of(
    fixed: float, position: float, token: float, word: float
) -> None:
    cost = OperationCost(fixed, position, token, word * 1e-3)
    found = fit(samples_of(cost))
    for sample in samples_of(cost):
        predicted = found.seconds(sample.size, sample.num_words)
        assert predicted == pytest.approx(sample.seconds, rel=0.2)


def test_a_fit_has_no_negative_terms() -> None:
    samples = [Sample(ChunkSize.full(k, b), 0, 1e-3 / (k * b)) for k in (1, 2, 4) for b in (2, 8)]
    found = fit(samples)
    terms = (found.fixed_s, found.position_s, found.token_s, found.token_word_s)
    assert all(term >= 0.0 for term in terms)
    assert any(term > 0.0 for term in terms)


def test_latency_bound_work_is_told_from_work_that_grows_with_rows() -> None:
    found = fit([Sample(ChunkSize.full(k, b), 0, 2e-3 * k) for k in (1, 4, 8) for b in (32, 128)])
    assert found.position_s == pytest.approx(2e-3)
    assert found.token_s == 0.0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_measured_costs_cover_every_operation_and_survive_a_file(
    precision: str, tmp_path: Path
) -> None:
    costs = measure_costs(MODEL, SHAPE, precision=precision, num_repetitions=1)
    save_costs(tmp_path / "costs.json", costs)
    assert load_costs(tmp_path / "costs.json") == costs
    assert {family for family, _ in costs.operations} == set(FAMILIES)
    for spec in network_blocks(MODEL):
        assert costs.block_s("F", spec, ChunkSize.full(2, 3)) > 0.0
        if spec.kind != "loss":
            assert costs.block_s("W", spec, ChunkSize.full(2, 3)) > 0.0
    assert costs.one_device_s() > 0.0


@pytest.mark.parametrize("shared_memory", [True, False])
def test_the_link_between_two_processes_has_a_latency_and_a_rate(shared_memory: bool) -> None:
    link = measure_link(num_repetitions=2, shared_memory=shared_memory)
    assert 0.0 < link.latency_s < math.inf
    assert 0.0 < link.bytes_per_s < math.inf


def test_a_full_batch_has_no_padding() -> None:
    batch = full_batch(SHAPE, num_words=24)
    assert (batch.source.shape, batch.target.shape) == ((8, 5), (8, 4))
    assert batch.num_words == batch.num_positions
    assert int(batch.source.max()) < 24
