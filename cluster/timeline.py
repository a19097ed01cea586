"""A few recorded steps of a run: which ones, and the files that are made of them at its end.

Replica 0 stands for all: the others do the same with other sentences.
The ranks send their records back with the step's result; nothing is drawn while training goes on.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.plan import Plan
from pipeline.stage import StageResult
from pipeline.timeline.chrome_trace import chrome_trace
from pipeline.timeline.drawing import draw_recorded
from pipeline.timeline.page import timeline_page
from pipeline.timeline.recording import RankRecord
from pipeline.timeline.timeline import build_timelines

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 5
"""Steps before the first recorded one: caches, allocators and connections fill in them."""
PAGE = "timeline.html"
TRACE = "timeline.trace.json"
PICTURE = "timeline.svg"


class TimelineRecorder:
    """Chooses `num_steps` steps after a warm-up, which is shorter if the run is.

    `num_steps_ahead` is how many steps the run has before it.
    """

    def __init__(self, plan: Plan, num_steps: int, num_steps_ahead: int) -> None:
        self._plan = plan
        self._num_steps = num_steps
        self._warm_up = max(0, min(WARM_UP_STEPS, num_steps_ahead - num_steps))
        self._first: int | None = None
        self._records: dict[int, list[RankRecord]] = {}
        self._nodes: list[str] = []

    def wants(self, step: int) -> bool:
        """Tell whether to record a step; the first one asked about is the first of this life."""
        if self._first is None:
            self._first = step + self._warm_up
        return self._first <= step < self._first + self._num_steps

    def add(self, step: int, results: Sequence[StageResult], nodes: Sequence[str]) -> None:
        """Keep the records of a step's results, in rank order, if it was recorded."""
        records = [result.record for result in results if result.record is not None]
        if len(records) == len(results):
            self._records[step], self._nodes = records, list(nodes)

    def files(self, title: str) -> dict[str, str]:
        """Return page, trace and the last step's picture by file name; none without a record."""
        if not self._records:
            return {}
        timelines = build_timelines(self._plan, self._records, self._nodes)
        return {
            PAGE: timeline_page(self._plan, timelines, title=title),
            TRACE: chrome_trace(self._plan, timelines),
            PICTURE: draw_recorded(self._plan, timelines[-1]),
        }


def write_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Write texts into a folder; a disk that is full costs a warning, not the run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        logger.warning("the timeline cannot be written to %s: %s", folder, error)
