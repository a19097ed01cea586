"""A batch cut along its two axes: microbatches of sentences, time chunks of positions."""

from collections.abc import Iterable

import torch

from model.batching import Batch, Chunk, even_bounds
from model.network import Side
from pipeline.graph import Operation


class BatchChunks:
    """The chunks of some sides of a batch, on a device.

    Both sides are cut into the same number of chunks, each side evenly; chunks and microbatches may
    be empty.
    """

    def __init__(
        self,
        batch: Batch,
        num_microbatches: int,
        num_chunks: int,
        device: torch.device | str,
        sides: Iterable[Side],
    ) -> None:
        microbatches = batch.split(num_microbatches)
        self._num_sentences = [microbatch.num_sentences for microbatch in microbatches]
        self._bounds: dict[Side, list[tuple[int, int]]] = {
            "source": even_bounds(batch.source_positions, num_chunks),
            "target": even_bounds(batch.target_positions, num_chunks),
        }
        self._chunks: dict[tuple[Side, int], list[Chunk]] = {
            (side, index): self._cut(microbatch, side, device)
            for side in sides
            for index, microbatch in enumerate(microbatches)
        }

    def size(self, side: Side, operation: Operation) -> tuple[int, int]:
        """Return the numbers of positions and of sentences that an operation works on."""
        start, stop = self._bounds[side][operation.chunk]
        return stop - start, self._num_sentences[operation.microbatch]

    def get(self, side: Side, operation: Operation) -> Chunk:
        """Return the chunk that an operation works on."""
        return self._chunks[side, operation.microbatch][operation.chunk]

    def _cut(self, batch: Batch, side: Side, device: torch.device | str) -> list[Chunk]:
        """Cut a side once, and slice that."""
        cut = batch.source_chunk if side == "source" else batch.target_chunk
        whole = cut(0, self._bounds[side][-1][1], device)
        return [
            Chunk(
                whole.tokens[start:stop],
                None if whole.targets is None else whole.targets[start:stop],
                None if whole.mask is None else whole.mask[start:stop],
                whole.active[start:stop],
            )
            for start, stop in self._bounds[side]
        ]
