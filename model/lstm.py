"""One LSTM layer as two blocks with hand-written gradients: input projection and recurrence.

The input projection is one large product over a whole chunk; only the recurrence has to go step by
step. The equations are those of Graves (2013), with peepholes optional; without them they are
torch.nn.LSTM's. Gate order i, f, g, o, and the single bias is the sum of torch's two.

The recurrence is bound by memory as soon as products are fast, so its I works on as many positions
at a time as fit a cache, and turns the gates into their gradients where they lie.

Shapes: N words of a chunk, B sentences, n sentences active at a position, D layer inputs, H cells.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model.batching import Chunk
from model.block import Block, Tensors
from model.packed_states import States, Step, steps_of
from model.parameter import Parameter
from model.precision import Precision

_CACHED_BYTES = 2 << 20
"""Gates that I works on at a time: they and what is made of them stay in a core's caches."""


@dataclass
class ProjectionSaved:
    """The inputs (N, D) and, after I, the gradient of the gates (N, 4H)."""

    inputs: Tensor
    gradient: Tensor | None = None


class Projection(Block[ProjectionSaved]):
    """Port `input` (N, D) to port `gates` (N, 4H): x W_ih' + b."""

    def __init__(self, name: str, weight: Parameter, bias: Parameter) -> None:
        super().__init__(name, [weight, bias])
        self.weight, self.bias = weight, bias

    def forward(
        self, chunk: Chunk, inputs: Tensors, *, training: bool = True
    ) -> tuple[Tensors, ProjectionSaved]:
        """F: one product over all words of the chunk."""
        gates = F.linear(inputs["input"], self.weight.compute, self.bias.compute)
        return {"gates": gates}, ProjectionSaved(inputs["input"])

    def input_gradient(self, saved: ProjectionSaved, gradients: Tensors) -> Tensors:
        """I: the gates' gradient through the weights."""
        saved.gradient = gradients["gates"]
        return {"input": saved.gradient @ self.weight.compute}

    def weight_gradient(self, saved: ProjectionSaved) -> None:
        """W: one product over all words of the chunk."""
        assert saved.gradient is not None, "W before I"
        self.weight.add_product(saved.gradient, saved.inputs)
        self.bias.add_gradient(saved.gradient.sum(0, dtype=self.bias.value.dtype))


@dataclass
class RecurrenceSaved:
    """What a chunk of the recurrence keeps.

    `gates` (N, 4H) after their activations and `cells` in the state format, and `hidden` in the
    compute format. I replaces `gates` by `gradient` (N, 4H), that of the gates before their
    activations, in the compute format.
    """

    chunk: Chunk
    gates: Tensor | None
    cells: States
    hidden: States
    gradient: Tensor | None = None

    def steps(self) -> list[Step]:
        """Return the positions at which a sentence runs, in order."""
        return steps_of(self.chunk)


class _Slopes(NamedTuple):
    """By what a step of I multiplies the gradients of the states, for the rows of some positions.

    `gates` (rows, 4H): how each gate's sum acts on the cell (i, f, g) or the hidden state (o).
    `cell` (rows, H): how the cell acts on the hidden state; `carry` (rows, H): on the next cell.
    """

    gates: Tensor
    cell: Tensor
    carry: Tensor


class Recurrence(Block[RecurrenceSaved]):
    """Ports `gates` (N, 4H), `hidden`, `cell` (B, H) to `output` (N, H), `hidden`, `cell` (B, H).

    A carry that does not come in is zero, and so is a gradient that does not. Sentences that are no
    longer active keep their carry.
    """

    def __init__(
        self, name: str, weight: Parameter, peephole: Parameter | None, precision: Precision
    ) -> None:
        super().__init__(name, [weight] if peephole is None else [weight, peephole])
        self.weight, self.peephole = weight, peephole
        self.num_cells = int(weight.value.shape[1])
        self.precision = precision

    def forward(
        self, chunk: Chunk, inputs: Tensors, *, training: bool = True
    ) -> tuple[Tensors, RecurrenceSaved]:
        """F: step through the positions, each over the sentences that are still active."""
        saved = self._start(chunk, inputs)
        assert saved.gates is not None
        # The transposed view costs nothing and lets one product read the weights as they lie.
        weight = self.weight.compute.t()
        peephole = None if self.peephole is None else self.peephole.value
        squashed = saved.cells.rows.new_empty((max(chunk.active, default=0), self.num_cells))
        for step in saved.steps():
            gates, cell = saved.gates[step.rows], saved.cells.rows[step.rows]
            _add_product(inputs["gates"][step.rows], saved.hidden.before(step), weight, out=gates)
            advance(gates, saved.cells.before(step), cell, peephole)
            bounded = torch.tanh(cell, out=squashed[: len(cell)])
            torch.mul(gates[:, 3 * self.num_cells :], bounded, out=saved.hidden.rows[step.rows])
        states = {"hidden": saved.hidden, "cell": saved.cells}
        carry = {port: of_port.ends(chunk) for port, of_port in states.items()}
        return {"output": saved.hidden.rows, **carry}, saved

    def _start(self, chunk: Chunk, inputs: Tensors) -> RecurrenceSaved:
        """Make room for the states, and take the carry that comes in."""
        state, compute = self.precision.state, self.precision.compute
        return RecurrenceSaved(
            chunk,
            torch.empty_like(inputs["gates"], dtype=state),
            self._states(chunk, inputs, "cell", state),
            self._states(chunk, inputs, "hidden", compute),
        )

    def _states(self, chunk: Chunk, inputs: Tensors, port: str, dtype: torch.dtype) -> States:
        rows = inputs["gates"].new_empty((len(inputs["gates"]), self.num_cells), dtype=dtype)
        if port not in inputs:
            return States(rows.new_zeros((chunk.num_sentences, self.num_cells)), rows)
        carry = inputs[port]
        return States(carry.clone() if chunk.order is None else carry[chunk.order], rows)

    def input_gradient(self, saved: RecurrenceSaved, gradients: Tensors) -> Tensors:
        """I: walk the chunk backwards."""
        assert saved.gates is not None, "I was run before"
        d_hidden, d_cell = self._gradient_carry(saved, gradients)
        d_output = gradients.get("output")
        saved.gradient = saved.gates  # each gradient takes the place of its gates
        if self.precision.compute != self.precision.state:
            saved.gradient = torch.empty_like(saved.gates, dtype=self.precision.compute)
        for steps in self._cached(saved.steps()):
            first_row = steps[-1].rows.start
            slopes = self._slopes(saved, steps)
            for step in steps:
                here = slice(step.rows.start - first_row, step.rows.stop - first_row)
                total, cell = d_hidden[: here.stop - here.start], d_cell[: here.stop - here.start]
                if d_output is not None:
                    total += d_output[step.rows]
                cell.addcmul_(total, slopes.cell[here])
                gates = slopes.gates[here]
                self._gate_gradients(gates, total, cell)
                cell.mul_(slopes.carry[here])
                gradient = saved.gradient[step.rows]
                if saved.gradient is not saved.gates:
                    gradient.copy_(gates)
                _product(gradient, self.weight.compute, out=total)
        saved.gates = None
        if saved.chunk.order is not None:
            d_hidden, d_cell = (_put_back(saved.chunk.order, d) for d in (d_hidden, d_cell))
        return {"gates": saved.gradient, "hidden": d_hidden, "cell": d_cell}

    def _gradient_carry(self, saved: RecurrenceSaved, gradients: Tensors) -> tuple[Tensor, Tensor]:
        if "hidden" not in gradients:
            zeros = saved.cells.carry.new_zeros((2, saved.chunk.num_sentences, self.num_cells))
            return zeros[0], zeros[1]
        state = self.precision.state
        return gradients["hidden"].to(state, copy=True), gradients["cell"].to(state, copy=True)

    def _cached(self, steps: list[Step]) -> Iterator[list[Step]]:
        """Yield the positions, last first, as many at a time as fit the cache, and at least one.

        A GPU takes them all at a time: there the number of operations counts.
        """
        most = _CACHED_BYTES // (4 * self.num_cells * self.precision.state.itemsize)
        if self.weight.value.is_cuda and steps:
            most = steps[-1].rows.stop
        group: list[Step] = []
        for step in reversed(steps):
            if group and group[0].rows.stop - step.rows.start > most:
                yield group
                group = []
            group.append(step)
        if group:
            yield group

    def _slopes(self, saved: RecurrenceSaved, steps: list[Step]) -> _Slopes:
        """Do all arithmetic of some positions that does not depend on their order, in the gates.

        With t = i g, the slope of i is t - t i, and that of g is i - t g; f and o are like i. A
        peephole is one more way from a cell to the gates, so it only adds to `cell` and `carry`.
        """
        assert saved.gates is not None
        rows = slice(steps[-1].rows.start, steps[0].rows.stop)
        gates = saved.gates[rows]
        i, f, g, o = gates.chunk(4, dim=1)
        carry = f.clone()
        product = i * g
        torch.addcmul(i, product, g, value=-1.0, out=g)
        torch.addcmul(product, product, i, value=-1.0, out=i)
        before = [saved.cells.before(step) for step in reversed(steps)]
        torch.mul(before[0] if len(before) == 1 else torch.cat(before), f, out=product)
        torch.addcmul(product, product, f, value=-1.0, out=f)
        cell = torch.tanh(saved.cells.rows[rows])
        torch.mul(cell, o, out=product)
        torch.addcmul(o, product, cell, value=-1.0, out=cell)
        torch.addcmul(product, product, o, value=-1.0, out=o)
        if self.peephole is not None:
            to_i, to_f, to_o = self.peephole.value
            cell += o * to_o
            carry += i * to_i + f * to_f
        return _Slopes(gates, cell, carry)

    def _gate_gradients(self, slopes: Tensor, d_hidden: Tensor, d_cell: Tensor) -> None:
        """Turn slopes (n, 4H) into the gradients of the gates' sums: i, f, g through the cell."""
        split, shape = 3 * self.num_cells, (len(slopes), 3, self.num_cells)
        slopes[:, :split].view(shape).mul_(d_cell[:, None])
        slopes[:, split:].mul_(d_hidden)

    def weight_gradient(self, saved: RecurrenceSaved) -> None:
        """W: one product of the gate gradients with the states before each step."""
        assert saved.gradient is not None, "W before I"
        steps = saved.steps()
        if not steps:
            return
        before = torch.cat([saved.hidden.before(step) for step in steps])
        self.weight.add_product(saved.gradient, before)
        if self.peephole is not None:
            self.peephole.add_gradient(self._peephole_gradient(saved, saved.gradient))

    def _peephole_gradient(self, saved: RecurrenceSaved, gradient: Tensor) -> Tensor:
        d_i, d_f, _, d_o = gradient.to(self.precision.state).chunk(4, dim=1)
        before = torch.cat([saved.cells.before(step) for step in saved.steps()])
        after = saved.cells.rows
        return torch.stack([(d_i * before).sum(0), (d_f * before).sum(0), (d_o * after).sum(0)])


def advance(gates: Tensor, before: Tensor, after: Tensor, peephole: Tensor | None) -> None:
    """Turn the gates' sums (n, 4H) into their values in place, and write the next cells (n, H).

    The cells before and after may be the same memory; the peephole is (3, H).
    """
    num_cells = before.shape[1]
    i, f, g, o = gates.chunk(4, dim=1)
    if peephole is not None:
        i.addcmul_(peephole[0], before)
        f.addcmul_(peephole[1], before)
    gates[:, : 2 * num_cells].sigmoid_()
    torch.mul(f, before, out=after)
    after.addcmul_(i, g.tanh_())
    if peephole is not None:
        o.addcmul_(peephole[2], after)
    o.sigmoid_()


def _add_product(sums: Tensor, left: Tensor, right: Tensor, *, out: Tensor) -> None:
    """Write sums + left @ right; one operation where the formats agree."""
    if left.dtype == out.dtype:
        torch.addmm(sums, left, right, out=out)
    else:
        out.copy_(sums)
        out += left @ right


def _product(left: Tensor, right: Tensor, *, out: Tensor) -> None:
    """Write left @ right, in the format of `out`."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def _put_back(order: Tensor, rows: Tensor) -> Tensor:
    """Return rows (B, H) in the order in which they came: row r goes to place order[r]."""
    placed = torch.empty_like(rows)
    placed[order] = rows
    return placed
