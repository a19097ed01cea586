"""A step as text: a row for each rank, time from left to right.

Each cell shows what took most of a column's time. In the coarse picture that is one letter a
column, F, I or W; in the fine one the block is named too.
"""

import re
from collections.abc import Callable, Sequence

from pipeline.simulation.simulator import Simulation, TimedOperation

Namer = Callable[[TimedOperation], str]
IDLE = "."
LEGEND = (
    "F forward, I gradient of the inputs, W gradient of the weights, . idle; "
    "e0p projection of encoder layer 0, d1r recurrence of decoder layer 1, s2 vocabulary shard 2, "
    "se and te embeddings, l loss; /3 microbatch 3"
)


def draw_letters(simulation: Simulation, num_columns: int = 96) -> str:
    """Draw the step with one letter a column, and the share of its time that each rank works."""
    rows = _cells(simulation, num_columns, lambda timed: timed.operation.kind)
    lines = [
        f"rank {rank:>2} |{''.join(row)}| {_share(simulation, rank):>4.0%}"
        for rank, row in enumerate(rows)
    ]
    return "\n".join(lines)


def draw_blocks(simulation: Simulation, num_columns: int = 24) -> str:
    """Draw the step with operations and their blocks, as `LEGEND` says."""
    many = any(timed.operation.microbatch for rank in simulation.timeline for timed in rank)

    def name(timed: TimedOperation) -> str:
        operation = timed.operation
        microbatch = f"/{operation.microbatch}" if many else ""
        return operation.kind + short_name(operation.block) + microbatch

    rows = _cells(simulation, num_columns, name)
    width = max((len(cell) for row in rows for cell in row), default=1)
    lines = [
        f"rank {rank:>2} |{' '.join(cell.ljust(width) for cell in row)}|"
        for rank, row in enumerate(rows)
    ]
    return "\n".join(lines)


def short_name(block: str) -> str:
    """Return a block's name in a few letters: `encoder.0.recurrence` is `e0r`."""
    if block.endswith("_embedding"):
        return block[0] + "e"
    return "".join(re.findall(r"(?:^|(?<=\.))(?:\d+|[a-z])", block))


def _share(simulation: Simulation, rank: int) -> float:
    return simulation.busy_s[rank] / simulation.step_seconds if simulation.step_seconds else 0.0


def _cells(simulation: Simulation, num_columns: int, name: Namer) -> list[list[str]]:
    column_s = simulation.step_seconds / num_columns
    return [_row(rank, num_columns, column_s, name) for rank in simulation.timeline]


def _row(
    timeline: Sequence[TimedOperation], num_columns: int, column_s: float, name: Namer
) -> list[str]:
    """Return what took most of each column, of the names' times added up; idle wins no tie."""
    seconds: list[dict[str, float]] = [{} for _ in range(num_columns)]
    for timed in timeline:
        if timed.end_s <= timed.start_s:
            continue
        first = min(num_columns - 1, int(timed.start_s / column_s))
        for column in range(first, num_columns):
            start, stop = column * column_s, (column + 1) * column_s
            overlap = min(stop, timed.end_s) - max(start, timed.start_s)
            if start >= timed.end_s:
                break
            cell = seconds[column]
            cell[name(timed)] = cell.get(name(timed), 0.0) + max(0.0, overlap)
    return [_winner(cell, column_s) for cell in seconds]


def _winner(cell: dict[str, float], column_s: float) -> str:
    idle = column_s - sum(cell.values())
    best = max(cell, key=lambda name: cell[name], default=IDLE)
    # Rounding must not decide between a column's work and its idle time.
    return best if cell and cell[best] >= idle - 1e-6 * column_s else IDLE
