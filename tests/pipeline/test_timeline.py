"""Recorded steps: what was recorded, on which clock, and what the trace and the page make of it."""

import json
import pickle
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.graph import Operation
from pipeline.in_process import InProcessPipeline
from pipeline.plan import Plan
from pipeline.timeline.chrome_trace import chrome_trace
from pipeline.timeline.page import timeline_page
from pipeline.timeline.rank_labels import rank_labels
from pipeline.timeline.recording import RankRecord, RecordedOperation
from pipeline.timeline.timeline import StepTimeline, build_timelines, clock_offsets, waits
from tests.batches import random_batch
from tests.pipeline.plans import small_plan

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
STEPS = (4, 5)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return small_plan((2, 2), num_microbatches=2, num_chunks=3)


@pytest.fixture(scope="module")
def recorded(plan: Plan) -> dict[int, list[RankRecord]]:
    """Two recorded steps of a pipeline, by step and rank; every chunk has words to wait for."""
    pipeline, batch = InProcessPipeline(plan), random_batch(6, lengths=(8, 9))
    steps: dict[int, list[RankRecord]] = {}
    for step in STEPS:
        results = pipeline.each(lambda stage: stage.train_step(batch, 0.1, 5.0, record=True))
        steps[step] = [result.record for result in results if result.record is not None]
    return steps


@pytest.fixture(scope="module")
def timelines(plan: Plan, recorded: dict[int, list[RankRecord]]) -> list[StepTimeline]:
    return build_timelines(plan, recorded)


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_the_recorded_operations_are_the_schedules_in_order(
    plan: Plan, recorded: dict[int, list[RankRecord]]
) -> None:
    for records in recorded.values():
        ran = tuple(tuple(op.operation for op in record.operations) for record in records)
        assert ran == plan.training.schedule.operations
        for record in records:
            ends = [float("-inf")] + [op.end_s for op in record.operations]
            for op, free_s in zip(record.operations, ends, strict=False):
                assert free_s <= op.start_s <= op.end_s
                assert op.wait_s >= 0
            assert ends[-1] <= record.meet_s <= record.met_s <= record.end_s


def test_nothing_is_recorded_unless_asked(plan: Plan) -> None:
    pipeline, batch = InProcessPipeline(plan), random_batch(6)
    for stage_result in pipeline.each(lambda stage: stage.train_step(batch, 0.1, 5.0)):
        assert stage_result.record is None
    for timing in pipeline.each(lambda stage: stage.accumulate(batch)):
        assert timing.operations is None
    for stage_result in pipeline.each(lambda stage: stage.evaluate(batch)):
        assert stage_result.record is None


def test_recording_changes_no_result(plan: Plan) -> None:
    batch = random_batch(6)
    plain, recording = InProcessPipeline(plan), InProcessPipeline(plan)
    expected = plain.each(lambda stage: stage.train_step(batch, 0.1, 5.0))
    results = recording.each(lambda stage: stage.train_step(batch, 0.1, 5.0, record=True))
    assert [r.loss for r in results] == [r.loss for r in expected]
    assert [r.gradient_norm for r in results] == [r.gradient_norm for r in expected]


def test_a_record_travels_small(recorded: dict[int, list[RankRecord]]) -> None:
    for record in recorded[STEPS[0]]:
        data = pickle.dumps(record)
        assert pickle.loads(data) == record
        assert len(data) < 500 + 100 * len(record.operations)


def test_no_operation_starts_before_its_inputs_exist(
    plan: Plan, timelines: list[StepTimeline]
) -> None:
    graph = plan.training.graph
    for timeline in timelines:
        end_s = {op.operation: op.end_s for rank in timeline.executed for op in rank.operations}
        for rank in timeline.executed:
            for op in rank.operations:
                assert all(end_s[need] <= op.start_s for need in graph.needs(op.operation))


def test_the_simulated_step_has_the_recorded_times_and_no_messages(
    plan: Plan, timelines: list[StepTimeline]
) -> None:
    for timeline in timelines:
        for record, simulated in zip(timeline.executed, timeline.simulated, strict=True):
            assert [t.operation for t in simulated] == [op.operation for op in record.operations]
            busy_s = sum(op.end_s - op.start_s for op in record.operations)
            assert sum(t.end_s - t.start_s for t in simulated) == pytest.approx(busy_s)
        # Some operation starts when another one ends, all the way from the step's start.
        ends = {0.0} | {t.end_s for rank in timeline.simulated for t in rank}
        assert all(t.start_s in ends for rank in timeline.simulated for t in rank)


def test_a_ranks_figures_add_up_to_the_step(timelines: list[StepTimeline]) -> None:
    for timeline in timelines:
        assert min(r.operations[0].start_s for r in timeline.executed) == 0.0
        for figures in timeline.figures():
            parts = (figures.busy_s, figures.wait_s, figures.between_s, figures.outside_s)
            assert all(part >= -1e-12 for part in parts)
            assert sum(parts) == pytest.approx(timeline.executed_s)
            assert figures.executed_bubble == pytest.approx(1 - parts[0] / timeline.executed_s)
            assert 0 <= figures.simulated_bubble < 1
        assert 0 <= timeline.executed_bubble < 1


def moved(record: RankRecord, by_s: float) -> RankRecord:
    ops = tuple(
        op._replace(start_s=op.start_s + by_s, end_s=op.end_s + by_s) for op in record.operations
    )
    return RankRecord(ops, record.meet_s + by_s, record.met_s + by_s, record.end_s + by_s)


def test_the_clocks_of_nodes_are_set_by_when_ranks_leave_the_sum(
    recorded: dict[int, list[RankRecord]],
) -> None:
    nodes = ["a", "a", "b", "b"]
    steps = list(recorded.values())
    true = clock_offsets(steps, nodes)
    assert true[:2] == [0.0, 0.0]
    assert true[2] == true[3]
    # What the clock of node b is ahead by is taken back.
    shifted = [[*step[:2], *(moved(record, 3600.0) for record in step[2:])] for step in steps]
    assert clock_offsets(shifted, nodes) == pytest.approx(
        [t - s for t, s in zip(true, [0.0, 0.0, 3600.0, 3600.0], strict=True)]
    )
    assert clock_offsets(steps, ["a"] * 4) == [0.0] * 4


def test_waits_lie_between_operations() -> None:
    operation = Operation("F", "loss", 0, 0)
    record = RankRecord(
        (
            RecordedOperation(operation, 2.0, 3.0, 5.0),
            RecordedOperation(operation, 4.0, 5.0, 0.25),
            RecordedOperation(operation, 5.0, 6.0, 0.0),
        ),
        6.0,
        7.0,
        8.0,
    )
    assert waits(record) == [(0.0, 2.0), (3.75, 4.0), (5.0, 5.0)]


def test_the_trace_has_a_slice_for_every_operation(
    plan: Plan, timelines: list[StepTimeline]
) -> None:
    trace = json.loads(chrome_trace(plan, timelines))
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    for rank, operations in enumerate(plan.training.schedule.operations):
        for step in STEPS:
            ran = [
                Operation(*(e["args"][key] for key in ("kind", "block", "microbatch", "chunk")))
                for e in slices
                if e["tid"] == rank and e["args"]["step"] == step and "block" in e["args"]
            ]
            assert tuple(ran) == operations
        free_us = 0.0
        for event in sorted((e for e in slices if e["tid"] == rank), key=lambda e: e["ts"]):
            # Times are rounded to nanoseconds.
            assert event["ts"] >= free_us - 0.01
            free_us = event["ts"] + event["dur"]
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"]
    assert names == [f"rank {rank}: {label}" for rank, label in enumerate(rank_labels(plan))]
    assert trace["otherData"]["operations_left_out"] == 0


def test_a_large_trace_is_cut_and_says_so(plan: Plan, timelines: list[StepTimeline]) -> None:
    trace = json.loads(chrome_trace(plan, timelines, max_operations=40))
    kept = [e for e in trace["traceEvents"] if "block" in e["args"]]
    assert len(kept) == 40
    assert trace["otherData"]["operations_left_out"] == trace["otherData"]["operations"] - 40


def test_the_page_needs_nothing_else(plan: Plan, timelines: list[StepTimeline]) -> None:
    page = timeline_page(plan, timelines, title="a <run>")
    assert "a &lt;run&gt;" in page
    assert "{{" not in page
    for foreign in (r"https?:", r"\bsrc\s*=", r"@import", r"<link", r"\burl\((?!#)", "Storage"):
        assert not re.search(foreign, page.replace("http://www.w3.org/2000/svg", "")), foreign
    data = data_of(page)
    assert data["ranks"] == rank_labels(plan)
    for step, timeline in zip(data["steps"], timelines, strict=True):
        for grid in ("executed", "simulated"):
            shown = [len(rank) for rank in step[grid]]
            assert shown == [len(rank) for rank in plan.training.schedule.operations]
        assert step["executedUs"] == pytest.approx(1e6 * timeline.executed_s, abs=0.1)


def test_a_large_page_is_cut_and_says_so(plan: Plan, timelines: list[StepTimeline]) -> None:
    num_operations = len(plan.training.graph.operations)
    one = data_of(timeline_page(plan, timelines, max_operations=num_operations + 1))
    assert len(one["steps"]) == 1
    assert one["stepsLeftOut"] == 1
    part = data_of(timeline_page(plan, timelines, max_operations=8))["steps"][0]
    assert [len(rank) for rank in part["executed"]] == [2, 2, 2, 2]
    assert part["leftOut"] == num_operations - 8


def test_labels_say_what_a_rank_owns() -> None:
    assert rank_labels(small_plan((3, 2))) == [
        "both embeddings, encoder and decoder layer 0",
        "encoder and decoder layer 1",
        "encoder and decoder layer 2",
        "7 words of the softmax, the loss",
        "6 words of the softmax",
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_every_operation_twice(
    plan: Plan, timelines: list[StepTimeline], tmp_path: Path
) -> None:
    page = tmp_path / "timeline.html"
    page.write_text(timeline_page(plan, timelines, title="test"), encoding="utf-8")
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    drawn = subprocess.run(
        [CHROMIUM, *options, profile, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    shapes = re.findall(r'<rect class="op ([FIW])', drawn)
    operations = plan.training.graph.operations
    assert len(shapes) == 2 * len(operations)
    assert shapes.count("W") == 2 * sum(op.kind == "W" for op in operations)
    assert len(re.findall(r"<tr><td>\d+</td>", drawn)) == plan.num_ranks
    assert "<button" in drawn
