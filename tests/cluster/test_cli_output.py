"""What is printed: progress as lines or bars, results as text or strict JSON."""

import io
import json
import math
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress

from cluster.commands.output import json_line, print_result, reserved_stdout, sample_lines, table
from cluster.commands.progress import PlainProgress, RichProgress, progress_bar, progress_display


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


def run(amounts: list[int], total: int | None, seconds_each: float) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    progress = PlainProgress(stream, "pairs", clock)
    for amount in amounts:
        progress("encode", amount, total)
        clock.now_s += seconds_each
    return stream.getvalue().splitlines()


def test_first_and_last_amounts_are_always_told() -> None:
    assert run([0, 1, 2, 3], 3, 0.2) == [
        "encode: 0 of 3 (0%) pairs",
        "encode: 3 of 3 (100%) pairs, 5.0/s, took 1 s",
    ]


def test_slow_work_is_told_every_five_seconds() -> None:
    lines = run(list(range(0, 13)), 1000, 1.0)
    assert [line.split(" of ")[0] for line in lines] == ["encode: 0", "encode: 5", "encode: 10"]
    assert lines[1] == "encode: 5 of 1,000 (0%) pairs, 1.0/s, 16 min 35 s left"


def test_fast_work_is_told_every_tenth() -> None:
    lines = run(list(range(0, 101, 5)), 100, 1.0)
    assert len(lines) == 11


def test_unknown_total_has_no_share() -> None:
    assert run([0, 6000], None, 6.0)[-1] == "encode: 6,000 pairs, 1,000.0/s"


def test_end_is_told_once() -> None:
    assert len(run([0, 3, 3, 3], 3, 9.0)) == 2


def test_phase_can_begin_again() -> None:
    assert len(run([0, 3, 0, 3], 3, 9.0)) == 4


@given(st.lists(st.integers(0, 50), max_size=30), st.floats(0, 20))
def test_lines_never_come_faster_than_once_a_second(steps: list[int], seconds_each: float) -> None:
    amounts = sorted(steps)
    lines = run(amounts, 100, seconds_each)
    # The first line is free, and no amount reaches the total, so there is no last one.
    assert len(lines) <= 1 + seconds_each * len(amounts)


def test_bars_show_phases_on_a_terminal() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with Progress(console=console) as progress:
        display = RichProgress(progress, "pairs")
        display("[read]", 1, None)
        display("encode", 1, 4)
        display("encode", 4, 4)
        display.message("a [note]")
    assert "a [note]" in stream.getvalue()
    assert [(task.completed, task.total) for task in progress.tasks] == [(1, None), (4, 4)]


def test_bar_counts_one_piece_of_work() -> None:
    stream = io.StringIO()
    with progress_bar("load", 2, "parts", stream) as bar:
        bar.update(2)
    assert stream.getvalue().splitlines()[0] == "load: 0 of 2 (0%) parts"
    assert "2 of 2 (100%)" in stream.getvalue()


def test_messages_are_lines() -> None:
    stream = io.StringIO()
    with progress_display(stream=stream) as display:
        display.message("a note")
    assert stream.getvalue() == "a note\n"


def test_prints_of_libraries_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with reserved_stdout() as stdout:
        print("a worker's chatter")
    assert stdout is sys.stdout
    print_result(stdout, as_json=True, result={"a": 1}, lines=["for people"])
    out, err = capsys.readouterr()
    assert (out, err) == ('{"a": 1}\n', "a worker's chatter\n")


def test_people_get_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(sys.stdout, as_json=False, result={"a": 1}, lines=["for", "people"])
    assert capsys.readouterr().out == "for\npeople\n"


def test_json_is_strict_and_on_one_line() -> None:
    line = json_line({"loss": math.nan, "nested": [{"inf": math.inf}], "text": "a\nb é"})
    assert json.loads(line) == {"loss": None, "nested": [{"inf": None}], "text": "a\nb é"}
    assert "\n" not in line


def test_table_lines_up() -> None:
    assert table([("bleu", 12.345), ("num_pairs", 1234), ("done", True)]) == [
        "  bleu       12.35",
        "  num_pairs  1,234",
        "  done       yes",
    ]


def test_samples_stand_beside_their_references() -> None:
    lines = list(sample_lines([{"source": "a", "hypothesis": "b", "reference": "c"}]))
    assert [line.split()[-1] for line in lines] == ["a", "b", "c"]
