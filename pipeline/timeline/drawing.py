"""A step as a picture: what of it is shown, simulated or recorded, and the file it is written to.

Simulated and recorded steps are drawn alike. The same step gives the same bytes, so pictures can be
compared and kept under version control.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from model.errors import UserError
from pipeline.placements.description import counted
from pipeline.plan import Plan
from pipeline.simulation.simulator import Simulation, TimedOperation
from pipeline.timeline.bars import bars_of, coarsened
from pipeline.timeline.picture import PLOT, Picture, svg
from pipeline.timeline.rank_labels import rank_labels
from pipeline.timeline.timeline import StepTimeline

NARROW = 1.6
"""Bars below this width are merged with their neighbours of the same colour."""
MOST_BARS = 6000
"""Beyond that many a picture shows what took most of each column of time."""


def draw_simulation(plan: Plan, simulation: Simulation, *, relative: bool = False) -> str:
    """Return a simulated step as SVG.

    With `relative`, seconds mean nothing but parts of the step of one device.
    """
    step_s = simulation.step_seconds
    unit = ("% of one device's step", 100.0 / (simulation.one_device_s or 1.0))
    unit = unit if relative else _unit_of(step_s)
    figures = (
        f"{simulation.speedup:.2f} times as fast as one device, bubble "
        f"{simulation.bubble_fraction:.1%}, step {_amount(step_s, unit)}"
    )
    sums = [[(each.start_s, each.end_s) for each in rank] for rank in simulation.exchanges]
    picture = _picture(plan, figures, simulation.timeline, step_s, unit)
    return svg(replace(picture, sums=sums))


def draw_recorded(plan: Plan, timeline: StepTimeline) -> str:
    """Return a recorded step as SVG, up to the end of its last operation."""
    rows = [
        [TimedOperation(op.operation, op.start_s, op.end_s) for op in record.operations]
        for record in timeline.executed
    ]
    unit = _unit_of(timeline.executed_s)
    figures = (
        f"step {timeline.step} as it ran: bubble {timeline.executed_bubble:.1%}, "
        f"{_amount(timeline.executed_s, unit)} up to the update"
    )
    return svg(_picture(plan, figures, rows, timeline.executed_s, unit))


def write_picture(path: Path, picture: str) -> None:
    """Write a picture; its folder is made if it is not there. Raises UserError where it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(picture, encoding="utf-8")
    except OSError as problem:
        raise UserError(
            f"cannot write the picture {path}: {problem.strerror}; name another file"
        ) from None


def _picture(
    plan: Plan,
    figures: str,
    rows: Sequence[Sequence[TimedOperation]],
    step_s: float,
    unit: tuple[str, float],
) -> Picture:
    narrow_s = NARROW * step_s / PLOT
    bars = [bars_of(row, plan.training.graph, narrow_s) for row in rows]
    if sum(map(len, bars)) > MOST_BARS:
        num_columns = max(32, MOST_BARS // len(rows))
        bars = [coarsened(row, step_s, num_columns) for row in bars]
        figures += "; drawn coarsely"
    busy = [sum(timed.end_s - timed.start_s for timed in row) / (step_s or 1.0) for row in rows]
    return Picture(_title(plan), figures, rank_labels(plan), bars, busy, step_s, unit)


def _title(plan: Plan) -> str:
    name = f"{plan.placement.name}, {counted(plan.num_ranks, 'rank', 'ranks')}"
    if plan.num_replicas > 1:
        name += f" x {plan.num_replicas} replicas (one is shown)"
    return (
        f"{name}: {plan.policy}, "
        f"{counted(plan.num_microbatches, 'microbatch', 'microbatches')}, "
        f"{counted(plan.num_chunks, 'time chunk', 'time chunks')}"
    )


def _unit_of(seconds: float) -> tuple[str, float]:
    if seconds >= 10.0:
        return "seconds", 1.0
    return ("milliseconds", 1e3) if seconds >= 1e-3 else ("microseconds", 1e6)


def _amount(seconds: float, unit: tuple[str, float]) -> str:
    name, factor = unit
    short = {"seconds": " s", "milliseconds": " ms", "microseconds": " us"}.get(name, name)
    return f"{seconds * factor:,.4g}{short}"
