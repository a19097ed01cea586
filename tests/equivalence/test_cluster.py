"""Real Ray actors must reproduce the single-device trainer, in every layout."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster.worker_group import WorkerGroup
from model.batching import Batch
from model.checkpoint import Checkpoint
from model.checkpoint_folder import checkpoint_name
from model.checkpoint_writer import commit, prepare_staging
from model.loss import LossSum
from model.trainer import Trainer
from pipeline.plan import Plan
from tests.batches import random_batch
from tests.cluster.groups import SMALL_SHARE, info_of, oracle, plan_of, save

CLIP_NORM = 0.8
LEARNING_RATE = 0.7
PLANS: dict[str, Plan] = {
    "single": plan_of("single", m=2, k=2),
    "2+1": plan_of("paper", 2, 1, m=3, k=2),
    "4+4": plan_of("paper", 4, 4, m=2, k=3),
    "2 of single": plan_of("single", m=2, k=2, replicas=2),
    "2 of 1+1": plan_of("paper", 1, 1, m=2, k=3, replicas=2),
}

GroupOf = Callable[[str], WorkerGroup]


@pytest.fixture(scope="module")
def initial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the initial values, so that groups can be shared between tests."""
    return save(oracle(), tmp_path_factory.mktemp("initial"))


@pytest.fixture(scope="module")
def group_of(ray_cluster: None, initial: Path) -> Iterator[GroupOf]:
    """Give a layout's ranks at their initial values; each layout is started once."""
    groups: dict[str, WorkerGroup] = {}

    def get(layout: str) -> WorkerGroup:
        if layout not in groups:
            groups[layout] = WorkerGroup(PLANS[layout], SMALL_SHARE, clip_norm=CLIP_NORM)
            groups[layout].start()
        groups[layout].load(initial)
        return groups[layout]

    yield get
    for group in groups.values():
        group.shutdown()


def batches(number: int = 3) -> list[Batch]:
    """Draw ragged batches, among them one with fewer sentences than microbatches."""
    return [random_batch(7 if seed else 2, seed=seed) for seed in range(number)]


def whole(pieces: dict[str, Tensor]) -> dict[str, Tensor]:
    """Lay the pieces of each parameter together, in the order of their rows."""
    joined: dict[str, list[tuple[int, Tensor]]] = {}
    for key, value in pieces.items():
        name, _, rows = key.partition("[")
        joined.setdefault(name, []).append((int(rows.partition(":")[0] or 0), value))
    return {
        name: torch.cat([value for _, value in sorted(parts, key=lambda part: part[0])])
        for name, parts in joined.items()
    }


def train(group: WorkerGroup) -> tuple[list[LossSum], list[float]]:
    """Make the steps of all batches, all in flight at once."""
    for step, batch in enumerate(batches(), start=1):
        group.submit_step(step, batch, LEARNING_RATE)
    outcomes = [group.collect_step() for _ in batches()]
    return [outcome.loss for outcome in outcomes], [outcome.gradient_norm for outcome in outcomes]


@pytest.mark.parametrize("layout", PLANS)
def test_steps_give_the_loss_the_norm_and_the_parameters_of_one_device(
    group_of: GroupOf, layout: str
) -> None:
    trainer = Trainer(oracle(), CLIP_NORM)
    expected = [trainer.step(batch, LEARNING_RATE) for batch in batches()]
    group = group_of(layout)
    losses, norms = train(group)
    assert [loss.num_tokens for loss in losses] == [e.loss.num_tokens for e in expected]
    assert [loss.total for loss in losses] == pytest.approx(
        [e.loss.total for e in expected], rel=1e-12
    )
    assert norms == pytest.approx([e.gradient_norm for e in expected], rel=1e-10)
    assert any(norm > CLIP_NORM for norm in norms), "no step was clipped"
    found = whole(group.parameters())
    for name, parameter in trainer.model.parameters().items():
        torch.testing.assert_close(found[name], parameter.value, rtol=0, atol=1e-10)
    for replica in range(1, group.plan.num_replicas):
        for key, value in group.parameters(replica).items():
            assert torch.equal(value, group.parameters()[key])


@pytest.mark.parametrize("layout", PLANS)
def test_every_gradient_is_that_of_one_device(group_of: GroupOf, layout: str) -> None:
    batch = random_batch(7, seed=5)
    model = oracle()
    model.loss_and_gradients(batch)
    group = group_of(layout)
    before = whole(group.parameters())
    group.submit_step(1, batch, 1.0)
    norm = group.collect_step().gradient_norm
    after = whole(group.parameters())
    factor = min(1.0, CLIP_NORM / norm) / batch.num_sentences
    for name, parameter in model.parameters().items():
        gradient = (before[name] - after[name]) / factor
        torch.testing.assert_close(gradient, parameter.gradient(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", PLANS)
def test_evaluation_is_that_of_one_device_and_changes_nothing(
    group_of: GroupOf, layout: str
) -> None:
    model = oracle()
    group = group_of(layout)
    before = group.parameters()
    loss = group.evaluate(iter(batches(5)))
    expected = sum((model.loss(batch) for batch in batches(5)), LossSum())
    assert loss.num_tokens == expected.num_tokens
    assert loss.total == pytest.approx(expected.total, rel=1e-12)
    for key, value in group.parameters().items():
        assert torch.equal(value, before[key])


def test_two_runs_give_the_same_bits(group_of: GroupOf) -> None:
    first = train(group_of("4+4")), group_of("4+4").parameters()
    train(group := group_of("4+4"))
    second = group.parameters()
    train(group := group_of("4+4"))
    third = group.parameters()
    assert first[0] == train(group_of("4+4"))
    assert all(torch.equal(second[key], third[key]) for key in second)


def test_a_checkpoint_of_8_ranks_gives_the_same_loss_on_one_device_and_on_3_ranks(
    group_of: GroupOf, tmp_path: Path
) -> None:
    held_out = batches(4)
    group = group_of("4+4")
    train(group)
    loss = group.evaluate(held_out)
    staging = prepare_staging(tmp_path, 3, 1)
    path = commit(
        staging, tmp_path / checkpoint_name(3), info_of(3), group.write_parts(staging), {}
    )
    model = oracle()
    model.load(Checkpoint.open(path).tensors())
    assert sum((model.loss(b) for b in held_out), LossSum()).total == pytest.approx(
        loss.total, rel=1e-12
    )
    for other in ("2+1", "2 of 1+1"):
        loaded = group_of(other)
        loaded.load(path, step=3)
        assert loaded.evaluate(held_out).total == pytest.approx(loss.total, rel=1e-12)


def test_a_checkpoint_of_two_replicas_is_written_once(group_of: GroupOf, tmp_path: Path) -> None:
    group = group_of("2 of 1+1")
    train(group)
    staging = prepare_staging(tmp_path, 3, 1)
    parts = group.write_parts(staging)
    assert len(parts) == 2
    path = commit(staging, tmp_path / checkpoint_name(3), info_of(3), parts, {})
    saved = Checkpoint.open(path).tensors()
    assert all(
        torch.equal(saved[name], value) for name, value in whole(group.parameters(1)).items()
    )


def test_actors_can_change_from_ranks_to_replicas(group_of: GroupOf, initial: Path) -> None:
    trainer = Trainer(oracle(), CLIP_NORM)
    for batch in batches():
        trainer.step(batch, LEARNING_RATE)
    group = group_of("2 of 1+1")
    try:
        for plan in (plan_of("single", k=2, replicas=4), PLANS["2 of 1+1"]):
            group.replan(plan)
            train(group)
            found = whole(group.parameters(1))
            for name, parameter in trainer.model.parameters().items():
                torch.testing.assert_close(found[name], parameter.value, rtol=0, atol=1e-10)
    finally:
        assert group.plan == PLANS["2 of 1+1"]
