"""A batch cut along its two axes: microbatches of sentences, time chunks of positions."""

import torch

from model.batching import Batch, Chunk, even_bounds
from model.network import Side
from pipeline.graph import Operation


class BatchChunks:
    """The chunks of a batch on a device, cut from whole sides that are made when first needed.

    Both sides are cut into the same number of chunks, each side evenly; chunks and microbatches may
    be empty.
    """

    def __init__(
        self, batch: Batch, num_microbatches: int, num_chunks: int, device: torch.device | str
    ) -> None:
        self._microbatches = batch.split(num_microbatches)
        self._num_sentences = [microbatch.num_sentences for microbatch in self._microbatches]
        self._bounds: dict[Side, list[tuple[int, int]]] = {
            "source": even_bounds(batch.source_positions, num_chunks),
            "target": even_bounds(batch.target_positions, num_chunks),
        }
        self._device = device
        self._sides: dict[tuple[Side, int], Chunk] = {}

    def size(self, side: Side, operation: Operation) -> tuple[int, int]:
        """Return the numbers of positions and of sentences that an operation works on."""
        start, stop = self._bounds[side][operation.chunk]
        return stop - start, self._num_sentences[operation.microbatch]

    def get(self, side: Side, operation: Operation) -> Chunk:
        """Return the chunk that an operation works on."""
        start, stop = self._bounds[side][operation.chunk]
        whole = self._whole(side, operation.microbatch)
        return Chunk(
            whole.tokens[start:stop],
            None if whole.targets is None else whole.targets[start:stop],
            None if whole.mask is None else whole.mask[start:stop],
            whole.active[start:stop],
        )

    def _whole(self, side: Side, microbatch: int) -> Chunk:
        """Return all positions of a side as one chunk."""
        key = side, microbatch
        if key not in self._sides:
            batch = self._microbatches[microbatch]
            cut = batch.source_chunk if side == "source" else batch.target_chunk
            self._sides[key] = cut(0, self._bounds[side][-1][1], self._device)
        return self._sides[key]
