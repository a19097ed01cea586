"""From pairs of word ids to the padded tensors of one step, and from those to time chunks.

A batch keeps its sentences sorted by source length, longest first, so that the sentences that still
run at a source position are always the leading rows: the encoder steps those rows and leaves the
states of the others as they are, without masks.

Shapes: B sentences, S source positions, T target positions, K positions of a chunk.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.vocabulary import EOS_ID

Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Chunk:
    """Some positions of one side of some sentences, time first.

    `tokens` (K, B) are the words read at each position; `targets` (K, B) the words to predict there
    and `mask` (K, B) where there is one (both None on the source side). `active` holds, for each
    position, how many of the leading sentences the recurrence must step.
    """

    tokens: Tensor
    targets: Tensor | None
    mask: Tensor | None
    active: tuple[int, ...]

    @property
    def num_positions(self) -> int:
        """K, possibly 0."""
        return len(self.active)

    @property
    def num_sentences(self) -> int:
        """B, possibly 0."""
        return int(self.tokens.shape[1])


@dataclass(frozen=True)
class Batch:
    """The sentences of one step, or a replica's share of them; the longest source comes first.

    `source` (B, S) is in the order in which the encoder reads it and ends in the end symbol; so
    does `target` (B, T). Both are padded with it. The lengths (B,) count it. All are int64 on the
    CPU.
    """

    source: Tensor
    source_lengths: Tensor
    target: Tensor
    target_lengths: Tensor

    @property
    def num_sentences(self) -> int:
        """B."""
        return int(self.source.shape[0])

    @property
    def source_positions(self) -> int:
        """S, the padded length of the source side."""
        return int(self.source.shape[1])

    @property
    def target_positions(self) -> int:
        """T, the padded length of the target side."""
        return int(self.target.shape[1])

    @property
    def num_target_tokens(self) -> int:
        """Target words with their end symbols, padding not counted: what the loss is over."""
        return int(self.target_lengths.sum())

    @property
    def num_words(self) -> int:
        """Source and target words with their end symbols, padding not counted."""
        return int(self.source_lengths.sum()) + self.num_target_tokens

    @property
    def num_positions(self) -> int:
        """Places for words in the padded tensors of both sides; what holds no word is padding."""
        return self.source.numel() + self.target.numel()

    def split(self, num_microbatches: int) -> list["Batch"]:
        """Cut into contiguous microbatches whose sizes differ by at most one; some may be empty.

        S and T stay the batch's, so that every microbatch has the same time chunks.
        """
        return [
            Batch(
                self.source[start:stop],
                self.source_lengths[start:stop],
                self.target[start:stop],
                self.target_lengths[start:stop],
            )
            for start, stop in even_bounds(self.num_sentences, num_microbatches)
        ]

    def share(self, replica: int, num_replicas: int) -> "Batch":
        """Return the sentences of one of several replicas, possibly none.

        They are every `num_replicas`-th one, so that all replicas have about the same lengths, and
        S and T are those of the longest there; every sentence is in exactly one share.
        """
        rows = slice(replica, None, num_replicas)
        source, source_lengths = _trimmed(self.source[rows], self.source_lengths[rows])
        target, target_lengths = _trimmed(self.target[rows], self.target_lengths[rows])
        return Batch(source, source_lengths, target, target_lengths)

    def source_chunk(self, start: int, stop: int, device: torch.device | str = "cpu") -> Chunk:
        """Return the source positions from start up to stop."""
        positions = torch.arange(start, stop)
        active = (self.source_lengths[None, :] > positions[:, None]).sum(dim=1)
        tokens = self.source[:, start:stop].t().contiguous().to(device)
        return Chunk(tokens, None, None, tuple(active.tolist()))

    def target_chunk(self, start: int, stop: int, device: torch.device | str = "cpu") -> Chunk:
        """Return the target positions from start up to stop.

        The word read at a position is the one to predict before it; the first is the end symbol
        (paper, figure 1). Every sentence stays active: what lies behind its end has no gradient.
        """
        positions = torch.arange(start, stop)
        first = torch.full((self.num_sentences, 1), EOS_ID, dtype=self.target.dtype)
        shifted = torch.cat([first, self.target[:, :-1]], dim=1)[:, start:stop]
        mask = self.target_lengths[None, :] > positions[:, None]
        return Chunk(
            shifted.t().contiguous().to(device),
            self.target[:, start:stop].t().contiguous().to(device),
            mask.to(device),
            (self.num_sentences,) * (stop - start),
        )


def even_bounds(length: int, num_parts: int) -> list[tuple[int, int]]:
    """Cut range(length) into contiguous parts whose sizes differ by at most one, larger first."""
    size, larger = divmod(length, num_parts)
    starts = [part * size + min(part, larger) for part in range(num_parts + 1)]
    return list(itertools.pairwise(starts))


def make_batch(pairs: Sequence[Pair], *, reverse_source: bool = True) -> Batch:
    """Sort, reverse, terminate and pad some pairs of word ids that have no end symbols yet.

    Sorting is stable, so equal lengths keep their order. Reversal turns the words round and leaves
    the end symbol last (paper, section 3.3).
    """
    ordered = sorted(pairs, key=lambda pair: -len(pair[0]))
    step = -1 if reverse_source else 1
    source, source_lengths = _pad([[*list(words)[::step], EOS_ID] for words, _ in ordered])
    target, target_lengths = _pad([[*words, EOS_ID] for _, words in ordered])
    return Batch(source, source_lengths, target, target_lengths)


def length_order(pairs: Sequence[Pair]) -> list[int]:
    """Return the index in `pairs` of each row of the batch that `make_batch` makes of them."""
    return sorted(range(len(pairs)), key=lambda index: -len(pairs[index][0]))


def _trimmed(padded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Cut off the positions that no row uses; tensors of their own, so that little travels."""
    width = int(lengths.max()) if len(lengths) else 0
    return padded[:, :width].contiguous(), lengths.clone()


def _pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    width = int(lengths.max()) if rows else 0
    padded = torch.full((len(rows), width), EOS_ID, dtype=torch.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return padded, lengths
