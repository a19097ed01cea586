"""Measures finding each row's best words: chunk by chunk, and in a table of all probabilities.

    PYTHONPATH=. python benchmarks/best_words.py
    PYTHONPATH=. python benchmarks/best_words.py --words 2000 --rows 768

Both start from the outputs of the decoder's last layer, take turns, and are timed in processor time
on one thread, in float32. Beside them stands the product that both contain.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from model.best_words import best_words


def main() -> None:
    """Print the medians, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--words", type=int, default=32_000, help="target vocabulary")
    parser.add_argument("--cells", type=int, default=1000, help="numbers of an output vector")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 768])
    parser.add_argument("--count", type=int, default=12, help="words to find for each row")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(options.words, options.cells, generator=generator) * 0.05
    bias = torch.randn(options.words, generator=generator)
    for num_rows in options.rows:
        outputs = torch.randn(num_rows, options.cells, generator=generator) * 0.3
        given = outputs, weight, bias, options.count
        ways: list[Callable[[], object]] = [
            partial(_chunks, *given),
            partial(_table, *given),
            partial(_product, *given),
        ]
        chunks_s, table_s, product_s = _medians(ways, options.rounds)
        print(
            f"{num_rows:>4} rows, {options.words:,} words: in chunks {chunks_s * 1e3:,.1f} ms, in "
            f"a table {table_s * 1e3:,.1f} ms ({chunks_s / table_s:.2f} of that), the product "
            f"alone {product_s * 1e3:,.1f} ms"
        )


def _chunks(outputs: Tensor, weight: Tensor, bias: Tensor, count: int) -> object:
    return best_words(outputs, weight, bias, count, outputs.dtype)


def _table(outputs: Tensor, weight: Tensor, bias: Tensor, count: int) -> object:
    return torch.log_softmax(F.linear(outputs, weight, bias), 1).topk(count, dim=1)


def _product(outputs: Tensor, weight: Tensor, bias: Tensor, count: int) -> object:
    return F.linear(outputs, weight, bias)


def _medians(ways: list[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median processor seconds of each way, after one turn to warm up."""
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds + 1):
        for way, taken in zip(ways, seconds, strict=True):
            start = time.process_time()
            way()
            taken.append(time.process_time() - start)
    return [statistics.median(taken[1:]) for taken in seconds]


if __name__ == "__main__":
    main()
