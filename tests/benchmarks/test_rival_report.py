"""What the contest makes of its figures: verdicts, the limit, disagreement, failures, options."""

import multiprocessing
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import benchmarks.rivals.processes as processes
from benchmarks.rivals.__main__ import main
from benchmarks.rivals.agreement import agreements
from benchmarks.rivals.contest import Contest
from benchmarks.rivals.plot import plot
from benchmarks.rivals.processes import Place, ProcessError, run_processes
from benchmarks.rivals.report import report
from tests.benchmarks.contests import contest_of


def page(contest: Contest) -> str:
    return report(contest, "the command", "a machine", "", "plot.svg")


def test_an_aim_above_the_products_is_called_out_of_reach() -> None:
    text = page(contest_of({"plain padded": 0.6, "ddp": 0.5, "ours 1 rank": 0.9}))
    assert "nobody could be more than 1.67 times as fast" in text
    assert (
        "Aim: 2 times the best rival. ours 1 rank, float32 is at 1.50: missed, and out of" in text
    )
    assert "1.2 times what the large product allows" in text
    assert (
        "Aim: a step at 50% of the large product. ours 1 rank, float32 is at 90%: reached" in text
    )


def test_an_aim_that_is_met_is_said_to_be() -> None:
    text = page(contest_of({"plain padded": 0.2, "ours 2 ranks": 0.45}))
    assert "ours 2 ranks, float32 is at 2.25: reached." in text
    assert "ours 2 ranks, float32 is at 45%: missed" in text


def test_the_best_rival_stands_out_and_ratios_are_to_it() -> None:
    text = page(contest_of({"plain padded": 0.2, "ddp": 0.4, "ours 1 rank": 0.6}))
    cells = [line.split(" | ") for line in text.splitlines()]
    rows = {row[0]: row for row in cells if len(row) == 8}
    assert rows["| **ddp, float32**"][3] == "1.00"
    assert rows["| plain padded, float32"][3] == "0.50"
    assert rows["| ours 1 rank, float32"][3] == "1.50"


def test_contestants_that_train_something_else_are_named() -> None:
    contest = contest_of({"plain padded": 0.5, "ddp": 0.5, "ours 1 rank": 0.5}, {"ddp": 4.1})
    assert [each.entry.contestant.name for each in agreements(contest) if not each.holds] == ["ddp"]
    assert "**No: ddp, float32 differ by more than rounding" in page(contest)


def test_one_contestant_alone_is_not_said_to_agree() -> None:
    text = page(contest_of({"ours 1 rank": 0.5}))
    assert "nothing to compare" in text
    assert "Yes" not in text


def test_who_fails_is_reported_with_the_reason() -> None:
    contest = contest_of({"plain padded": 0.5, "ours 1 rank": 0.5, "ddp": 0.5})
    contest.entries[2].turns.clear()
    contest.entries[2].problem = "process 0: RuntimeError: no such primitive"
    text = page(contest)
    assert "| ddp, float32 | 2 processes x 1 thread | does not run here |" in text
    assert "ddp, float32 failed: `process 0: RuntimeError: no such primitive`" in text


def test_the_plot_has_a_bar_for_everybody() -> None:
    root = ET.fromstring(plot(contest_of({"plain padded": 0.5, "ddp": 0.25, "ours 1 rank": 0.8})))
    bars = [float(each.get("width", "0")) for each in root.iter("{http://www.w3.org/2000/svg}rect")]
    ground, *widths = bars
    assert ground > sum(widths) / 2
    assert widths[1] == pytest.approx(widths[0] / 2, abs=0.02)
    assert widths[2] == pytest.approx(widths[0] * 1.6, abs=0.02)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "1"], "--steps=1 is too few; use 2 or more"),
        (["--batch-size", "6"], "--batch-size=6 cannot be cut into four microbatches"),
        (["--contestants", "ddp,gpipe"], "--contestants names 'gpipe', which is nobody"),
        (["--vocabulary", "many"], "--vocabulary=many is not one number of words"),
        (["--formats", "float8"], "precision 'float8' is unknown"),
    ],
)
def test_wrong_options_are_one_line(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.md"
    assert main([*options, "--output", str(output)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {said}")
    assert printed.count("\n") == 1
    assert not output.exists()


def fail_on_rank_1(place: Place) -> int:
    if place.index == 1:
        raise ValueError("a long story\nno memory")
    return place.index


def test_the_first_failure_of_a_process_is_told() -> None:
    with pytest.raises(ProcessError, match="process 1: ValueError: no memory"):
        run_processes(fail_on_rank_1, num_processes=2, num_threads=1)


def hang_on_rank_1(place: Place) -> int:
    time.sleep(3600 if place.index == 1 else 0)
    return place.index


def test_a_process_that_says_nothing_is_named_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_TURN_TIMEOUT_S", 20.0)
    with pytest.raises(ProcessError, match="process 1 said nothing for 20 s"):
        run_processes(hang_on_rank_1, num_processes=2, num_threads=1)
    assert not multiprocessing.active_children()
