"""A picture of a step as SVG: a row for each rank, time to the right, idle time empty.

Lengths are pixels.
"""

import math
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.timeline import palette
from pipeline.timeline.bars import Bar
from pipeline.timeline.svg import child, px, rectangle, write

WIDTH, LEFT, RIGHT, MARGIN = 900.0, 226.0, 56.0, 16.0
PLOT = WIDTH - LEFT - RIGHT
TOP, LEGEND_HEIGHT = 94.0, 62.0
SUM_HEIGHT = 6.0
"""Of the strip along a row's lower edge that shows sums over replicas."""
_LABEL_WIDTH, _LETTER, _LINE = 35, 6.6, 12.5
_MOST_TICKS = 9
_FONTS = "system-ui,-apple-system,'Segoe UI',Roboto,sans-serif"


@dataclass(frozen=True)
class Picture:
    """What is drawn; `sums` are each rank's sums of gradients over replicas, as starts and ends."""

    title: str
    figures: str
    labels: Sequence[str]
    rows: Sequence[Sequence[Bar]]
    busy: Sequence[float]
    step_s: float
    unit: tuple[str, float]
    sums: Sequence[Sequence[tuple[float, float]]] = ()


def svg(picture: Picture) -> str:
    """Return a picture as SVG."""
    row_height = _row_height(picture.labels)
    bottom = TOP + row_height * len(picture.rows)
    height = bottom + LEGEND_HEIGHT
    root = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {px(WIDTH)} {px(height)}",
            "width": px(WIDTH),
            "height": px(height),
            "role": "img",
        },
    )
    child(root, "title", text=f"{picture.title}. {picture.figures}.")
    child(root, "style", text=_style())
    ground = {"class": "ground", "rx": "6"}
    rectangle(root, 0.5, 0.5, WIDTH - 1.0, height - 1.0, **ground)
    write(root, MARGIN, 29.0, textwrap.shorten(picture.title, 100, placeholder=" …"), "head")
    write(root, MARGIN, 50.0, picture.figures)
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


def _axis(root: ET.Element, picture: Picture, bottom: float) -> None:
    name, factor = picture.unit
    whole = picture.step_s * factor
    step = _tick(whole)
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    for number in range(int(whole / step + 1e-9) + 1 if step else 0):
        x = LEFT + PLOT * number * step / whole
        child(
            root,
            "line",
            **{"class": "grid"},
            x1=px(x),
            x2=px(x),
            y1=px(TOP - 8),
            y2=px(bottom - 2),
        )
        if x <= LEFT + PLOT - 16.0:
            write(root, x, TOP - 13.0, f"{number * step:,.{digits}f}", "soft mid")
    write(root, LEFT - 12.0, TOP - 13.0, name, "soft end")
    write(root, WIDTH - MARGIN, TOP - 13.0, "busy", "soft end")


def _tick(extent: float) -> float:
    """Return the distance of marks on an axis: 1, 2 or 5 times a power of ten, few of them."""
    if extent <= 0.0:
        return 0.0
    power: float = 10.0 ** math.floor(math.log10(extent / _MOST_TICKS))
    choices = (power, 2 * power, 5 * power, 10 * power)
    return next(unit for unit in choices if extent / unit <= _MOST_TICKS)


def _row(root: ET.Element, picture: Picture, rank: int, y: float, height: float) -> None:
    group = child(root, "g", transform=f"translate(0 {px(y)})")
    words = picture.labels[rank]
    child(group, "title", text=f"rank {rank}: {words}")
    thick = height - (8.0 if height > 30 else 4.0)
    rectangle(group, LEFT, 0.0, PLOT, thick, **{"class": "idle"})
    middle = thick / 2 + 4.0
    if height > 30:
        lines = _wrapped(words)
        first = middle - _LINE / 2 * len(lines)
        write(group, MARGIN, first, f"rank {rank}", "name")
        for number, line in enumerate(lines, start=1):
            write(group, MARGIN, first + _LINE * number, line, "soft")
    else:
        write(group, MARGIN, middle, f"rank {rank}", "name")
        short = textwrap.shorten(words, _LABEL_WIDTH - 10, placeholder=" …")
        write(group, MARGIN + 54.0, middle, short, "soft")
    write(group, WIDTH - MARGIN, middle, f"{picture.busy[rank]:.0%}", "soft end")
    _bars(group, picture, rank, thick)


def _bars(group: ET.Element, picture: Picture, rank: int, thick: float) -> None:
    scale = PLOT / (picture.step_s or 1.0)
    paths: dict[str, list[str]] = {}
    for bar in picture.rows[rank]:
        x, width = LEFT + scale * bar.start_s, scale * bar.seconds
        # Neighbours are told apart by a gap, which a thin one cannot spare.
        drawn = width - 0.6 if width > 3.0 else width
        name = f"{bar.kind}{bar.part[0]}" + (" odd" if bar.is_odd else "")
        paths.setdefault(name, []).append(f"M{px(x)} 0h{px(drawn)}v{px(thick)}h-{px(drawn)}z")
    for name, parts in sorted(paths.items()):
        child(group, "path", **{"class": name}, d="".join(parts))
    for start_s, end_s in picture.sums[rank] if picture.sums else ():
        x, width = LEFT + scale * start_s, scale * (end_s - start_s)
        rectangle(group, x, thick - SUM_HEIGHT, width, SUM_HEIGHT, **{"class": "sum"})
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
            write(group, x, first + 12.0 * number, word, look)


def _legend(root: ET.Element, y: float, *, is_fused: bool, has_sums: bool) -> None:
    x = MARGIN
    words = dict(palette.KIND_WORDS)
    if is_fused:
        words = {"F": words["F"], "I": "gradients of inputs and weights together"}
    for kind, text in words.items():
        for part in palette.PARTS:
            rectangle(root, x, y - 10.0, 14.0, 12.0, **{"class": f"{kind}{part[0]}"})
            x += 15.0
        write(root, x + 5.0, y, f"{kind} {text}")
        x += 25.0 + _LETTER * (len(text) + 2)
    rectangle(root, x, y - 10.0, 14.0, 12.0, **{"class": "idle", "stroke": palette.LINE})
    write(root, x + 20.0, y, "idle")
    if has_sums:
        rectangle(root, x + 60.0, y - 10.0, 14.0, 12.0, **{"class": "sum"})
        write(root, x + 80.0, y, "sum of gradients")
    write(
        root,
        MARGIN,
        y + 19.0,
        "Light encoder, middle decoder, dark softmax. e0 d0 layers (p projection, r recurrence), "
        "s0 words, l loss; m0 microbatch, k0 time chunk.",
        "soft",
    )
