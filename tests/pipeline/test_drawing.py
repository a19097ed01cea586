"""Pictures of steps: what is on them, where it stands, and that they stay small."""

import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from model.errors import UserError
from pipeline.costs.arithmetic import arithmetic_costs
from pipeline.costs.operation_costs import Link, OperationCost
from pipeline.graph import Graph, Kind, Operation, build_graph
from pipeline.in_process import InProcessPipeline
from pipeline.placements.named import named_placement
from pipeline.placements.placement import Placement
from pipeline.plan import Plan
from pipeline.simulation.simulator import Simulation, TimedOperation, simulate
from pipeline.timeline import picture as pictures
from pipeline.timeline.bars import Bar, bars_of, coarsened
from pipeline.timeline.drawing import draw_recorded, draw_simulation, write_picture
from pipeline.timeline.palette import COLOURS, PARTS, part_of
from pipeline.timeline.timeline import build_timelines
from tests.batches import random_batch
from tests.pipeline.plans import paper_placement, small_model, small_plan

SVG = "{http://www.w3.org/2000/svg}"


def one_second_plan(num_chunks: int = 1, num_microbatches: int = 1) -> Plan:
    """Plan one layer rank and one softmax rank; recurrences and softmax take a second each."""
    model = small_model(num_layers=1)
    costs = arithmetic_costs(model, 4, 3, 3)
    busy = ("recurrence", "softmax")
    seconds = {key: OperationCost(fixed_s=1.0) for key in costs.operations if key[0] in busy}
    return Plan(
        model,
        paper_placement(model, 1, 1),
        "deferred_weights",
        num_microbatches,
        num_chunks,
        costs=replace(costs, operations=seconds),
    )


def simulated(plan: Plan, num_replicas: int = 1) -> Simulation:
    assert plan.costs is not None
    step = plan.training
    return simulate(
        step.schedule, step.graph, plan.placement, plan.costs, num_replicas=num_replicas
    )


def words_on(picture: str) -> list[str]:
    return [text.text or "" for text in ET.fromstring(picture).iter(f"{SVG}text")]


def rows_of(picture: str) -> list[ET.Element]:
    return list(ET.fromstring(picture).iter(f"{SVG}g"))


def shapes(row: ET.Element, look: str) -> list[str]:
    """Return the bars of one colour in a row, as starts of their paths."""
    paths = [p.get("d") or "" for p in row.iter(f"{SVG}path") if p.get("class") == look]
    return [part for path in paths for part in path.split("M") if part]


def test_bars_stand_to_scale_in_their_rows() -> None:
    plan = one_second_plan()
    rows = rows_of(draw_simulation(plan, simulated(plan)))
    # The layer rank has F, I and W of encoder and decoder; the softmax rank works from 2 s to 5 s
    # of the step's 8 s.
    assert len(rows) == 2
    second = pictures.PLOT / 8
    assert [len(shapes(rows[0], look)) for look in ("Fe", "Fd", "Id", "Ie", "Wd", "We")] == [1] * 6
    for number, look in enumerate(("Fs", "Is", "Ws"), start=2):
        (bar,) = shapes(rows[1], look)
        x, rest = bar.split(" ", 1)
        assert float(x) == pytest.approx(pictures.LEFT + number * second, abs=0.01)
        width = float(rest.split("h")[1].split("v")[0])
        assert width == pytest.approx(second, abs=0.61)


def test_the_header_says_what_the_step_reaches() -> None:
    plan = one_second_plan()
    simulation = simulated(plan)
    words = words_on(draw_simulation(plan, simulation))
    assert words[0] == "paper, 2 ranks: deferred_weights, 1 microbatch, 1 time chunk"
    assert words[1] == (
        f"{simulation.speedup:.2f} times as fast as one device, bubble "
        f"{simulation.bubble_fraction:.1%}, step 8,000 ms"
    )
    assert {"rank 0", "rank 1", "e0r", "s0", "75%", "38%", "idle"} <= set(words)


def test_relative_times_are_parts_of_one_devices_step() -> None:
    plan = one_second_plan()
    words = words_on(draw_simulation(plan, simulated(plan), relative=True))
    assert "% of one device's step" in words
    # Nine seconds of work on one device; the two ranks need eight.
    assert "step 88.89% of one device's step" in words[1]


def test_pieces_are_named_where_there_are_several() -> None:
    for plan, pieces in (
        (one_second_plan(num_chunks=2), {"k0", "k1"}),
        (one_second_plan(num_microbatches=2), {"m0", "m1"}),
        (one_second_plan(), set[str]()),
    ):
        words = words_on(draw_simulation(plan, simulated(plan)))
        assert {word for word in words if word[0] in "mk" and word[1:].isdigit()} == pieces


def test_a_backward_pass_in_one_piece_has_its_own_legend() -> None:
    plan = one_second_plan()
    assert plan.costs is not None
    fused = replace(plan, costs=plan.costs.fused())
    words = words_on(draw_simulation(fused, simulated(fused)))
    assert "I gradients of inputs and weights together" in words
    assert not any(word.startswith("W ") for word in words)


def test_sums_over_replicas_are_drawn_where_they_run() -> None:
    model = small_model()
    costs = arithmetic_costs(model, 8, 5, 5, flop_per_s=1e6, link=Link(0.0, 1e6))
    plan = Plan(model, named_placement("single", model), num_replicas=2, costs=costs)
    simulation = simulated(plan, num_replicas=2)
    picture = draw_simulation(plan, simulation)
    strips = [rect for row in rows_of(picture) for rect in row if rect.get("class") == "sum"]
    assert len(strips) == len(simulation.exchanges[0]) > 0
    scale = pictures.PLOT / simulation.step_seconds
    for strip, exchange in zip(strips, simulation.exchanges[0], strict=True):
        x = pictures.LEFT + scale * exchange.start_s
        assert float(strip.get("x") or 0) == pytest.approx(x, abs=0.01)
    words = words_on(picture)
    assert "x 2 replicas" in words[0]
    assert "sum of gradients" in words


def test_the_same_step_gives_the_same_bytes() -> None:
    plan = small_plan((2, 2), num_microbatches=2, num_chunks=3)
    plan = replace(plan, costs=arithmetic_costs(plan.model, 8, 9, 9))
    again = replace(plan, seed=2)
    assert draw_simulation(plan, simulated(plan)) == draw_simulation(again, simulated(again))


def test_a_recorded_step_is_drawn_like_a_simulated_one() -> None:
    plan = small_plan((2, 2), num_chunks=2)
    pipeline = InProcessPipeline(plan)
    results = pipeline.each(lambda s: s.train_step(random_batch(6), 0.1, 5.0, record=True))
    records = [result.record for result in results if result.record is not None]
    (timeline,) = build_timelines(plan, {4: records})
    picture = draw_recorded(plan, timeline)
    assert "step 4 as it ran" in words_on(picture)[1]
    assert len(rows_of(picture)) == 4
    assert all(list(row.iter(f"{SVG}path")) for row in rows_of(picture))


def test_names_cannot_break_the_picture() -> None:
    plan = one_second_plan()
    named = replace(plan.placement, name='a<b>&"c"\x01\udc80')
    plan = replace(plan, placement=named)
    assert words_on(draw_simulation(plan, simulated(plan)))[0].startswith('a<b>&"c"??, 2 ranks')


def test_thousands_of_operations_stay_a_small_file() -> None:
    model = small_model(num_layers=8)
    placement = named_placement("split", model, num_ranks=32)
    costs = arithmetic_costs(model, 16, 32, 32)
    plan = Plan(model, placement, "wavefront", 4, 32, costs=costs)
    picture = draw_simulation(plan, simulated(plan))
    assert sum(len(rank) for rank in plan.training.schedule.operations) > 10_000
    assert len(picture.encode()) < 200_000
    assert len(rows_of(picture)) == 32
    assert "drawn coarsely" in picture


def test_a_coarse_row_shows_what_took_most_of_each_column() -> None:
    def bar(kind: Kind, start_s: float, end_s: float) -> Bar:
        return Bar(kind, "encoder", "e0", "", False, start_s, end_s)

    fine = [bar("F", 0.0, 1.4), bar("W", 1.4, 3.3), bar("I", 3.9, 4.0)]
    assert [(b.kind, b.start_s, b.end_s) for b in coarsened(fine, 4.0, 4)] == [
        ("F", 0.0, 1.0),
        ("W", 1.0, 3.0),
    ]


def graph_of_one_layer(num_chunks: int) -> Graph:
    model = small_model(num_layers=1)
    placement = Placement("one", 1, dict.fromkeys(_names(), 0), ((0, 13),))
    return build_graph(placement.blocks(model), 1, num_chunks, training=True)


def _names() -> list[str]:
    layers = [f"{n}.0.{k}" for n in ("encoder", "decoder") for k in ("projection", "recurrence")]
    return ["source_embedding", "target_embedding", *layers, "softmax.0", "loss"]


def timed(kind: Kind, block: str, chunk: int, start_s: float, end_s: float) -> TimedOperation:
    return TimedOperation(Operation(kind, block, 0, chunk), start_s, end_s)


def test_the_halves_of_a_layer_are_one_bar() -> None:
    found = bars_of(
        [
            timed("F", "encoder.0.projection", 0, 0.0, 1.0),
            timed("F", "encoder.0.recurrence", 0, 1.0, 3.0),
            timed("F", "encoder.0.projection", 1, 3.0, 4.0),
        ],
        graph_of_one_layer(2),
        0.1,
    )
    assert found == [
        Bar("F", "encoder", "e0", "k0", False, 0.0, 3.0),
        Bar("F", "encoder", "e0p", "k1", True, 3.0, 4.0),
    ]


def test_narrow_neighbours_of_one_colour_are_one_bar() -> None:
    operations = [timed("F", "softmax.0", chunk, chunk, chunk + 1.0) for chunk in range(3)]
    (bar,) = bars_of(operations, graph_of_one_layer(3), 10.0)
    assert (bar.label, bar.start_s, bar.end_s) == ("", 0.0, 3.0)
    other = timed("W", "softmax.0", 2, 3.0, 4.0)
    assert [bar.kind for bar in bars_of([*operations, other], graph_of_one_layer(3), 10.0)] == [
        "F",
        "W",
    ]


def test_an_idle_gap_is_never_drawn_over() -> None:
    operations = [
        timed("F", "softmax.0", 0, 0.0, 1.0),
        timed("F", "softmax.0", 1, 3.0, 4.0),
    ]
    assert len(bars_of(operations, graph_of_one_layer(2), 10.0)) == 2


def test_what_takes_no_time_has_no_bar() -> None:
    assert bars_of([timed("F", "loss", 0, 1.0, 1.0)], graph_of_one_layer(1), 0.1) == []


def test_every_block_has_a_part_and_every_part_a_colour_of_its_own() -> None:
    parts = {spec.name: part_of(spec) for spec in graph_of_one_layer(1).blocks}
    assert parts["source_embedding"] == "encoder"
    assert parts["target_embedding"] == parts["decoder.0.recurrence"] == "decoder"
    assert parts["loss"] == parts["softmax.0"] == "softmax"
    colours = [COLOURS[kind][part] for kind in COLOURS for part in PARTS]
    assert len(set(colours)) == 9


def test_a_picture_that_cannot_be_written_is_one_line(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    blocked = tmp_path_factory.mktemp("pictures") / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="cannot write the picture"):
        write_picture(blocked / "step.svg", "<svg/>")
