"""A step as a picture: an SVG file with a row for each rank, time to the right, idle time empty.

Simulated and recorded steps are drawn alike. The same step gives the same bytes, so pictures can be
compared and kept under version control. Lengths of the picture are pixels.
"""

import math
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from model.errors import UserError
from pipeline.placements.description import describe_rank
from pipeline.plan import Plan
from pipeline.simulation.simulator import Simulation, TimedOperation
from pipeline.timeline import palette
from pipeline.timeline.bars import Bar, bars_of, coarsened
from pipeline.timeline.timeline import StepTimeline

WIDTH, LEFT, RIGHT, MARGIN = 900.0, 226.0, 56.0, 16.0
PLOT = WIDTH - LEFT - RIGHT
TOP, LEGEND_HEIGHT = 94.0, 62.0
NARROW = 1.6
"""Bars below this width are merged with their neighbours of the same colour."""
MOST_BARS = 6000
"""Beyond that many a picture shows what took most of each column of time."""
SUM_HEIGHT = 6.0
"""Of the strip along a row's lower edge that shows sums over replicas."""
_LABEL_WIDTH, _LETTER, _LINE = 35, 6.6, 12.5
_MOST_TICKS = 9
_FONTS = "system-ui,-apple-system,'Segoe UI',Roboto,sans-serif"


@dataclass(frozen=True)
class _Picture:
    """What is drawn; `sums` are each rank's sums of gradients over replicas, as starts and ends."""

    title: str
    figures: str
    labels: Sequence[str]
    rows: Sequence[Sequence[Bar]]
    busy: Sequence[float]
    step_s: float
    unit: tuple[str, float]
    sums: Sequence[Sequence[tuple[float, float]]] = ()


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
    return _svg(replace(picture, sums=sums))


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
    return _svg(_picture(plan, figures, rows, timeline.executed_s, unit))


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
) -> _Picture:
    narrow_s = NARROW * step_s / PLOT
    bars = [bars_of(row, plan.training.graph, narrow_s) for row in rows]
    if sum(map(len, bars)) > MOST_BARS:
        num_columns = max(32, MOST_BARS // len(rows))
        bars = [coarsened(row, step_s, num_columns) for row in bars]
        figures += "; drawn coarsely"
    busy = [sum(timed.end_s - timed.start_s for timed in row) / (step_s or 1.0) for row in rows]
    labels = [describe_rank(plan.placement, rank) for rank in range(plan.num_ranks)]
    return _Picture(_title(plan), figures, labels, bars, busy, step_s, unit)


def _title(plan: Plan) -> str:
    name = f"{plan.placement.name}, {_counted(plan.num_ranks, 'rank', 'ranks')}"
    if plan.num_replicas > 1:
        name += f" x {plan.num_replicas} replicas (one is shown)"
    return (
        f"{name}: {plan.policy}, "
        f"{_counted(plan.num_microbatches, 'microbatch', 'microbatches')}, "
        f"{_counted(plan.num_chunks, 'time chunk', 'time chunks')}"
    )


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _svg(picture: _Picture) -> str:
    row_height = _row_height(picture.labels)
    bottom = TOP + row_height * len(picture.rows)
    height = bottom + LEGEND_HEIGHT
    root = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {_n(WIDTH)} {_n(height)}",
            "width": _n(WIDTH),
            "height": _n(height),
            "role": "img",
        },
    )
    _child(root, "title", text=f"{picture.title}. {picture.figures}.")
    _child(root, "style", text=_style())
    ground = {"class": "ground", "rx": "6"}
    _rect(root, 0.5, 0.5, WIDTH - 1.0, height - 1.0, **ground)
    _text(root, MARGIN, 29.0, textwrap.shorten(picture.title, 100, placeholder=" …"), "head")
    _text(root, MARGIN, 50.0, picture.figures)
    _axis(root, picture, bottom)
    for rank in range(len(picture.rows)):
        _row(root, picture, rank, TOP + rank * row_height, row_height)
    is_fused = not any(bar.kind == "W" for row in picture.rows for bar in row)
    _legend(root, bottom + 26.0, is_fused=is_fused, has_sums=any(picture.sums))
    ET.indent(root, space=" ")
    return ET.tostring(root, encoding="unicode") + "\n"


def _style() -> str:
    """Return the style; the picture has a light ground of its own, also on a dark page."""
    rules = [
        f"text{{font:12px {_FONTS};fill:{palette.INK}}}",
        ".head{font-size:16px;font-weight:650}.name{font-weight:650}",
        f".soft{{font-size:11px;fill:{palette.SOFT}}}.end{{text-anchor:end}}",
        ".mid{text-anchor:middle}.in{font-size:11px;text-anchor:middle;fill:#fff}",
        f".dark{{fill:{palette.INK}}}.odd{{fill-opacity:.86}}",
        f".ground{{fill:{palette.GROUND};stroke:{palette.LINE}}}.idle{{fill:{palette.IDLE}}}",
        f".grid{{stroke:{palette.LINE}}}.sum{{fill:{palette.SUM};stroke:#fff;stroke-width:.6}}",
    ]
    rules += [
        f".{kind}{part[0]}{{fill:{colour}}}"
        for kind, shades in palette.COLOURS.items()
        for part, colour in shades.items()
    ]
    return "\n" + "\n".join(rules) + "\n"


def _row_height(labels: Sequence[str]) -> float:
    if len(labels) > 12:
        return 24.0 if len(labels) <= 32 else 16.0
    return max(40.0, 16.0 + _LINE * max(len(_wrapped(words)) for words in labels))


def _wrapped(words: str) -> list[str]:
    return textwrap.wrap(words, _LABEL_WIDTH, max_lines=3, placeholder=" …")


def _axis(root: ET.Element, picture: _Picture, bottom: float) -> None:
    name, factor = picture.unit
    length = picture.step_s * factor
    step = _tick(length)
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    for number in range(int(length / step + 1e-9) + 1 if step else 0):
        x = LEFT + PLOT * number * step / length
        _child(
            root, "line", **{"class": "grid"}, x1=_n(x), x2=_n(x), y1=_n(TOP - 8), y2=_n(bottom - 2)
        )
        if x <= LEFT + PLOT - 16.0:
            _text(root, x, TOP - 13.0, f"{number * step:,.{digits}f}", "soft mid")
    _text(root, LEFT - 12.0, TOP - 13.0, name, "soft end")
    _text(root, WIDTH - MARGIN, TOP - 13.0, "busy", "soft end")


def _tick(length: float) -> float:
    """Return the distance of marks on an axis: 1, 2 or 5 times a power of ten, few of them."""
    if length <= 0.0:
        return 0.0
    power: float = 10.0 ** math.floor(math.log10(length / _MOST_TICKS))
    choices = (power, 2 * power, 5 * power, 10 * power)
    return next(unit for unit in choices if length / unit <= _MOST_TICKS)


def _row(root: ET.Element, picture: _Picture, rank: int, y: float, height: float) -> None:
    group = _child(root, "g", transform=f"translate(0 {_n(y)})")
    words = picture.labels[rank]
    _child(group, "title", text=f"rank {rank}: {words}")
    thick = height - (8.0 if height > 30 else 4.0)
    _rect(group, LEFT, 0.0, PLOT, thick, **{"class": "idle"})
    middle = thick / 2 + 4.0
    if height > 30:
        lines = _wrapped(words)
        first = middle - _LINE / 2 * len(lines)
        _text(group, MARGIN, first, f"rank {rank}", "name")
        for number, line in enumerate(lines, start=1):
            _text(group, MARGIN, first + _LINE * number, line, "soft")
    else:
        _text(group, MARGIN, middle, f"rank {rank}", "name")
        short = textwrap.shorten(words, _LABEL_WIDTH - 10, placeholder=" …")
        _text(group, MARGIN + 54.0, middle, short, "soft")
    _text(group, WIDTH - MARGIN, middle, f"{picture.busy[rank]:.0%}", "soft end")
    _bars(group, picture, rank, thick)


def _bars(group: ET.Element, picture: _Picture, rank: int, thick: float) -> None:
    scale = PLOT / (picture.step_s or 1.0)
    paths: dict[str, list[str]] = {}
    for bar in picture.rows[rank]:
        x, width = LEFT + scale * bar.start_s, scale * bar.seconds
        # Neighbours are told apart by a gap, which a thin one cannot spare.
        drawn = width - 0.6 if width > 3.0 else width
        name = f"{bar.kind}{bar.part[0]}" + (" odd" if bar.is_odd else "")
        paths.setdefault(name, []).append(f"M{_n(x)} 0h{_n(drawn)}v{_n(thick)}h-{_n(drawn)}z")
    for name, parts in sorted(paths.items()):
        _child(group, "path", **{"class": name}, d="".join(parts))
    for start_s, end_s in picture.sums[rank] if picture.sums else ():
        x, width = LEFT + scale * start_s, scale * (end_s - start_s)
        _rect(group, x, thick - SUM_HEIGHT, width, SUM_HEIGHT, **{"class": "sum"})
    if thick >= 14.0:
        _bar_labels(group, picture.rows[rank], scale, thick)


def _bar_labels(group: ET.Element, bars: Sequence[Bar], scale: float, thick: float) -> None:
    for bar in bars:
        room = (scale * bar.seconds - 6.0) / _LETTER
        words = [bar.label, bar.piece] if bar.piece else [bar.label]
        if not bar.label or room < max(map(len, words)):
            continue
        if len(words) * 12.0 > thick:
            del words[1:]
        x = LEFT + scale * (bar.start_s + bar.end_s) / 2
        look = "in dark" if bar.part == "encoder" else "in"
        first = thick / 2 + 4.0 - 6.0 * (len(words) - 1)
        for number, word in enumerate(words):
            _text(group, x, first + 12.0 * number, word, look)


def _legend(root: ET.Element, y: float, *, is_fused: bool, has_sums: bool) -> None:
    x = MARGIN
    words = dict(palette.KIND_WORDS)
    if is_fused:
        words = {"F": words["F"], "I": "gradients of inputs and weights together"}
    for kind, text in words.items():
        for part in palette.PARTS:
            _rect(root, x, y - 10.0, 14.0, 12.0, **{"class": f"{kind}{part[0]}"})
            x += 15.0
        _text(root, x + 5.0, y, f"{kind} {text}")
        x += 25.0 + _LETTER * (len(text) + 2)
    _rect(root, x, y - 10.0, 14.0, 12.0, **{"class": "idle", "stroke": palette.LINE})
    _text(root, x + 20.0, y, "idle")
    if has_sums:
        _rect(root, x + 60.0, y - 10.0, 14.0, 12.0, **{"class": "sum"})
        _text(root, x + 80.0, y, "sum of gradients")
    _text(
        root,
        MARGIN,
        y + 19.0,
        "Light encoder, middle decoder, dark softmax. e0 d0 layers (p projection, r recurrence), "
        "s0 words, l loss; m0 microbatch, k0 time chunk.",
        "soft",
    )


def _unit_of(seconds: float) -> tuple[str, float]:
    if seconds >= 10.0:
        return "seconds", 1.0
    return ("milliseconds", 1e3) if seconds >= 1e-3 else ("microseconds", 1e6)


def _amount(seconds: float, unit: tuple[str, float]) -> str:
    name, factor = unit
    short = {"seconds": " s", "milliseconds": " ms", "microseconds": " us"}.get(name, name)
    return f"{seconds * factor:,.4g}{short}"


def _child(parent: ET.Element, tag: str, *, text: str = "", **attributes: str) -> ET.Element:
    element = ET.SubElement(parent, tag, attributes)
    # What is not printable may not stand in XML at all, and a placement's name is a file's.
    element.text = "".join(c if c.isprintable() or c == "\n" else "?" for c in text) or None
    return element


def _rect(
    parent: ET.Element, x: float, y: float, width: float, height: float, **attributes: str
) -> None:
    size = {"x": _n(x), "y": _n(y), "width": _n(width), "height": _n(height)}
    _child(parent, "rect", **attributes, **size)


def _text(parent: ET.Element, x: float, y: float, text: str, look: str = "") -> None:
    attributes = {"class": look} if look else {}
    _child(parent, "text", text=text, **attributes, x=_n(x), y=_n(y))


def _n(value: float) -> str:
    """Write a length with two digits at most, the same on every machine."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
