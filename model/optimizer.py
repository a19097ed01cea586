"""The paper's update rule: plain SGD, a halving learning rate, one norm over all parameters.

The gradient is divided by the number of sequences of the batch, not of its words (paper, section
3.4).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from model.errors import UserError


class NonFiniteGradientError(UserError):
    """The gradient of a step holds a NaN or an infinity; the parameters were not touched."""


@dataclass(frozen=True)
class LearningRateSchedule:
    """A constant rate that is halved from some point on, at equal distances, all in epochs."""

    initial: float = 0.7
    halve_after_epochs: float = 5.0
    halve_every_epochs: float = 0.5

    def at(self, epochs: float) -> float:
        """Return the rate after so many epochs; the first halving is at `halve_after_epochs`."""
        if epochs < self.halve_after_epochs:
            return self.initial
        passed = (epochs - self.halve_after_epochs) / self.halve_every_epochs
        return float(self.initial * 0.5 ** (1 + math.floor(passed)))


@dataclass(frozen=True)
class GradientScale:
    """How the summed gradient becomes the update: its norm per sequence, and the factor."""

    norm: float
    factor: float


def gradient_scale(
    squared_norms: Iterable[float], num_sentences: int, clip_norm: float | None
) -> GradientScale:
    """Divide by the number of sequences, then clip to the norm over all parameters.

    `squared_norms` belong to the summed gradient, one a parameter or shard, and are added in the
    order given: the same order gives the same bits. Raises NonFiniteGradientError.
    """
    norm = math.sqrt(sum(squared_norms)) / num_sentences
    if not math.isfinite(norm):
        raise NonFiniteGradientError(
            f"the gradient's norm is {norm}; the update was not made. "
            "Lower training.learning_rate or training.clip_norm, or look for damaged input"
        )
    clip = 1.0 if clip_norm is None or norm <= clip_norm else clip_norm / norm
    return GradientScale(norm, clip / num_sentences)
