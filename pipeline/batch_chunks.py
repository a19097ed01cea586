"""A batch cut along its two axes: microbatches of sentences, time chunks of positions."""

import torch

from model.batching import Batch, Chunk, even_bounds
from model.network import Side
from pipeline.graph import Operation


class BatchChunks:
    """The chunks of a batch on a device, made when they are first asked for.

    Both sides are cut into the same number of chunks, each side evenly; chunks and microbatches may
    be empty.
    """

    def __init__(
        self, batch: Batch, num_microbatches: int, num_chunks: int, device: torch.device | str
    ) -> None:
        self._microbatches = batch.split(num_microbatches)
        self._bounds: dict[Side, list[tuple[int, int]]] = {
            "source": even_bounds(batch.source_positions, num_chunks),
            "target": even_bounds(batch.target_positions, num_chunks),
        }
        self._device = device
        self._made: dict[tuple[Side, int, int], Chunk] = {}

    def size(self, side: Side, operation: Operation) -> tuple[int, int]:
        """Return the numbers of positions and of sentences that an operation works on."""
        start, stop = self._bounds[side][operation.chunk]
        return stop - start, self._microbatches[operation.microbatch].num_sentences

    def get(self, side: Side, operation: Operation) -> Chunk:
        """Return the chunk that an operation works on."""
        key = side, operation.microbatch, operation.chunk
        if key not in self._made:
            microbatch = self._microbatches[operation.microbatch]
            cut = microbatch.source_chunk if side == "source" else microbatch.target_chunk
            self._made[key] = cut(*self._bounds[side][operation.chunk], self._device)
        return self._made[key]
