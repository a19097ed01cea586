"""What every contestant trains, and how much arithmetic that is.

Multiply-adds are those that the model needs for its words; padding and the lookups of embeddings
count nothing, and a multiply-add is two operations.
"""

from dataclasses import dataclass

from model.batching import Batch
from model.network import ModelConfig
from model.precision import Precision


@dataclass(frozen=True)
class Task:
    """A model with the initial values of `seed`, and the paper's update (section 3.4).

    The first batch is for warming up, `num_steps` others are timed; all are drawn from `seed`.
    Cells and embeddings have the same size. `precision` is one of `model.precision`.
    """

    model: ModelConfig
    batch_size: int = 128
    num_steps: int = 2
    precision: str = "float32"
    seed: int = 1
    learning_rate: float = 0.7
    clip_norm: float = 5.0

    def __post_init__(self) -> None:
        Precision(self.precision)
        assert self.model.embedding_size == self.model.hidden_size
        assert self.num_steps >= 1


def operations(model: ModelConfig, batch: Batch) -> float:
    """Return the floating-point operations of one training step: forward and two gradients."""
    return 3.0 * sum(forward_operations(model, batch).values())


def forward_operations(model: ModelConfig, batch: Batch) -> dict[str, float]:
    """Return the floating-point operations of F by kind of block; I and W have as many each."""
    source, target = int(batch.source_lengths.sum()), batch.num_target_tokens
    cells = model.hidden_size
    gates = 2.0 * 4.0 * cells * (source + target)
    return {
        "projection": gates * (model.embedding_size + (model.num_layers - 1) * cells),
        "recurrence": gates * cells * model.num_layers,
        "softmax": 2.0 * cells * model.target_vocabulary_size * target,
    }
