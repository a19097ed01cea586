"""A GPU reproduces the processor: the same steps in float32, and bfloat16 near them."""

import pytest

from model.network import ModelConfig
from model.precision import Precision
from model.seq2seq import Seq2Seq
from model.trainer import Trainer
from tests.batches import random_batch

MODEL = ModelConfig(11, 13, num_layers=2, hidden_size=8, embedding_size=6, init_scale=0.2)


def losses(device: str, precision: str) -> list[float]:
    trainer = Trainer(Seq2Seq(MODEL, Precision(precision), device, seed=3))
    batches = [random_batch(5, seed=step) for step in range(3)]
    return [trainer.step(batch, 0.5).loss.mean for batch in batches]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float64", 1e-9), ("float32", 1e-3), ("bfloat16", 5e-2)]
)
def test_steps_on_a_gpu_are_those_on_the_processor(precision: str, tolerance: float) -> None:
    assert losses("cuda", precision) == pytest.approx(losses("cpu", "float64"), rel=tolerance)
