"""The hand-written operations against torch.nn.LSTM and autograd, in float64."""

import pytest
import torch

from model.network import ModelConfig
from model.precision import Precision
from model.seq2seq import Seq2Seq
from model.vocabulary import EOS_ID
from tests.batches import random_batch
from tests.model.autograd_seq2seq import AutogradSeq2Seq
from tests.model.decoder_oracle import decode_step

CONFIG = ModelConfig(11, 13, num_layers=3, hidden_size=7, embedding_size=5, init_scale=0.5)


def build(config: ModelConfig, precision: str = "float64", seed: int = 3) -> Seq2Seq:
    return Seq2Seq(config, Precision(precision), seed=seed)


@pytest.mark.parametrize("lengths", [(0, 9), (1, 1), (0, 0), (6, 6)])
@pytest.mark.parametrize("num_pairs", [1, 6])
def test_loss_and_every_gradient_equal_autograd(num_pairs: int, lengths: tuple[int, int]) -> None:
    model = build(CONFIG)
    batch = random_batch(num_pairs, lengths=lengths)
    values = {name: parameter.value for name, parameter in model.parameters().items()}
    expected_loss, expected = AutogradSeq2Seq(CONFIG, values).gradients(batch)

    loss = model.loss_and_gradients(batch)

    assert loss.num_tokens == batch.num_target_tokens
    assert loss.total == pytest.approx(expected_loss, rel=1e-12)
    for name, parameter in model.parameters().items():
        torch.testing.assert_close(parameter.gradient(), expected[name], rtol=0, atol=1e-10)


def test_peephole_gradients_equal_finite_differences() -> None:
    config = ModelConfig(11, 13, 2, hidden_size=4, embedding_size=3, peepholes=True, init_scale=0.5)
    model = build(config)
    batch = random_batch(5)
    model.loss_and_gradients(batch)
    epsilon = 1e-6
    for name, parameter in model.parameters().items():
        flat, gradient = parameter.value.view(-1), parameter.gradient().reshape(-1).clone()
        for index in range(0, flat.numel(), max(1, flat.numel() // 5)):
            before = float(flat[index])
            flat[index] = before + epsilon
            above = model.loss(batch).total
            flat[index] = before - epsilon
            below = model.loss(batch).total
            flat[index] = before
            slope = (above - below) / (2 * epsilon)
            assert slope == pytest.approx(float(gradient[index]), abs=1e-6), (name, index)


def test_peepholes_change_the_loss_and_have_the_documented_shape() -> None:
    config = ModelConfig(11, 13, 2, hidden_size=4, embedding_size=3, peepholes=True, init_scale=0.5)
    assert config.parameter_shapes()["decoder.1.peephole"] == (3, 4)
    with_peepholes, without = build(config), build(ModelConfig(11, 13, 2, 4, 3, False, 0.5))
    batch = random_batch(4)
    assert with_peepholes.loss(batch).total != without.loss(batch).total


def test_padding_does_not_change_the_encoder_states() -> None:
    model = build(CONFIG)
    batch = random_batch(6, lengths=(0, 9), seed=4)
    together = model.encode(batch.source, batch.source_lengths)
    for row in range(batch.num_sentences):
        length = int(batch.source_lengths[row])
        alone = model.encode(batch.source[row : row + 1, :length], batch.source_lengths[[row]])
        torch.testing.assert_close(together.hidden[:, row], alone.hidden[:, 0], rtol=0, atol=1e-12)
        torch.testing.assert_close(together.cell[:, row], alone.cell[:, 0], rtol=0, atol=1e-12)


def test_decode_steps_give_the_probabilities_of_the_loss() -> None:
    model = build(CONFIG)
    batch = random_batch(5)
    state = model.encode(batch.source, batch.source_lengths)
    read = torch.cat([torch.full((5, 1), EOS_ID), batch.target], dim=1)
    total = 0.0
    for position in range(batch.target_positions):
        log_probabilities, state = decode_step(model, read[:, position], state)
        chosen = log_probabilities.gather(1, batch.target[:, position, None])[:, 0]
        total -= float(chosen[batch.target_lengths > position].sum())
    assert total == pytest.approx(model.loss(batch).total, rel=1e-12)


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_lower_precision_agrees_to_rounding(precision: str, tolerance: float) -> None:
    exact, rounded = build(CONFIG), build(CONFIG, precision)
    batch = random_batch(6)
    expected, loss = exact.loss_and_gradients(batch), rounded.loss_and_gradients(batch)
    assert loss.total == pytest.approx(expected.total, rel=tolerance)
    for name, parameter in rounded.parameters().items():
        gradient = exact.parameters()[name].gradient()
        error = (parameter.gradient().double() - gradient).norm() / gradient.norm()
        assert float(error) < tolerance, name


def test_master_weights_of_bfloat16_stay_float32() -> None:
    model = build(CONFIG, "bfloat16")
    weight = model.parameters()["encoder.0.weight_ih"]
    assert (weight.value.dtype, weight.compute.dtype) == (torch.float32, torch.bfloat16)
    model.loss_and_gradients(random_batch(3))
    weight.descend(0.1)
    torch.testing.assert_close(weight.compute, weight.value.bfloat16(), rtol=0, atol=0)


def test_the_papers_model_has_384_million_weights() -> None:
    paper = ModelConfig(160_000, 80_000)
    assert paper.num_parameters() == 384_000_000
    recurrent = sum(
        shape[0] * shape[1]
        for name, shape in paper.parameter_shapes().items()
        if name.startswith(("encoder", "decoder")) and "weight" in name
    )
    assert recurrent == 64_000_000
