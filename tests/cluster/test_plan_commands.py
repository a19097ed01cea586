"""The commands simulate and plan, and the layouts that a configuration can name."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cluster import cli
from cluster.config import Config, ConfigError
from cluster.config.sections import PLACEMENT_NAMES, PipelineConfig
from cluster.layout import layout_words, plan_of
from model.batching import make_batch
from model.errors import UserError
from model.network import ModelConfig
from pipeline.costs.arithmetic import arithmetic_costs
from pipeline.costs.file import save_costs
from pipeline.costs.operation_costs import BatchShape, Costs, CostsError, Link
from pipeline.in_process import InProcessPipeline
from pipeline.placements.named import PLACEMENTS
from pipeline.placements.placement import PlacementError
from pipeline.schedules.file import load_schedule
from pipeline.schedules.policies import POLICIES
from pipeline.schedules.schedule import ScheduleError, validate
from tests.pipeline.plans import assert_tensors_close, oracle_step

CONFIGS = Path(__file__).parents[2] / "configs"
PAPER, QUICKSTART = str(CONFIGS / "paper.yaml"), str(CONFIGS / "quickstart.yaml")
# As small as a plan can be that is still one.
SMALL = [
    "model.num_layers=2",
    "model.hidden_size=8",
    "model.embedding_size=8",
    "corpus.source_vocabulary.size=30",
    "corpus.target_vocabulary.size=40",
    "training.batch_size=4",
    "pipeline.layer_ranks=null",
    "pipeline.softmax_ranks=1",
    "pipeline.time_chunks=3",
]
MODEL = ModelConfig(30, 40, num_layers=2, hidden_size=8, embedding_size=8)
BY_HAND = """
shards: [10, 30]
blocks:
  "encoder.*": 0
  "decoder.*": 1
  "*_embedding": 0
  "softmax.0": 1
  "softmax.1": 2
  "loss": 2
"""


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def as_json(*arguments: str) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def small_config(*overrides: str) -> Config:
    return Config.load(QUICKSTART, [*SMALL, *overrides])


@pytest.mark.parametrize(("placement", "expected"), [("split", 7.70), ("paper", 6.25)])
def test_simulate_reaches_the_known_speedups(placement: str, expected: float) -> None:
    arguments = "--devices 8 --policy deferred_weights --microbatches 1 --time-chunks 29"
    lengths = "--costs arithmetic --source-length 29 --target-length 29"
    found = as_json(
        "simulate", PAPER, "--placement", placement, *arguments.split(), *lengths.split()
    )
    assert found["speedup"] >= expected
    assert found["efficiency"] == pytest.approx(found["speedup"] / 8)
    assert found["step_seconds"] == pytest.approx(1 / found["speedup"])
    assert found["time_unit"] == "step of one device"
    assert [rank["rank"] for rank in found["ranks"]] == list(range(8))
    busy = sum(rank["busy_fraction"] for rank in found["ranks"]) / 8
    assert found["bubble_fraction"] == pytest.approx(1 - busy)
    assert sum(rank["bytes_sent"] for rank in found["ranks"]) == found["bytes_sent"] > 0


def test_simulate_takes_what_is_not_given_from_the_configuration() -> None:
    found = as_json("simulate", PAPER)
    assert (found["placement"], found["policy"]) == ("paper", "wavefront")
    assert (found["microbatches"], found["time_chunks"], found["devices"]) == (1, 4, 8)


def test_simulate_prints_a_line_for_each_rank_and_a_grid() -> None:
    result = invoke("simulate", QUICKSTART, *SMALL, "--grid")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("3 ranks (placement paper), wavefront schedule")
    assert "speedup" in lines[1]
    assert sum(line.startswith("rank ") and "|" in line for line in lines) == 3
    assert "messages take no time" in result.stdout


def test_a_rate_and_a_link_make_seconds_and_messages_count() -> None:
    at_once = as_json("simulate", PAPER, "--device-tflops", "20")
    assert at_once["time_unit"] == "second"
    slowed = as_json(
        "simulate",
        PAPER,
        *("--device-tflops", "20", "--link-gb-per-s", "1", "--link-latency-us", "50"),
    )
    assert slowed["step_seconds"] > at_once["step_seconds"]
    assert slowed["one_device_seconds"] == pytest.approx(at_once["one_device_seconds"])


def test_measured_costs_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    costs = arithmetic_costs(MODEL, 4, 7, 9, one_device_step_s=2.0, link=Link(1e-3, 1e6))
    save_costs(path, costs)
    found = as_json("simulate", QUICKSTART, *SMALL, "--costs", str(path))
    assert found["one_device_seconds"] == pytest.approx(2.0)
    assert "7 + 9 positions" in found["costs"]
    longer = as_json("simulate", QUICKSTART, *SMALL, "--costs", str(path), "--source-length", "70")
    assert longer["one_device_seconds"] > 2.0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--link-gb-per-s", "10"], "a link needs --device-tflops"),
        (["--placement", "papr"], "pipeline.placement is 'papr'; use one of single, paper"),
        (["--policy", "zigzag"], "it must be one of 'fill_drain', 'wavefront'"),
        (["--devices", "1"], "pipeline.ranks=1 is too few for pipeline.placement=paper"),
        (["--microbatches", "1000"], "pipeline.microbatches=1000 is more than"),
        (["--costs", "/nowhere/costs.json"], "cannot read /nowhere/costs.json"),
        (
            ["--devices", "8", "--placement", "single"],
            "placement single has 1 rank, where --devices=8 were asked for; add --replicas 8 or",
        ),
        (
            ["--placement", "auto", "--policy", "1f1b"],
            "--policy=1f1b would be ignored, since with placement auto the planner chooses it",
        ),
        (
            ["training.precision=float32", "--memory-gb", "0.5"],
            "rank 0 would hold 1,318,464,000 bytes",
        ),
        (["--save-schedule", "."], "cannot write the schedule file .: it is a folder"),
        (["--save-schedule", "/dev/null/x"], "/dev/null is no folder"),
        (["--source-length", "200", "--time-chunks", "201"], "more than the 200 positions"),
    ],
)
def test_simulate_tells_mistakes_in_a_line(arguments: list[str], expected: str) -> None:
    result = invoke("simulate", PAPER, *arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, UserError)
    assert expected in str(result.exception)
    assert "\n" not in str(result.exception)


def test_a_saved_schedule_is_simulated_and_trained_with_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "schedule.json"
    made = as_json(
        "simulate",
        *(QUICKSTART, *SMALL, "--placement", "split", "--policy", "priority_list"),
        *("--devices", "4", "--save-schedule", str(path)),
    )
    assert made["devices"] == load_schedule(path).placement.num_ranks == 4
    config = small_config(f"training.schedule={path}", "pipeline.policy=fill_drain")
    assert config.num_ranks == 4
    plan = plan_of(config, MODEL)
    assert plan.training.schedule == load_schedule(path).schedule
    assert plan.num_chunks == 3
    validate(plan.evaluation.schedule, plan.evaluation.graph, plan.placement)
    assert "a saved schedule" in layout_words(plan)
    again = as_json("simulate", QUICKSTART, *SMALL, f"training.schedule={path}")
    assert again["speedup"] == pytest.approx(made["speedup"])
    with pytest.raises(PlacementError):
        plan_of(config, ModelConfig(30, 40, num_layers=3, hidden_size=8, embedding_size=8))


def test_a_saved_schedule_travels_with_its_plan(tmp_path: Path) -> None:
    import pickle

    path = tmp_path / "schedule.json"
    invoke("simulate", QUICKSTART, *SMALL, "--save-schedule", str(path))
    plan = plan_of(small_config(f"training.schedule={path}"), MODEL)
    moved = pickle.loads(pickle.dumps(plan))
    assert moved.training.schedule == plan.training.schedule


def test_a_step_of_a_saved_schedule_is_the_one_device_step(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    invoke(
        "simulate",
        *(QUICKSTART, *SMALL, "--placement", "uneven", "--policy", "deferred_weights"),
        *("--devices", "3", "--microbatches", "2", "--save-schedule", str(path)),
    )
    plan = plan_of(small_config(f"training.schedule={path}", "training.precision=float64"), MODEL)
    batch = make_batch([([3, 4, 5], [6, 7]), ([8], [9, 10, 11, 12]), ([2], [3])])
    pipeline = InProcessPipeline(plan)
    result = pipeline.train_step(batch, 0.7, 5.0)
    expected = oracle_step(plan, batch, 0.7, 5.0)
    assert result.loss.total == pytest.approx(expected.loss_sum, rel=1e-10)
    updated = pipeline.whole(lambda parameter: parameter.value)
    assert_tensors_close(updated, expected.updated, tolerance=1e-10)
    assert pipeline.evaluate(batch).num_tokens == expected.num_tokens


def test_a_schedule_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ScheduleError, match="no baton schedule file"):
        _ = small_config(f"training.schedule={path}").num_ranks


def test_plan_ranks_layouts_and_always_has_the_paper_and_data_parallelism() -> None:
    found = as_json("plan", QUICKSTART, *SMALL, "--devices", "4", "--top", "1")
    names = [candidate["placement"] for candidate in found["candidates"]]
    assert {"paper", "data_parallel"} <= set(names)
    rival = next(c for c in found["candidates"] if c["placement"] == "data_parallel")
    assert (rival["replicas"], rival["ranks"], rival["devices"]) == (4, 1, 4)
    speedups = [candidate["speedup"] for candidate in found["candidates"]]
    assert speedups == sorted(speedups, reverse=True)
    assert all(candidate["why"] for candidate in found["candidates"])


def test_the_overrides_of_every_candidate_give_its_layout() -> None:
    link = ("--device-tflops", "0.001", "--link-gb-per-s", "0.01", "--link-latency-us", "1")
    found = as_json("plan", QUICKSTART, *SMALL, "--devices", "4", *link)
    assert found["overrides"] == found["best"]["overrides"]
    assert len({(c["ranks"], c["replicas"]) for c in found["candidates"]}) >= 3
    for candidate in found["candidates"]:
        again = as_json("simulate", QUICKSTART, *SMALL, *candidate["overrides"], *link)
        for key in ("devices", "replicas", "policy", "exposed_exchange_seconds", "bytes_sent"):
            assert again[key] == pytest.approx(candidate[key]), (key, candidate)
        assert again["speedup"] == pytest.approx(candidate["speedup"])


def test_simulate_shares_devices_among_replicas() -> None:
    link = ("--device-tflops", "10", "--link-gb-per-s", "10", "--link-latency-us", "20")
    arguments = (PAPER, "--placement", "separate", "--devices", "8")
    one = as_json("simulate", *arguments, *link)
    assert (one["replicas"], one["exposed_exchange_seconds"]) == (1, 0.0)
    two = as_json("simulate", *arguments, "--replicas", "2", *link)
    assert (two["devices"], two["replicas"], len(two["ranks"])) == (8, 2, 4)
    assert two["exposed_exchange_seconds"] > 0.0
    assert two["efficiency"] == pytest.approx(two["speedup"] / 8)
    again = as_json("simulate", *arguments, "pipeline.replicas=2", *link)
    assert again["speedup"] == two["speedup"]
    printed = invoke("simulate", *arguments, "--replicas", "2", *link).stdout
    assert "2 replicas on 8 devices" in printed
    odd = invoke("simulate", *arguments, "--replicas", "3")
    assert "--devices=8 cannot be shared evenly by 3 replicas" in str(odd.exception)


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        (
            (),
            "Recommended where messages are free: data parallelism, the whole model on each of 8 "
            "devices.",
        ),
        (
            ("--device-tflops", "10", "--link-gb-per-s", "10", "--link-latency-us", "20"),
            "Recommended: placement separate over 8 devices.",
        ),
    ],
)
def test_plan_recommends_at_the_top(link: tuple[str, ...], expected: str) -> None:
    text = invoke("plan", PAPER, "training.precision=float32", "--devices", "8", *link).stdout
    assert expected in text.split("\n\n")[1].replace("\n", " ")
    assert ("Messages and sums of gradients take no time here" in text) == (not link)
    assert "pipeline.replicas=" in text


@pytest.mark.parametrize("columns", [80, 100])
def test_plan_reads_well(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    result = invoke("plan", PAPER, "--devices", "8", "--memory-gb", "2")
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert "Recommended where messages are free: placement split over" in text
    assert "What the columns say:" in text
    assert "Who owns what" in text
    assert "pipeline.placement=split" in text
    assert "! more than the 2 GB that a device may hold" in text
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    table = text.split("\n\n")[2].splitlines()
    assert max(map(len, table)) <= 80
    assert table[0].split()[:4] == ["placement", "replicas", "policy", "M"]


def test_a_plan_that_fits_nowhere_is_refused_in_a_line() -> None:
    result = invoke("plan", QUICKSTART, *SMALL, "--devices", "2", "--memory-gb", "0.001")
    found = invoke("plan", PAPER, "--devices", "2", "--memory-gb", "0.5")
    assert result.exit_code == 0, result.output
    assert found.exit_code == 1
    assert "no layout fits the memory bound" in str(found.exception)


def test_the_configuration_knows_the_names_of_placements_and_policies() -> None:
    assert (*PLACEMENTS, "auto") == PLACEMENT_NAMES
    options = PipelineConfig.model_fields["policy"].annotation
    assert set(POLICIES) == set(getattr(options, "__args__", ()))


@pytest.mark.parametrize("placement", [*PLACEMENTS, "auto"])
@pytest.mark.parametrize("ranks", ["null", "4"])
def test_the_configuration_counts_the_ranks_that_the_plan_has(placement: str, ranks: str) -> None:
    config = small_config(f"pipeline.placement={placement}", f"pipeline.ranks={ranks}")
    assert config.num_workers == plan_of(config, MODEL).num_workers


def test_auto_chooses_the_same_layout_each_time() -> None:
    config = small_config("pipeline.placement=auto", "pipeline.ranks=3")
    first, second = plan_of(config, MODEL), plan_of(config, MODEL)
    assert first == second
    assert first.num_workers == 3


def test_a_placement_by_hand_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(BY_HAND, encoding="utf-8")
    config = small_config(f"pipeline.placement={path}")
    plan = plan_of(config, MODEL)
    assert config.num_ranks == plan.num_ranks == 3
    assert plan.placement.name == "mine"
    assert plan.placement.shards == ((0, 10), (10, 40))
    assert plan.placement.rank_of["decoder.1.projection"] == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("blocks: {}", "blocks is empty"),
        ("blocks: {loss: -1}", "it must be at least 0"),
        ("block: {loss: 0}", "unknown key block; did you mean blocks?"),
        ("blocks: {loss: 0}\nshards: 0", "at least 1"),
    ],
)
def test_a_bad_placement_file_is_told_with_its_line(
    tmp_path: Path, text: str, expected: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        _ = small_config(f"pipeline.placement={path}").num_ranks
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["pipeline.placement=split", "pipeline.ranks=1"], "pipeline.ranks=1 is too few"),
        (["pipeline.ranks=2", "pipeline.layer_ranks=2"], "leaves no rank of pipeline.ranks=2"),
        (["pipeline.placement=uneven", "pipeline.layer_ranks=3"], "more than model.num_layers=2"),
        (["pipeline.ranks=0"], "pipeline.ranks is 0; it must be at least 1"),
    ],
)
def test_layouts_that_cannot_work_are_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small_config(*overrides)
    assert expected in str(caught.value)
    assert len(caught.value.problems) == 1


def test_costs_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    costs: Costs = arithmetic_costs(ModelConfig(30, 40, 2, 9, 8), 4, 7, 9)
    save_costs(path, costs)
    config = small_config(f"pipeline.costs={path}", "pipeline.placement=split", "pipeline.ranks=2")
    with pytest.raises(CostsError, match="hidden_size 9, not 8"):
        plan_of(config, MODEL)


def test_costs_serve_other_vocabularies_and_batches_but_no_other_precision(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    save_costs(path, arithmetic_costs(ModelConfig(31, 41, 2, 8, 8), 9, 7, 6))
    settings = f"pipeline.costs={path}", "pipeline.placement=split", "pipeline.ranks=2"
    plan = plan_of(small_config(*settings), MODEL)
    assert plan.costs is not None
    assert plan.costs.model == MODEL
    assert plan.costs.batch == BatchShape(4, 7, 6)
    with pytest.raises(CostsError, match="float32, not of training.precision=bfloat16"):
        plan_of(small_config(*settings, "training.precision=bfloat16"), MODEL)


def test_one_half_of_a_link_leaves_the_other_as_it_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    save_costs(path, arithmetic_costs(MODEL, 4, 7, 9, link=Link(1e-3, 2e9)))
    arguments = (QUICKSTART, *SMALL, "--costs", str(path))
    found = as_json("simulate", *arguments, "--link-latency-us", "5")
    assert "messages 5 us + 2 GB/s" in found["costs"]
    found = as_json("simulate", *arguments, "--link-gb-per-s", "7")
    assert "messages 1000 us + 7 GB/s" in found["costs"]


def test_given_lengths_allow_as_many_time_chunks() -> None:
    lengths = "--source-length", "200", "--time-chunks", "100"
    assert as_json("simulate", QUICKSTART, *SMALL, *lengths)["time_chunks"] == 100


def test_a_saved_schedule_and_options_of_the_layout_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    as_json("simulate", QUICKSTART, *SMALL, "--save-schedule", str(path))
    result = invoke(
        "simulate", QUICKSTART, *SMALL, f"training.schedule={path}", "--time-chunks", "2"
    )
    assert "--time-chunks=2 would be ignored" in str(result.exception)


def test_a_plan_keeps_the_costs_that_it_counts_with(tmp_path: Path) -> None:
    link = ("--device-tflops", "0.001", "--link-gb-per-s", "0.01", "--link-latency-us", "1")
    arguments = (QUICKSTART, *SMALL, "--devices", "2", *link)
    path = tmp_path / "costs.json"
    found = as_json("plan", *arguments, "--save-costs", str(path))
    assert f"pipeline.costs={path}" in found["overrides"]
    again = as_json("simulate", QUICKSTART, *SMALL, *found["overrides"])
    assert again["speedup"] == pytest.approx(found["best"]["speedup"])
    assert (again["time_unit"], again["costs"]) == ("second", found["costs"])
    assert "--save-costs FILE" in invoke("plan", *arguments).stdout


def test_profile_looks_at_its_output_before_it_measures(tmp_path: Path) -> None:
    result = invoke("profile", QUICKSTART, "--output", str(tmp_path))
    assert isinstance(result.exception, UserError)
    assert "it is a folder; name another file" in str(result.exception)


def test_precision_auto_is_that_of_the_costs(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    for precision in ("float32", "bfloat16"):
        settings = [*SMALL, f"training.precision={precision}"]
        invoke("plan", QUICKSTART, *settings, "--devices", "2", "--save-costs", str(path))
        found = as_json("simulate", QUICKSTART, *SMALL, "--costs", str(path))
        same = as_json("simulate", QUICKSTART, *settings, "--costs", str(path))
        assert found == same
        other = "float32" if precision == "bfloat16" else "bfloat16"
        given = [*SMALL, f"training.precision={other}"]
        refused = invoke("simulate", QUICKSTART, *given, "--costs", str(path))
        assert f"of precision {precision}, not of training.precision={other}" in str(
            refused.exception
        )
