"""Small plans and batches shared by the pipeline's tests, and the comparison with the oracle."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.batching import Batch
from model.network import ModelConfig
from model.precision import Precision
from model.seq2seq import Seq2Seq
from model.trainer import Trainer
from pipeline.placements.named import named_placement
from pipeline.placements.placement import Placement
from pipeline.plan import Plan


def small_model(**changes: Any) -> ModelConfig:
    """Return a model of 3 layers, 11 and 13 words, whose sizes all differ."""
    sizes: dict[str, Any] = {
        "source_vocabulary_size": 11,
        "target_vocabulary_size": 13,
        "num_layers": 3,
        "hidden_size": 5,
        "embedding_size": 4,
        # Larger than the paper's, so that no gradient is near the rounding error.
        "init_scale": 0.5,
    }
    return ModelConfig(**(sizes | changes))


def paper_placement(config: ModelConfig, layer_ranks: int, softmax_ranks: int) -> Placement:
    return named_placement("paper", config, layer_ranks=layer_ranks, softmax_ranks=softmax_ranks)


def small_plan(layout: tuple[int, int] | None = None, **changes: Any) -> Plan:
    """Return a plan; `layout` holds layer ranks and softmax ranks, None is one rank."""
    config = changes.pop("model", None) or small_model()
    if layout is None:
        placement = named_placement("single", config)
    else:
        placement = paper_placement(config, *layout)
    return Plan(config, placement, **({"precision": "float64"} | changes))


@dataclass(frozen=True)
class OracleStep:
    """What the single-device trainer makes of a batch."""

    loss_sum: float
    num_tokens: int
    gradient_norm: float
    gradients: dict[str, Tensor]
    updated: dict[str, Tensor]


def oracle_step(
    plan: Plan, batch: Batch, learning_rate: float, clip_norm: float | None
) -> OracleStep:
    """Make the first step of a plan's model on one device."""
    model = Seq2Seq(plan.model, Precision(plan.precision), seed=plan.seed)
    model.loss_and_gradients(batch)
    gradients = {name: p.gradient().clone() for name, p in model.parameters().items()}
    for parameter in model.parameters().values():
        parameter.clear_gradient()
    result = Trainer(model, clip_norm).step(batch, learning_rate)
    updated = {name: parameter.value for name, parameter in model.parameters().items()}
    return OracleStep(
        result.loss.total, result.loss.num_tokens, result.gradient_norm, gradients, updated
    )


def assert_tensors_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float
) -> None:
    """Compare all tensors by name, absolutely and relative to the largest entry of each."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        bound = tolerance * max(1.0, float(tensor.abs().max()))
        difference = float((actual[name] - tensor).abs().max())
        assert difference <= bound, f"{name} differs by {difference}"


def assert_tensors_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare bit for bit."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), f"{name} differs"
