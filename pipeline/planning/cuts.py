"""How many microbatches and time chunks a search tries: a grid, and a few points to begin at."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from pipeline.costs.operation_costs import BatchShape

MICROBATCHES = (1, 2, 4, 8)

Cut = tuple[int, int]
"""M and K."""


@dataclass(frozen=True)
class Cuts:
    """The grid, and the few points of it that placements are tried at first, the smallest last."""

    coarse: tuple[Cut, ...]
    all: tuple[Cut, ...]

    @staticmethod
    def of(
        batch: BatchShape, microbatches: Sequence[int], time_chunks: Sequence[int] | None
    ) -> "Cuts":
        """Return the cuts of a replica's share of a batch: none finer than sentence and position.

        Without `time_chunks` a few numbers up to one chunk for each position are in the grid.
        """
        longest = max(batch.source_positions, batch.target_positions)
        counts = sorted({num for num in microbatches if num <= batch.num_sentences}) or [1]
        if time_chunks is None:
            half = -(-longest // 2)
            time_chunks = [*(num for num in (1, 2, 4, 8, 16) if 4 * num < 3 * half), half, longest]
        chunks = sorted({min(num, longest) for num in time_chunks})
        grid = tuple(product(counts, chunks))
        finest, middle = chunks[-1], chunks[len(chunks) // 2]
        wanted = ((1, finest), (2, middle), (4, middle), (1, middle))
        coarse = tuple(dict.fromkeys(point for point in wanted if point in grid))
        return Cuts(coarse or grid[:1], grid)

    def beside(self, cut: Cut) -> list[Cut]:
        """Return the points of the grid with the next smaller or larger M or K."""
        counts, chunks = (sorted(set(numbers)) for numbers in zip(*self.all, strict=True))
        m, k = counts.index(cut[0]), chunks.index(cut[1])
        near = ((m, k + 1), (m + 1, k), (m, k - 1), (m - 1, k))
        return [
            (counts[i], chunks[j]) for i, j in near if 0 <= i < len(counts) and 0 <= j < len(chunks)
        ]
