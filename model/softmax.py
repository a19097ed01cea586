"""The softmax over the target words, whole or cut into vocabulary shards, and the exact merge.

A shard turns the decoder's outputs into three numbers a word: its largest logit, its sum of
exponentials relative to that, and the logit of the word to predict (0 where another shard holds
it). The loss block merges them into the logarithm of the whole normaliser, with which every shard
computes its own gradient. No logit ever leaves its shard. What a shard keeps are the exponentials:
dividing them by the normaliser goes into the smaller factor of each product that follows, so they
are written once and never touched again.

Where one shard holds all words it knows the normaliser at once, and keeps no exponentials at all.

Logits are made for some rows at a time, so those of a whole chunk never lie in the state format.

Shapes: N words of a chunk, H cells, V words of the shard, n rows of a group.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.batching import Chunk
from model.block import Block, Tensors
from model.parameter import Parameter
from model.precision import Precision

_LOGITS_AT_ONCE = 1 << 23
"""Entries of a group of logits: few enough for the caches of a processor, many for a product."""


@dataclass
class SoftmaxSaved:
    """What a chunk of a shard keeps between its operations.

    `exponentials` (N, V) are relative to `maximum` (N,); `local_targets` (N,) are places in the
    shard, of any word where `held` (N,) is 0 and not 1. After I, `scale` (N, 1) turns the
    exponentials into probabilities.
    """

    inputs: Tensor
    maximum: Tensor
    exponentials: Tensor
    local_targets: Tensor
    held: Tensor
    scale: Tensor | None = None


class _OutputWords:
    """The output layer's words [start, stop): weights and biases, and the logits from them."""

    def __init__(self, weight: Parameter, bias: Parameter, precision: Precision) -> None:
        self.weight, self.bias = weight, bias
        self.precision = precision

    def logits(self, inputs: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the logits (n, V) of outputs (n, H), in the state format; in `out` if it fits."""
        weight, bias = self.weight.compute, self.bias.compute
        if out is None or self.precision.compute != self.precision.state:
            return F.linear(inputs, weight, bias).to(self.precision.state)
        return torch.addmm(bias, inputs, weight.t(), out=out)

    def groups(self, num_rows: int) -> Iterator[slice]:
        """Cut rows into groups whose logits are made at a time.

        A group holds an eighth of what the weights and their gradient hold, or less, unless that is
        little anyway.
        """
        num_words, num_cells = self.weight.value.shape
        size = max(_LOGITS_AT_ONCE // num_words, num_cells // 4, 1)
        for start in range(0, num_rows, size):
            yield slice(start, min(start + size, num_rows))


class SoftmaxShard(Block[SoftmaxSaved | None]):
    """Words [start, stop) of the output layer: port `input` (N, H) to `statistics` (3, N).

    Its input gradient takes the merged `log_normalizer` (N,) and returns the share of the gradient
    at `input` that comes through these words.
    """

    def __init__(self, name: str, weight: Parameter, bias: Parameter, precision: Precision) -> None:
        super().__init__(name, [weight, bias])
        self.weight, self.bias = weight, bias
        self.precision = precision
        self._words = _OutputWords(weight, bias, precision)

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the logits (n, V), in the state format, of outputs (n, H)."""
        return self._words.logits(inputs)

    def forward(
        self, chunk: Chunk, inputs: Tensors, *, training: bool = True
    ) -> tuple[Tensors, SoftmaxSaved | None]:
        """F: the logits of this shard, reduced to three numbers a word."""
        assert chunk.targets is not None
        outputs = inputs["input"]
        local = chunk.targets - self.weight.rows.start
        held = ((local >= 0) & (local < len(self.weight.value))).to(self.precision.state)
        local = local.clamp(0, len(self.weight.value) - 1)
        statistics = held.new_empty((3, len(outputs)))
        exponentials = None
        if training:
            shape = (len(outputs), len(self.weight.value))
            exponentials = outputs.new_empty(shape, dtype=self.precision.compute)
        for rows in self._words.groups(len(outputs)):
            kept = None if exponentials is None else exponentials[rows]
            logits = self._words.logits(outputs[rows], out=kept)
            maximum, sums, target = statistics[:, rows]
            torch.mul(logits.gather(1, local[rows, None])[:, 0], held[rows], out=target)
            torch.amax(logits, 1, out=maximum)
            torch.sum(logits.sub_(maximum[:, None]).exp_(), 1, out=sums)
            if kept is not None and kept.data_ptr() != logits.data_ptr():
                kept.copy_(logits)
        saved = None
        if exponentials is not None:
            saved = SoftmaxSaved(outputs, statistics[0].clone(), exponentials, local, held)
        return {"statistics": statistics}, saved

    def input_gradient(self, saved: SoftmaxSaved | None, gradients: Tensors) -> Tensors:
        """I: probabilities minus the word that stood there, through the weights."""
        assert saved is not None, "F was run without training"
        saved.scale = (saved.maximum - gradients["log_normalizer"]).exp()[:, None]
        weight = self.weight.compute
        gradient = (saved.exponentials @ weight) * saved.scale
        words = F.embedding(saved.local_targets, weight)
        gradient.addcmul_(words.to(gradient.dtype), saved.held[:, None], value=-1.0)
        return {"input": gradient.to(weight.dtype)}

    def weight_gradient(self, saved: SoftmaxSaved | None) -> None:
        """W: one product over all words of the chunk."""
        assert saved is not None and saved.scale is not None, "W before I"
        _add_weight_gradient(
            self, saved.exponentials, saved.scale, saved.inputs, saved.local_targets, saved.held
        )


class WholeSoftmax(Block[Tensor | None]):
    """All words of the output layer: port `input` (N, H) to `statistics` (3, N), like a shard.

    F in training is all there is to do. It makes both gradients for a group of rows as soon as it
    has their logits, so the memory for these does not grow with the chunk, and what it keeps is the
    gradient (N, H) at `input`. It fits where nobody waits for F alone: on a single rank.
    """

    def __init__(self, name: str, weight: Parameter, bias: Parameter, precision: Precision) -> None:
        super().__init__(name, [weight, bias])
        self.weight, self.bias = weight, bias
        self.precision = precision
        self._words = _OutputWords(weight, bias, precision)

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the logits (n, V), in the state format, of outputs (n, H)."""
        return self._words.logits(inputs)

    def forward(
        self, chunk: Chunk, inputs: Tensors, *, training: bool = True
    ) -> tuple[Tensors, Tensor | None]:
        """F: three numbers a word and, in training, both gradients."""
        assert chunk.targets is not None
        outputs = inputs["input"]
        statistics = outputs.new_empty((3, len(outputs)), dtype=self.precision.state)
        gradient = torch.empty_like(outputs) if training else None
        buffer: Tensor | None = None
        for rows in self._words.groups(len(outputs)):
            room = None if buffer is None else buffer[: rows.stop - rows.start]
            logits = self._words.logits(outputs[rows], out=room)
            buffer = logits if buffer is None else buffer
            targets = chunk.targets[rows]
            maximum, sums, target = statistics[:, rows]
            torch.gather(logits, 1, targets[:, None], out=target[:, None])
            torch.amax(logits, 1, out=maximum)
            torch.sum(logits.sub_(maximum[:, None]).exp_(), 1, out=sums)
            if gradient is not None:
                gradient[rows] = self._gradients(logits, sums, outputs[rows], targets)
        return {"statistics": statistics}, gradient

    def _gradients(
        self, exponentials: Tensor, sums: Tensor, inputs: Tensor, targets: Tensor
    ) -> Tensor:
        """Add a group's gradient of the weights, and return that of its inputs (n, H)."""
        weight, scale = self.weight.compute, sums.reciprocal()[:, None]
        exponentials = exponentials.to(self.precision.compute)
        gradient = (exponentials @ weight) * scale
        gradient -= F.embedding(targets, weight)
        _add_weight_gradient(self, exponentials, scale, inputs, targets, torch.ones_like(sums))
        return gradient

    def input_gradient(self, saved: Tensor | None, gradients: Tensors) -> Tensors:
        """I: what F kept."""
        assert saved is not None, "F was run without training"
        return {"input": saved}

    def weight_gradient(self, saved: Tensor | None) -> None:
        """W: done by F."""


def _add_weight_gradient(
    block: SoftmaxShard | WholeSoftmax,
    exponentials: Tensor,
    scale: Tensor,
    inputs: Tensor,
    local_targets: Tensor,
    held: Tensor,
) -> None:
    """Add probabilities (n, V) times inputs (n, H), less the words that stood there where held.

    The probabilities are `exponentials` times `scale` (n, 1).
    """
    scaled = (inputs * scale).to(inputs.dtype)
    block.weight.add_product(exponentials, scaled)
    block.bias.add_product(exponentials, scale.to(inputs.dtype))
    block.weight.add_rows(local_targets, inputs * -held[:, None])
    block.bias.add_rows(local_targets, -held)


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
