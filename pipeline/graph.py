"""The work of one step as a graph: operations over block, microbatch and chunk, and their values.

An operation takes its inputs by port and makes values by port; an edge is a value. The carry of a
recurrence from chunk to chunk is an edge like every other one, and so is its gradient on the way
back. Nothing here knows ranks, costs or tensors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from model.network import BlockSpec
from pipeline.numbered_graph import NumberedGraph, number_graph

Kind = Literal["F", "I", "W"]


class Operation(NamedTuple):
    """F, I or W of a block, for one microbatch and one time chunk of the block's side."""

    kind: Kind
    block: str
    microbatch: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.kind} {self.block} (microbatch {self.microbatch}, chunk {self.chunk})"


class Value(NamedTuple):
    """What an operation makes at one of its output ports."""

    operation: Operation
    port: str


# Several producers of one port are added up in the order in which they stand here.
Inputs = dict[str, tuple[Value, ...]]


@dataclass(frozen=True)
class Graph:
    """The operations of one step in forward-then-backward order, with the inputs of each.

    `inputs` has every operation as a key. A graph without training has forward operations only.
    """

    blocks: tuple[BlockSpec, ...]
    num_microbatches: int
    num_chunks: int
    training: bool
    inputs: Mapping[Operation, Inputs]
    spec_of: Mapping[str, BlockSpec] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec_of", {spec.name: spec for spec in self.blocks})

    @property
    def operations(self) -> tuple[Operation, ...]:
        """All operations, in the order of `inputs`."""
        return tuple(self.inputs)

    @cached_property
    def numbered(self) -> NumberedGraph:
        """The same graph with operations as numbers, made on first use."""
        return number_graph(self)

    def values_in(self, operation: Operation) -> Iterator[Value]:
        """Yield the values that the operation takes, in port order."""
        for producers in self.inputs[operation].values():
            yield from producers

    def needs(self, operation: Operation) -> tuple[Operation, ...]:
        """Return the operations that must run before: producers of inputs, and I's F or W's I.

        The latter share the block's saved object, so they are always on the same rank.
        """
        producers = dict.fromkeys(value.operation for value in self.values_in(operation))
        if operation.kind == "I":
            producers[operation._replace(kind="F")] = None
        elif operation.kind == "W":
            producers[operation._replace(kind="I")] = None
        return tuple(producers)


def build_graph(
    blocks: tuple[BlockSpec, ...], num_microbatches: int, num_chunks: int, *, training: bool
) -> Graph:
    """Build the graph of the blocks, given in forward order, over M microbatches and K chunks."""
    edges = _Edges(blocks, num_chunks)
    inputs: dict[Operation, Inputs] = {}
    for microbatch in range(num_microbatches):
        for spec in blocks:
            for chunk in range(num_chunks):
                operation = Operation("F", spec.name, microbatch, chunk)
                inputs[operation] = edges.forward(spec, operation)
    if training:
        for microbatch in reversed(range(num_microbatches)):
            for spec in reversed([spec for spec in blocks if spec.kind != "loss"]):
                for chunk in reversed(range(num_chunks)):
                    operation = Operation("I", spec.name, microbatch, chunk)
                    inputs[operation] = edges.backward(spec, operation)
                    inputs[operation._replace(kind="W")] = {}
    return Graph(blocks, num_microbatches, num_chunks, training, inputs)


class _Edges:
    """The network's wiring: which values arrive at an operation."""

    def __init__(self, blocks: tuple[BlockSpec, ...], num_chunks: int) -> None:
        self.last_chunk = num_chunks - 1
        self.shards = [spec.name for spec in blocks if spec.kind == "softmax"]
        self.top = max(spec.layer for spec in blocks if spec.kind == "recurrence")

    def forward(self, spec: BlockSpec, operation: Operation) -> Inputs:
        def made(block: str, port: str, chunk: int = operation.chunk) -> tuple[Value, ...]:
            return (Value(Operation("F", block, operation.microbatch, chunk), port),)

        match spec.kind:
            case "embedding":
                return {}
            case "projection":
                return {"input": made(self._below(spec), "output")}
            case "recurrence":
                inputs = {"gates": made(f"{_layer(spec)}.projection", "gates")}
                before = self._carry_from(spec, operation.chunk)
                if before is not None:
                    inputs |= {port: made(before[0], port, before[1]) for port in _CARRY}
                return inputs
            case "softmax":
                return {"input": made(f"decoder.{self.top}.recurrence", "output")}
            case "loss":
                return {
                    f"statistics.{index}": made(shard, "statistics")
                    for index, shard in enumerate(self.shards)
                }

    def backward(self, spec: BlockSpec, operation: Operation) -> Inputs:
        def made(block: str, port: str, chunk: int = operation.chunk) -> tuple[Value, ...]:
            return (Value(Operation("I", block, operation.microbatch, chunk), port),)

        match spec.kind:
            case "embedding":
                network = "encoder" if spec.side == "source" else "decoder"
                return {"output": made(f"{network}.0.projection", "input")}
            case "projection":
                return {"gates": made(f"{_layer(spec)}.recurrence", "gates")}
            case "recurrence":
                inputs: Inputs = {}
                above = self._above(spec)
                if above:
                    inputs["output"] = tuple(made(block, "input")[0] for block in above)
                after = self._carry_to(spec, operation.chunk)
                if after is not None:
                    inputs |= {port: made(after[0], port, after[1]) for port in _CARRY}
                return inputs
            case "softmax":
                loss = Operation("F", "loss", operation.microbatch, operation.chunk)
                return {"log_normalizer": (Value(loss, "log_normalizer"),)}
            case "loss":
                raise AssertionError("the loss has no gradient operations")

    def _below(self, spec: BlockSpec) -> str:
        """Return the block whose output a projection reads."""
        if spec.layer == 0:
            return f"{spec.side}_embedding"
        return f"{_network(spec)}.{spec.layer - 1}.recurrence"

    def _above(self, spec: BlockSpec) -> list[str]:
        """Return the blocks that read a recurrence's output: only its states leave the encoder."""
        if spec.layer < self.top:
            return [f"{_network(spec)}.{spec.layer + 1}.projection"]
        return self.shards if spec.side == "target" else []

    def _carry_from(self, spec: BlockSpec, chunk: int) -> tuple[str, int] | None:
        """Return the block and chunk whose last states a recurrence starts with."""
        if chunk > 0:
            return spec.name, chunk - 1
        if spec.side == "target":
            return f"encoder.{spec.layer}.recurrence", self.last_chunk
        return None

    def _carry_to(self, spec: BlockSpec, chunk: int) -> tuple[str, int] | None:
        """Return the block and chunk that start with a recurrence's last states."""
        if chunk < self.last_chunk:
            return spec.name, chunk + 1
        if spec.side == "source":
            return f"decoder.{spec.layer}.recurrence", 0
        return None


_CARRY = ("hidden", "cell")


def _network(spec: BlockSpec) -> str:
    return "encoder" if spec.side == "source" else "decoder"


def _layer(spec: BlockSpec) -> str:
    return f"{_network(spec)}.{spec.layer}"
