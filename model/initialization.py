"""Initial values that depend on the seed and the parameter's name alone.

A rank that owns some rows of a matrix draws just those rows, and gets the same numbers as a rank
that owns all of them. Values are drawn in float32 whatever the precision, so that runs of different
precision start from the same point.
"""

import hashlib

import torch
from torch import Tensor

# Rows that share one random stream; a cut between ranks redraws at most two such groups.
_ROWS_PER_STREAM = 1024


def uniform_rows(
    seed: int, name: str, shape: tuple[int, ...], start: int, stop: int, scale: float
) -> Tensor:
    """Draw rows [start, stop) of the parameter, uniform in [-scale, scale] (paper, section 3.4)."""
    rows = torch.empty((stop - start, *shape[1:]), dtype=torch.float32)
    for first in range(start - start % _ROWS_PER_STREAM, stop, _ROWS_PER_STREAM):
        last = min(first + _ROWS_PER_STREAM, shape[0])
        stream = torch.Generator().manual_seed(_stream_seed(seed, name, first))
        drawn = torch.empty((last - first, *shape[1:]), dtype=torch.float32)
        drawn.uniform_(-scale, scale, generator=stream)
        low, high = max(first, start), min(last, stop)
        rows[low - start : high - start] = drawn[low - first : high - first]
    return rows


def _stream_seed(seed: int, name: str, row: int) -> int:
    digest = hashlib.sha256(f"{seed}/{name}/{row}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
