"""The pipeline inside one process against the single-device trainer: loss, gradients, updates."""

import pytest
import torch

from model.batching import Batch, make_batch
from model.precision import Precision
from model.seq2seq import Seq2Seq
from model.trainer import Trainer
from pipeline.in_process import InProcessPipeline
from pipeline.placements.named import named_placement
from pipeline.placements.placement import Placement
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

# Layer ranks and softmax ranks; None is one rank for everything.
LAYOUTS = [None, (1, 1), (2, 1), (3, 2), (2, 4)]
# Microbatches and time chunks; a batch of 5 has empty microbatches in 7, and no sentence of the
# batches here has 20 words.
CUTS = [(1, 1), (2, 1), (1, 3), (3, 4), (7, 2), (2, 20)]
# More ranks than layers, fewer, and numbers that do not divide.
NAMED = [("uneven", 2), ("uneven", 5), ("separate", 3), ("separate", 8), ("split", 4), ("split", 7)]
NO_WORDS = make_batch([([], []), ([], [])])
ONE_WORD = make_batch([([3], [4])])


def check_step(plan: Plan, batch: Batch, clip_norm: float | None, tolerance: float) -> None:
    expected = oracle_step(plan, batch, 0.7, clip_norm)
    pipeline = InProcessPipeline(plan)
    loss = pipeline.accumulate(batch)
    gradients = pipeline.whole(lambda parameter: parameter.gradient())
    norms = pipeline.each(lambda stage: stage.update(batch.num_sentences, 0.7, clip_norm))
    assert loss.total == pytest.approx(expected.loss_sum, rel=tolerance, abs=tolerance)
    assert loss.num_tokens == expected.num_tokens
    assert len(set(norms)) == 1
    assert norms[0] == pytest.approx(expected.gradient_norm, rel=tolerance)
    assert_tensors_close(gradients, expected.gradients, tolerance=tolerance)
    updated = pipeline.whole(lambda parameter: parameter.value)
    assert_tensors_close(updated, expected.updated, tolerance=tolerance)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_float64_step_is_the_oracles(
    layout: tuple[int, int] | None, cuts: tuple[int, int], policy: str
) -> None:
    plan = small_plan(layout, policy=policy, num_microbatches=cuts[0], num_chunks=cuts[1])
    check_step(plan, random_batch(5, seed=sum(cuts)), 5.0, 1e-10)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cuts", CUTS[2:], ids=str)
@pytest.mark.parametrize(("name", "num_ranks"), NAMED, ids=str)
def test_named_placements_make_the_oracles_step(
    name: str, num_ranks: int, cuts: tuple[int, int], policy: str
) -> None:
    config = small_model()
    placement = named_placement(
        name, config, num_ranks=num_ranks, num_microbatches=cuts[0], num_chunks=cuts[1]
    )
    plan = Plan(config, placement, policy, *cuts, precision="float64")
    check_step(plan, random_batch(5, seed=sum(cuts)), 5.0, 1e-10)


@pytest.mark.parametrize("batch", [random_batch(5, seed=3), NO_WORDS], ids=["words", "no words"])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("name", ["paper", "split"])
def test_logits_made_twice_change_nothing(name: str, cuts: tuple[int, int], batch: Batch) -> None:
    config = small_model()
    placement = named_placement(name, config, num_ranks=4, recomputes_logits=True)
    plan = Plan(config, placement, "deferred_weights", *cuts, precision="float64")
    assert all(spec.recomputes for spec in plan.blocks if spec.kind == "softmax")
    check_step(plan, batch, 5.0, 1e-10)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("batch", [NO_WORDS, ONE_WORD], ids=["no words", "one word"])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_shortest_sentences(batch: Batch, cuts: tuple[int, int], policy: str) -> None:
    plan = small_plan((3, 2), policy=policy, num_microbatches=cuts[0], num_chunks=cuts[1])
    check_step(plan, batch, 5.0, 1e-10)


@pytest.mark.parametrize("clip_norm", [None, 0.01, 1e6])
def test_peepholes_with_the_clip_on_and_off(clip_norm: float | None) -> None:
    model = small_model(peepholes=True)
    plan = small_plan((2, 3), model=model, num_microbatches=2, num_chunks=3)
    batch = random_batch(6)
    norm = oracle_step(plan, batch, 0.7, clip_norm).gradient_norm
    assert 0.01 < norm < 1e6, "the clip must be active in one case and not in the other"
    check_step(plan, batch, clip_norm, 1e-10)


def test_one_layer_and_uneven_shards_on_ranks_that_share() -> None:
    model = small_model(num_layers=1)
    rank_of = {
        "source_embedding": 2,
        "target_embedding": 0,
        "encoder.0.projection": 1,
        "encoder.0.recurrence": 0,
        "decoder.0.projection": 0,
        "decoder.0.recurrence": 1,
        "softmax.0": 1,
        "softmax.1": 0,
        "softmax.2": 2,
        "loss": 0,
    }
    placement = Placement("by hand", 3, rank_of, ((0, 1), (1, 9), (9, 13)))
    plan = Plan(model, placement, num_microbatches=2, num_chunks=3, precision="float64")
    check_step(plan, random_batch(5), 5.0, 1e-10)


def test_float32_is_the_oracles_to_rounding() -> None:
    plan = small_plan((3, 2), precision="float32", num_microbatches=2, num_chunks=3)
    check_step(plan, random_batch(8), 5.0, 2e-5)


def test_bfloat16_is_the_oracles_to_rounding() -> None:
    plan = small_plan((3, 2), precision="bfloat16", num_microbatches=2, num_chunks=3)
    check_step(plan, random_batch(8), 5.0, 2e-2)


@pytest.mark.parametrize("layout", [None, (2, 3)], ids=str)
def test_several_steps_stay_with_the_oracle(layout: tuple[int, int] | None) -> None:
    plan = small_plan(layout, num_microbatches=2, num_chunks=2)
    oracle = Trainer(Seq2Seq(plan.model, Precision(plan.precision), seed=plan.seed), 5.0)
    pipeline = InProcessPipeline(plan)
    for seed in range(4):
        batch = random_batch(4 + seed, seed=seed)
        expected = oracle.step(batch, 0.7)
        actual = pipeline.train_step(batch, 0.7, 5.0)
        assert actual.loss.mean == pytest.approx(expected.loss.mean, rel=1e-10)
        assert actual.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-10)
    values = {name: p.value for name, p in oracle.model.parameters().items()}
    assert_tensors_close(pipeline.whole(lambda p: p.value), values, tolerance=1e-10)


@pytest.mark.parametrize("layout", [None, (3, 2)], ids=str)
def test_evaluation_is_the_oracles_and_leaves_no_gradient(layout: tuple[int, int] | None) -> None:
    plan = small_plan(layout, num_microbatches=2, num_chunks=3)
    batch = random_batch(7)
    expected = Seq2Seq(plan.model, Precision("float64"), seed=plan.seed).loss(batch)
    pipeline = InProcessPipeline(plan)
    loss = pipeline.evaluate(batch)
    assert loss.total == pytest.approx(expected.total, rel=1e-12)
    assert loss.num_tokens == expected.num_tokens
    assert all(not p.gradient().any() for p in pipeline.parameters().values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_one_rank_whole_batch_has_the_oracles_bits(precision: str) -> None:
    plan = small_plan(None, precision=precision)
    oracle = Trainer(Seq2Seq(plan.model, Precision(precision), seed=plan.seed), 5.0)
    pipeline = InProcessPipeline(plan)
    for seed in range(3):
        batch = random_batch(6, seed=seed)
        assert pipeline.train_step(batch, 0.7, 5.0) == oracle.step(batch, 0.7)
    values = {name: p.value for name, p in oracle.model.parameters().items()}
    assert_tensors_equal(pipeline.whole(lambda p: p.value), values)


def test_the_same_layout_gives_the_same_bits_again() -> None:
    plan = small_plan((2, 3), precision="float32", num_microbatches=2, num_chunks=3)

    def three_steps() -> dict[str, torch.Tensor]:
        pipeline = InProcessPipeline(plan)
        for seed in range(3):
            pipeline.train_step(random_batch(6, seed=seed), 0.7, 5.0)
        return pipeline.whole(lambda parameter: parameter.value)

    assert_tensors_equal(three_steps(), three_steps())


def test_layer_ranks_do_not_change_bits() -> None:
    batch = random_batch(6)
    wholes = []
    for layer_ranks in (1, 2, 3):
        plan = small_plan((layer_ranks, 2), precision="float32", num_microbatches=2, num_chunks=3)
        pipeline = InProcessPipeline(plan)
        pipeline.train_step(batch, 0.7, 5.0)
        wholes.append(pipeline.whole(lambda parameter: parameter.value))
    assert_tensors_equal(wholes[1], wholes[0])
    assert_tensors_equal(wholes[2], wholes[0])
