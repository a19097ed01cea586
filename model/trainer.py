"""The single-device trainer: the oracle that the pipeline and the cluster must reproduce."""

from dataclasses import dataclass

from model.batching import Batch
from model.loss import LossSum
from model.optimizer import NonFiniteGradientError, gradient_scale
from model.seq2seq import Seq2Seq


@dataclass(frozen=True)
class StepResult:
    """One update: the loss before it, and the gradient's norm per sequence before clipping."""

    loss: LossSum
    gradient_norm: float


class Trainer:
    """Trains a model on one device, one batch a step."""

    def __init__(self, model: Seq2Seq, clip_norm: float | None = 5.0) -> None:
        self.model = model
        self.clip_norm = clip_norm

    def step(self, batch: Batch, learning_rate: float) -> StepResult:
        """Make one update. Raises NonFiniteGradientError before any value is changed."""
        loss = self.model.loss_and_gradients(batch)
        parameters = self.model.parameters().values()
        norms = [parameter.squared_norm() for parameter in parameters]
        try:
            scale = gradient_scale(norms, batch.num_sentences, self.clip_norm)
        except NonFiniteGradientError:
            for parameter in parameters:
                parameter.clear_gradient()
            raise
        for parameter in parameters:
            parameter.descend(learning_rate * scale.factor)
        return StepResult(loss, scale.norm)
