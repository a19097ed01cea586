"""A stage owns its part, fails together with the others, and leaves nothing behind."""

import pickle
from typing import Any

import pytest
import torch

from model.batching import Chunk
from model.block import Block, Tensors
from model.errors import UserError
from model.optimizer import NonFiniteGradientError
from model.precision import Precision
from pipeline.graph import Operation, Value
from pipeline.in_process import InProcessPipeline
from pipeline.placements.placement import PlacementError
from pipeline.plan import Plan
from pipeline.program import POST_AHEAD, compile_program
from pipeline.shapes import value_dtype, value_shape
from pipeline.stage import Stage
from pipeline.transports.transport import TransportError
from tests.batches import random_batch
from tests.pipeline.plans import paper_placement, small_model, small_plan


class Recording(Block[Any]):
    """Runs another block and notes what it makes."""

    def __init__(self, block: Block[Any], made: list[tuple[str, str, Tensors]]) -> None:
        super().__init__(block.name, block.parameters)
        self.block, self.made = block, made

    def forward(
        self, chunk: Chunk, inputs: Tensors, *, training: bool = True
    ) -> tuple[Tensors, Any]:
        outputs, saved = self.block.forward(chunk, inputs, training=training)
        self.made.append(("F", self.name, outputs))
        return outputs, saved

    def input_gradient(self, saved: Any, gradients: Tensors) -> Tensors:
        outputs = self.block.input_gradient(saved, gradients)
        self.made.append(("I", self.name, outputs))
        return outputs

    def weight_gradient(self, saved: Any) -> None:
        self.block.weight_gradient(saved)


def test_the_ranks_parameters_are_the_models_in_the_canonical_order() -> None:
    plan = small_plan((2, 2))
    assert list(InProcessPipeline(plan).parameters()) == [rows.key for rows in plan.parameter_rows]
    names = list(dict.fromkeys(rows.name for rows in plan.parameter_rows))
    assert names == list(plan.model.parameter_shapes())
    assert [rows.key for rows in plan.parameter_rows if rows.name == "softmax.bias"] == [
        "softmax.bias[0:7]",
        "softmax.bias[7:13]",
    ]


def test_a_plan_travels_without_its_schedules() -> None:
    plan = small_plan((3, 2), num_chunks=4)
    before = len(pickle.dumps(plan))
    schedule = plan.training.schedule
    assert len(pickle.dumps(plan)) == before
    copy = pickle.loads(pickle.dumps(plan))
    assert copy == plan
    assert copy.training.schedule == schedule


@pytest.mark.parametrize(
    "changes",
    [{"num_microbatches": 0}, {"num_chunks": 0}, {"num_replicas": 0}, {"precision": "float16"}],
)
def test_a_plan_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"too few|float16"):
        small_plan(**changes)


def test_a_plan_counts_the_ranks_of_all_replicas() -> None:
    plan = small_plan((2, 1), num_replicas=4)
    assert (plan.num_ranks, plan.num_workers) == (3, 12)
    assert small_plan((2, 1)).num_workers == 3


def test_a_plan_checks_its_placement() -> None:
    placement = paper_placement(small_model(num_layers=2), 2, 2)
    with pytest.raises(PlacementError, match=r"encoder\.2\.projection"):
        Plan(small_model(num_layers=3), placement)


def test_all_ranks_refuse_a_gradient_that_is_not_finite_and_can_go_on() -> None:
    pipeline = InProcessPipeline(small_plan((2, 2)))
    poisoned = pipeline.parameters()["decoder.1.bias"]
    whole = poisoned.value.clone()
    poisoned.load(torch.full_like(whole, float("nan")))
    before = pipeline.whole(lambda parameter: parameter.value.clone())
    errors = []

    def step(stage: Stage) -> None:
        with pytest.raises(NonFiniteGradientError) as caught:
            stage.train_step(random_batch(4), 0.7, 5.0)
        errors.append(str(caught.value))

    pipeline.each(step)
    assert len(errors) == 4
    assert len(set(errors)) == 1
    after = pipeline.whole(lambda parameter: parameter.value)
    assert all(torch.equal(after[k], before[k]) or k == "decoder.1.bias" for k in before)
    poisoned.load(whole)
    fresh = InProcessPipeline(small_plan((2, 2)))
    assert pipeline.train_step(random_batch(4), 0.7, 5.0) == fresh.train_step(
        random_batch(4), 0.7, 5.0
    )


def test_an_error_on_one_rank_releases_the_others() -> None:
    pipeline = InProcessPipeline(small_plan((2, 2), num_chunks=3))

    class Failing(Recording):
        def input_gradient(self, saved: Any, gradients: Tensors) -> Tensors:
            raise ValueError("out of luck")

    blocks = pipeline.stages[2].blocks
    blocks["softmax.0"] = Failing(blocks["softmax.0"], [])
    with pytest.raises(ValueError, match="out of luck"):
        pipeline.train_step(random_batch(4), 0.7, 5.0)
    assert all(not p.gradient().any() for p in pipeline.parameters().values())
    with pytest.raises(TransportError):
        pipeline.train_step(random_batch(4), 0.7, 5.0)


def test_times_and_bytes_are_reported() -> None:
    pipeline = InProcessPipeline(small_plan((2, 2), num_chunks=2))
    batch = random_batch(4)
    results = pipeline.each(lambda stage: stage.train_step(batch, 0.7, 5.0))
    for result in results:
        assert result.busy_s > 0
        assert result.busy_s + result.wait_s <= result.step_s
    # The first softmax rank sends the normaliser and the gradients of the decoder's outputs.
    words = batch.num_target_tokens
    assert results[2].bytes_sent == words * (1 + 5) * 8
    # The other one sends its statistics instead of the normaliser.
    assert results[3].bytes_sent == words * (3 + 5) * 8
    again = pipeline.each(lambda stage: stage.train_step(batch, 0.7, 5.0))
    assert [r.bytes_sent for r in again] == [r.bytes_sent for r in results]
    assert [r.loss.num_tokens for r in results] == [0, 0, batch.num_target_tokens, 0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_values_have_the_shapes_and_formats_foretold(precision: str) -> None:
    plan = small_plan(model=small_model(peepholes=True), precision=precision)
    (stage,) = InProcessPipeline(plan).stages
    made: list[tuple[str, str, Tensors]] = []
    for name, block in list(stage.blocks.items()):
        stage.blocks[name] = Recording(block, made)
    batch = random_batch(4)
    stage.accumulate(batch)
    specs = {spec.name: spec for spec in plan.blocks}
    assert len(made) == 2 * len(specs) - 1
    for kind, name, outputs in made:
        is_source = specs[name].side == "source"
        chunk = batch.source_chunk(0, batch.source_positions)
        if not is_source:
            chunk = batch.target_chunk(0, batch.target_positions)
        for port, tensor in outputs.items():
            value = Value(Operation("F" if kind == "F" else "I", name, 0, 0), port)
            shape = value_shape(value, specs[name], plan.model, chunk.size)
            assert tuple(tensor.shape) == shape, value
            assert tensor.dtype == value_dtype(value, Precision(precision)), value


def test_receives_are_posted_ahead_and_in_the_order_of_the_sends() -> None:
    plan = small_plan((3, 2), num_microbatches=2, num_chunks=3)
    for rank in range(plan.num_ranks):
        program = compile_program(plan.training, plan.placement, rank)
        posted: dict[int, list[int]] = {}
        when = {}
        for index, instruction in enumerate(program.instructions):
            for receive in instruction.posts:
                assert plan.placement.rank_of[receive.value.operation.block] != rank
                posted.setdefault(receive.source, []).append(receive.tag)
                when[receive.slot] = index
            for slot in instruction.awaited:
                assert when[slot] <= max(0, index - POST_AHEAD)
        for tags in posted.values():
            assert tags == list(range(len(tags)))


def test_every_slot_is_filled_before_it_is_read_and_read_until_it_is_emptied() -> None:
    plan = small_plan((3, 2), num_microbatches=2, num_chunks=3)
    for rank in range(plan.num_ranks):
        full: set[int] = set()
        for instruction in compile_program(plan.training, plan.placement, rank).instructions:
            full.update(instruction.awaited)
            read = {slot for _, slots in instruction.inputs for slot in slots}
            assert read <= full
            assert set(instruction.unused) <= read
            full.difference_update(instruction.unused)
            made = {slot for _, slot in instruction.kept}
            assert not made & full
            full |= made
        assert not full
