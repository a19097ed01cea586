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
    """What a chunk of the recurrence keeps.

    `gates` (K, B, 4H) after their activations and `cells` (K + 1, B, H) in the state format, and
    `hidden` (K + 1, B, H) in the compute format; the latter two have the carry that came in at
    index 0, and zeros where a sentence was no longer active. After I, `gradient` (K, B, 4H) is that
    of the gates before their activations, in the compute format.
    """

    active: tuple[int, ...]
    gates: Tensor
    cells: Tensor
    hidden: Tensor
    gradient: Tensor | None = None


@dataclass(frozen=True)
class _Slopes:
    """By what a step of I multiplies the gradients of the states, for all positions at once.

    `gates` (K, B, 4H): how each gate's sum acts on the cell (i, f, g) or the hidden state (o).
    `cell` (K, B, H): how the cell acts on the hidden state; `carry` (K, B, H): on the next cell.
    """

    gates: Tensor
    cell: Tensor
    carry: Tensor


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
        for position, count in enumerate(chunk.active):
            gates = saved.gates[position, :count]
            _add_product(gates, saved.hidden[position, :count], weight)
            cell = saved.cells[position + 1, :count]
            self._activate(gates, saved.cells[position, :count], cell)
            output = gates[:, 3 * self.num_cells :] * torch.tanh(cell)
            saved.hidden[position + 1, :count] = output
        ends = _ends(saved.active, chunk.num_sentences, saved.hidden.device)
        carry = {"hidden": saved.hidden[ends], "cell": saved.cells[ends]}
        return {"output": saved.hidden[1:], **carry}, saved

    def _start(self, chunk: Chunk, inputs: Tensors) -> RecurrenceSaved:
        gates = inputs["gates"].to(self.precision.state, copy=True)
        shape = (chunk.num_positions + 1, chunk.num_sentences, self.num_cells)
        cells = gates.new_zeros(shape)
        hidden = gates.new_zeros(shape, dtype=self.precision.compute)
        if "cell" in inputs:
            cells[0] = inputs["cell"]
            hidden[0] = inputs["hidden"]
        return RecurrenceSaved(chunk.active, gates, cells, hidden)

    def _activate(self, gates: Tensor, before: Tensor, after: Tensor) -> None:
        """Turn the sums (N, 4H) into gate activations in place, and write the new cells (N, H)."""
        i, f, g, o = gates.chunk(4, dim=1)
        if self.peephole is not None:
            i += self.peephole.value[0] * before
            f += self.peephole.value[1] * before
        gates[:, : 2 * self.num_cells].sigmoid_()
        g.tanh_()
        torch.mul(f, before, out=after)
        after.addcmul_(i, g)
        if self.peephole is not None:
            o += self.peephole.value[2] * after
        o.sigmoid_()

    def input_gradient(self, saved: RecurrenceSaved, gradients: Tensors) -> Tensors:
        """I: walk the chunk backwards."""
        d_hidden, d_cell = self._gradient_carry(saved, gradients)
        d_output = gradients.get("output")
        slopes = self._slopes(saved)
        saved.gradient = saved.gates.new_zeros(saved.gates.shape, dtype=self.precision.compute)
        for position in reversed(range(len(saved.active))):
            count = saved.active[position]
            total, cell = d_hidden[:count], d_cell[:count]
            if d_output is not None:
                total = total + d_output[position, :count]
            cell.addcmul_(total, slopes.cell[position, :count])
            step = saved.gradient[position, :count]
            self._gate_gradients(step, slopes.gates[position, :count], total, cell)
            cell.mul_(slopes.carry[position, :count])
            d_hidden[:count] = step @ self.weight.compute
        return {"gates": saved.gradient, "hidden": d_hidden, "cell": d_cell}

    def _gradient_carry(self, saved: RecurrenceSaved, gradients: Tensors) -> tuple[Tensor, Tensor]:
        if "hidden" not in gradients:
            return torch.zeros_like(saved.cells[0]), torch.zeros_like(saved.cells[0])
        state = self.precision.state
        return gradients["hidden"].to(state, copy=True), gradients["cell"].to(state, copy=True)

    def _slopes(self, saved: RecurrenceSaved) -> _Slopes:
        """Do all arithmetic of I that does not depend on its order, in few large operations.

        A peephole is one more way from a cell to the gates, so it only adds to `cell` and `carry`.
        """
        i, f, g, o = saved.gates.chunk(4, dim=2)
        squashed = torch.tanh(saved.cells[1:])
        gates = torch.empty_like(saved.gates)
        d_i, d_f, d_g, d_o = gates.chunk(4, dim=2)
        torch.mul(g * i, 1 - i, out=d_i)
        torch.mul(saved.cells[:-1] * f, 1 - f, out=d_f)
        torch.mul(i, 1 - g * g, out=d_g)
        torch.mul(squashed * o, 1 - o, out=d_o)
        cell, carry = o * (1 - squashed * squashed), f
        if self.peephole is not None:
            to_i, to_f, to_o = self.peephole.value
            cell = cell + d_o * to_o
            carry = carry + d_i * to_i + d_f * to_f
        return _Slopes(gates, cell, carry)

    def _gate_gradients(
        self, step: Tensor, slopes: Tensor, d_hidden: Tensor, d_cell: Tensor
    ) -> None:
        """Write the gradients of a step's gate sums (N, 4H): i, f, g come through the cell."""
        split, shape = 3 * self.num_cells, (len(step), 3, self.num_cells)
        through_cell = slopes[:, :split].view(shape) * d_cell[:, None]
        step[:, :split].view(shape).copy_(through_cell)
        step[:, split:] = slopes[:, split:] * d_hidden

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


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to the sums in place; one operation where the formats agree."""
    if left.dtype == sums.dtype:
        sums.addmm_(left, right)
    else:
        sums += left @ right


def _ends(
    active: tuple[int, ...], num_sentences: int, device: torch.device
) -> tuple[Tensor, Tensor] | int:
    """Return where in (K + 1, B, H) the last state of each sentence lies: an index for two axes."""
    if not active or active[-1] == num_sentences:
        return len(active)
    counts = torch.tensor(active)
    sentences = torch.arange(num_sentences)
    num_steps = (counts[:, None] > sentences).sum(0)
    return num_steps.to(device), sentences.to(device)
