"""The sums over replicas begin during the step, move only what they must, and fail together."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.batching import Chunk
from model.block import Block, Tensors
from model.optimizer import NonFiniteGradientError
from model.parameter import RowParameter
from pipeline.costs.arithmetic import arithmetic_costs
from pipeline.costs.operation_costs import Costs, Link
from pipeline.gradient_sum import EmulatedSum
from pipeline.in_process import InProcessPipeline
from pipeline.simulation.gradient_exchange import block_exchange_s, replica_costs
from pipeline.stage import Stage
from pipeline.transports.in_process import InProcessTransport, in_process_transports
from pipeline.transports.transport import Pending, TransportError
from tests.batches import random_batch
from tests.pipeline.plans import small_model, small_plan


class Watched(InProcessTransport):
    """Notes the sums that start."""

    def watch(self, events: list[str]) -> None:
        self.events = events

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        self.events.append("sum")
        return super().start_all_reduce(tensor)


class Noted(Block[Any]):
    """Runs another block and notes its weight gradients."""

    def __init__(self, block: Block[Any], events: list[str]) -> None:
        super().__init__(block.name, block.parameters)
        self.block, self.events = block, events

    def forward(
        self, chunk: Chunk, inputs: Tensors, *, training: bool = True
    ) -> tuple[Tensors, Any]:
        return self.block.forward(chunk, inputs, training=training)

    def input_gradient(self, saved: Any, gradients: Tensors) -> Tensors:
        return self.block.input_gradient(saved, gradients)

    def weight_gradient(self, saved: Any) -> None:
        self.events.append(self.name)
        self.block.weight_gradient(saved)


def test_blocks_are_summed_while_others_still_run() -> None:
    plan = small_plan(num_chunks=2, num_replicas=2)
    pipeline = InProcessPipeline(plan)
    stage = pipeline.stages[0]
    events: list[str] = []
    watched = stage._transports[1]
    assert isinstance(watched, InProcessTransport)
    watched.__class__ = Watched
    assert isinstance(watched, Watched)
    watched.watch(events)
    for name, block in list(stage.blocks.items()):
        stage.blocks[name] = Noted(block, events)
    pipeline.train_step(random_batch(4), 0.7, 5.0)
    softmax = [at for at, event in enumerate(events) if event == "softmax.0"]
    others = [at for at, event in enumerate(events) if event not in ("softmax.0", "sum")]
    assert events[softmax[-1] + 1 : softmax[-1] + 3] == ["sum", "sum"], "weight and bias"
    assert others[-1] > softmax[-1] + 2
    events.clear()
    pipeline.accumulate(random_batch(4))
    assert "sum" not in events, "more batches may follow"


def test_only_touched_rows_of_embeddings_travel() -> None:
    model = small_model(source_vocabulary_size=2000, target_vocabulary_size=13)
    batch = random_batch(6, source_words=2000)
    plan = small_plan(model=model, num_replicas=2)
    pipeline = InProcessPipeline(plan)
    results = pipeline.each(lambda stage: stage.train_step(batch, 0.7, 5.0))
    dense = sum(
        parameter.value.nbytes
        for parameter in pipeline.parameters().values()
        if not isinstance(parameter, RowParameter)
    )
    for replica, result in enumerate(results):
        share = batch.share(replica, 2)
        source = len(torch.unique(share.source))
        target = len(torch.unique(share.target_chunk(0, share.target_positions).tokens))
        assert result.bytes_sent == dense + (source + target) * model.embedding_size * 8


def test_an_update_without_a_batch_changes_nothing() -> None:
    pipeline = InProcessPipeline(small_plan(num_replicas=2))
    before = {key: parameter.value.clone() for key, parameter in pipeline.parameters(1).items()}
    norms = pipeline.each(lambda stage: stage.update(4, 0.7, 5.0))
    assert norms == [0.0, 0.0]
    after = pipeline.parameters(1)
    assert all(torch.equal(after[key].value, value) for key, value in before.items())


def test_all_replicas_refuse_a_gradient_that_is_not_finite_and_can_go_on() -> None:
    plan = small_plan((2, 1), num_replicas=2)
    pipeline = InProcessPipeline(plan)
    # Only one replica's value is bad, so only the sum tells the other one.
    poisoned = pipeline.parameters(1)["decoder.1.bias"]
    whole = poisoned.value.clone()
    poisoned.load(torch.full_like(whole, float("nan")))
    errors = []

    def step(stage: Stage) -> None:
        with pytest.raises(NonFiniteGradientError) as caught:
            stage.train_step(random_batch(4), 0.7, 5.0)
        errors.append(str(caught.value))

    pipeline.each(step)
    assert len(errors) == 6
    assert len(set(errors)) == 1
    poisoned.load(whole)
    fresh = InProcessPipeline(plan)
    assert pipeline.train_step(random_batch(4), 0.7, 5.0) == fresh.train_step(
        random_batch(4), 0.7, 5.0
    )


def test_an_error_on_one_worker_releases_those_of_all_replicas() -> None:
    class Failing(Noted):
        def weight_gradient(self, saved: Any) -> None:
            raise ValueError("out of luck")

    pipeline = InProcessPipeline(small_plan((2, 1), num_chunks=2, num_replicas=2))
    blocks = pipeline.stages[4].blocks
    blocks["decoder.2.projection"] = Failing(blocks["decoder.2.projection"], [])
    with pytest.raises(ValueError, match="out of luck"):
        pipeline.train_step(random_batch(4), 0.7, 5.0)
    for replica in range(2):
        assert not any(p.gradient().any() for p in pipeline.parameters(replica).values())
    with pytest.raises(TransportError):
        pipeline.train_step(random_batch(4), 0.7, 5.0)
    with pytest.raises(TransportError, match="replica 0"):
        pipeline.stages[0]._transports[1].all_reduce_sum(torch.zeros(1, dtype=torch.float64))


class FakeClock:
    """A clock that only sleep moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def now(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def costs_with_link(link: Link) -> Costs:
    costs = arithmetic_costs(small_model())
    return Costs(costs.model, costs.batch, costs.operations, link)


def test_emulated_sums_go_one_after_another_over_a_link_of_their_own() -> None:
    costs = costs_with_link(Link(latency_s=0.5, bytes_per_s=1000.0))
    plan = small_plan(costs=costs, num_replicas=2)
    batch = random_batch(6)
    specs = {spec.name: spec for spec in plan.blocks}
    (transport,) = in_process_transports(1)
    transport.num_ranks = 2
    transport.start_all_reduce = lambda tensor: _Done(tensor)  # type: ignore[method-assign]
    clock = FakeClock()
    names = ["softmax.0", "source_embedding", "loss"]
    emulated = EmulatedSum(plan, names, transport, clock.now, clock.sleep)
    emulated.begin(batch)
    shaped = Costs(
        costs.model,
        type(costs.batch)(6, batch.source_positions, batch.target_positions),
        costs.operations,
        costs.link,
    )
    softmax_s, embedding_s = (
        block_exchange_s(specs[name], replica_costs(shaped, 2), 2) for name in names[:2]
    )
    assert softmax_s > 1.0
    emulated.start("softmax.0")
    clock.now_s += 0.25  # another operation runs meanwhile
    emulated.start("source_embedding")
    emulated.finish()
    assert clock.now_s == pytest.approx(100.0 + softmax_s + embedding_s)
    # A block that was not announced is summed at the end.
    emulated.begin(batch)
    emulated.start("source_embedding")
    clock.now_s += 1000.0
    before_s = clock.now_s
    emulated.finish()
    assert clock.now_s == pytest.approx(before_s + softmax_s)


class _Done:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def wait(self) -> Tensor:
        return self.tensor


def test_emulated_replicas_run_and_a_free_link_takes_no_time() -> None:
    costs = costs_with_link(Link())
    plan = small_plan((2, 1), num_chunks=2, num_replicas=2, precision="float32", costs=costs)
    pipeline = InProcessPipeline(plan, device="emulated")
    results = pipeline.each(lambda stage: stage.train_step(random_batch(4), 0.7, 5.0))
    assert len(results) == 6
    assert all(result.busy_s > 0 for result in results)
    assert {result.gradient_norm for result in results} == {0.0}
