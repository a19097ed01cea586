"""The decoder as translation needs it: a word a row at a time, nothing kept for a backward pass.

The numbers are those of the trained blocks, here for many rows that come and go. States lie row by
row, all layers of a row together, so that a search moves a row in one copy. They and the gates are
written into memory that is taken once.

Shapes: R rows (hypotheses), L layers, E embedding numbers, H cells, V target words.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.best_words import BestWords, best_words
from model.lstm import advance
from model.seq2seq import DecoderState, Seq2Seq


@dataclass(frozen=True)
class _Layer:
    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor
    peephole: Tensor | None


class Decoder:
    """The decoder of a model, with the states of up to `max_rows` rows."""

    def __init__(self, model: Seq2Seq, max_rows: int) -> None:
        config, parameters = model.config, model.parameters()
        self._state_format = model.precision.state
        self._softmax_weight = parameters["softmax.weight"].compute
        self._softmax_bias = parameters["softmax.bias"].compute
        self._embedding = parameters["target_embedding.weight"].compute
        self._layers = []
        for layer in range(config.num_layers):
            name = f"decoder.{layer}"
            # Peepholes act on cells, which are in the state format.
            peephole = parameters[f"{name}.peephole"].value if config.peepholes else None
            parts = (f"{name}.{part}" for part in ("weight_ih", "weight_hh", "bias"))
            weight_ih, weight_hh, bias = (parameters[part].compute for part in parts)
            self._layers.append(_Layer(weight_ih, weight_hh, bias, peephole))
        shape = (max_rows, config.num_layers, config.hidden_size)
        compute = self._embedding
        self._hidden = [compute.new_empty(shape) for _ in range(2)]
        self._cell = [compute.new_empty(shape, dtype=self._state_format) for _ in range(2)]
        self._gates = compute.new_empty((max_rows, 4 * config.hidden_size))
        self.num_rows = 0

    @property
    def state(self) -> DecoderState:
        """The states of all rows; they change with the next call."""
        hidden, cell = self._hidden[0], self._cell[0]
        rows = slice(self.num_rows)
        return DecoderState(hidden[rows].transpose(0, 1), cell[rows].transpose(0, 1))

    def start(self, state: DecoderState) -> None:
        """Take these rows in place of all others."""
        self.num_rows = state.hidden.shape[1]
        self.state.hidden.copy_(state.hidden)
        self.state.cell.copy_(state.cell)

    def select(self, rows: Tensor) -> None:
        """Make row i what row `rows[i]` was (int64 ids, which may repeat)."""
        for pair in (self._hidden, self._cell):
            torch.index_select(pair[0][: self.num_rows], 0, rows, out=pair[1][: len(rows)])
            pair.reverse()
        self.num_rows = len(rows)

    def step(self, words: Tensor) -> Tensor:
        """Read a word a row (R,); return the top layer's outputs (R, H)."""
        # Hypotheses of a batch often end in the same word, whose product is needed once. On a GPU,
        # finding that out costs more than the product.
        distinct, places = words, None
        if words.is_cpu:
            distinct, places = torch.unique(words, return_inverse=True)
        inputs = F.embedding(distinct, self._embedding)
        for number, layer in enumerate(self._layers):
            hidden = self._hidden[0][: self.num_rows, number]
            cell = self._cell[0][: self.num_rows, number]
            gates = self._gate_sums(layer, inputs, hidden, places)
            places = None
            advance(gates, cell, cell, layer.peephole)
            torch.mul(gates[:, -cell.shape[1] :], torch.tanh(cell), out=hidden)
            inputs = hidden
        return inputs

    def best_words(self, outputs: Tensor, count: int) -> BestWords:
        """Return each row's most probable next words, at most `count`, after outputs (R, H)."""
        return best_words(
            outputs, self._softmax_weight, self._softmax_bias, count, self._state_format
        )

    def _gate_sums(
        self, layer: _Layer, inputs: Tensor, hidden: Tensor, places: Tensor | None
    ) -> Tensor:
        """Return x W_ih' + h W_hh' + b (R, 4H) in the state format.

        Row i reads input `places[i]`, or input i where places are None.
        """
        gates = self._gates[: self.num_rows]
        if places is None:
            torch.addmm(layer.bias, inputs, layer.weight_ih.t(), out=gates)
        else:
            products = torch.addmm(layer.bias, inputs, layer.weight_ih.t())
            torch.index_select(products, 0, places, out=gates)
        if gates.dtype == self._state_format:
            return gates.addmm_(hidden, layer.weight_hh.t())
        # As in training: each product is rounded to the compute format, their sum is not.
        return gates.to(self._state_format).add_(hidden @ layer.weight_hh.t())
