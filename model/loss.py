"""The loss: shards' statistics merged exactly, and the sum over words before its one division.

Shapes: N words of a chunk.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.batching import Chunk
from model.block import Block, Tensors


@dataclass
class LossSum:
    """A loss before its one division: the sum over words in nats, and the number of words."""

    total: float = 0.0
    num_tokens: int = 0

    def __add__(self, other: "LossSum") -> "LossSum":
        return LossSum(self.total + other.total, self.num_tokens + other.num_tokens)

    @property
    def mean(self) -> float:
        """Nats a target word; 0 when there was no word."""
        return self.total / self.num_tokens if self.num_tokens else 0.0

    @property
    def perplexity(self) -> float:
        """E to the mean; infinity where a float cannot hold it, NaN when there was no word."""
        if not self.num_tokens:
            return math.nan
        try:
            return math.exp(self.mean)
        except OverflowError:
            return math.inf


class Loss(Block[None]):
    """Exact merge: ports `statistics.{p}` (3, N) of all shards p to `log_normalizer` (N,).

    Adds the negative log-probability of the chunk's words to a running sum; it has no parameters
    and only a forward operation, since the shards' input gradients start from its output.
    """

    def __init__(self, name: str = "loss") -> None:
        super().__init__(name)
        self._sum: Tensor | None = None
        self._num_tokens = 0

    def forward(
        self, chunk: Chunk, inputs: Tensors, *, training: bool = True
    ) -> tuple[Tensors, None]:
        """F: merge the shards in their order."""
        statistics = torch.stack([inputs[f"statistics.{p}"] for p in range(len(inputs))])
        maximum = statistics[:, 0].amax(0)
        sums = (statistics[:, 1] * (statistics[:, 0] - maximum).exp()).sum(0)
        log_normalizer = maximum + sums.log()
        losses = log_normalizer - statistics[:, 2].sum(0)
        self._add(losses.sum(dtype=torch.float64), len(losses))
        return {"log_normalizer": log_normalizer}, None

    def _add(self, total: Tensor, num_tokens: int) -> None:
        # Kept on the device: reading a number back would wait for all work before it.
        self._sum = total if self._sum is None else self._sum + total
        self._num_tokens += num_tokens

    def take(self) -> LossSum:
        """Return the sum since the last call and start a new one."""
        taken = LossSum(0.0 if self._sum is None else float(self._sum), self._num_tokens)
        self._sum, self._num_tokens = None, 0
        return taken

    def input_gradient(self, saved: None, gradients: Tensors) -> Tensors:
        """Never scheduled: see the class."""
        raise NotImplementedError("the loss has no input gradient; the softmax shards start there")

    def weight_gradient(self, saved: None) -> None:
        """Never scheduled: see the class."""
        raise NotImplementedError("the loss has no parameters")
