"""The planner: what it finds is never worse than what somebody could name by hand."""

import random
from dataclasses import replace

import pytest

from model.network import ModelConfig
from pipeline.costs.arithmetic import arithmetic_costs
from pipeline.costs.operation_costs import (
    FAMILIES,
    BatchShape,
    Costs,
    CostsError,
    Link,
    OperationCost,
)
from pipeline.graph import Kind, build_graph
from pipeline.placements.description import describe_rank
from pipeline.placements.named import named_placement
from pipeline.placements.placement import PlacementError
from pipeline.plan import Plan
from pipeline.planning.bounds import shortest_step_s
from pipeline.planning.candidate import DATA_PARALLEL, Candidate
from pipeline.planning.layouts import SEARCHED
from pipeline.planning.planner import best_of, plan
from pipeline.schedules.policies import POLICIES
from pipeline.schedules.schedule import validate
from pipeline.simulation.gradient_exchange import replica_costs
from pipeline.simulation.simulator import Simulation, simulate

PAPER = ModelConfig(160_000, 80_000)
SMALL = ModelConfig(30, 40, num_layers=2, hidden_size=8, embedding_size=6)
TINY = replace(SMALL, num_layers=1)
M_GRID, K_GRID = (1, 2), (1, 2)
EVERYTHING = 10**9


def random_costs(seed: int, model: ModelConfig) -> Costs:
    """Return costs of every kind and size, on a link that may be free or dear."""
    draw = random.Random(seed)

    def seconds(scale: float) -> float:
        return scale * 10 ** draw.uniform(-2, 1) * draw.choice((0.0, 1.0, 1.0))

    kinds: tuple[Kind, ...] = ("F", "I", "W")
    operations = {
        (family, kind): OperationCost(
            seconds(1e-3), seconds(1e-3), seconds(1e-3) + 1e-6, seconds(1e-4)
        )
        for family in FAMILIES
        for kind in kinds
    }
    link = Link(
        draw.choice((0.0, 1e-4, 1e-2)),
        draw.choice((float("inf"), 1e7, 1e5)),
        draw.choice(("pair", "sender", "none")),
    )
    return Costs(model, BatchShape(4, 6, 5), operations, link, "float32", "drawn at random")


def by_hand(
    name: str, num_ranks: int, policy: str, m: int, k: int, costs: Costs, num_replicas: int = 1
) -> Simulation:
    share = replica_costs(costs, num_replicas)
    placement = named_placement(
        name, costs.model, num_ranks=num_ranks, costs=share, num_microbatches=m, num_chunks=k
    )
    graph = build_graph(placement.blocks(costs.model), m, k, training=True)
    schedule = POLICIES[policy](graph, placement, costs=share)
    simulation = simulate(schedule, graph, placement, costs, num_replicas=num_replicas)
    bound_s = shortest_step_s(placement, share, num_replicas)
    assert bound_s <= simulation.step_seconds * (1 + 1e-9), "a bound that is none"
    return simulation


def layouts_by_hand(num_devices: int) -> list[tuple[str, int, int]]:
    """Return names with ranks and replicas: one device, and all that fill the devices."""
    found = [("single", 1, 1), ("single", 1, num_devices)]
    for num_ranks in range(2, num_devices + 1):
        if num_devices % num_ranks == 0:
            found += [(name, num_ranks, num_devices // num_ranks) for name in SEARCHED]
    return found


def test_the_choice_beats_or_ties_every_placement_named_by_hand_on_200_cost_tables() -> None:
    for seed in range(200):
        costs, draw = random_costs(seed, TINY), random.Random(-seed)
        num_devices = draw.choice((2, 3, 4))
        found = plan(
            TINY,
            num_devices,
            costs,
            microbatches=M_GRID,
            time_chunks=K_GRID,
            max_operations=EVERYTHING,
        )
        best = best_of(found)
        for name, ranks, replicas in layouts_by_hand(num_devices):
            policy, m, k = draw.choice(list(POLICIES)), draw.choice(M_GRID), draw.choice(K_GRID)
            step_s = by_hand(name, ranks, policy, m, k, costs, replicas).step_seconds
            assert best.step_s <= step_s * (1 + 1e-9), (seed, name, ranks, replicas, policy, m, k)


def test_a_search_that_is_cut_short_is_nearly_as_good() -> None:
    for seed in range(30):
        costs, draw = random_costs(seed, SMALL), random.Random(-seed)
        chunks = (1, 2, 3, 6)
        found = plan(SMALL, 4, costs, microbatches=M_GRID, time_chunks=chunks, max_operations=5000)
        best = best_of(found)
        for name in SEARCHED:
            policy, m, k = draw.choice(list(POLICIES)), draw.choice(M_GRID), draw.choice(K_GRID)
            step_s = by_hand(name, 4, policy, m, k, costs).step_seconds
            assert best.step_s <= 1.05 * step_s, (seed, name, policy, m, k)


@pytest.fixture(scope="module")
def on_8_devices() -> list[Candidate]:
    return plan(PAPER, 8, arithmetic_costs(PAPER))


def test_the_papers_model_is_ranked_on_8_devices(on_8_devices: list[Candidate]) -> None:
    names = [candidate.name for candidate in on_8_devices]
    assert {*SEARCHED, "single", DATA_PARALLEL} <= set(names)
    speedups = [candidate.speedup for candidate in on_8_devices]
    assert speedups == sorted(speedups, reverse=True)
    assert best_of(on_8_devices).name == DATA_PARALLEL, "sums of gradients are free here"
    whole = {c.name: c.speedup for c in on_8_devices if c.num_replicas == 1}
    assert whole["split"] >= 7.86
    assert 6.25 <= whole["paper"] <= 7.2
    assert any(c.num_replicas > 1 and c.placement.num_ranks > 1 for c in on_8_devices)
    assert {c.num_devices for c in on_8_devices} == {1, 8}
    assert all(candidate.why.endswith(".") for candidate in on_8_devices)


def test_the_same_question_gets_the_same_answer(on_8_devices: list[Candidate]) -> None:
    assert plan(PAPER, 8, arithmetic_costs(PAPER)) == on_8_devices


def test_every_candidate_has_a_valid_schedule_that_a_plan_makes_again(
    on_8_devices: list[Candidate],
) -> None:
    costs = arithmetic_costs(PAPER)
    for candidate in on_8_devices:
        cuts = candidate.num_microbatches, candidate.num_chunks
        graph = build_graph(candidate.placement.blocks(PAPER), *cuts, training=True)
        validate(candidate.schedule, graph, candidate.placement)
        made = Plan(
            PAPER,
            candidate.placement,
            candidate.policy,
            *cuts,
            costs=costs,
            num_replicas=candidate.num_replicas,
        )
        assert made.training.schedule == candidate.schedule


def test_a_slow_link_moves_the_choice_away_from_wide_messages() -> None:
    costs = arithmetic_costs(PAPER, flop_per_s=20e12, link=Link(10e-6, 10e9))
    found = plan(PAPER, 8, costs)
    best = best_of(found)
    assert best.name == "separate"
    assert best.speedup >= 7.23
    rival = next(candidate for candidate in found if candidate.name == DATA_PARALLEL)
    assert rival.num_devices == 8
    assert 1.3 <= rival.speedup <= 1.4, "the little work that is left hides little"
    assert "the rest makes the step" in rival.why


def test_replicas_of_pipelines_win_where_layers_cannot_be_cut_further() -> None:
    costs = arithmetic_costs(PAPER, flop_per_s=10e12, link=Link(20e-6, 10e9))
    found = plan(PAPER, 64, costs)
    best = best_of(found)
    assert best.num_replicas > 1
    assert best.placement.num_ranks > 1
    assert best.speedup >= 26
    whole = max(c.speedup for c in found if c.num_replicas == 1)
    plain = next(c.speedup for c in found if c.name == DATA_PARALLEL and c.num_devices == 64)
    assert best.speedup > max(whole, plain)
    assert f"{best.num_replicas} replicas of the whole model" in best.why


def test_small_shares_cost_time_where_recurrences_are_bound_by_latency() -> None:
    counted = arithmetic_costs(PAPER)
    operations = dict(counted.operations)
    for kind in ("F", "I"):
        whole_s = counted.operations["recurrence", "F"].token_s * counted.batch.num_sentences
        operations["recurrence", kind] = OperationCost(position_s=whole_s)
    costs = replace(counted, operations=operations)
    rival = next(c for c in plan(PAPER, 8, costs) if c.name == DATA_PARALLEL)
    assert rival.speedup < 4
    assert rival.busy_fraction == pytest.approx(1.0)
    assert "in such small pieces the work itself takes" in rival.why


def test_one_device_wins_where_messages_cost_more_than_they_save() -> None:
    costs = replace(arithmetic_costs(SMALL, 4, 6, 5), link=Link(latency_s=10.0))
    assert best_of(plan(SMALL, 4, costs)).name == "single"
    on_all = plan(SMALL, 4, costs, use_all=True)
    assert {candidate.num_devices for candidate in on_all} == {4}


def test_one_device_needs_no_plan() -> None:
    (only,) = plan(SMALL, 1, arithmetic_costs(SMALL, 4, 6, 5))
    assert (only.name, only.num_devices) == ("single", 1)
    assert only.speedup == pytest.approx(1.0)


def test_the_memory_bound_holds_and_excludes() -> None:
    costs = arithmetic_costs(PAPER)
    bound = int(1.3e9)
    found = plan(PAPER, 8, costs, memory_bytes=bound)
    best = best_of(found)
    assert best.peak_memory_bytes <= bound
    assert all(c.fits == (c.peak_memory_bytes <= bound) for c in found)
    fitting = [candidate.fits for candidate in found]
    assert fitting == sorted(fitting, reverse=True), "what does not fit is last"
    assert not next(c for c in found if c.name == DATA_PARALLEL).fits
    with pytest.raises(PlacementError, match=r"no layout fits the memory bound: .* GB"):
        best_of(plan(PAPER, 8, costs, memory_bytes=1000))


def test_64_devices_do_not_make_the_search_longer_than_its_bound() -> None:
    found = plan(PAPER, 64, arithmetic_costs(PAPER), max_operations=5000)
    assert max(c.speedup for c in found if c.num_replicas == 1) > 15
    assert best_of(found).speedup == pytest.approx(64, rel=1e-6)


def test_no_replica_is_left_without_sentences() -> None:
    found = plan(SMALL, 12, arithmetic_costs(SMALL, 4, 6, 5))
    assert max(candidate.num_replicas for candidate in found) <= 4


def test_mistakes_are_told() -> None:
    costs = arithmetic_costs(SMALL)
    with pytest.raises(PlacementError, match="0 devices are too few"):
        plan(SMALL, 0, costs)
    with pytest.raises(CostsError, match="num_layers 2, not 4"):
        plan(PAPER, 8, costs)


def test_data_parallelism_divides_the_sentences() -> None:
    costs = arithmetic_costs(PAPER)
    for num_devices, speedup in ((8, 8.0), (3, 128 / 43)):
        found = plan(PAPER, num_devices, costs, max_operations=1)
        rival = next(c for c in found if c.name == DATA_PARALLEL)
        assert (rival.num_replicas, rival.placement.num_ranks) == (num_devices, 1)
        assert rival.speedup == pytest.approx(speedup), "the largest of 3 shares has 43 of 128"


def test_a_rank_is_described_by_what_it_owns() -> None:
    placement = named_placement("paper", PAPER, layer_ranks=2, softmax_ranks=4)
    assert describe_rank(placement, 0) == ("both embeddings, encoder and decoder layers 0 and 1")
    assert describe_rank(placement, 2) == "20,000 words of the softmax, the loss"
    split = named_placement("split", PAPER, num_ranks=8)
    assert "recurrence of encoder and decoder layer 1" in describe_rank(split, 1)
