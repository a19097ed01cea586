"""From a configuration to a plan with replicas: by name, by the planner, from a saved schedule."""

from pathlib import Path

import pytest

from cluster.config import Config
from cluster.layout import layout_words, plan_of
from model.errors import UserError
from model.network import ModelConfig
from pipeline.schedules.file import SavedSchedule, save_schedule

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
MODEL = ModelConfig(30, 40, num_layers=2, hidden_size=8, embedding_size=8)


def config_of(*overrides: str) -> Config:
    sizes = (
        "model.num_layers=2",
        "model.hidden_size=8",
        "model.embedding_size=8",
        "pipeline.layer_ranks=null",
    )
    return Config.load(QUICKSTART, [*sizes, *overrides])


@pytest.mark.parametrize("placement", ["single", "paper", "split"])
@pytest.mark.parametrize("replicas", [1, 3])
def test_replicas_stand_on_top_of_every_placement(placement: str, replicas: int) -> None:
    layout = f"pipeline.placement={placement}", "pipeline.ranks=4"
    config = config_of(*layout, f"pipeline.replicas={replicas}")
    plan = plan_of(config, MODEL)
    assert plan.num_replicas == replicas
    assert plan.num_workers == config.num_workers == replicas * plan.num_ranks
    alone = plan_of(config_of(*layout), MODEL)
    assert plan.placement == alone.placement


@pytest.mark.parametrize("placement", ["single", "uneven", "auto"])
def test_logits_are_made_twice_where_that_is_set_and_words_are_cut(placement: str) -> None:
    layout = f"pipeline.placement={placement}", "pipeline.ranks=2", "pipeline.recompute_logits=true"
    plan = plan_of(config_of(*layout), MODEL)
    recomputes = {spec.recomputes for spec in plan.blocks if spec.kind == "softmax"}
    assert recomputes == {plan.num_ranks > 1}


@pytest.mark.parametrize(("ranks", "replicas"), [(1, 2), (2, 2)])
def test_the_planner_shares_out_ranks_times_replicas(ranks: int, replicas: int) -> None:
    config = config_of(
        "pipeline.placement=auto", f"pipeline.ranks={ranks}", f"pipeline.replicas={replicas}"
    )
    plan = plan_of(config, MODEL)
    assert plan.num_workers == config.num_workers == ranks * replicas
    assert plan == plan_of(config, MODEL)


def test_a_saved_schedule_that_keeps_logits_does_not_hide_that_others_were_asked_for(
    tmp_path: Path,
) -> None:
    made = plan_of(config_of("pipeline.placement=uneven", "pipeline.ranks=2"), MODEL)
    cuts = made.num_microbatches, made.num_chunks
    path = tmp_path / "schedule.json"
    save_schedule(path, SavedSchedule(made.training.schedule, made.placement, *cuts, made.policy))
    schedule = f"training.schedule={path}"
    assert plan_of(config_of(schedule), MODEL).placement == made.placement
    with pytest.raises(UserError, match=r"recompute_logits=true, but .* keeps them"):
        plan_of(config_of(schedule, "pipeline.recompute_logits=true"), MODEL)


def test_a_saved_schedule_of_one_rank_keeps_no_logits_to_begin_with(tmp_path: Path) -> None:
    made = plan_of(config_of("pipeline.placement=single"), MODEL)
    cuts = made.num_microbatches, made.num_chunks
    path = tmp_path / "schedule.json"
    save_schedule(path, SavedSchedule(made.training.schedule, made.placement, *cuts, made.policy))
    plan = plan_of(config_of(f"training.schedule={path}", "pipeline.recompute_logits=true"), MODEL)
    assert plan.placement == made.placement


def test_every_replica_follows_a_saved_schedule(tmp_path: Path) -> None:
    made = plan_of(config_of("pipeline.placement=paper", "pipeline.ranks=2"), MODEL)
    path = tmp_path / "schedule.json"
    save_schedule(
        path,
        SavedSchedule(
            made.training.schedule,
            made.placement,
            made.num_microbatches,
            made.num_chunks,
            made.policy,
        ),
    )
    config = config_of(f"training.schedule={path}", "pipeline.replicas=3")
    plan = plan_of(config, MODEL)
    assert (plan.num_ranks, plan.num_replicas, config.num_workers) == (2, 3, 6)
    assert plan.training.schedule == made.training.schedule


def test_a_line_tells_replicas_only_where_there_are_some() -> None:
    single = "pipeline.placement=single"
    assert layout_words(plan_of(config_of(single), MODEL)) == "1 rank"
    several = plan_of(config_of(single, "pipeline.replicas=4"), MODEL)
    assert layout_words(several) == "4 replicas of 1 rank"
    paper = plan_of(
        config_of("pipeline.placement=paper", "pipeline.ranks=3", "pipeline.replicas=2"), MODEL
    )
    assert layout_words(paper).startswith("2 replicas of 3 ranks (placement paper), ")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_measurements_the_planner_assumes_a_usual_device(device: str) -> None:
    settings = "pipeline.ranks=2", f"cluster.device={device}"
    # What auto replaces is not held against it.
    replaced = "training.batch_size=4", "pipeline.microbatches=8", "pipeline.time_chunks=1000"
    plan = plan_of(config_of("pipeline.placement=auto", *settings, *replaced), MODEL)
    assert plan.costs is not None
    assert not plan.costs.link.is_free
    assert plan.costs.batch.num_sentences == 4
    assert "(from assumed costs; `baton profile` measures)" in layout_words(plan)
    named = plan_of(config_of("pipeline.placement=paper", *settings), MODEL)
    assert named.costs is None
    assert "assumed" not in layout_words(named)
