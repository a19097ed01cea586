"""The contest as a picture: a bar of words a second for everybody, and the limit as a line."""

import xml.etree.ElementTree as ET

from benchmarks.rivals.contest import Contest
from pipeline.timeline.palette import GROUND, INK, LINE, SOFT
from pipeline.timeline.svg import child, px, rectangle, write

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW, _BAR = 760.0, 210.0, 80.0, 62.0, 30.0, 18.0
_OURS, _RIVAL, _LIMIT = "#0072B2", "#E69F00", "#CC79A7"
_FONTS = "system-ui,-apple-system,'Segoe UI',Roboto,sans-serif"
_STYLE = (
    f"text{{font:13px {_FONTS};fill:{INK}}}.head{{font-weight:600;font-size:15px}}"
    f".soft{{fill:{SOFT};font-size:12px}}.name{{text-anchor:end}}"
)


def plot(contest: Contest) -> str:
    """Return the picture as SVG; the line is where the large product alone would end."""
    entries = contest.finished()
    words_per_operation = contest.num_words / contest.num_operations
    limits = {p: contest.ceiling(p) * words_per_operation for p in contest.formats}
    most = max([*limits.values(), *(contest.speed(entry) for entry in entries)])
    scale = (_WIDTH - _LEFT - _RIGHT) / most
    height = _TOP + _ROW * len(entries) + 34.0
    size = {"viewBox": f"0 0 {px(_WIDTH)} {px(height)}", "width": px(_WIDTH), "height": px(height)}
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img", **size})
    child(root, "title", text="Words a second of every contestant, and the limit")
    child(root, "style", text=_STYLE)
    rectangle(root, 0.5, 0.5, _WIDTH - 1, height - 1, fill=GROUND, stroke=LINE, rx="6")
    write(root, 16, 26, "Words a second in training, the same model and batches", "head")
    write(root, 16, 46, "blue: this project; line: what large matrix products allow", "soft")
    for row, entry in enumerate(entries):
        y = _TOP + row * _ROW
        speed = contest.speed(entry)
        write(root, _LEFT - 8, y + 14, entry.name, "name")
        colour = _OURS if entry.contestant.ours else _RIVAL
        rectangle(root, _LEFT, y, scale * speed, _BAR, fill=colour)
        limit = _LEFT + scale * limits[entry.task.precision]
        ends = {"x1": px(limit), "x2": px(limit), "y1": px(y - 6), "y2": px(y + _ROW - 6)}
        child(root, "line", **ends, stroke=_LIMIT, **{"stroke-width": "2"})
        write(root, _LEFT + scale * speed + 6, y + 14, f"{speed:,.0f}", "soft")
    each = ", ".join(f"{precision} {limit:,.0f} words/s" for precision, limit in limits.items())
    write(root, _LEFT, height - 14, f"limit: {each}", "soft")
    return ET.tostring(root, encoding="unicode") + "\n"
