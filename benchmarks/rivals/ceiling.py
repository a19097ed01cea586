"""The machine's matrix products: what a step could take if it were nothing but large ones.

Every product of a step is measured in the form in which a step makes it (weights as they lie, one
factor transposed for the gradient of the weights), alone, into memory that is there already, with
both cores in two ways: one process of two threads, and two processes of one.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.rivals.processes import Place, run_processes
from benchmarks.rivals.task import Task
from model.precision import Precision

POSITIONS = 29
"""Of a large product's chunk: 29 positions of a full batch, 3,712 rows for the paper's."""
_SOFTMAX_PART = 8
_REPETITIONS = 3

ProductName = tuple[str, str]
"""Kind of block and operation: `("softmax", "W")`."""
LARGE: ProductName = ("projection", "F")
"""Stands for the machine's rate: a layer's input projection, the paper's 3712 x 1000 x 4000."""
Rates = Mapping[ProductName, float]


@dataclass(frozen=True)
class Product:
    """Rows x inner times inner x columns; the left or the right factor is stored transposed."""

    rows: int
    inner: int
    columns: int
    left_transposed: bool = False
    right_transposed: bool = False

    @property
    def operations(self) -> float:
        """Floating-point operations."""
        return 2.0 * self.rows * self.inner * self.columns

    def __str__(self) -> str:
        return f"{self.rows} x {self.inner} x {self.columns}"

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return both factors as they are used, and memory for the product."""
        left = _random(self.rows, self.inner, dtype, transposed=self.left_transposed)
        right = _random(self.inner, self.columns, dtype, transposed=self.right_transposed)
        return left, right, torch.zeros(self.rows, self.columns, dtype=dtype)


def products(task: Task) -> dict[ProductName, Product]:
    """Return the products of a step by block and operation; those of the softmax over a part."""
    cells, words, batch = task.model.hidden_size, task.model.target_vocabulary_size, task.batch_size
    rows, gates = POSITIONS * batch, 4 * cells
    some = max(1, rows // _SOFTMAX_PART)
    weights = Product(gates, rows, cells, left_transposed=True)
    return {
        LARGE: Product(rows, cells, gates, right_transposed=True),
        ("projection", "I"): Product(rows, gates, cells),
        ("projection", "W"): weights,
        ("recurrence", "F"): Product(batch, cells, gates, right_transposed=True),
        ("recurrence", "I"): Product(batch, gates, cells),
        ("recurrence", "W"): weights,
        ("softmax", "F"): Product(some, cells, words, right_transposed=True),
        ("softmax", "I"): Product(some, words, cells),
        ("softmax", "W"): Product(words, some, cells, left_transposed=True),
    }


def measure_products(task: Task, num_processes: int, num_threads: int) -> dict[ProductName, float]:
    """Return operations a second of each product, over all processes together."""
    parts = run_processes(_rates, task, num_processes=num_processes, num_threads=num_threads)
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def _rates(place: Place, task: Task) -> dict[ProductName, float]:
    if place.num_processes > 1:
        place.join_group()
    dtype = Precision(task.precision).compute
    measured: dict[Product, float] = {}
    for product in dict.fromkeys(products(task).values()):
        if place.num_processes > 1:
            dist.barrier()
        measured[product] = _rate(product, dtype)
    return {name: measured[product] for name, product in products(task).items()}


def _rate(product: Product, dtype: torch.dtype) -> float:
    left, right, result = product.factors(dtype)
    # A small product is repeated, so that the clock and the first call count little.
    times = max(1, round(2e9 / product.operations))
    seconds = []
    for _ in range(_REPETITIONS + 1):
        start = time.perf_counter()
        for _ in range(times):
            torch.mm(left, right, out=result)
        seconds.append((time.perf_counter() - start) / times)
    return product.operations / statistics.median(seconds[1:])


def _random(rows: int, columns: int, dtype: torch.dtype, *, transposed: bool) -> Tensor:
    if transposed:
        return _random(columns, rows, dtype, transposed=False).t()
    return (torch.rand(rows, columns) * 0.1).to(dtype)
