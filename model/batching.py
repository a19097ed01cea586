"""From pairs of word ids to the padded tensors of one step, and from those to time chunks.

A batch keeps its sentences sorted by source length, longest first; a target side is sorted anew
when it is cut. So the sentences that still run at a position are always the leading rows, and the
words of a chunk are packed without padding: nothing is computed for a place that holds no word.

Shapes: B sentences, S source positions, T target positions, K positions and N words of a chunk.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from model.vocabulary import EOS_ID

Pair = tuple[Sequence[int], Sequence[int]]


class ChunkSize(NamedTuple):
    """How much work a chunk is: K positions, B sentences, N words, each possibly 0."""

    num_positions: int
    num_sentences: int
    num_tokens: int

    @classmethod
    def full(cls, num_positions: int, num_sentences: int) -> "ChunkSize":
        """Return the size of a chunk in which every sentence runs to the end."""
        return cls(num_positions, num_sentences, num_positions * num_sentences)


@dataclass(frozen=True)
class Chunk:
    """Some positions of one side of some sentences, packed: position after position, words only.

    `tokens` (N,) are the words read and `targets` (N,) the words to predict there (None on the
    source side). At each position the leading sentences still run; `active` has their number, which
    never grows from one position to the next. `num_sentences` counts those that have ended as well.
    `order` (B,) stands in a target side's first chunk where its sentences lie in another order than
    the source side's: row r of the target is row order[r] of the source.
    """

    tokens: Tensor
    targets: Tensor | None
    active: tuple[int, ...]
    num_sentences: int
    order: Tensor | None = None

    @property
    def size(self) -> ChunkSize:
        """K, B and N."""
        return ChunkSize(len(self.active), self.num_sentences, len(self.tokens))

    @cached_property
    def last_rows(self) -> Tensor:
        """The row of the last word of every sentence that runs at the first position.

        Made once for all layers, since on a GPU it has to be copied there.
        """
        runs = torch.arange(self.active[0])
        last = (torch.tensor(self.active)[:, None] > runs).sum(0) - 1
        starts = torch.tensor([*itertools.accumulate(self.active, initial=0)])
        return (starts[last] + runs).to(self.tokens.device)

    def part(self, start: int, stop: int) -> "Chunk":
        """Return the positions from start up to stop, counted from this chunk's first."""
        words = slice(sum(self.active[:start]), sum(self.active[:stop]))
        return Chunk(
            self.tokens[words],
            None if self.targets is None else self.targets[words],
            self.active[start:stop],
            self.num_sentences,
            self.order if start == 0 else None,
        )


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
        runs, active = _running(self.source_lengths, start, stop)
        tokens = self.source.t()[start:stop][runs].to(device)
        return Chunk(tokens, None, active, self.num_sentences)

    def target_chunk(self, start: int, stop: int, device: torch.device | str = "cpu") -> Chunk:
        """Return the target positions from start up to stop, the longest target first.

        The word read at a position is the one to predict before it; the first is the end symbol
        (paper, figure 1).
        """
        lengths, order = self.target_lengths.sort(descending=True, stable=True)
        target = self.target[order]
        first = torch.full((self.num_sentences, 1), EOS_ID, dtype=target.dtype)
        read = torch.cat([first, target[:, :-1]], dim=1)
        runs, active = _running(lengths, start, stop)
        in_order = torch.equal(order, torch.arange(len(order)))
        return Chunk(
            read.t()[start:stop][runs].to(device),
            target.t()[start:stop][runs].to(device),
            active,
            self.num_sentences,
            order.to(device) if start == 0 and not in_order else None,
        )


def _running(lengths: Tensor, start: int, stop: int) -> tuple[Tensor, tuple[int, ...]]:
    """Return which sentences still run at each position (K, B), and how many."""
    runs = lengths[None, :] > torch.arange(start, stop)[:, None]
    return runs, tuple(runs.sum(dim=1).tolist())


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
