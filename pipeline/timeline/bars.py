"""From timed operations to the bars of a picture: neighbours that look alike become one.

A step has thousands of operations. What cannot be told apart at the picture's size is merged, so
that its file stays small.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pipeline.graph import Graph, Kind, Operation
from pipeline.schedules.grid import short_name
from pipeline.simulation.simulator import TimedOperation
from pipeline.timeline.palette import Part, part_of


@dataclass(frozen=True)
class Bar:
    """Some time of a rank in operations of one kind and part, in seconds after the step's start.

    `label` names the block or the layer and `piece` the part of the batch, or nothing where several
    are merged. Pieces of a batch that follow each other differ in `is_odd`.
    """

    kind: Kind
    part: Part
    label: str
    piece: str
    is_odd: bool
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end_s - self.start_s


def bars_of(timed: Iterable[TimedOperation], graph: Graph, narrow_s: float) -> list[Bar]:
    """Return a rank's bars, in order of time.

    Projection and recurrence of a layer become one bar where they follow each other on the same
    piece. Shorter than `narrow_s`, neighbours of one colour become one whatever their pieces.
    Operations that take no time have no bar.
    """
    bars: list[Bar] = []
    cell: tuple[str, int, int] | None = None
    for each in timed:
        if each.end_s <= each.start_s:
            continue
        bar, here = _bar(each, graph), _cell(each.operation, graph)
        before = bars[-1] if bars else None
        if before is None or not _alike(before, bar, narrow_s):
            bars.append(bar)
        elif here == cell:
            label = before.label and _layer(each.operation.block)
            label = bar.label if bar.label == before.label else label
            bars[-1] = replace(before, label=label, end_s=bar.end_s)
        elif min(before.seconds, bar.seconds) < narrow_s:
            bars[-1] = replace(before, label="", piece="", end_s=bar.end_s)
        else:
            bars.append(bar)
        cell = here
    return bars


def coarsened(bars: Sequence[Bar], step_s: float, num_columns: int) -> list[Bar]:
    """Return no more bars than columns: each column shows what took most of its time, idle too."""
    column_s = step_s / num_columns
    seconds: list[dict[tuple[Kind, Part], float]] = [{} for _ in range(num_columns)]
    for bar in bars:
        for column in range(int(bar.start_s / column_s), num_columns):
            start_s, end_s = column * column_s, (column + 1) * column_s
            if start_s >= bar.end_s:
                break
            overlap_s = min(end_s, bar.end_s) - max(start_s, bar.start_s)
            cell, colour = seconds[column], (bar.kind, bar.part)
            cell[colour] = cell.get(colour, 0.0) + max(0.0, overlap_s)
    drawn: list[Bar] = []
    for column, cell in enumerate(seconds):
        best = max(cell, key=lambda colour: cell[colour], default=None)
        # Rounding must not decide between a column's work and its idle time.
        if best is None or cell[best] < column_s - sum(cell.values()) - 1e-6 * column_s:
            continue
        bar = Bar(*best, "", "", False, column * column_s, (column + 1) * column_s)
        if drawn and _alike(drawn[-1], bar, column_s):
            drawn[-1] = replace(drawn[-1], end_s=bar.end_s)
        else:
            drawn.append(bar)
    return drawn


def _bar(timed: TimedOperation, graph: Graph) -> Bar:
    kind, block, microbatch, chunk = timed.operation
    part, is_odd = part_of(graph.spec_of[block]), (microbatch + chunk) % 2 == 1
    parts = [f"m{microbatch}"] if graph.num_microbatches > 1 else []
    parts += [f"k{chunk}"] if graph.num_chunks > 1 else []
    names = short_name(block), " ".join(parts)
    return Bar(kind, part, *names, is_odd, timed.start_s, timed.end_s)


def _cell(operation: Operation, graph: Graph) -> tuple[str, int, int]:
    """Return what operations of one bar have in common: the layer, and the piece of the batch."""
    spec = graph.spec_of[operation.block]
    name = _layer(operation.block) if spec.kind in ("projection", "recurrence") else spec.name
    return name, operation.microbatch, operation.chunk


def _layer(block: str) -> str:
    return short_name(block.rpartition(".")[0])


def _alike(before: Bar, bar: Bar, narrow_s: float) -> bool:
    """Tell whether two bars have one colour and nothing between them that could be seen."""
    gap_s = bar.start_s - before.end_s
    return (before.kind, before.part) == (bar.kind, bar.part) and gap_s < 0.1 * narrow_s
