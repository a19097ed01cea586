"""The task of the contest: lengths, words, arithmetic, products and the cut of the pipeline."""

import statistics

import numpy as np
import pytest
import torch

from benchmarks.rivals.batches import draw_batches
from benchmarks.rivals.ceiling import products
from benchmarks.rivals.lengths import MEAN_SOURCE, MEAN_TARGET, row_groups_of_lengths
from benchmarks.rivals.pipelining import num_lower_layers
from benchmarks.rivals.task import forward_operations, operations
from model.network import ModelConfig
from pipeline.costs.arithmetic import arithmetic_costs
from pipeline.costs.operation_costs import BatchShape
from pipeline.costs.profiling import full_batch
from tests.benchmarks.contests import small_task


def test_lengths_are_those_of_the_papers_corpus() -> None:
    groups = row_groups_of_lengths(1024, seed=1)
    lengths = np.concatenate(groups)
    assert [float(side.mean()) for side in lengths.T] == pytest.approx(
        [MEAN_SOURCE, MEAN_TARGET], rel=0.02
    )
    source, target = ((side - side.mean()) / side.std() for side in lengths.T)
    assert float((source * target).mean()) > 0.8  # the correlation
    assert lengths.min() >= 1


def test_a_row_group_holds_pairs_of_about_the_same_length() -> None:
    groups = row_groups_of_lengths(1024, seed=1)
    for side, most in ((0, 1), (1, 4)):
        spreads = [int(group[:, side].max() - group[:, side].min()) for group in groups]
        assert statistics.median(spreads) <= most
    assert [len(group) for group in groups] == [1024] * len(groups)


def test_batches_are_full_in_the_vocabulary_and_the_same_at_every_call() -> None:
    task = small_task(num_steps=3)
    batches = draw_batches(task)
    assert [batch.num_sentences for batch in batches] == [8] * 4
    shortest, middle, longest = (batch.source_positions for batch in batches[1:])
    assert shortest < middle < longest
    for batch, again in zip(batches, draw_batches(task), strict=True):
        assert batch.source.equal(again.source)
        assert batch.target.equal(again.target)
        assert int(batch.source.max()) < task.model.source_vocabulary_size
        assert int(batch.target.max()) < task.model.target_vocabulary_size
    other = draw_batches(small_task(num_steps=3, seed=2))
    assert not batches[0].source.equal(other[0].source)


def test_operations_are_those_of_the_planner() -> None:
    model = small_task().model
    batch = full_batch(BatchShape(8, 7, 9), model.target_vocabulary_size)
    costs = arithmetic_costs(model, 8, 7, 9, flop_per_s=1.0)
    assert operations(model, batch) == pytest.approx(costs.one_device_s())
    assert sum(forward_operations(model, batch).values()) == pytest.approx(costs.one_device_s() / 3)


def test_products_have_the_shapes_that_they_name() -> None:
    for name, product in products(small_task()).items():
        left, right, result = product.factors(torch.float32)
        assert (left @ right).shape == result.shape, name
        assert str(product) == f"{left.shape[0]} x {left.shape[1]} x {right.shape[1]}"


@pytest.mark.parametrize(
    ("words", "lower"),
    [
        (1_000, 0),  # 32 of 65 million multiply-adds are the encoder's
        (32_000, 2),  # 48 below and 48 above
        (80_000, 3),  # 56 below and 88 above
    ],
)
def test_the_pipeline_is_cut_where_arithmetic_is_most_even(words: int, lower: int) -> None:
    assert num_lower_layers(ModelConfig(160_000, words)) == lower
