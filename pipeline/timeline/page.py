"""Recorded steps as one HTML page that needs nothing else: the executed grid above the simulated.

The page itself is `page.html`; this fills in the data that its script draws.
"""

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from pipeline.graph import Operation
from pipeline.plan import Plan
from pipeline.schedules.grid import short_name
from pipeline.timeline.palette import css_variables
from pipeline.timeline.rank_labels import rank_labels
from pipeline.timeline.timeline import StepTimeline, waits

MAX_OPERATIONS = 20_000
"""Of all steps together; beyond that many the page keeps the first steps and says what is left
out, since a browser draws each operation as a shape."""


def timeline_page(
    plan: Plan,
    timelines: Sequence[StepTimeline],
    *,
    title: str = "a run",
    max_operations: int = MAX_OPERATIONS,
) -> str:
    """Return the page; of a step that is too large by itself, the first operations of each rank.

    Bubbles and times are always those of whole steps. `title` names the run.
    """
    num_operations = len(plan.training.graph.operations)
    num_steps = max(1, max_operations // max(1, num_operations))
    shown = timelines[:num_steps]
    data = {
        "layout": _layout(plan),
        "blocks": [[spec.name, short_name(spec.name)] for spec in plan.blocks],
        "ranks": rank_labels(plan),
        "stepsLeftOut": len(timelines) - len(shown),
        "steps": [_step(plan, timeline, max_operations // plan.num_ranks) for timeline in shown],
    }
    template = (files("pipeline.timeline") / "page.html").read_text(encoding="utf-8")
    # A `<` in the data could end the script that holds it.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = template.replace("{{palette}}", css_variables()).replace("{{title}}", escape(title))
    return page.replace("{{data}}", text)


def _layout(plan: Plan) -> str:
    return (
        f"{plan.placement.name} placement on {plan.num_ranks} ranks, {plan.policy} schedule, "
        f"microbatches {plan.num_microbatches}, time chunks {plan.num_chunks}"
    )


def _step(plan: Plan, timeline: StepTimeline, max_each: int) -> dict[str, Any]:
    block_number = {spec.name: number for number, spec in enumerate(plan.blocks)}
    executed = [
        _rows(
            block_number,
            (
                (op.operation, op.start_s, op.end_s, stop - start)
                for op, (start, stop) in zip(record.operations, waits(record), strict=True)
            ),
        )
        for record in timeline.executed
    ]
    simulated = [
        _rows(block_number, ((timed.operation, timed.start_s, timed.end_s, 0.0) for timed in rank))
        for rank in timeline.simulated
    ]
    return {
        "step": timeline.step,
        "executed": [rank[:max_each] for rank in executed],
        "simulated": [rank[:max_each] for rank in simulated],
        "leftOut": sum(max(0, len(rank) - max_each) for rank in executed),
        "ends": [[_us(r.meet_s), _us(r.met_s), _us(r.end_s)] for r in timeline.executed],
        "executedUs": _us(timeline.executed_s),
        "simulatedUs": _us(timeline.simulated_s),
        "bubbles": [round(timeline.executed_bubble, 4), round(timeline.simulated_bubble, 4)],
        "figures": [
            [
                *map(_us, (f.busy_s, f.wait_s, f.between_s, f.outside_s)),
                round(f.executed_bubble, 4),
                round(f.simulated_bubble, 4),
            ]
            for f in timeline.figures()
        ],
    }


def _rows(
    block_number: dict[str, int], timed: Iterable[tuple[Operation, float, float, float]]
) -> list[list[str | int | float]]:
    """Give each operation as kind, block, microbatch, chunk, start, duration and wait before."""
    return [
        [
            operation.kind,
            block_number[operation.block],
            operation.microbatch,
            operation.chunk,
            _us(start_s),
            _us(end_s - start_s),
            _us(wait_s),
        ]
        for operation, start_s, end_s, wait_s in timed
    ]


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 1)
