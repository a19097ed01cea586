"""A batch cut along its two axes: microbatches of sentences, time chunks of positions."""

from collections.abc import Iterable

import torch

from model.batching import Batch, Chunk, ChunkSize, even_bounds
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
        self._bounds: dict[Side, list[tuple[int, int]]] = {
            "source": even_bounds(batch.source_positions, num_chunks),
            "target": even_bounds(batch.target_positions, num_chunks),
        }
        self._sizes: dict[tuple[Side, int], list[ChunkSize]] = {
            (side, index): _chunk_sizes(microbatch, side, bounds)
            for side, bounds in self._bounds.items()
            for index, microbatch in enumerate(microbatches)
        }
        self._device = device
        self._chunks: dict[tuple[Side, int], list[Chunk]] = {
            (side, index): self._cut(microbatch, side)
            for side in sides
            for index, microbatch in enumerate(microbatches)
        }

    def size(self, side: Side, operation: Operation) -> ChunkSize:
        """Return the size of the chunk that an operation works on, of either side."""
        return self._sizes[side, operation.microbatch][operation.chunk]

    def get(self, side: Side, operation: Operation) -> Chunk:
        """Return the chunk that an operation works on."""
        return self._chunks[side, operation.microbatch][operation.chunk]

    def _cut(self, batch: Batch, side: Side) -> list[Chunk]:
        """Pack a side once, and slice that."""
        pack = batch.source_chunk if side == "source" else batch.target_chunk
        whole = pack(0, self._bounds[side][-1][1], self._device)
        return [whole.part(start, stop) for start, stop in self._bounds[side]]


def _chunk_sizes(batch: Batch, side: Side, bounds: list[tuple[int, int]]) -> list[ChunkSize]:
    lengths = batch.source_lengths if side == "source" else batch.target_lengths
    stops = torch.tensor([stop for _, stop in bounds])
    # Words before each stop: a sentence has no more of them than its length.
    words = torch.minimum(lengths[None, :], stops[:, None]).sum(dim=1).tolist()
    return [
        ChunkSize(stop - start, batch.num_sentences, after - before)
        for (start, stop), before, after in zip(bounds, [0, *words], words, strict=False)
    ]
