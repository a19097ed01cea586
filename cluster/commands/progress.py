"""Progress of long work on stderr: bars on a terminal, now and then a line anywhere else.

The work itself knows nothing of terminals: it calls a `ProgressReport` with the name of a phase,
what is done of it, and how much there is. A phase may come back, and its total may be unknown.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LINE_INTERVAL_S = 5.0
MIN_LINE_INTERVAL_S = 1.0
LINE_FRACTION = 0.1

ProgressReport = Callable[[str, int, int | None], None]


class ProgressDisplay(Protocol):
    """A `ProgressReport` that can also show a message without disturbing the bars."""

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        """Say that `done` of `total` (None: unknown) units of a phase are done."""

    def message(self, text: str) -> None:
        """Show one line."""


@dataclass
class _Phase:
    start_s: float
    start_done: int
    line_s: float
    line_done: int
    ended: bool = False


@dataclass
class PlainProgress:
    """Lines with amount, share, speed and time left: at most one each second for each phase.

    A line is written when a phase begins and ends, each tenth of it, and every five seconds.
    """

    stream: TextIO
    unit: str = ""
    clock: Callable[[], float] = time.monotonic
    _phases: dict[str, _Phase] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        """Say that `done` of `total` (None: unknown) units of a phase are done."""
        with self._lock:
            now = self.clock()
            state = self._phases.get(phase)
            if state is None or done < state.line_done:
                state = self._phases[phase] = _Phase(now, done, now, done)
            elif not self._is_due(state, now, done, total):
                return
            state.line_s, state.line_done = now, done
            state.ended = total is not None and done >= total
            self.stream.write(self._line(phase, state, now, done, total) + "\n")
            self.stream.flush()

    def message(self, text: str) -> None:
        """Show one line."""
        with self._lock:
            self.stream.write(text + "\n")
            self.stream.flush()

    def _is_due(self, state: _Phase, now: float, done: int, total: int | None) -> bool:
        if state.ended or done == state.line_done:
            return False
        waited = now - state.line_s
        if total is not None and done >= total:
            return True
        if total and done - state.line_done >= LINE_FRACTION * total:
            return waited >= MIN_LINE_INTERVAL_S
        return waited >= LINE_INTERVAL_S

    def _line(self, phase: str, state: _Phase, now: float, done: int, total: int | None) -> str:
        unit = f" {self.unit}" if self.unit else ""
        line = f"{phase}: {_amount(done, total)}{unit}"
        elapsed, moved = now - state.start_s, done - state.start_done
        if moved > 0 and elapsed > 0:
            line += f", {_speed(moved / elapsed)}"
            if total is not None and done < total:
                line += f", {_duration((total - done) * elapsed / moved)} left"
            elif state.ended:
                line += f", took {_duration(elapsed)}"
        return line


class _SpeedColumn(ProgressColumn):
    """How many units a second are done; nothing before that is known."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(_speed(speed) if speed else "")


@dataclass
class RichProgress:
    """One bar for each phase, on a terminal."""

    progress: Progress
    unit: str = ""
    _tasks: dict[str, TaskID] = field(default_factory=dict)

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        """Say that `done` of `total` (None: unknown) units of a phase are done."""
        amount = f"{_amount(done, total)} {self.unit}".rstrip()
        if phase not in self._tasks:
            # What was done before does not count as speed.
            self._tasks[phase] = self.progress.add_task(
                phase, total=total, completed=done, amount=amount
            )
        self.progress.update(self._tasks[phase], completed=done, total=total, amount=amount)

    def message(self, text: str) -> None:
        """Show one line."""
        self.progress.console.print(text, markup=False, highlight=False)


@dataclass(frozen=True)
class ProgressBar:
    """The progress of one piece of work; made by `progress_bar`."""

    display: ProgressDisplay
    description: str
    total: int | None

    def update(self, done: int) -> None:
        """Say how much is done, counted from the start."""
        self.display(self.description, done, self.total)


@contextmanager
def progress_display(unit: str = "", stream: TextIO | None = None) -> Iterator[ProgressDisplay]:
    """Show the progress of work of several phases on stderr while the block runs."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield PlainProgress(stream, unit)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}", markup=False),
        _SpeedColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=stream)) as progress:
        yield RichProgress(progress, unit)


@contextmanager
def progress_bar(
    description: str, total: int | None, unit: str = "", stream: TextIO | None = None
) -> Iterator[ProgressBar]:
    """Show the progress of one piece of work on stderr while the block runs."""
    with progress_display(unit, stream) as display:
        bar = ProgressBar(display, description, total)
        bar.update(0)
        yield bar


def _amount(done: int, total: int | None) -> str:
    if total is None:
        return f"{done:,}"
    share = f" ({done / total:.0%})" if total else ""
    return f"{done:,} of {total:,}{share}"


def _speed(per_second: float) -> str:
    return f"{per_second:,.1f}/s" if per_second >= 1 else f"{1 / per_second:,.1f} s each"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
