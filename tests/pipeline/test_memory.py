"""Peak memory: counted by hand in a small case, within bounds in all, and refused above a limit."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.network import ModelConfig
from model.precision import Precision
from model.seq2seq import Seq2Seq
from pipeline.costs.arithmetic import arithmetic_costs
from pipeline.graph import build_graph
from pipeline.placements.named import named_placement
from pipeline.plan import Plan
from pipeline.schedules.policies import POLICIES
from pipeline.schedules.schedule import ScheduleError
from pipeline.simulation.memory import check_memory, parameter_bytes, peak_memory_bytes
from tests.pipeline.plans import small_model, small_plan

PAPER = ModelConfig(160_000, 80_000)


def peaks(policy: str, num_microbatches: int, name: str = "separate") -> tuple[int, ...]:
    costs = arithmetic_costs(PAPER)
    placement = named_placement(name, PAPER, num_ranks=8)
    graph = build_graph(placement.blocks(PAPER), num_microbatches, 1, training=True)
    schedule = POLICIES[policy](graph, placement, costs=costs)
    return peak_memory_bytes(schedule, graph, placement, costs)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_parameters_are_those_of_the_model(precision: str) -> None:
    model = small_model(peepholes=True)
    built = Seq2Seq(model, Precision(precision))
    for spec in small_plan(model=model).blocks:
        held = 0
        for parameter in built.blocks[spec.name].parameters:
            held += parameter.value.nbytes
            if parameter.compute is not parameter.value:
                held += parameter.compute.nbytes
            if spec.kind != "embedding":
                held += parameter.gradient().nbytes
        assert parameter_bytes(spec, model, Precision(precision)) == held


def test_the_softmax_rank_by_hand() -> None:
    plan = small_plan((1, 1), model=small_model(num_layers=1), precision="float32")
    costs = arithmetic_costs(plan.model, batch_size=2, source_length=3, target_length=3)
    planned = plan.training
    peak = peak_memory_bytes(planned.schedule, planned.graph, plan.placement, costs)[1]
    tokens, words, cells = 6, 13, 5
    parameters = 2 * 4 * words * (cells + 1)
    exponentials, small = 4 * tokens * words, tokens * (4 + 8 + 4)
    inputs, normalizer, statistics = 4 * tokens * cells, 4 * tokens, 3 * 4 * tokens
    gradient = 4 * tokens * cells
    expected = parameters + exponentials + small + inputs
    assert peak == expected + max(statistics + normalizer, normalizer + gradient)


def test_shards_that_make_logits_twice_keep_none() -> None:
    costs = arithmetic_costs(PAPER)
    held = {}
    for recomputes in (False, True):
        placement = named_placement("paper", PAPER, num_ranks=8, recomputes_logits=recomputes)
        graph = build_graph(placement.blocks(PAPER), 1, 1, training=True)
        schedule = POLICIES["deferred_weights"](graph, placement, costs=costs)
        held[recomputes] = peak_memory_bytes(schedule, graph, placement, costs)
    softmax_rank = 7
    exponentials = 4 * 128 * 29 * 20_000
    assert held[False][softmax_rank] - held[True][softmax_rank] == exponentials


def test_1f1b_holds_less_than_fill_drain_where_it_should() -> None:
    assert max(peaks("1f1b", 16)) < max(peaks("fill_drain", 16))


def test_deferring_weights_holds_no_less() -> None:
    for eager, deferred in zip(peaks("1f1b", 4), peaks("deferred_weights", 4), strict=True):
        assert deferred >= 0.99 * eager


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(list(POLICIES)),
    st.sampled_from(["single", "paper", "uneven", "separate", "split"]),
    st.integers(1, 5),
    st.integers(1, 4),
    st.booleans(),
)
def test_a_limit_at_the_peak_is_kept_and_one_below_is_not(
    policy: str, name: str, num_microbatches: int, num_chunks: int, training: bool
) -> None:
    model = small_model()
    plan = Plan(model, named_placement(name, model, num_ranks=4), policy, num_microbatches,
                num_chunks)  # fmt: skip
    costs = arithmetic_costs(model, 4, 7, 6)
    planned = plan.training if training else plan.evaluation
    peaks = peak_memory_bytes(planned.schedule, planned.graph, plan.placement, costs)
    check_memory(peaks, planned.graph, plan.placement, costs, max(peaks))
    with pytest.raises(ScheduleError, match=r"rank \d would hold .* use more ranks"):
        check_memory(peaks, planned.graph, plan.placement, costs, max(peaks) - 1)
