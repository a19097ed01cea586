"""Schedules come back from their files, and files that do not fit are refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from pipeline.graph import build_graph
from pipeline.plan import Plan
from pipeline.schedules.file import SavedSchedule, load_schedule, save_schedule
from pipeline.schedules.policies import POLICIES
from pipeline.schedules.schedule import ScheduleError, validate
from tests.pipeline.plans import small_model, small_plan


def saved_of(plan: Plan) -> SavedSchedule:
    cuts = plan.num_microbatches, plan.num_chunks
    return SavedSchedule(plan.training.schedule, plan.placement, *cuts, plan.policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_schedule_comes_back_with_its_placement(tmp_path: Path, policy: str) -> None:
    plan = small_plan((2, 2), policy=policy, num_microbatches=2, num_chunks=3)
    save_schedule(tmp_path / "schedule.json", saved_of(plan))
    loaded = load_schedule(tmp_path / "schedule.json")
    assert loaded == saved_of(plan)
    assert loaded.graph(plan.model) == plan.training.graph


def test_whether_logits_are_made_twice_is_kept(tmp_path: Path) -> None:
    plan = small_plan((2, 2))
    placement = replace(plan.placement, recomputes_logits=True)
    save_schedule(tmp_path / "schedule.json", saved_of(replace(plan, placement=placement)))
    assert load_schedule(tmp_path / "schedule.json").placement == placement


def test_its_forward_part_runs_the_evaluation() -> None:
    plan = small_plan((2, 2), policy="1f1b", num_microbatches=3, num_chunks=2)
    graph = build_graph(plan.blocks, 3, 2, training=False)
    validate(plan.training.schedule.forward_only(), graph, plan.placement)


def test_a_schedule_of_another_model_is_refused(tmp_path: Path) -> None:
    save_schedule(tmp_path / "schedule.json", saved_of(small_plan((2, 2))))
    with pytest.raises(UserError, match=r"num_layers=4"):
        load_schedule(tmp_path / "schedule.json").graph(small_model(num_layers=4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 0}, "version 0"),
        ({"ranks": [["F loss"]]}, "damaged"),
        ({"ranks": [["X loss 0 0"]]}, "damaged"),
        ({"microbatches": 0}, "damaged"),
        ({"placement": {}}, "damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "schedule.json"
    save_schedule(path, saved_of(small_plan((2, 2))))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ScheduleError, match=words):
        load_schedule(path)


def test_an_edited_order_is_checked_against_the_graph(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    save_schedule(path, saved_of(small_plan((2, 2))))
    content = json.loads(path.read_text())
    content["ranks"][0].reverse()
    path.write_text(json.dumps(content))
    with pytest.raises(ScheduleError, match="never ends"):
        load_schedule(path).graph(small_model())
