"""The softmax over the target words, cut into vocabulary shards, and the exact merge of the shards.

A shard turns the decoder's outputs into three numbers a position: its largest logit, its sum of
exponentials relative to that, and the logit of the word to predict (0 where another shard holds
it). The loss block merges them into the logarithm of the whole normaliser, with which every shard
computes its own gradient. No logit ever leaves its shard.

Shapes: K positions of a chunk, B sentences, H cells, V words of the shard.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.batching import Chunk
from model.block import Block, Tensors
from model.parameter import Parameter
from model.precision import Precision


@dataclass
class SoftmaxSaved:
    """What a chunk of a shard keeps between its operations.

    `exponentials` (K, B, V) are relative to `maximum` (K, B); I turns them, in place, into the
    gradient of the logits.
    """

    inputs: Tensor
    maximum: Tensor
    exponentials: Tensor
    local_targets: Tensor
    held: Tensor
    mask: Tensor


class SoftmaxShard(Block[SoftmaxSaved]):
    """Words [start, stop) of the output layer: port `input` (K, B, H) to `statistics` (3, K, B).

    Its input gradient takes the merged `log_normalizer` (K, B) and returns the share of the
    gradient at `input` that comes through these words.
    """

    def __init__(self, name: str, weight: Parameter, bias: Parameter, precision: Precision) -> None:
        super().__init__(name, [weight, bias])
        self.weight, self.bias = weight, bias
        self.precision = precision

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the logits (..., V), in the state format, of outputs (..., H)."""
        products = F.linear(inputs, self.weight.compute, self.bias.compute)
        return products.to(self.precision.state)

    def forward(self, chunk: Chunk, inputs: Tensors) -> tuple[Tensors, SoftmaxSaved]:
        """F: the logits of this shard, reduced to three numbers a position."""
        assert chunk.targets is not None
        assert chunk.mask is not None
        logits = self.logits(inputs["input"])
        local = chunk.targets - self.weight.rows.start
        held = (local >= 0) & (local < logits.shape[2])
        local = local.clamp(0, logits.shape[2] - 1)
        target = logits.gather(2, local[:, :, None])[:, :, 0].masked_fill(~held, 0.0)
        maximum = logits.amax(2)
        exponentials = logits.sub_(maximum[:, :, None]).exp_()
        statistics = torch.stack([maximum, exponentials.sum(2), target])
        saved = SoftmaxSaved(
            inputs["input"],
            maximum,
            exponentials.to(self.precision.compute),
            local,
            held & chunk.mask,
            chunk.mask,
        )
        return {"statistics": statistics}, saved

    def input_gradient(self, saved: SoftmaxSaved, gradients: Tensors) -> Tensors:
        """I: probabilities minus the word that stood there, through the weights."""
        scale = (saved.maximum - gradients["log_normalizer"]).exp() * saved.mask
        d_logits = saved.exponentials.mul_(scale[:, :, None])
        one = saved.held.to(d_logits.dtype)[:, :, None]
        d_logits.scatter_add_(2, saved.local_targets[:, :, None], -one)
        return {"input": d_logits @ self.weight.compute}

    def weight_gradient(self, saved: SoftmaxSaved) -> None:
        """W: one product over all positions of the chunk."""
        d_logits = saved.exponentials.flatten(0, 1)
        self.weight.add_gradient(d_logits.t() @ saved.inputs.flatten(0, 1))
        self.bias.add_gradient(d_logits.sum(0, dtype=self.bias.value.dtype))


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
    """Exact merge: ports `statistics.{p}` (3, K, B) of all shards p to `log_normalizer` (K, B).

    Adds the negative log-probability of the chunk's words to a running sum; it has no parameters
    and only a forward operation, since the shards' input gradients start from its output.
    """

    def __init__(self, name: str = "loss") -> None:
        super().__init__(name)
        self._sum: Tensor | None = None
        self._num_tokens: Tensor | None = None

    def forward(self, chunk: Chunk, inputs: Tensors) -> tuple[Tensors, None]:
        """F: merge the shards in their order."""
        assert chunk.mask is not None
        statistics = torch.stack([inputs[f"statistics.{p}"] for p in range(len(inputs))])
        maximum = statistics[:, 0].amax(0)
        sums = (statistics[:, 1] * (statistics[:, 0] - maximum).exp()).sum(0)
        log_normalizer = maximum + sums.log()
        losses = (log_normalizer - statistics[:, 2].sum(0)).masked_fill(~chunk.mask, 0.0)
        self._add(losses.sum(dtype=torch.float64), chunk.mask.sum())
        return {"log_normalizer": log_normalizer}, None

    def _add(self, total: Tensor, num_tokens: Tensor) -> None:
        # Kept on the device: reading a number back would wait for all work before it.
        self._sum = total if self._sum is None else self._sum + total
        self._num_tokens = num_tokens if self._num_tokens is None else self._num_tokens + num_tokens

    def take(self) -> LossSum:
        """Return the sum since the last call and start a new one."""
        if self._sum is None or self._num_tokens is None:
            return LossSum()
        taken = LossSum(float(self._sum), int(self._num_tokens))
        self._sum = self._num_tokens = None
        return taken

    def input_gradient(self, saved: None, gradients: Tensors) -> Tensors:
        """Never scheduled: see the class."""
        raise NotImplementedError("the loss has no input gradient; the softmax shards start there")

    def weight_gradient(self, saved: None) -> None:
        """Never scheduled: see the class."""
        raise NotImplementedError("the loss has no parameters")
