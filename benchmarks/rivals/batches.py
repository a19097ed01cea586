"""The batches that all contestants read: random words in sentences of real training's lengths.

Words are drawn with a frequency like that of language (Zipf's law with Mandelbrot's offset), so
that a batch touches as many rows of an embedding as real text would.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from benchmarks.rivals.lengths import Lengths, row_groups_of_lengths
from benchmarks.rivals.task import Task
from model.batching import Batch, Pair, make_batch
from model.data_order import Cursor, DataOrder, RowGroup
from model.vocabulary import EOS_ID

_BATCHES_PER_ROW_GROUP = 8
_FIRST_WORD = EOS_ID + 1
_OFFSET = 2.7


def draw_batches(task: Task) -> list[Batch]:
    """Return the batch to warm up with and those to time, the same at every call.

    The timed ones come from row groups in the middle of equal parts of the corpus, so that a few of
    them stand for all lengths; the first comes from the middle.
    """
    size = _BATCHES_PER_ROW_GROUP * task.batch_size
    groups = row_groups_of_lengths(size, task.seed)
    parts = [0.5, *((part + 0.5) / task.num_steps for part in range(task.num_steps))]
    words = _Words(task)
    return [
        make_batch(list(words.pairs(_dealt(groups[int(part * len(groups))], task))))
        for part in parts
    ]


def _dealt(group: Lengths, task: Task) -> Lengths:
    """Return the lengths of a row group's first batch, as training deals them."""
    order = DataOrder(
        [RowGroup(0, 0, len(group))], batch_size=task.batch_size, seed=task.seed, window=1
    )
    return group[list(order.batch(Cursor(0, 0)).rows)]


class _Words:
    """Draws words of both sides."""

    def __init__(self, task: Task) -> None:
        model = task.model
        self._draw = np.random.default_rng((task.seed, 1))
        sizes = model.source_vocabulary_size, model.target_vocabulary_size
        self._cumulative = [_cumulative(size - _FIRST_WORD) for size in sizes]

    def pairs(self, lengths: Lengths) -> Iterator[Pair]:
        for pair in lengths.tolist():
            source, target = (
                self._sentence(cumulative, count)
                for cumulative, count in zip(self._cumulative, pair, strict=True)
            )
            yield source, target

    def _sentence(self, cumulative: NDArray[np.float64], count: int) -> list[int]:
        ranks = np.searchsorted(cumulative, self._draw.random(count), side="right")
        return [_FIRST_WORD + rank for rank in ranks.tolist()]


def _cumulative(num_words: int) -> NDArray[np.float64]:
    weights = 1.0 / (np.arange(num_words) + 1.0 + _OFFSET)
    total = np.cumsum(weights)
    total /= total[-1]
    total[-1] = 1.0
    return total
