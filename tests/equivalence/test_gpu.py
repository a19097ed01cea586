"""A GPU reproduces the processor: steps on one rank and on several, and translations."""

import pytest
import torch

from model.beam_search import beam_search
from model.network import ModelConfig
from model.precision import Precision
from model.seq2seq import Seq2Seq
from model.trainer import Trainer
from pipeline.in_process import InProcessPipeline
from pipeline.placements.named import named_placement
from pipeline.plan import Plan
from tests.batches import random_batch
from tests.pipeline.plans import oracle_step

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


@pytest.mark.gpu
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_pipeline_on_a_gpu_makes_the_processors_step(replicas: int, recomputes: bool) -> None:
    placement = named_placement("uneven", MODEL, num_ranks=2, recomputes_logits=recomputes)
    plan = Plan(
        MODEL, placement, "deferred_weights", 2, 3, precision="float64", num_replicas=replicas
    )
    batch = random_batch(6, seed=2)
    expected = oracle_step(plan, batch, 0.7, 5.0)
    pipeline = InProcessPipeline(plan, "cuda")
    loss = pipeline.accumulate(batch)
    norms = pipeline.each(lambda stage: stage.update(batch.num_sentences, 0.7, 5.0))
    assert loss.total == pytest.approx(expected.loss_sum, rel=1e-9)
    assert norms == pytest.approx([expected.gradient_norm] * len(norms), rel=1e-9)
    for name, value in pipeline.whole(lambda parameter: parameter.value).items():
        torch.testing.assert_close(value.cpu(), expected.updated[name], rtol=0, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_search_on_a_gpu_finds_the_processors_translations(beam_size: int) -> None:
    batch = random_batch(6, seed=4)
    found = [
        beam_search(
            Seq2Seq(MODEL, Precision("float64"), device, seed=3),
            batch.source,
            batch.source_lengths,
            beam_size=beam_size,
            max_length=9,
            n_best=beam_size,
        )
        for device in ("cpu", "cuda")
    ]
    words = [[[each.tokens for each in best] for best in of_device] for of_device in found]
    assert words[0] == words[1]
