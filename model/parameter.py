"""Parameters with their gradients: whole ones, rows of one, and embeddings with sparse gradients.

Every parameter carries its whole-model name and the rows of it that are held here, so that a shard
knows its place in the model without knowing who holds the rest. The gradient is the sum over the
batch's sentences; the optimiser divides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.initialization import uniform_rows
from model.precision import Precision

_CACHED_BYTES = 1 << 22
"""The part of a product in a lower format that is added to a gradient at a time."""
_GPU_BYTES = 1 << 28
_BLOCK_NUMBERS = 1 << 18
_GPU_BLOCK_NUMBERS = 1 << 24
"""The part of a parameter that is updated, or squared and added up, at a time."""


@dataclass(frozen=True)
class ParameterRows:
    """Rows [start, stop) of the whole-model parameter `name`, which has `shape`."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def key(self) -> str:
        """The name, with the rows when they are not all of them: `softmax.weight[0:20000]`."""
        whole = (self.start, self.stop) == (0, self.shape[0])
        return self.name if whole else f"{self.name}[{self.start}:{self.stop}]"


class Parameter:
    """Some rows of a parameter: master value, its copy in the compute format, and its gradient."""

    def __init__(self, rows: ParameterRows, value: Tensor, precision: Precision) -> None:
        self.rows = rows
        self.value = value
        # One tensor serves as both when the formats agree.
        self.compute = value.to(precision.compute)
        self._gradient: Tensor | None = None

    @classmethod
    def initial(
        cls, rows: ParameterRows, scale: float, seed: int, precision: Precision, device: str
    ) -> "Parameter":
        """Create the parameter with its initial values."""
        drawn = uniform_rows(seed, rows.name, rows.shape, rows.start, rows.stop, scale)
        return cls(rows, drawn.to(device=device, dtype=precision.state), precision)

    @property
    def name(self) -> str:
        """The whole-model name."""
        return self.rows.name

    def load(self, value: Tensor) -> None:
        """Replace the held rows by `value`, of the same shape."""
        self.value.copy_(value)
        if self.compute is not self.value:
            self.compute.copy_(self.value)

    def add_gradient(self, gradient: Tensor) -> None:
        """Add to the gradient; the tensor may be kept, so the caller must not change it later."""
        if self._gradient is None:
            self._gradient = gradient.to(self.value.dtype)
        else:
            self._gradient.add_(gradient)

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add left' @ right to the gradient of a matrix, or of a vector if `right` is (N, 1)."""
        if left.dtype != self.value.dtype:
            self._add_lower_product(left, right)
        elif self._gradient is None:
            self._gradient = (left.t() @ right).view(self.value.shape)
        else:
            self._gradient.view(left.shape[1], -1).addmm_(left.t(), right)

    def _add_lower_product(self, left: Tensor, right: Tensor) -> None:
        """Add a product in the compute format, some rows at a time, while these are in a cache."""
        if self._gradient is None:
            self._gradient = torch.zeros_like(self.value)
        at_once = _GPU_BYTES if left.is_cuda else _CACHED_BYTES
        size = max(1, at_once // (right.shape[1] * right.dtype.itemsize))
        sums = self._gradient.view(left.shape[1], -1)
        for start in range(0, len(sums), size):
            rows = slice(start, start + size)
            sums[rows] += left[:, rows].t() @ right

    def gradient(self) -> Tensor:
        """Return the gradient summed so far, dense, of the value's shape."""
        return torch.zeros_like(self.value) if self._gradient is None else self._gradient

    def gradient_to_sum(self) -> Tensor:
        """Return the gradient for a sum over replicas, which changes it in place; zeros at first.

        Entries lie in the order of the value's.
        """
        self._gradient = self.gradient().contiguous()
        return self._gradient

    def settle_gradient(self) -> None:
        """Hear that this step adds no more; the gradient then holds on to no tensor of others."""

    def squared_norm(self) -> float:
        """Return the sum of the squares of the gradient's entries."""
        return 0.0 if self._gradient is None else _sum_of_squares(self._gradient)

    def descend(self, step_size: float) -> None:
        """Subtract step_size times the gradient, and start a new gradient."""
        if self._gradient is not None:
            tensors = (self.value, self.compute, self._gradient)
            for value, compute, gradient in zip(*map(_blocks, tensors), strict=True):
                value.add_(gradient, alpha=-step_size)
                if self.compute is not self.value:
                    compute.copy_(value)
        self.clear_gradient()

    def clear_gradient(self) -> None:
        """Forget the gradient."""
        self._gradient = None


class RowParameter(Parameter):
    """A parameter of which a batch touches few rows: its gradient is kept as (rows, values)."""

    def __init__(self, rows: ParameterRows, value: Tensor, precision: Precision) -> None:
        super().__init__(rows, value, precision)
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add_row_gradient(self, ids: Tensor, gradients: Tensor) -> None:
        """Add `gradients` (N, E) to the rows `ids` (N,), which may repeat."""
        self._parts.append((ids, gradients))

    def gradient(self) -> Tensor:
        """Return the gradient summed so far, dense."""
        dense = torch.zeros_like(self.value)
        ids, sums = self._merged()
        dense[ids] = sums
        return dense

    def row_gradients(self) -> tuple[Tensor, Tensor]:
        """Return the touched rows (N,), each once, in order, and their gradients (N, E)."""
        return self._merged()

    def set_row_gradients(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Replace the gradient by the sum of parts, added in the order given.

        A part is rows (N,), each once, and their gradients (N, E).
        """
        self._parts = list(parts)

    def settle_gradient(self) -> None:
        """Add up repeated rows, in tensors of its own."""
        given = self._parts
        ids, sums = self._merged()
        if given and self._parts is given:
            self._parts = [(ids.clone(), sums.clone())]

    def squared_norm(self) -> float:
        """Return the sum of squares after repeated rows were added up."""
        _, sums = self._merged()
        return _sum_of_squares(sums)

    def descend(self, step_size: float) -> None:
        """Subtract step_size times the gradient from the touched rows only."""
        ids, sums = self._merged()
        self.value.index_add_(0, ids, sums, alpha=-step_size)
        if self.compute is not self.value:
            self.compute.index_copy_(0, ids, self.value[ids].to(self.compute.dtype))
        self.clear_gradient()

    def clear_gradient(self) -> None:
        """Forget the gradient."""
        self._parts = []

    def _merged(self) -> tuple[Tensor, Tensor]:
        if not self._parts:
            ids = torch.empty(0, dtype=torch.int64, device=self.value.device)
            return ids, self.value[:0]
        if len(self._parts) > 1 or not _strictly_increasing(self._parts[0][0]):
            ids = torch.cat([part for part, _ in self._parts])
            unique, inverse = torch.unique(ids, return_inverse=True)
            sums = self.value.new_zeros((len(unique), *self.value.shape[1:]))
            for (_, gradients), places in zip(
                self._parts, inverse.split([len(part) for part, _ in self._parts]), strict=True
            ):
                sums.index_add_(0, places, gradients.to(sums.dtype))
            self._parts = [(unique, sums)]
        ids, sums = self._parts[0]
        return ids, sums.to(self.value.dtype)


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Cut into groups of rows that stay in the processor's cache; a GPU does best with all."""
    return (tensor,) if tensor.is_cuda else _rows(tensor, _BLOCK_NUMBERS)


def _rows(tensor: Tensor, num_numbers: int) -> tuple[Tensor, ...]:
    """Cut into groups of rows of about so many numbers."""
    return torch.split(tensor, max(1, num_numbers * len(tensor) // max(1, tensor.numel())))


def _sum_of_squares(tensor: Tensor) -> float:
    """Add up in float64, a block at a time, so that no second tensor of this size is made."""
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for block in _rows(tensor, _GPU_BLOCK_NUMBERS if tensor.is_cuda else _BLOCK_NUMBERS):
        numbers = block.to(torch.float64).flatten()
        total += torch.dot(numbers, numbers)
    return float(total)


def _strictly_increasing(ids: Tensor) -> bool:
    return bool((ids[1:] > ids[:-1]).all())
