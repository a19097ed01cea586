"""The orders of the policies in small cases that can be read, and their order of phases."""

from dataclasses import replace
from itertools import pairwise

import pytest

from model.errors import UserError
from model.network import ModelConfig
from pipeline.costs.arithmetic import arithmetic_costs
from pipeline.graph import Operation, build_graph
from pipeline.placements.named import named_placement
from pipeline.placements.rules import placement_from_rules
from pipeline.plan import Plan
from pipeline.schedules.policies import POLICIES, named_policy
from pipeline.simulation.simulator import simulate
from tests.pipeline.plans import small_model, small_plan


def row(plan: Plan, rank: int, blocks: dict[str, str]) -> str:
    """Print a rank's operations of some blocks, with short names and the chunk."""
    operations = plan.training.schedule.operations[rank]
    return " ".join(f"{o.kind}{blocks[o.block]}{o.chunk}" for o in operations if o.block in blocks)


def two_layers(policy: str) -> Plan:
    return small_plan((1, 1), model=small_model(num_layers=2), policy=policy, num_chunks=3)


ENCODER = {"encoder.0.recurrence": "a", "encoder.1.recurrence": "b"}


def test_fill_drain_finishes_a_block_before_the_next() -> None:
    assert row(two_layers("fill_drain"), 0, ENCODER) == (
        "Fa0 Fa1 Fa2 Fb0 Fb1 Fb2 Ib2 Wb2 Ib1 Wb1 Ib0 Wb0 Ia2 Wa2 Ia1 Wa1 Ia0 Wa0"
    )


def test_wavefront_goes_along_the_diagonals() -> None:
    assert row(two_layers("wavefront"), 0, ENCODER) == (
        "Fa0 Fa1 Fb0 Fa2 Fb1 Fb2 Ib2 Wb2 Ib1 Wb1 Ia2 Wa2 Ib0 Wb0 Ia1 Wa1 Ia0 Wa0"
    )


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("fill_drain", "Fs0 Fs1 Fs2 Fl0 Fl1 Fl2 Is2 Ws2 Is1 Ws1 Is0 Ws0"),
        ("wavefront", "Fs0 Fl0 Fs1 Fl1 Fs2 Fl2 Is2 Ws2 Is1 Ws1 Is0 Ws0"),
    ],
)
def test_the_softmax_runs_all_chunks_forward_before_it_turns_back(
    policy: str, expected: str
) -> None:
    assert row(two_layers(policy), 1, {"softmax.0": "s", "loss": "l"}) == expected


@pytest.mark.parametrize("policy", ["fill_drain", "wavefront"])
def test_all_forward_operations_come_first(policy: str) -> None:
    plan = small_plan((2, 2), policy=policy, num_microbatches=3, num_chunks=3)
    for operations in plan.training.schedule.operations:
        kinds = [operation.kind == "F" for operation in operations]
        assert kinds == sorted(kinds, reverse=True)


@pytest.mark.parametrize("policy", ["fill_drain", "wavefront"])
def test_weight_gradients_follow_their_input_gradients(policy: str) -> None:
    plan = small_plan((2, 2), policy=policy, num_microbatches=2, num_chunks=3)
    for operations in plan.training.schedule.operations:
        for before, operation in pairwise(operations):
            if operation.kind == "W":
                assert before == operation._replace(kind="I")


def one_chain(policy: str, num_microbatches: int) -> Plan:
    """Four ranks in a row: two layers of the encoder, two of the decoder, the words on the last."""
    rules = {
        "source_embedding": 0, "encoder.0.*": 0, "encoder.1.*": 1,
        "target_embedding": 2, "decoder.0.*": 2, "decoder.1.*": 3, "softmax.0": 3, "loss": 3,
    }  # fmt: skip
    model = small_model(num_layers=2)
    placement = placement_from_rules(model, rules)
    return Plan(model, placement, policy=policy, num_microbatches=num_microbatches)


def phases(plan: Plan, rank: int, block: str) -> str:
    """Print a block's operations with their microbatches."""
    operations = plan.training.schedule.operations[rank]
    return " ".join(f"{o.kind}{o.microbatch}" for o in operations if o.block == block)


def test_1f1b_alternates_behind_its_warm_up() -> None:
    plan = one_chain("1f1b", 6)
    assert phases(plan, 3, "decoder.1.recurrence") == (
        "F0 I0 W0 F1 I1 W1 F2 I2 W2 F3 I3 W3 F4 I4 W4 F5 I5 W5"
    )
    assert phases(plan, 0, "encoder.0.recurrence") == (
        "F0 F1 F2 I0 W0 F3 I1 W1 F4 I2 W2 F5 I3 W3 I4 W4 I5 W5"
    )


def test_1f1b_keeps_no_more_microbatches_when_there_are_more() -> None:
    def most_begun(num_microbatches: int) -> list[int]:
        plan = one_chain("1f1b", num_microbatches)
        most = []
        for rank, block in enumerate(["encoder.0", "encoder.1", "decoder.0", "decoder.1"]):
            begun = [0]
            for step in phases(plan, rank, f"{block}.recurrence").split():
                begun.append(begun[-1] + {"F": 1, "I": -1, "W": 0}[step[0]])
            most.append(max(begun))
        return most

    assert most_begun(6) == most_begun(12) == [3, 2, 2, 1]


@pytest.mark.parametrize("policy", ["deferred_weights", "priority_list"])
def test_deferred_weights_run_when_nothing_else_is_there(policy: str) -> None:
    config = ModelConfig(160_000, 80_000)
    placement = named_placement("split", config, num_ranks=8)
    costs = arithmetic_costs(config)
    graph = build_graph(placement.blocks(config), 1, 8, training=True)
    schedule = POLICIES[policy](graph, placement, costs=costs)
    ready: dict[Operation, float] = {}
    simulation = simulate(schedule, graph, placement, costs)
    for timeline in simulation.timeline:
        for timed in timeline:
            ready[timed.operation] = timed.end_s
    for timeline in simulation.timeline:
        for index, timed in enumerate(timeline):
            for later in timeline[index + 1 :]:
                if timed.operation.kind == "W" and later.operation.kind != "W":
                    ends = [ready[need] for need in graph.needs(later.operation)]
                    assert max(ends, default=0.0) > timed.start_s - 1e-9


@pytest.mark.parametrize("policy", POLICIES)
def test_a_blocks_weight_gradients_are_summed_in_one_order_under_every_placement(
    policy: str,
) -> None:
    orders = []
    for name in ("single", "paper", "separate", "split"):
        model = small_model()
        placement = named_placement(name, model, num_ranks=4)
        plan = Plan(model, placement, policy=policy, num_microbatches=3, num_chunks=3)
        rank = placement.rank_of["decoder.1.projection"]
        operations = plan.training.schedule.operations[rank]
        orders.append(
            [o for o in operations if o.kind == "W" and o.block == "decoder.1.projection"]
        )
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_arguments_give_the_same_schedule(policy: str) -> None:
    plan = small_plan((2, 2), policy=policy, num_microbatches=2, num_chunks=3)
    ranks = dict(reversed(list(plan.placement.rank_of.items())))
    other = replace(plan, placement=replace(plan.placement, rank_of=ranks))
    assert other.training.schedule == plan.training.schedule


def test_an_unknown_policy_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"policy='zigzag' is unknown; use one of fill_drain, wave"):
        named_policy("zigzag")
    with pytest.raises(UserError, match="zigzag"):
        small_plan(policy="zigzag")
