"""The states of a recurrence over a packed chunk: which rows a position reads and writes.

Shapes: N words of a chunk, B sentences, n sentences active at a position, H cells.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from model.batching import Chunk


@dataclass
class States:
    """The states of one kind: `carry` (B, H) that came in, and `rows` (N, H) after each word.

    They lie apart, so that the rows begin where memory is aligned, as copies of them on other ranks
    do: the last bits of a product can depend on that.
    """

    carry: Tensor
    rows: Tensor

    def before(self, step: "Step") -> Tensor:
        """Return the states (n, H) before a position."""
        count = step.rows.stop - step.rows.start
        if step.previous is None:
            return self.carry[:count]
        return self.rows[step.previous : step.previous + count]

    def ends(self, chunk: Chunk) -> Tensor:
        """Return each sentence's last state (B, H)."""
        num_sentences, num_words = len(self.carry), len(self.rows)
        if not num_words:
            return self.carry
        if chunk.active[-1] == num_sentences:
            return self.rows[num_words - num_sentences :]
        # The sentences that do not run here keep their carry.
        return torch.cat([self.rows[chunk.last_rows], self.carry[chunk.active[0] :]])


class Step(NamedTuple):
    """Where a position's rows lie, and where those of the one before begin, if there is one."""

    rows: slice
    previous: int | None


def steps_of(chunk: Chunk) -> list[Step]:
    """Return the positions of a chunk at which a sentence runs, in order."""
    starts = list(accumulate(chunk.active, initial=0))
    previous = [None, *starts]
    return [
        Step(slice(start, stop), before)
        for before, start, stop in zip(previous, starts, starts[1:], strict=False)
        if stop > start
    ]
