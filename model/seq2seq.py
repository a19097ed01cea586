"""The whole network on one device: loss, exact gradients, and what the encoder hands on.

Shapes: B sentences, S source positions, L layers, H cells, V target words.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from model.batching import Batch, Chunk
from model.block import Block
from model.embedding import Embedding
from model.loss import Loss, LossSum
from model.lstm import Projection, Recurrence
from model.network import ModelConfig, build_block, network_blocks
from model.parameter import Parameter
from model.precision import Precision
from model.softmax import WholeSoftmax

__all__ = ["DecoderState", "ModelConfig", "Seq2Seq"]


@dataclass(frozen=True)
class DecoderState:
    """The states of all decoder layers: `hidden` and `cell`, each (L, B, H)."""

    hidden: Tensor
    cell: Tensor


@dataclass
class _Layer:
    projection: Projection
    recurrence: Recurrence


@dataclass
class _Network:
    """One side's forward pass: the chunk, the saved objects by block, the top layer's outputs."""

    chunk: Chunk
    saved: dict[str, Any]
    outputs: Tensor
    carries: list[dict[str, Tensor]]


class Seq2Seq:
    """Encoder, decoder and softmax of Sutskever et al. (2014), whole, on one device."""

    def __init__(
        self,
        config: ModelConfig,
        precision: Precision | None = None,
        device: str = "cpu",
        seed: int = 1,
    ) -> None:
        self.config = config
        self.precision = precision or Precision()
        self.device = device
        self.blocks: dict[str, Block[Any]] = {
            spec.name: build_block(
                spec, config, precision=self.precision, device=device, seed=seed, alone=True
            )
            for spec in network_blocks(config)
        }
        self._encoder = self._layers("encoder")
        self._decoder = self._layers("decoder")

    def parameters(self) -> dict[str, Parameter]:
        """Return the parameters by name, in the canonical order."""
        held = {p.name: p for block in self.blocks.values() for p in block.parameters}
        return {name: held[name] for name in self.config.parameter_shapes()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace all parameters by whole tensors of the documented names and shapes."""
        for name, parameter in self.parameters().items():
            parameter.load(tensors[name])

    def loss(self, batch: Batch) -> LossSum:
        """Return the summed negative log-probability of the batch's target words, in nats."""
        self._forward(batch)
        return self._loss.take()

    def loss_and_gradients(self, batch: Batch) -> LossSum:
        """Return the loss, and add its gradient (a sum over sentences) to every parameter."""
        encoder, decoder, d_outputs = self._forward(batch, backward=True)
        d_carries = self._backward("target", self._decoder, decoder, d_outputs, None)
        self._backward("source", self._encoder, encoder, None, d_carries)
        return self._loss.take()

    def encode(self, source: Tensor, source_lengths: Tensor) -> DecoderState:
        """Read sentences (B, S), laid out and sorted as in a batch; return the decoder's start."""
        batch = Batch(source, source_lengths, source[:, :0], torch.zeros_like(source_lengths))
        chunk = batch.source_chunk(0, batch.source_positions, self.device)
        return _state(self._read("source", self._encoder, chunk, None, training=False).carries)

    @property
    def _loss(self) -> Loss:
        loss = self.blocks["loss"]
        assert isinstance(loss, Loss)
        return loss

    @property
    def _softmax(self) -> WholeSoftmax:
        softmax = self.blocks["softmax.0"]
        assert isinstance(softmax, WholeSoftmax)
        return softmax

    def _layers(self, network: Literal["encoder", "decoder"]) -> list[_Layer]:
        layers = []
        for layer in range(self.config.num_layers):
            projection = self.blocks[f"{network}.{layer}.projection"]
            recurrence = self.blocks[f"{network}.{layer}.recurrence"]
            assert isinstance(projection, Projection)
            assert isinstance(recurrence, Recurrence)
            layers.append(_Layer(projection, recurrence))
        return layers

    def _forward(
        self, batch: Batch, *, backward: bool = False
    ) -> tuple[_Network, _Network, Tensor | None]:
        """Run both sides and the loss; with `backward`, also the softmax's gradients."""
        source = batch.source_chunk(0, batch.source_positions, self.device)
        target = batch.target_chunk(0, batch.target_positions, self.device)
        encoder = self._read("source", self._encoder, source, None, training=backward)
        carries = encoder.carries
        decoder = self._read("target", self._decoder, target, carries, training=backward)
        given = {"input": decoder.outputs}
        outputs, saved = self._softmax.forward(target, given, training=backward)
        merged, _ = self._loss.forward(target, {"statistics.0": outputs["statistics"]})
        if not backward:
            return encoder, decoder, None
        d_outputs = self._softmax.input_gradient(saved, merged)["input"]
        self._softmax.weight_gradient(saved)
        return encoder, decoder, d_outputs

    def _read(
        self,
        side: Literal["source", "target"],
        layers: list[_Layer],
        chunk: Chunk,
        carries: list[dict[str, Tensor]] | None,
        *,
        training: bool,
    ) -> _Network:
        """Read a side; in training, what the gradients need is kept."""
        saved: dict[str, Any] = {}

        def forward(block: Block[Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            outputs, kept = block.forward(chunk, inputs, training=training)
            if training:
                saved[block.name] = kept
            return outputs

        embedding = self.blocks[f"{side}_embedding"]
        assert isinstance(embedding, Embedding)
        below, ends = forward(embedding, {})["output"], []
        for index, layer in enumerate(layers):
            gates = forward(layer.projection, {"input": below})
            carry = carries[index] if carries is not None else {}
            outputs = forward(layer.recurrence, gates | carry)
            below = outputs["output"]
            ends.append({"hidden": outputs["hidden"], "cell": outputs["cell"]})
        return _Network(chunk, saved, below, ends)

    def _backward(
        self,
        side: Literal["source", "target"],
        layers: list[_Layer],
        network: _Network,
        d_outputs: Tensor | None,
        d_carries: list[dict[str, Tensor]] | None,
    ) -> list[dict[str, Tensor]]:
        """Run I and W from the top layer down; return the gradients of the carries that came in."""
        d_starts: list[dict[str, Tensor]] = [{} for _ in layers]
        for index, layer in reversed(list(enumerate(layers))):
            gradients = dict(d_carries[index]) if d_carries is not None else {}
            if d_outputs is not None:
                gradients["output"] = d_outputs
            saved = network.saved[layer.recurrence.name]
            d_gates = layer.recurrence.input_gradient(saved, gradients)
            layer.recurrence.weight_gradient(saved)
            d_starts[index] = {"hidden": d_gates.pop("hidden"), "cell": d_gates.pop("cell")}
            saved = network.saved[layer.projection.name]
            d_outputs = layer.projection.input_gradient(saved, d_gates)["input"]
            layer.projection.weight_gradient(saved)
        embedding = self.blocks[f"{side}_embedding"]
        saved = network.saved[embedding.name]
        assert d_outputs is not None
        embedding.input_gradient(saved, {"output": d_outputs})
        embedding.weight_gradient(saved)
        return d_starts


def _state(carries: list[dict[str, Tensor]]) -> DecoderState:
    return DecoderState(
        torch.stack([carry["hidden"] for carry in carries]),
        torch.stack([carry["cell"] for carry in carries]),
    )
