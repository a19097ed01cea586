"""Replicas of every placement must make the step of the single-device trainer, and stay equal."""

import pytest
import torch
from torch import Tensor

from model.batching import Batch, make_batch
from model.precision import Precision
from model.seq2seq import Seq2Seq
from model.trainer import Trainer
from pipeline.in_process import InProcessPipeline
from pipeline.placements.named import named_placement
from pipeline.plan import Plan
from pipeline.schedules.policies import POLICIES
from tests.batches import random_batch
from tests.pipeline.plans import (
    assert_tensors_close,
    assert_tensors_equal,
    oracle_step,
    small_model,
    small_plan,
)

PLACEMENTS = [("single", 1), ("paper", 3), ("uneven", 2), ("separate", 3), ("split", 4)]
# A share of 3 of the 5 sentences has empty microbatches in 4, and no sentence has 12 words.
CUTS = [(2, 3), (4, 12)]
NO_WORDS = make_batch([([], []), ([], []), ([], [])])
ONE_WORD = make_batch([([3], [4])])


def values(pipeline: InProcessPipeline, replica: int = 0) -> dict[str, Tensor]:
    return pipeline.whole(lambda parameter: parameter.value, replica)


def assert_replicas_agree(pipeline: InProcessPipeline) -> None:
    for replica in range(1, pipeline.plan.num_replicas):
        assert_tensors_equal(values(pipeline, replica), values(pipeline))


def check_step(plan: Plan, batch: Batch, clip_norm: float | None = 5.0) -> None:
    """Compare both ways through a step, with the sums at its end and beside it."""
    expected = oracle_step(plan, batch, 0.7, clip_norm)
    pipeline = InProcessPipeline(plan)
    loss = pipeline.accumulate(batch)
    shares = [
        pipeline.whole(lambda parameter: parameter.gradient(), replica)
        for replica in range(plan.num_replicas)
    ]
    gradients = {
        name: sum((share[name] for share in shares), torch.zeros(())) for name in shares[0]
    }
    norms = pipeline.each(lambda stage: stage.update(batch.num_sentences, 0.7, clip_norm))
    assert loss.total == pytest.approx(expected.loss_sum, rel=1e-10, abs=1e-10)
    assert loss.num_tokens == expected.num_tokens
    assert len(set(norms)) == 1
    assert norms[0] == pytest.approx(expected.gradient_norm, rel=1e-10)
    assert_tensors_close(gradients, expected.gradients, tolerance=1e-10)
    assert_tensors_close(values(pipeline), expected.updated, tolerance=1e-10)
    assert_replicas_agree(pipeline)

    overlapped = InProcessPipeline(plan)
    result = overlapped.train_step(batch, 0.7, clip_norm)
    assert (result.loss, result.gradient_norm) == (loss, norms[0])
    assert_tensors_equal(values(overlapped), values(pipeline))
    assert_replicas_agree(overlapped)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize(("name", "num_ranks"), PLACEMENTS, ids=str)
def test_two_replicas_of_every_placement_make_the_oracles_step(
    name: str, num_ranks: int, cuts: tuple[int, int], policy: str
) -> None:
    config = small_model()
    placement = named_placement(name, config, num_ranks=num_ranks)
    plan = Plan(config, placement, policy, *cuts, precision="float64", num_replicas=2)
    check_step(plan, random_batch(5, seed=sum(cuts)))


@pytest.mark.parametrize("layout", [None, (2, 1)], ids=str)
@pytest.mark.parametrize("num_replicas", [2, 3, 4])
@pytest.mark.parametrize("batch", [NO_WORDS, ONE_WORD], ids=["no words", "one word"])
@pytest.mark.parametrize("cuts", [(1, 1), (2, 3)], ids=str)
def test_shares_without_sentences(
    layout: tuple[int, int] | None, num_replicas: int, batch: Batch, cuts: tuple[int, int]
) -> None:
    plan = small_plan(
        layout, num_microbatches=cuts[0], num_chunks=cuts[1], num_replicas=num_replicas
    )
    check_step(plan, batch)


@pytest.mark.parametrize("clip_norm", [None, 0.01])
def test_peepholes_with_and_without_the_clip(clip_norm: float | None) -> None:
    model = small_model(peepholes=True)
    plan = small_plan((2, 2), model=model, num_microbatches=2, num_chunks=3, num_replicas=3)
    check_step(plan, random_batch(7), clip_norm)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_other_formats_are_the_oracles_to_rounding(precision: str) -> None:
    plan = small_plan((2, 2), precision=precision, num_microbatches=2, num_replicas=2)
    batch = random_batch(8)
    pipeline = InProcessPipeline(plan)
    pipeline.train_step(batch, 0.7, 5.0)
    tolerance = 2e-5 if precision == "float32" else 2e-2
    expected = oracle_step(plan, batch, 0.7, 5.0)
    assert_tensors_close(values(pipeline), expected.updated, tolerance=tolerance)
    assert_replicas_agree(pipeline)


def test_several_steps_stay_with_the_oracle_and_replicas_with_each_other() -> None:
    plan = small_plan((2, 1), num_microbatches=2, num_chunks=2, num_replicas=3)
    oracle = Trainer(Seq2Seq(plan.model, Precision("float64"), seed=plan.seed), 5.0)
    pipeline = InProcessPipeline(plan)
    for seed in range(5):
        batch = random_batch(1 + 2 * seed, seed=seed)
        expected = oracle.step(batch, 0.7)
        actual = pipeline.train_step(batch, 0.7, 5.0)
        assert actual.loss.mean == pytest.approx(expected.loss.mean, rel=1e-10)
        assert actual.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-10)
        assert_replicas_agree(pipeline)
    expected_values = {name: p.value for name, p in oracle.model.parameters().items()}
    assert_tensors_close(values(pipeline), expected_values, tolerance=1e-10)


def test_batches_add_up_before_an_update() -> None:
    plan = small_plan((2, 1), num_chunks=2, num_replicas=2)
    first, second = random_batch(3, seed=1), random_batch(4, seed=2)
    model = Seq2Seq(plan.model, Precision("float64"), seed=plan.seed)
    model.loss_and_gradients(first)
    model.loss_and_gradients(second)
    for parameter in model.parameters().values():
        parameter.descend(0.7 / 7)
    pipeline = InProcessPipeline(plan)
    pipeline.accumulate(first)
    pipeline.accumulate(second)
    pipeline.each(lambda stage: stage.update(7, 0.7, None))
    expected = {name: parameter.value for name, parameter in model.parameters().items()}
    assert_tensors_close(values(pipeline), expected, tolerance=1e-10)
    assert_replicas_agree(pipeline)


def test_the_same_replicas_give_the_same_bits_again() -> None:
    plan = small_plan((2, 2), precision="float32", num_microbatches=2, num_chunks=3, num_replicas=3)

    def three_steps() -> dict[str, Tensor]:
        pipeline = InProcessPipeline(plan)
        for seed in range(3):
            pipeline.train_step(random_batch(7, seed=seed), 0.7, 5.0)
        assert_replicas_agree(pipeline)
        return values(pipeline)

    assert_tensors_equal(three_steps(), three_steps())


def test_evaluation_is_the_oracles() -> None:
    plan = small_plan((2, 2), num_microbatches=2, num_chunks=3, num_replicas=3)
    batch = random_batch(7)
    expected = Seq2Seq(plan.model, Precision("float64"), seed=plan.seed).loss(batch)
    loss = InProcessPipeline(plan).evaluate(batch)
    assert loss.total == pytest.approx(expected.total, rel=1e-12)
    assert loss.num_tokens == expected.num_tokens
