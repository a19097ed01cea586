"""The update rule and the oracle: the paper's division, clipping, halving, and determinism."""

import math

import pytest
import torch

from model.network import ModelConfig
from model.optimizer import LearningRateSchedule, NonFiniteGradientError, gradient_scale
from model.precision import Precision
from model.seq2seq import Seq2Seq
from model.trainer import Trainer
from tests.batches import random_batch
from tests.model.autograd_seq2seq import AutogradSeq2Seq

CONFIG = ModelConfig(11, 13, num_layers=2, hidden_size=6, embedding_size=5, init_scale=0.5)


@pytest.mark.parametrize("clip_norm", [None, 1e9, 0.05])
def test_update_follows_the_papers_rule(clip_norm: float | None) -> None:
    model = Seq2Seq(CONFIG, Precision("float64"))
    before = {name: parameter.value.clone() for name, parameter in model.parameters().items()}
    batch = random_batch(4)
    _, sums = AutogradSeq2Seq(CONFIG, before).gradients(batch)
    gradients = {name: value / batch.num_sentences for name, value in sums.items()}
    norm = math.sqrt(sum(float(value.square().sum()) for value in gradients.values()))
    clip = clip_norm / norm if clip_norm is not None and norm > clip_norm else 1.0

    result = Trainer(model, clip_norm).step(batch, learning_rate=0.7)

    assert result.gradient_norm == pytest.approx(norm, rel=1e-10)
    assert (clip < 1.0) == (clip_norm == 0.05)
    for name, parameter in model.parameters().items():
        expected = before[name] - 0.7 * clip * gradients[name]
        torch.testing.assert_close(parameter.value, expected, rtol=0, atol=1e-12)


def test_rate_halves_every_half_epoch_after_five() -> None:
    schedule = LearningRateSchedule()
    rates = [schedule.at(epochs) for epochs in (0.0, 4.99, 5.0, 5.49, 5.5, 6.0, 7.49)]
    assert rates == [0.7, 0.7, 0.35, 0.35, 0.175, 0.0875, 0.7 / 32]


def test_non_finite_gradient_stops_before_the_update() -> None:
    model = Seq2Seq(CONFIG, Precision("float64"))
    model.parameters()["softmax.bias"].value[3] = math.nan
    before = {name: parameter.value.clone() for name, parameter in model.parameters().items()}
    with pytest.raises(NonFiniteGradientError, match="update was not made"):
        Trainer(model).step(random_batch(4), learning_rate=0.7)
    for name, parameter in model.parameters().items():
        assert torch.equal(parameter.value.nan_to_num(), before[name].nan_to_num())
        assert not parameter.gradient().any(), "the next step must not inherit the NaN"


def test_scale_divides_by_sentences_and_clips_at_the_norm() -> None:
    scale = gradient_scale([9.0, 16.0], num_sentences=1, clip_norm=2.0)
    assert (scale.norm, scale.factor) == (5.0, 0.4)
    assert gradient_scale([9.0, 16.0], num_sentences=5, clip_norm=2.0).factor == 0.2


def test_same_seed_gives_the_same_bits() -> None:
    runs = []
    for _ in range(2):
        model = Seq2Seq(CONFIG, seed=5)
        trainer = Trainer(model)
        losses = [trainer.step(random_batch(6, seed=seed), 0.7).loss.total for seed in range(5)]
        runs.append((losses, {name: p.value for name, p in model.parameters().items()}))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


def test_training_learns_a_small_set_by_heart() -> None:
    model = Seq2Seq(ModelConfig(11, 13, 1, hidden_size=24, embedding_size=12))
    trainer = Trainer(model)
    batch = random_batch(8, lengths=(1, 4))
    first = trainer.step(batch, 0.7).loss.mean
    for _ in range(400):
        last = trainer.step(batch, 0.7).loss.mean
    assert first > 2.0
    assert last < 0.1
