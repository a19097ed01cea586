"""The bench of real training: layouts of real ranks take turns, and make the same steps."""

import json

import pytest
from typer.testing import CliRunner

from cluster.commands.bench_training import _counts, _fields, _lines, _result
from cluster.config import Config
from cluster.training_bench import (
    DEFAULT_FIELDS,
    TrainingBenchSettings,
    layout_plan,
    measure_training,
    random_batches,
)
from cluster.training_comparison import Comparison, LayoutResult, Turn
from model.errors import UserError
from model.network import ModelConfig
from pipeline.costs.arithmetic import arithmetic_costs

MODEL = ModelConfig(23, 29, num_layers=2, hidden_size=8, embedding_size=8)
SETTINGS = TrainingBenchSettings(
    MODEL, num_sentences=6, shortest=2, longest=7, num_steps=1, num_rounds=2
)
COSTS = arithmetic_costs(MODEL, 6, 7, 7)
CONFIG = Config.from_dict({**DEFAULT_FIELDS, "training": {"batch_size": 6}})


def test_layouts_of_real_ranks_take_turns_and_agree(ray_cluster: None) -> None:
    given = {"placement": "uneven", "policy": "deferred_weights", "time_chunks": 2}
    plans = {
        "1 rank": layout_plan(CONFIG, 1, {}, COSTS),
        "2 ranks": layout_plan(CONFIG, 2, given, COSTS),
        "2 replicas": layout_plan(CONFIG, 2, {"placement": "single", "replicas": 2}, COSTS),
    }
    found = measure_training(plans, COSTS, SETTINGS)
    assert [result.name for result in found.layouts] == list(plans)
    assert found.ceiling is not None
    assert found.ceiling.num_workers == 2
    assert found.losses_agree
    for result in (*found.layouts, found.ceiling):
        assert result.words_per_second > 0
        # Two rounds of a step to warm up and a timed one.
        assert len(result.losses) == 4
        assert len(result.rank_busy) == result.num_workers
        assert all(busy > 0.0 for busy in result.rank_busy)
        # Torch alone takes more than 100 MB; the tensors of this model next to nothing.
        assert len(result.peak_memory_bytes) == result.num_workers
        assert all(peak > 100e6 for peak in result.peak_memory_bytes)
        assert all(0 < told < 1e6 for told in result.simulated_memory_bytes)
    assert found.layouts[0].speedups == (1.0, 1.0)
    assert [result.bytes_sent > 0 for result in found.layouts] == [False, True, True]
    # Steps change the parameters, so agreement is that of several updates.
    assert len(set(found.layouts[0].losses)) == 4
    _check_output(found)


def _check_output(found: Comparison) -> None:
    result = json.loads(json.dumps(_result(SETTINGS, CONFIG, "a machine", found)))
    assert [layout["ranks"] for layout in result["layouts"]] == [1, 2, 2]
    assert [layout["replicas"] for layout in result["layouts"]] == [1, 1, 2]
    assert result["layouts"][1]["placement"] == "uneven"
    assert result["ceiling"]["trainings"] == 2
    assert result["losses_agree"]
    lines = _lines(SETTINGS, CONFIG, "a machine", found)
    assert sum(line.startswith("2 independent") for line in lines) == 3
    assert lines[-1].startswith("losses agree")


def test_speedups_are_taken_within_a_round() -> None:
    plan = layout_plan(CONFIG, 1, {}, COSTS)
    turns = (_turn(100.0, 1.5), _turn(300.0, 1.4), _turn(200.0, 1.3))
    result = LayoutResult("2 ranks", (plan,), 2.0, turns, (1.9, 1.7, 1.8))
    assert result.words_per_second == 200.0
    assert result.speedup == 1.8
    assert result.losses == (1.5, 1.4, 1.3)
    assert _fields(result)["words_per_cpu_second"] is None


def test_losses_that_differ_are_told() -> None:
    plan = layout_plan(CONFIG, 1, {}, COSTS)
    one = LayoutResult("1 rank", (plan,), 1.0, (_turn(100.0, 2.0),), (1.0,), (1000,))
    other = LayoutResult("2 ranks", (plan,), 2.0, (_turn(100.0, 2.1),), (1.0,), (1000,))
    found = Comparison((one, other), None)
    assert found.loss_difference == pytest.approx(0.05)
    assert not found.losses_agree
    assert "bug" in _lines(SETTINGS, CONFIG, "a machine", found)[-1]


def test_batches_are_the_same_at_every_call_and_as_long_as_asked() -> None:
    batches, again = random_batches(SETTINGS), random_batches(SETTINGS)
    assert all(
        batch.source.equal(other.source) and batch.target.equal(other.target)
        for batch, other in zip(batches, again, strict=True)
    )
    lengths = [int(length) for batch in batches for length in batch.source_lengths]
    assert (min(lengths), max(lengths)) == (2, 7)


def test_the_planner_chooses_where_no_placement_is_given() -> None:
    plan = layout_plan(CONFIG, 2, {}, COSTS)
    assert plan.num_workers == 2
    assert plan.costs == COSTS


@pytest.mark.parametrize(
    ("ranks", "settings", "words"),
    [
        (3, {"placement": "single"}, "single has 1 ranks, where 3 were asked for"),
        (3, {"placement": "uneven", "replicas": 2}, "cannot be shared out"),
    ],
)
def test_impossible_layouts_are_one_line(
    ranks: int, settings: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError, match=words) as error:
        layout_plan(CONFIG, ranks, settings, COSTS)
    assert "\n" not in str(error.value)


def test_ranks_are_a_list_that_always_has_one_rank() -> None:
    assert _counts("4, 2") == [1, 2, 4]
    for wrong in ("", "0,2", "two", "1000"):
        with pytest.raises(UserError, match="is not a list of numbers"):
            _counts(wrong)


def test_a_cut_without_a_placement_is_refused() -> None:
    from cluster.cli import app

    result = CliRunner().invoke(app, ["bench", "training", "--time-chunks", "4"])
    assert isinstance(result.exception, UserError)
    assert "--time-chunks goes with a placement" in str(result.exception)


def _turn(words_per_second: float, loss: float) -> Turn:
    return Turn(words_per_second, None, (0.9,), (0.0,), 0, (loss,), (1_000_000,))
