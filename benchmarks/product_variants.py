"""Compares ways to make the products of an LSTM step on a processor, in turns.

    python benchmarks/product_variants.py
    python benchmarks/product_variants.py --threads 2 --rows 64

For the product of a recurrence's step (rows x cells by cells x 4 cells) and that of a whole input
projection: torch's own as this project calls it, into a new tensor, with weights that were packed
beforehand (MKL, oneDNN), with the factors turned round, and numpy's (OpenBLAS). Medians over rounds
in which all take turns.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

_ROUNDS = 15
_POSITIONS = 25


def main() -> None:
    """Print a table of GFLOP/s."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=128, help="sentences of a step")
    parser.add_argument("--cells", type=int, default=1000, help="cells of the layer")
    parser.add_argument("--threads", type=int, default=1, help="threads of a product")
    options = parser.parse_args()
    # Read when the libraries are loaded, so they come later.
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    print(f"| product, {options.threads} thread(s) | way | GFLOP/s |")
    print("|---|---|---|")
    for name, rows in (("step", options.rows), ("projection", options.rows * _POSITIONS)):
        operations = 2.0 * rows * options.cells * 4 * options.cells
        ways = _ways(rows, options.cells)
        for way, seconds in _medians(ways).items():
            print(f"| {name}, {rows} rows | {way} | {operations / seconds / 1e9:.1f} |")


def _ways(rows: int, cells: int) -> dict[str, Callable[[], object]]:
    import numpy as np
    import torch
    from torch.nn import functional as F

    weight, states = torch.rand(4 * cells, cells), torch.rand(rows, cells)
    sums = torch.zeros(rows, 4 * cells)
    turned = torch.zeros(4 * cells, rows)
    weight_array, states_array, sums_array = weight.numpy(), states.numpy(), sums.numpy()
    ways: dict[str, Callable[[], object]] = {
        "as here: into memory that is there": lambda: torch.mm(states, weight.t(), out=sums),
        "into a new tensor": lambda: F.linear(states, weight),
        "factors turned round": lambda: torch.mm(weight, states.t(), out=turned),
        "numpy": lambda: np.matmul(states_array, weight_array.T, out=sums_array),
    }
    if hasattr(torch.ops.mkl, "_mkl_linear"):
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        ways["MKL, weights packed"] = lambda: torch.ops.mkl._mkl_linear(
            states, packed, weight, None, rows
        )
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        ways["oneDNN, weights packed"] = lambda: torch.ops.mkldnn._linear_pointwise(
            states, reordered, None, "none", [], ""
        )
    return ways


def _medians(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(_ROUNDS + 1):
        for way, call in ways.items():
            start = time.perf_counter()
            call()
            seconds[way].append(time.perf_counter() - start)
    return {way: statistics.median(times[1:]) for way, times in seconds.items()}


if __name__ == "__main__":
    main()
