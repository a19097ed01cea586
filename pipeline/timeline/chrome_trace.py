"""Recorded steps in Chrome's trace format, which ui.perfetto.dev and chrome://tracing open.

A replica is a process, a rank is a thread, an operation or a wait is a slice. Times are in
microseconds after the first recorded operation.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.plan import Plan
from pipeline.schedules.grid import short_name
from pipeline.timeline.rank_labels import rank_labels
from pipeline.timeline.recording import RankRecord
from pipeline.timeline.timeline import StepTimeline, waits

MAX_OPERATIONS = 50_000
"""Beyond that many the trace keeps the first steps and says in `otherData` what it left out."""

Event = dict[str, Any]


def chrome_trace(
    plan: Plan, timelines: Sequence[StepTimeline], *, max_operations: int = MAX_OPERATIONS
) -> str:
    """Return the trace as JSON; of steps that are too large, the first operations of each rank."""
    events: list[Event] = []
    for replica in sorted({timeline.replica for timeline in timelines}):
        events += _names(plan, replica)
    origin_s = min((timeline.clock_s for timeline in timelines), default=0.0)
    num_operations = sum(len(rank.operations) for t in timelines for rank in t.executed)
    left = max_operations
    for timeline in timelines:
        for rank, record in enumerate(timeline.executed):
            kept = record.operations[: left // max(1, len(timeline.executed) - rank)]
            left -= len(kept)
            events += _slices(timeline, rank, record, len(kept), origin_s)
    return json.dumps(
        {
            "traceEvents": events,
            "displayTimeUnit": "ms",
            "otherData": {
                "placement": plan.placement.name,
                "policy": plan.policy,
                "operations": num_operations,
                "operations_left_out": num_operations - (max_operations - left),
            },
        },
        separators=(",", ":"),
    )


def _names(plan: Plan, replica: int) -> Iterator[Event]:
    yield _about("process_name", replica, 0, {"name": f"replica {replica}"})
    for rank, label in enumerate(rank_labels(plan)):
        yield _about("thread_name", replica, rank, {"name": f"rank {rank}: {label}"})
        yield _about("thread_sort_index", replica, rank, {"sort_index": rank})


def _about(what: str, replica: int, rank: int, args: dict[str, str | int]) -> Event:
    return {"ph": "M", "name": what, "pid": replica, "tid": rank, "args": args}


def _slices(
    timeline: StepTimeline, rank: int, record: RankRecord, num_kept: int, origin_s: float
) -> Iterator[Event]:
    """Yield a rank's operations, the waits before them, and the end of its step."""
    moved_s = timeline.clock_s - origin_s
    place = {"ph": "X", "pid": timeline.replica, "tid": rank}

    def span(name: str, category: str, start_s: float, end_s: float, **args: str | int) -> Event:
        times = {
            "ts": round(1e6 * (start_s + moved_s), 3),
            "dur": round(1e6 * max(0.0, end_s - start_s), 3),
        }
        about = {"name": name, "cat": category, "args": {"step": timeline.step, **args}}
        return {**place, **times, **about}

    for op, (start_s, end_s) in list(zip(record.operations, waits(record), strict=True))[:num_kept]:
        kind, block, microbatch, chunk = op.operation
        if end_s > start_s:
            yield span("wait", "wait", start_s, end_s, wait_for=f"inputs of {kind} {block}")
        yield span(
            f"{kind} {short_name(block)}",
            kind,
            op.start_s,
            op.end_s,
            kind=kind,
            block=block,
            microbatch=microbatch,
            chunk=chunk,
        )
    yield span("sum of norms", "wait", record.meet_s, record.met_s, wait_for="all ranks")
    yield span("update", "update", record.met_s, record.end_s)
