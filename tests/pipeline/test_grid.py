"""Grids of small steps, character by character."""

from dataclasses import replace

import pytest

from pipeline.costs.arithmetic import arithmetic_costs
from pipeline.costs.operation_costs import OperationCost
from pipeline.graph import build_graph
from pipeline.schedules.grid import draw_blocks, draw_letters, short_name
from pipeline.schedules.policies import POLICIES
from pipeline.simulation.simulator import Simulation, simulate
from tests.pipeline.plans import paper_placement, small_model


def step(policy: str, num_microbatches: int = 1) -> Simulation:
    """Simulate one layer rank and one softmax rank; recurrences and softmax take a second each."""
    model = small_model(num_layers=1)
    placement = paper_placement(model, 1, 1)
    costs = arithmetic_costs(model, 4, 3, 3)
    second = OperationCost(fixed_s=1.0)
    busy = ("recurrence", "softmax")
    operations = {key: second for key in costs.operations if key[0] in busy}
    costs = replace(costs, operations=operations)
    graph = build_graph(placement.blocks(model), num_microbatches, 1, training=True)
    schedule = POLICIES[policy](graph, placement, costs=costs)
    return simulate(schedule, graph, placement, costs)


def test_letters_over_time() -> None:
    assert draw_letters(step("deferred_weights"), 16).splitlines() == [
        "rank  0 |FFFF....IIIIWWWW|  75%",
        "rank  1 |....FFIIWW......|  38%",
    ]


def test_blocks_over_time() -> None:
    assert draw_blocks(step("deferred_weights"), 8).splitlines() == [
        "rank  0 |Fe0r Fd0r .    .    Id0r Ie0r Wd0r We0r|",
        "rank  1 |.    .    Fs0  Is0  Ws0  .    .    .   |",
    ]


def test_microbatches_are_named_when_there_are_several() -> None:
    assert draw_blocks(step("1f1b", 2), 12).splitlines() == [
        "rank  0 |Fe0r/0 Fd0r/0 Fe0r/1 Fd0r/1 Id0r/0 Wd0r/0 Ie0r/0 We0r/0 "
        "Id0r/1 Wd0r/1 Ie0r/1 We0r/1|",
        "rank  1 |.      .      Fs0/0  Is0/0  Ws0/0  Fs0/1  Is0/1  Ws0/1  "
        ".      .      .      .     |",
    ]


@pytest.mark.parametrize(
    ("block", "short"),
    [
        ("source_embedding", "se"),
        ("target_embedding", "te"),
        ("encoder.10.projection", "e10p"),
        ("decoder.1.recurrence", "d1r"),
        ("softmax.3", "s3"),
        ("loss", "l"),
    ],
)
def test_short_names(block: str, short: str) -> None:
    assert short_name(block) == short
