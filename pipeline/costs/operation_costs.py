"""What operations and messages cost in seconds, measured or worked out, for batches of one shape.

Operations of blocks of one family take the same time on every rank. A cost is affine in the size of
the work, which tells a large matrix product, whose time goes with the rows, from a recurrence bound
by latency, whose time goes with the positions only.

Shapes: K positions of a chunk, B sentences, V words of a vocabulary shard.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from model.batching import ChunkSize, even_bounds
from model.errors import UserError
from model.network import BlockSpec, ModelConfig, Side, network_blocks
from model.precision import Precision
from pipeline.graph import Graph, Kind, Operation, Value
from pipeline.shapes import value_dtype, value_shape

Family = Literal["embedding", "first_projection", "projection", "recurrence", "softmax", "loss"]
FAMILIES: tuple[Family, ...] = (
    "embedding",
    "first_projection",
    "projection",
    "recurrence",
    "softmax",
    "loss",
)
KINDS: tuple[Kind, ...] = ("F", "I", "W")


class CostsError(UserError):
    """Costs that cannot be read, or that are those of another model."""


def family_of(spec: BlockSpec) -> Family:
    """Return which costs a block has; only layer 0's projection reads embeddings."""
    return "first_projection" if spec.kind == "projection" and spec.layer == 0 else spec.kind


@dataclass(frozen=True)
class OperationCost:
    """Seconds of an operation: fixed, a position, a position of a sentence, and that times V.

    The last is for vocabulary shards only, whose time grows with their words.
    """

    fixed_s: float = 0.0
    position_s: float = 0.0
    token_s: float = 0.0
    token_word_s: float = 0.0

    def seconds(self, size: ChunkSize, num_words: int) -> float:
        """Return the time for a chunk on a shard of V words; nothing takes no time."""
        if not size.num_tokens:
            return 0.0
        each = self.token_s + self.token_word_s * num_words
        return self.fixed_s + self.position_s * size.num_positions + each * size.num_tokens

    def __add__(self, other: "OperationCost") -> "OperationCost":
        return OperationCost(
            self.fixed_s + other.fixed_s,
            self.position_s + other.position_s,
            self.token_s + other.token_s,
            self.token_word_s + other.token_word_s,
        )


FREE = OperationCost()


@dataclass(frozen=True)
class Link:
    """The way between two ranks; by default messages take no time.

    `shared_by` says which messages go one after another: those of a `pair` of ranks, all that a
    `sender` sends, or none.
    """

    latency_s: float = 0.0
    bytes_per_s: float = math.inf
    shared_by: Literal["pair", "sender", "none"] = "pair"

    @property
    def is_free(self) -> bool:
        """Whether messages take no time."""
        return self.latency_s == 0.0 and self.bytes_per_s == math.inf


@dataclass(frozen=True)
class BatchShape:
    """The size of a batch: sentences, and padded positions of each side."""

    num_sentences: int
    source_positions: int
    target_positions: int

    def positions(self, side: Side) -> int:
        """Return S or T."""
        return self.source_positions if side == "source" else self.target_positions


@dataclass(frozen=True)
class Costs:
    """The costs of a model's operations and messages, for batches of one shape.

    `operations` has a cost for families and kinds of operation; those not in it are free.
    `origin` says in words where the numbers come from.
    """

    model: ModelConfig
    batch: BatchShape
    operations: Mapping[tuple[Family, Kind], OperationCost]
    link: Link = field(default_factory=Link)
    precision: str = "float32"
    origin: str = "given"

    def block_s(self, kind: Kind, spec: BlockSpec, size: ChunkSize) -> float:
        """Return the seconds of an operation of a block on a chunk."""
        num_words = spec.words[1] - spec.words[0]
        return sum(
            self.operations.get((family_of(spec), part), FREE).seconds(size, num_words)
            for part in _parts(kind, spec)
        )

    def whole_block_s(self, spec: BlockSpec, kinds: str = "FIW") -> float:
        """Return the seconds of a block's operations on the whole batch, uncut."""
        size = ChunkSize.full(self.batch.positions(spec.side), self.batch.num_sentences)
        return sum(self.block_s(kind, spec, size) for kind in KINDS if kind in kinds)

    def one_device_s(self) -> float:
        """Return the seconds of a training step on one device, with the batch whole."""
        return sum(self.whole_block_s(spec) for spec in network_blocks(self.model))

    def fused(self) -> "Costs":
        """Return the costs of devices that give out an input gradient only after W."""
        families = {family for family, _ in self.operations}
        joined = dict(self.operations)
        for family in families:
            weights = self.operations.get((family, "W"), FREE)
            joined[family, "I"] = self.operations.get((family, "I"), FREE) + weights
            joined[family, "W"] = FREE
        return replace(self, operations=joined)

    def check(self, model: ModelConfig) -> None:
        """Raise CostsError unless these are the costs of a model of the same layers.

        Vocabularies may be of other sizes: the time of a shard is known for any number of words.
        """
        for name in ("num_layers", "hidden_size", "embedding_size"):
            mine, other = getattr(self.model, name), getattr(model, name)
            if mine != other:
                raise CostsError(
                    f"the costs are those of a model with {name} {mine}, not {other}; "
                    "measure them again for this model"
                )

    def fitted_to(self, model: ModelConfig, num_sentences: int, precision: str) -> "Costs":
        """Return these costs for a model of the same layers and another number of sentences.

        Raises CostsError if they are of other layers or of another precision.
        """
        self.check(model)
        if precision != self.precision:
            raise CostsError(
                f"the costs are those of precision {self.precision}, not of training.precision="
                f"{precision}; measure them again with this precision"
            )
        batch = replace(self.batch, num_sentences=num_sentences)
        return replace(self, model=model, batch=batch)


def _parts(kind: Kind, spec: BlockSpec) -> tuple[Kind, ...]:
    """Return whose work an operation does: a shard that recomputes does all again in I."""
    if not spec.recomputes:
        return (kind,)
    return {"F": ("F",), "I": KINDS, "W": ()}[kind]


class WorkSizes:
    """How large each operation of a graph and each value is, for batches of one shape."""

    def __init__(self, graph: Graph, model: ModelConfig, batch: BatchShape, precision: str) -> None:
        self._graph, self._model = graph, model
        self._precision = Precision(precision)
        self._num_sentences = _sizes(batch.num_sentences, graph.num_microbatches)
        sides: tuple[Side, ...] = ("source", "target")
        self._num_positions = {
            side: _sizes(batch.positions(side), graph.num_chunks) for side in sides
        }
        self._known: dict[tuple[str, str, str, ChunkSize], int] = {}

    def chunk(self, operation: Operation) -> ChunkSize:
        """Return the size of the chunk that an operation works on."""
        side = self._graph.spec_of[operation.block].side
        num_positions = self._num_positions[side][operation.chunk]
        return ChunkSize.full(num_positions, self._num_sentences[operation.microbatch])

    def value_bytes(self, operation: Operation, port: str) -> int:
        """Return the bytes of what an operation makes at a port."""
        size = self.chunk(operation)
        key = (operation.kind, operation.block, port, size)
        if key not in self._known:
            value = Value(operation, port)
            spec = self._graph.spec_of[operation.block]
            shape = value_shape(value, spec, self._model, size)
            self._known[key] = math.prod(shape) * value_dtype(value, self._precision).itemsize
        return self._known[key]


def _sizes(length: int, num_parts: int) -> list[int]:
    return [stop - start for start, stop in even_bounds(length, num_parts)]
