"""Schedules of all policies run their graphs, and every broken one is refused by name."""

from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.graph import Graph, Operation, build_graph
from pipeline.placements.placement import Placement
from pipeline.placements.rules import placement_from_rules
from pipeline.plan import Plan
from pipeline.schedules.exchange import Sends
from pipeline.schedules.policies import POLICIES
from pipeline.schedules.schedule import Schedule, ScheduleError, messages, validate
from tests.pipeline.plans import paper_placement, small_model, small_plan

PLAN = small_plan((2, 2), num_microbatches=2, num_chunks=2)
GRAPH, SCHEDULE = PLAN.training.graph, PLAN.training.schedule


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any small model over the paper's placement, or with its blocks dealt to ranks at random."""
    num_layers, num_shards = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    model = small_model(num_layers=num_layers)
    placement = paper_placement(model, draw(st.integers(1, num_layers)), num_shards)
    if draw(st.booleans()):
        names = list(placement.rank_of)
        num_ranks = draw(st.integers(1, min(5, len(names))))
        dealt = draw(st.lists(st.integers(0, num_ranks - 1), min_size=len(names)))
        ranks = [*range(num_ranks), *dealt][: len(names)]
        rank_of = dict(zip(draw(st.permutations(names)), ranks, strict=True))
        placement = Placement("dealt", num_ranks, rank_of, placement.shards)
    return Plan(
        model,
        placement,
        policy=draw(st.sampled_from(list(POLICIES))),
        num_microbatches=draw(st.integers(1, 4)),
        num_chunks=draw(st.integers(1, 5)),
    )


@settings(max_examples=60, deadline=None)
@given(plans(), st.booleans())
def test_every_policy_makes_valid_schedules(plan: Plan, training: bool) -> None:
    planned = plan.training if training else plan.evaluation
    scheduled = [operation for rank in planned.schedule.operations for operation in rank]
    assert len(scheduled) == len(set(scheduled))
    assert set(scheduled) == set(planned.graph.inputs)
    validate(planned.schedule, planned.graph, plan.placement)


@settings(max_examples=30, deadline=None)
@given(plans())
def test_each_value_travels_once_to_each_rank_that_needs_it(plan: Plan) -> None:
    planned, rank_of = plan.training, plan.placement.rank_of
    needed = {
        (rank_of[value.operation.block], rank_of[operation.block], value)
        for operation in planned.graph.operations
        for value in planned.graph.values_in(operation)
    }
    sent = [(*pair, value) for pair, values in planned.messages.items() for value in values]
    assert sorted(sent) == sorted(need for need in needed if need[0] != need[1])


@settings(max_examples=30, deadline=None)
@given(plans())
def test_messages_stand_in_the_order_in_which_they_are_made(plan: Plan) -> None:
    planned = plan.training
    for (sender, _), values in planned.messages.items():
        order = planned.schedule.operations[sender]
        places = [order.index(value.operation) for value in values]
        assert places == sorted(places)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_swap_is_refused_or_breaks_no_edge(data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, PLAN.num_ranks - 1))
    operations = list(SCHEDULE.operations[rank])
    first = data.draw(st.integers(0, len(operations) - 1))
    second = data.draw(st.integers(0, len(operations) - 1))
    operations[first], operations[second] = operations[second], operations[first]
    swapped = with_rank(rank, operations)
    if can_run(swapped):
        validate(swapped, GRAPH, PLAN.placement)
    else:
        with pytest.raises(ScheduleError, match="never ends"):
            validate(swapped, GRAPH, PLAN.placement)


def can_run(schedule: Schedule) -> bool:
    """Run the schedule the slow way: any operation at a rank's head whose needs are done."""
    left = [list(operations) for operations in schedule.operations]
    done: set[Operation] = set()
    moved = True
    while moved:
        moved = False
        for operations in left:
            if operations and done.issuperset(GRAPH.needs(operations[0])):
                done.add(operations.pop(0))
                moved = True
    return not any(left)


def with_rank(rank: int, operations: list[Operation]) -> Schedule:
    ranks = list(SCHEDULE.operations)
    ranks[rank] = tuple(operations)
    return Schedule(tuple(ranks))


def drop(operations: list[Operation], other: list[Operation]) -> None:
    operations.pop(3)


def double(operations: list[Operation], other: list[Operation]) -> None:
    operations.insert(9, operations[3])


def move(operations: list[Operation], other: list[Operation]) -> None:
    other.append(operations.pop(3))


def invent(operations: list[Operation], other: list[Operation]) -> None:
    operations.append(Operation("I", "loss", 0, 0))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop, "is scheduled on no rank"),
        (double, "is scheduled 2 times"),
        (move, "is scheduled on rank 1 but its block is on rank 0"),
        (invent, r"I loss \(microbatch 0, chunk 0\) .* no operation"),
    ],
)
def test_damaged_schedules_are_refused_with_the_operation(
    damage: Callable[[list[Operation], list[Operation]], None], words: str
) -> None:
    ranks = [list(operations) for operations in SCHEDULE.operations]
    named = ranks[0][3]
    damage(ranks[0], ranks[1])
    broken = Schedule(tuple(tuple(operations) for operations in ranks))
    with pytest.raises(ScheduleError, match=words) as caught:
        validate(broken, GRAPH, PLAN.placement)
    assert damage is invent or str(named) in str(caught.value)


def test_a_wait_in_a_circle_over_two_ranks_is_refused() -> None:
    ranks = [list(operations) for operations in SCHEDULE.operations]
    # The decoder's top layer needs the softmax's gradient of the last chunk before it makes the
    # outputs from which that comes.
    top = Operation("F", "decoder.2.recurrence", 0, 1)
    gradient = Operation("I", "decoder.2.recurrence", 0, 1)
    places = ranks[1].index(top), ranks[1].index(gradient)
    ranks[1][places[0]], ranks[1][places[1]] = gradient, top
    with pytest.raises(ScheduleError, match=r"never ends: rank \d waits for [FI] "):
        validate(Schedule(tuple(map(tuple, ranks))), GRAPH, PLAN.placement)


def test_a_schedule_for_other_ranks_is_refused() -> None:
    with pytest.raises(ScheduleError, match="is for 3 ranks and placement 'paper' has 4"):
        validate(Schedule(SCHEDULE.operations[:3]), GRAPH, PLAN.placement)


@pytest.mark.parametrize(("policy", "training"), list(product(POLICIES, (True, False))))
def test_a_policys_order_within_a_block_does_not_depend_on_the_placement(
    policy: str, training: bool
) -> None:
    model = small_model()
    orders = []
    for layer_ranks in (1, 3):
        placement = paper_placement(model, layer_ranks, 2)
        graph = build_graph(placement.blocks(model), 2, 3, training=training)
        schedule = POLICIES[policy](graph, placement)
        orders.append(
            {
                spec.name: [o for rank in schedule.operations for o in rank if o.block == spec.name]
                for spec in graph.blocks
            }
        )
    if policy in ("fill_drain", "wavefront"):
        assert orders[0] == orders[1]
    else:
        # What runs when depends on costs and ranks, but not the order of sums.
        assert sums(orders[0]) == sums(orders[1])


def sums(orders: dict[str, list[Operation]]) -> dict[str, list[Operation]]:
    return {block: [o for o in order if o.kind == "W"] for block, order in orders.items()}


def test_messages_of_one_rank_are_none() -> None:
    planned = small_plan().training
    assert messages(planned.schedule, planned.graph, small_plan().placement) == {}


def crossed() -> tuple[Schedule, Graph, Placement]:
    """Two ranks, each of which sends the other a carry and then waits for the other's."""
    model = small_model(num_layers=2)
    rules = {
        "source_embedding": 0, "encoder.0.*": 0, "decoder.1.*": 0, "softmax.0": 0, "loss": 0,
        "target_embedding": 1, "encoder.1.*": 1, "decoder.0.*": 1,
    }  # fmt: skip
    placement = placement_from_rules(model, rules)
    graph = build_graph(placement.blocks(model), 1, 2, training=False)
    wave = POLICIES["wavefront"](graph, placement)
    return wave, graph, placement


def test_sends_that_block_need_another_order_than_those_that_do_not() -> None:
    schedule, graph, placement = crossed()
    validate(schedule, graph, placement)
    ends = {}
    for sends in ("rendezvous", "batched"):
        try:
            validate(schedule, graph, placement, sends=sends)
        except ScheduleError as error:
            assert f"with {sends} sends the schedule never ends: rank" in str(error)
            ends[sends] = False
        else:
            ends[sends] = True
    assert ends["rendezvous"] is False


def test_a_row_of_ranks_that_only_send_forward_never_blocks() -> None:
    model = small_model()
    placement = paper_placement(model, 3, 1)
    graph = build_graph(placement.blocks(model), 1, 1, training=False)
    schedule = POLICIES["wavefront"](graph, placement)
    for sends in ("buffered", "rendezvous", "batched"):
        validate(schedule, graph, placement, sends=sends)


@settings(max_examples=60, deadline=None)
@given(plans())
def test_what_runs_with_rendezvous_runs_batched(plan: Plan) -> None:
    def ends(sends: Sends) -> bool:
        try:
            validate(plan.training.schedule, plan.training.graph, plan.placement, sends=sends)
        except ScheduleError:
            return False
        return True

    assert ends("batched") or not ends("rendezvous")
    assert ends("buffered")
