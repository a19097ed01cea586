"""The network as an ordered list of blocks, described before any of them is built.

A description names a block, its kind, side and layer, and the words it holds if it is a vocabulary
shard. Whoever owns a block builds it from its description; nobody needs the whole model for that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from model.batching import even_bounds
from model.block import Block
from model.embedding import Embedding
from model.loss import Loss
from model.lstm import Projection, Recurrence
from model.parameter import Parameter, ParameterRows, RowParameter
from model.precision import Precision
from model.softmax import RecomputingShard, SoftmaxShard, WholeSoftmax

Kind = Literal["embedding", "projection", "recurrence", "softmax", "loss"]
Side = Literal["source", "target"]
NETWORK_OF_SIDE: dict[Side, str] = {"source": "encoder", "target": "decoder"}


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of the network; words, layers and cells are counts, the scale is that of the init.

    The defaults of the sizes are the paper's.
    """

    source_vocabulary_size: int
    target_vocabulary_size: int
    num_layers: int = 4
    hidden_size: int = 1000
    embedding_size: int = 1000
    peepholes: bool = False
    init_scale: float = 0.08

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter, in the one order in which sums over them run."""
        num_gates = 4 * self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "source_embedding.weight": (self.source_vocabulary_size, self.embedding_size),
            "target_embedding.weight": (self.target_vocabulary_size, self.embedding_size),
        }
        for network in NETWORK_OF_SIDE.values():
            for layer in range(self.num_layers):
                inputs = self.embedding_size if layer == 0 else self.hidden_size
                shapes[f"{network}.{layer}.weight_ih"] = (num_gates, inputs)
                shapes[f"{network}.{layer}.weight_hh"] = (num_gates, self.hidden_size)
                shapes[f"{network}.{layer}.bias"] = (num_gates,)
                if self.peepholes:
                    shapes[f"{network}.{layer}.peephole"] = (3, self.hidden_size)
        shapes["softmax.weight"] = (self.target_vocabulary_size, self.hidden_size)
        shapes["softmax.bias"] = (self.target_vocabulary_size,)
        return shapes

    def num_parameters(self, *, biases: bool = False) -> int:
        """Count the weights; the paper's 384M leave the biases out."""
        return sum(
            math.prod(shape)
            for name, shape in self.parameter_shapes().items()
            if biases or not name.endswith(".bias")
        )


@dataclass(frozen=True)
class BlockSpec:
    """The description of a block.

    `words` is the half-open range of a vocabulary shard, which may make its logits anew for the
    gradients, `recomputes`, and not keep them.
    """

    name: str
    kind: Kind
    side: Side
    layer: int = 0
    words: tuple[int, int] = (0, 0)
    recomputes: bool = False


def network_blocks(config: ModelConfig, num_shards: int = 1) -> tuple[BlockSpec, ...]:
    """Describe all blocks, in forward order, with an even cut of the vocabulary into shards."""
    bounds = even_bounds(config.target_vocabulary_size, num_shards)
    return network_blocks_of_shards(config, bounds)


def network_blocks_of_shards(
    config: ModelConfig, shards: Sequence[tuple[int, int]], *, recomputes: bool = False
) -> tuple[BlockSpec, ...]:
    """Describe all blocks, in forward order, with the given vocabulary shards, which may differ."""
    specs: list[BlockSpec] = []
    sides: tuple[Side, ...] = ("source", "target")
    for side in sides:
        specs.append(BlockSpec(f"{side}_embedding", "embedding", side))
        for layer in range(config.num_layers):
            name = f"{NETWORK_OF_SIDE[side]}.{layer}"
            specs.append(BlockSpec(f"{name}.projection", "projection", side, layer))
            specs.append(BlockSpec(f"{name}.recurrence", "recurrence", side, layer))
    for shard, words in enumerate(shards):
        specs.append(BlockSpec(f"softmax.{shard}", "softmax", "target", shard, words, recomputes))
    specs.append(BlockSpec("loss", "loss", "target"))
    return tuple(specs)


def build_block(
    spec: BlockSpec,
    config: ModelConfig,
    *,
    precision: Precision,
    device: str = "cpu",
    seed: int = 1,
    alone: bool = False,
) -> Block[Any]:
    """Build a described block with its initial values on a device.

    `alone` says that the device holds the whole network, so nobody waits for parts of its work.
    """
    shapes = config.parameter_shapes()

    def parameter(name: str, words: tuple[int, int] | None = None) -> Parameter:
        rows = ParameterRows(name, shapes[name], *(words or (0, shapes[name][0])))
        kind = RowParameter if spec.kind == "embedding" else Parameter
        return kind.initial(rows, config.init_scale, seed, precision, device)

    layer = f"{NETWORK_OF_SIDE[spec.side]}.{spec.layer}"
    match spec.kind:
        case "embedding":
            weight = parameter(f"{spec.name}.weight")
            assert isinstance(weight, RowParameter)
            return Embedding(spec.name, weight)
        case "projection":
            weights = parameter(f"{layer}.weight_ih"), parameter(f"{layer}.bias")
            return Projection(spec.name, *weights)
        case "recurrence":
            peephole = parameter(f"{layer}.peephole") if config.peepholes else None
            return Recurrence(spec.name, parameter(f"{layer}.weight_hh"), peephole, precision)
        case "softmax":
            shard = parameter("softmax.weight", spec.words), parameter("softmax.bias", spec.words)
            if alone and spec.words == (0, config.target_vocabulary_size):
                return WholeSoftmax(spec.name, *shard, precision)
            kind = RecomputingShard if spec.recomputes else SoftmaxShard
            return kind(spec.name, *shard, precision)
        case "loss":
            return Loss(spec.name)
