"""One LSTM layer as two blocks with hand-written gradients: input projection and recurrence.

The input projection is one large product over a whole chunk; only the recurrence has to go step by
step. The equations are those of Graves (2013), with peepholes optional; without them they are
torch.nn.LSTM's. Gate order i, f, g, o, and the single bias is the sum of torch's two.

Shapes: K positions of a chunk, B sentences, N sentences active at a position, D layer inputs,
H cells.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.batching import Chunk
from model.block import Block, Tensors
from model.parameter import Parameter
from model.precision import Precision


@dataclass
class ProjectionSaved:
    """The inputs (K, B, D) and, after I, the gradient of the gates (K, B, 4H)."""

    inputs: Tensor
    gradient: Tensor | None = None


class Projection(Block[ProjectionSaved]):
    """Port `input` (K, B, D) to port `gates` (K, B, 4H): x W_ih' + b."""

    def __init__(self, name: str, weight: Parameter, bias: Parameter) -> None:
        super().__init__(name, [weight, bias])
        self.weight, self.bias = weight, bias

    def forward(self, chunk: Chunk, inputs: Tensors) -> tuple[Tensors, ProjectionSaved]:
        """F: one product over all positions of the chunk."""
        gates = F.linear(inputs["input"], self.weight.compute, self.bias.compute)
        return {"gates": gates}, ProjectionSaved(inputs["input"])

    def input_gradient(self, saved: ProjectionSaved, gradients: Tensors) -> Tensors:
        """I: the gates' gradient through the weights."""
        saved.gradient = gradients["gates"]
        return {"input": saved.gradient @ self.weight.compute}

    def weight_gradient(self, saved: ProjectionSaved) -> None:
        """W: one product over all positions of the chunk."""
        assert saved.gradient is not None, "W before I"
        gradient = saved.gradient.flatten(0, 1)
        self.weight.add_gradient(gradient.t() @ saved.inputs.flatten(0, 1))
        self.bias.add_gradient(gradient.sum(0, dtype=self.bias.value.dtype))


@dataclass
class RecurrenceSaved:
    """What a chunk of the recurrence keeps, all in the state format unless said otherwise.

    `gates` (K, B, 4H) after their activations, `cells` and `hidden` (K + 1, B, H) with the carry
    that came in at index 0 (`hidden` in the compute format), and, after I, `gradient` (K, B, 4H) of
    the gates before their activations, in the compute format.
    """

    active: tuple[int, ...]
    gates: Tensor
    cells: Tensor
    hidden: Tensor
    gradient: Tensor | None = None


class Recurrence(Block[RecurrenceSaved]):
    """Ports `gates` (K, B, 4H), `hidden`, `cell` (B, H) to `output` (K, B, H), `hidden`, `cell`.

    A carry that does not come in is zero, and so is a gradient that does not. Sentences that are no
    longer active keep their carry, and their outputs are zero.
    """

    def __init__(
        self, name: str, weight: Parameter, peephole: Parameter | None, precision: Precision
    ) -> None:
        super().__init__(name, [weight] if peephole is None else [weight, peephole])
        self.weight, self.peephole = weight, peephole
        self.num_cells = int(weight.value.shape[1])
        self.precision = precision

    def forward(self, chunk: Chunk, inputs: Tensors) -> tuple[Tensors, RecurrenceSaved]:
        """F: step through the positions, each over the sentences that are still active."""
        saved = self._start(chunk, inputs)
        # The transposed view costs nothing and lets one product read the weights as they lie.
        weight = self.weight.compute.t()
        hidden, cell = saved.hidden[0].clone(), saved.cells[0].clone()
        for position, count in enumerate(chunk.active):
            gates = saved.gates[position, :count]
            gates += hidden[:count] @ weight
            new_cell = self._activate(gates, cell[:count])
            output = gates[:, 3 * self.num_cells :] * torch.tanh(new_cell)
            cell[:count] = new_cell
            hidden[:count] = output
            saved.cells[position + 1] = cell
            saved.hidden[position + 1, :count] = hidden[:count]
        return {"output": saved.hidden[1:], "hidden": hidden, "cell": cell}, saved

    def _start(self, chunk: Chunk, inputs: Tensors) -> RecurrenceSaved:
        gates = inputs["gates"].to(self.precision.state, copy=True)
        shape = (chunk.num_positions + 1, chunk.num_sentences, self.num_cells)
        cells = gates.new_zeros(shape)
        hidden = gates.new_zeros(shape, dtype=self.precision.compute)
        if "cell" in inputs:
            cells[0] = inputs["cell"]
            hidden[0] = inputs["hidden"]
        return RecurrenceSaved(chunk.active, gates, cells, hidden)

    def _activate(self, gates: Tensor, cell: Tensor) -> Tensor:
        """Turn the sums (N, 4H) into gate activations in place; return the new cells (N, H)."""
        i, f, g, o = gates.chunk(4, dim=1)
        if self.peephole is not None:
            i += self.peephole.value[0] * cell
            f += self.peephole.value[1] * cell
        i.sigmoid_()
        f.sigmoid_()
        g.tanh_()
        new_cell = f * cell + i * g
        if self.peephole is not None:
            o += self.peephole.value[2] * new_cell
        o.sigmoid_()
        return new_cell

    def input_gradient(self, saved: RecurrenceSaved, gradients: Tensors) -> Tensors:
        """I: walk the chunk backwards."""
        d_hidden, d_cell = self._gradient_carry(saved, gradients)
        d_output = gradients.get("output")
        saved.gradient = saved.gates.new_zeros(saved.gates.shape, dtype=self.precision.compute)
        for position in reversed(range(len(saved.active))):
            count = saved.active[position]
            total = d_hidden[:count]
            if d_output is not None:
                total = total + d_output[position, :count]
            d_gates, d_cell[:count] = self._step_back(saved, position, total, d_cell[:count])
            step = saved.gradient[position, :count]
            step.copy_(d_gates)
            d_hidden[:count] = step @ self.weight.compute
        return {"gates": saved.gradient, "hidden": d_hidden, "cell": d_cell}

    def _gradient_carry(self, saved: RecurrenceSaved, gradients: Tensors) -> tuple[Tensor, Tensor]:
        if "hidden" not in gradients:
            return torch.zeros_like(saved.cells[0]), torch.zeros_like(saved.cells[0])
        state = self.precision.state
        return gradients["hidden"].to(state, copy=True), gradients["cell"].to(state, copy=True)

    def _step_back(
        self, saved: RecurrenceSaved, position: int, d_hidden: Tensor, d_cell: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of a step's gate sums (N, 4H) and of the cells before it (N, H)."""
        count = len(d_hidden)
        i, f, g, o = saved.gates[position, :count].chunk(4, dim=1)
        before = saved.cells[position, :count]
        squashed = torch.tanh(saved.cells[position + 1, :count])
        d_o = d_hidden * squashed * o * (1 - o)
        d_cell = d_cell + d_hidden * o * (1 - squashed * squashed)
        if self.peephole is not None:
            d_cell = d_cell + d_o * self.peephole.value[2]
        d_i = d_cell * g * i * (1 - i)
        d_f = d_cell * before * f * (1 - f)
        d_g = d_cell * i * (1 - g * g)
        d_before = d_cell * f
        if self.peephole is not None:
            d_before = d_before + d_i * self.peephole.value[0] + d_f * self.peephole.value[1]
        return torch.cat([d_i, d_f, d_g, d_o], dim=1), d_before

    def weight_gradient(self, saved: RecurrenceSaved) -> None:
        """W: one product of the gate gradients with the states before each step."""
        assert saved.gradient is not None, "W before I"
        gradient = saved.gradient.flatten(0, 1)
        self.weight.add_gradient(gradient.t() @ saved.hidden[:-1].flatten(0, 1))
        if self.peephole is not None:
            self.peephole.add_gradient(self._peephole_gradient(saved, saved.gradient))

    def _peephole_gradient(self, saved: RecurrenceSaved, gradient: Tensor) -> Tensor:
        d_i, d_f, _, d_o = gradient.to(self.precision.state).chunk(4, dim=2)
        before, after = saved.cells[:-1], saved.cells[1:]
        return torch.stack(
            [(d_i * before).sum((0, 1)), (d_f * before).sum((0, 1)), (d_o * after).sum((0, 1))]
        )
