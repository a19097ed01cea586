"""Emulated devices: the true sizes of everything, the planned time, lateness caught up."""

import itertools

import pytest
import torch

from model.batching import ChunkSize
from model.network import network_blocks
from pipeline.costs.operation_costs import BatchShape, Costs, OperationCost
from pipeline.emulation import DeviceClock, EmulatedDevice, make_device
from pipeline.in_process import InProcessPipeline
from tests.batches import random_batch
from tests.pipeline.plans import small_model, small_plan


class FakeTime:
    """A clock whose sleeps end late by a fixed time, and that goes on a little when it is read."""

    def __init__(self, late_s: float) -> None:
        self.now_s, self.late_s = 0.0, late_s
        self.slept: list[float] = []

    def now(self) -> float:
        self.now_s += 1e-6
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds + self.late_s


def clock_of(time: FakeTime) -> DeviceClock:
    return DeviceClock(time.now, time.sleep)


def test_the_lateness_of_sleeps_does_not_add_up() -> None:
    time = FakeTime(late_s=0.25)
    clock = clock_of(time)
    for _ in range(100):
        clock.spend(1.0)
    assert time.now_s == pytest.approx(100.25, abs=1e-3)


def test_usual_lateness_is_slept_less_beforehand() -> None:
    time = FakeTime(late_s=1e-4)
    clock = clock_of(time)
    ends = []
    for _ in range(50):
        clock.spend(0.01)
        clock.waited(1.0)
        ends.append(time.now_s)
    late_s = [end - start - 0.01 for start, end in itertools.pairwise(ends)]
    assert late_s[0] > 5e-5
    assert max(late_s[-10:]) < 1e-5


def test_operations_shorter_than_the_lateness_catch_up_without_sleeping() -> None:
    time = FakeTime(late_s=0.25)
    clock = clock_of(time)
    clock.spend(1.0)
    clock.spend(0.125)
    assert time.now_s == pytest.approx(1.25, abs=1e-3)
    assert len(time.slept) == 1


def test_the_ranks_own_time_between_operations_is_not_given_back() -> None:
    time = FakeTime(late_s=0.25)
    clock = clock_of(time)
    for _ in range(10):
        clock.spend(1.0)
        time.now_s += 0.5
    assert time.now_s == pytest.approx(15.25, abs=1e-3)


def test_a_wait_for_other_ranks_hides_lateness() -> None:
    time = FakeTime(late_s=0.25)
    clock = clock_of(time)
    clock.spend(1.0)
    time.now_s += 2.0
    clock.waited(2.0)
    clock.spend(1.0)
    assert time.now_s == pytest.approx(1.25 + 2.0 + 1.0 + 0.25, abs=1e-3)


def test_work_within_an_operation_is_part_of_its_time() -> None:
    time = FakeTime(late_s=0.0)
    clock = clock_of(time)
    start = clock.now()
    time.now_s += 0.75
    clock.spend(1.0, start)
    assert time.now_s == pytest.approx(1.0, abs=1e-3)


def test_work_beyond_an_operations_time_is_not_given_back() -> None:
    time = FakeTime(late_s=0.0)
    clock = clock_of(time)
    start = clock.now()
    time.now_s += 1.5
    clock.spend(1.0, start)
    clock.spend(1.0)
    assert time.now_s == pytest.approx(2.5, abs=1e-3)


@pytest.mark.parametrize("placement_size", [None, (2, 1)])
def test_values_have_the_shapes_of_real_ones(placement_size: tuple[int, int] | None) -> None:
    plan = small_plan(placement_size, num_microbatches=2, num_chunks=3)
    batch = random_batch(5)
    real, emulated = InProcessPipeline(plan), InProcessPipeline(plan, device="emulated")
    # The in-process transport asserts the shape and number format of every message.
    in_real = real.each(lambda stage: stage.train_step(batch, 0.1, 5.0))
    in_emulated = emulated.each(lambda stage: stage.train_step(batch, 0.1, 5.0))
    assert [r.bytes_sent for r in in_emulated] == [r.bytes_sent for r in in_real]


def test_blocks_have_no_parameters_and_a_step_has_no_gradient() -> None:
    pipeline = InProcessPipeline(small_plan((2, 1)), device="emulated")
    assert all(not stage.parameters() for stage in pipeline.stages)
    result = pipeline.each(lambda stage: stage.train_step(random_batch(3), 0.1, 5.0))[0]
    assert result.gradient_norm == 0.0
    assert result.loss.num_tokens == 0


def test_an_operation_takes_the_cost_of_its_chunk() -> None:
    model = small_model()
    costs = Costs(
        model,
        BatchShape(4, 6, 6),
        {("recurrence", "I"): OperationCost(fixed_s=1.0, position_s=0.5, token_s=0.25)},
    )
    time = FakeTime(late_s=0.0)
    device = EmulatedDevice(small_plan(model=model, costs=costs), clock_of(time))
    spec = next(spec for spec in network_blocks(model) if spec.kind == "recurrence")
    values = device.run("I", spec, ChunkSize.full(2, 3))
    assert time.now_s == pytest.approx(1.0 + 0.5 * 2 + 0.25 * 6, abs=1e-3)
    assert set(values) == {"gates", "hidden", "cell"}
    device.run("F", spec, ChunkSize.full(2, 3))
    assert time.now_s == pytest.approx(3.5, abs=1e-3)


def test_values_of_all_sizes_lie_in_the_zeros_of_the_largest() -> None:
    model = small_model()
    device = EmulatedDevice(small_plan(model=model, precision="float32"), clock_of(FakeTime(0.0)))
    spec = next(spec for spec in network_blocks(model) if spec.kind == "recurrence")
    sizes = [ChunkSize.full(positions, 3) for positions in (5, 2, 9, 1)]
    for _ in range(2):
        values = [device.run(kind, spec, size) for kind in ("F", "I") for size in sizes]
    for size, of_i in zip(sizes, values[len(sizes) :], strict=True):
        assert of_i["gates"].shape == (size.num_tokens, 4 * model.hidden_size)
        assert of_i["cell"].shape == (3, model.hidden_size)
    tensors = [tensor for found in values for tensor in found.values()]
    assert not any(tensor.any() for tensor in tensors)
    assert all(tensor.is_contiguous() for tensor in tensors)
    assert len({tensor.data_ptr() for tensor in tensors}) == 1


def test_what_goes_to_other_ranks_is_written_where_the_transport_wants_it() -> None:
    model = small_model()
    device = EmulatedDevice(small_plan(model=model), clock_of(FakeTime(late_s=0.0)))
    spec = next(spec for spec in network_blocks(model) if spec.kind == "recurrence")
    memory = torch.ones(3, model.hidden_size, dtype=torch.float64)
    asked: list[tuple[int, ...]] = []

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        asked.append(shape)
        return memory if len(asked) == 1 else None

    device.announce_outputs(["hidden", "output"], empty)
    values = device.run("F", spec, ChunkSize.full(2, 3))
    assert values["hidden"] is memory
    assert not memory.any()
    assert asked == [(3, model.hidden_size), (6, model.hidden_size)]
    assert values["output"].shape == asked[1]
    assert device.run("F", spec, ChunkSize.full(2, 3))["hidden"] is not memory


def test_real_devices_add_in_order_and_emulated_ones_do_not_add() -> None:
    plan = small_plan()
    terms = [torch.full((2,), value, dtype=torch.float64) for value in (1.0, 2.0, 3.0)]
    assert make_device(plan, "cpu").add(terms).tolist() == [6.0, 6.0]
    assert terms[0].tolist() == [1.0, 1.0]
    assert make_device(plan, "emulated").add(terms).shape == (2,)
