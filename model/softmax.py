"""The softmax over the target words, whole or cut into vocabulary shards.

A shard turns the decoder's outputs into three numbers a word: its largest logit, its sum of
exponentials relative to that, and the logit of the word to predict (0 where another shard holds
it). The loss block (`model.loss`) merges them into the logarithm of the whole normaliser, with
which every shard computes its own gradient. No logit ever leaves its shard. What a shard keeps are
the exponentials: dividing them by the normaliser goes into the smaller factor of each product that
follows, so they are written once, and only the entry of the word to predict changes.

There are two ways to keep none. Where one shard holds all words it knows the normaliser at once,
and is done after F. Any other can make the logits a second time when the normaliser has come.

Logits are made for some rows at a time, so those of a whole chunk never lie in the state format.

Shapes: N words of a chunk, H cells, V words of the shard, n rows of a group.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.batching import Chunk
from model.block import Block, Saved, Tensors
from model.parameter import Parameter
from model.precision import Precision

_GROUP_BYTES = 1 << 25
"""Logits that products work on at a time: many rows for a product, little beside the weights."""
_CACHED_ENTRIES = 1 << 19
"""Logits that are exponentiated at a time: in the state format they stay in a core's caches."""
_GPU_ENTRIES = 1 << 26
"""The same on a GPU, where operations are to be few."""
_LARGEST_GAP = 60.0
"""Of a row's normaliser above its largest logit here, as a logarithm: its exponential is 1e26."""


@dataclass
class SoftmaxSaved:
    """What a chunk of a shard keeps between its operations.

    `maximum` (N,) are its largest logits; `local_targets` (N,) are places in the shard, of any word
    where `held` (N,) is 0 and not 1. `exponentials` (N, V) are relative to `maximum`; None where
    they are not kept. After I, `scale` (N, 1) makes gradients of logits of them.
    """

    inputs: Tensor
    maximum: Tensor
    local_targets: Tensor
    held: Tensor
    exponentials: Tensor | None = None
    scale: Tensor | None = None


class _OutputLayer(Block[Saved]):
    """The output layer's words [start, stop): weights and biases, and what both kinds do with them.

    Statistics (3, n) are a word's largest logit, sum of exponentials, and logit of the target.
    """

    def __init__(self, name: str, weight: Parameter, bias: Parameter, precision: Precision) -> None:
        super().__init__(name, [weight, bias])
        self.weight, self.bias = weight, bias
        self.precision = precision

    def _groups(self, num_rows: int) -> Iterator[slice]:
        """Cut rows into groups for the products.

        A group holds an eighth of what the weights and their gradient hold, or less, unless that is
        little anyway.
        """
        num_words, num_cells = self.weight.value.shape
        row_bytes = num_words * self.precision.compute.itemsize
        return _cut(num_rows, max(_GROUP_BYTES // row_bytes, num_cells // 4))

    def _room(self, num_rows: int, *, whole: bool) -> Tensor:
        """Return memory for the exponentials of all rows or, not `whole`, of the largest group."""
        if not whole:
            num_rows = max((rows.stop - rows.start for rows in self._groups(num_rows)), default=0)
        return self.weight.compute.new_empty((num_rows, len(self.weight.value)))

    def _exponentials(
        self, inputs: Tensor, local_targets: Tensor, out: Tensor, statistics: Tensor
    ) -> None:
        """Write exponentials (n, V), relative to the largest, in the compute format; and the rest.

        `local_targets` (n,) are places among these words.
        """
        torch.addmm(self.bias.compute, inputs, self.weight.compute.t(), out=out)
        entries = _GPU_ENTRIES if out.is_cuda else _CACHED_ENTRIES
        for rows in _cut(len(out), entries // out.shape[1]):
            part = out[rows]
            logits = part.to(self.precision.state)  # the same memory where formats agree
            maximum, sums, target = statistics[:, rows]
            torch.gather(logits, 1, local_targets[rows, None], out=target[:, None])
            torch.amax(logits, 1, out=maximum)
            torch.sum(logits.sub_(maximum[:, None]).exp_(), 1, out=sums)
            if logits.dtype != part.dtype:
                part.copy_(logits)

    def _take_targets(
        self, exponentials: Tensor, gap: Tensor, local_targets: Tensor, held: Tensor
    ) -> Tensor:
        """Take one from the probability of each row's word to predict, where it is held.

        `gap` (n,) is how far the logarithm of the normaliser lies above a row's largest logit here.
        Beyond 60 it counts as 60, to stay within range: all these words then have next to no
        probability. Changes the exponentials (n, V), and returns the factor (n, 1) that makes
        gradients of logits of them.
        """
        gap = gap.clamp(max=_LARGEST_GAP)
        places = local_targets[:, None]
        # Close to one another where the word is likely, so the difference is taken before rounding.
        entries = exponentials.gather(1, places).to(gap.dtype) - (gap.exp() * held)[:, None]
        exponentials.scatter_(1, places, entries.to(exponentials.dtype))
        return gap.neg().exp()[:, None]

    def _gradient_of_inputs(self, exponentials: Tensor, scale: Tensor) -> Tensor:
        """Return the gradient (n, H) of the inputs in the state format."""
        return (exponentials @ self.weight.compute) * scale

    def _add_gradient(self, exponentials: Tensor, scale: Tensor, inputs: Tensor) -> None:
        """Add the gradients of logits, `exponentials` (n, V) times `scale` (n, 1)."""
        self.weight.add_product(exponentials, (inputs * scale).to(inputs.dtype))
        self.bias.add_product(exponentials, scale.to(inputs.dtype))

    def _both_gradients(
        self, exponentials: Tensor, gap: Tensor, local_targets: Tensor, held: Tensor, inputs: Tensor
    ) -> Tensor:
        """Add the gradients of the weights, and return that (n, H) of the inputs."""
        scale = self._take_targets(exponentials, gap, local_targets, held)
        self._add_gradient(exponentials, scale, inputs)
        return self._gradient_of_inputs(exponentials, scale)


class SoftmaxShard(_OutputLayer[SoftmaxSaved | None]):
    """Words [start, stop) of the output layer: port `input` (N, H) to `statistics` (3, N).

    Its input gradient takes the merged `log_normalizer` (N,) and returns the share of the gradient
    at `input` that comes through these words.
    """

    _keeps_exponentials = True

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
        keeps = training and self._keeps_exponentials
        room = self._room(len(outputs), whole=keeps)
        for rows in self._groups(len(outputs)):
            into = room[rows] if keeps else room[: rows.stop - rows.start]
            self._exponentials(outputs[rows], local[rows], into, statistics[:, rows])
        statistics[2] *= held
        saved = None
        if training:
            kept = room if keeps else None
            saved = SoftmaxSaved(outputs, statistics[0].clone(), local, held, kept)
        return {"statistics": statistics}, saved

    def input_gradient(self, saved: SoftmaxSaved | None, gradients: Tensors) -> Tensors:
        """I: probabilities minus the word that stood there, through the weights."""
        assert saved is not None and saved.exponentials is not None, "F was run without training"
        gap = gradients["log_normalizer"] - saved.maximum
        saved.scale = self._take_targets(saved.exponentials, gap, saved.local_targets, saved.held)
        gradient = self._gradient_of_inputs(saved.exponentials, saved.scale)
        return {"input": gradient.to(saved.inputs.dtype)}

    def weight_gradient(self, saved: SoftmaxSaved | None) -> None:
        """W: one product over all words of the chunk."""
        assert saved is not None and saved.exponentials is not None, "F was run without training"
        assert saved.scale is not None, "W before I"
        self._add_gradient(saved.exponentials, saved.scale, saved.inputs)


class RecomputingShard(SoftmaxShard):
    """A shard that keeps no exponentials: a product more, and no memory that grows with V times N.

    I makes the logits anew for a group of rows, and both gradients while it has them.
    """

    _keeps_exponentials = False

    def input_gradient(self, saved: SoftmaxSaved | None, gradients: Tensors) -> Tensors:
        """I: the logits once more, then both gradients."""
        assert saved is not None, "F was run without training"
        gap = gradients["log_normalizer"] - saved.maximum
        gradient = torch.empty_like(saved.inputs)
        room = self._room(len(saved.inputs), whole=False)
        known = gap.new_empty((3, len(saved.inputs)))
        for rows in self._groups(len(saved.inputs)):
            into, local = room[: rows.stop - rows.start], saved.local_targets[rows]
            inputs = saved.inputs[rows]
            self._exponentials(inputs, local, into, known[:, rows])
            gradient[rows] = self._both_gradients(into, gap[rows], local, saved.held[rows], inputs)
        return {"input": gradient}

    def weight_gradient(self, saved: SoftmaxSaved | None) -> None:
        """W: done by I."""


class WholeSoftmax(_OutputLayer[Tensor | None]):
    """All words of the output layer: port `input` (N, H) to `statistics` (3, N), like a shard.

    F in training is all there is to do. It makes both gradients for a group of rows as soon as it
    has their logits, so the memory for these does not grow with the chunk, and what it keeps is the
    gradient (N, H) at `input`. It fits where nobody waits for F alone: on a single rank.
    """

    def forward(
        self, chunk: Chunk, inputs: Tensors, *, training: bool = True
    ) -> tuple[Tensors, Tensor | None]:
        """F: three numbers a word and, in training, both gradients."""
        assert chunk.targets is not None
        outputs = inputs["input"]
        statistics = outputs.new_empty((3, len(outputs)), dtype=self.precision.state)
        gradient = torch.empty_like(outputs) if training else None
        room = self._room(len(outputs), whole=False)
        for rows in self._groups(len(outputs)):
            into, targets = room[: rows.stop - rows.start], chunk.targets[rows]
            self._exponentials(outputs[rows], targets, into, statistics[:, rows])
            if gradient is not None:
                gap = statistics[1, rows].log()
                held = torch.ones_like(gap)
                gradient[rows] = self._both_gradients(into, gap, targets, held, outputs[rows])
        return {"statistics": statistics}, gradient

    def input_gradient(self, saved: Tensor | None, gradients: Tensors) -> Tensors:
        """I: what F kept."""
        assert saved is not None, "F was run without training"
        return {"input": saved}

    def weight_gradient(self, saved: Tensor | None) -> None:
        """W: done by F."""


def _cut(num_rows: int, size: int) -> Iterator[slice]:
    """Cut rows into parts of so many, at least one."""
    for start in range(0, num_rows, max(size, 1)):
        yield slice(start, min(start + max(size, 1), num_rows))
