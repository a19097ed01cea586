"""In which order training reads the corpus: a pure function of (seed, epoch) and nothing else.

Because of that, a cursor of two numbers is all that a checkpoint needs to go on with exactly the
batches that an unbroken run would have seen, and any step's batch can be made again.

The corpus lies in row groups, pieces of a file that are read as a whole, whose pairs have about
the same length. So that batches do too, each is drawn from one unit: the fewest neighbouring row
groups that make full batches. Each epoch the units are put in a new order, their pairs are dealt
anew to batches, and the batches of a window of units are mixed, so that lengths alternate while
only one window has to be read at a time.

Orders come from the raw 64-bit output of PCG64, which numpy promises to keep, sorted: numpy's own
shuffles may change with its version.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A unit of more row groups than this is not worth full batches: its pairs would differ in length.
_MAX_ROW_GROUPS_FOR_FULL_BATCHES = 8


@dataclass(frozen=True, order=True)
class Cursor:
    """A position in the data order: the epoch and the batch in it, both counted from 0."""

    epoch: int
    batch: int


@dataclass(frozen=True)
class RowGroup:
    """One row group of the corpus: the number of its file, its place there, its pairs."""

    file: int
    index: int
    num_rows: int


@dataclass(frozen=True)
class BatchRows:
    """Which pairs make a batch: rows counted through its row groups laid end to end."""

    cursor: Cursor
    row_groups: tuple[RowGroup, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """Consecutive batches of an epoch that together read only a few row groups."""

    batches: tuple[BatchRows, ...]

    @property
    def row_groups(self) -> tuple[RowGroup, ...]:
        """The row groups to read, each once, in the order of first use."""
        return tuple(dict.fromkeys(group for batch in self.batches for group in batch.row_groups))


class DataOrder:
    """The batches of every epoch over some row groups.

    `batch_size` is in pairs. Where the size of the row groups is no multiple of it, batches of a
    unit are made even rather than full, so none has just a few pairs. `window` is the number of row
    groups whose batches are mixed. Every epoch has the same number of batches and holds every pair
    once.
    """

    def __init__(
        self, row_groups: Sequence[RowGroup], *, batch_size: int, seed: int, window: int
    ) -> None:
        assert batch_size >= 1 and window >= 1 and seed >= 0
        self._seed = seed
        filled = [group for group in row_groups if group.num_rows > 0]
        largest = max((group.num_rows for group in filled), default=1)
        size = _row_groups_per_unit(largest, batch_size)
        self._units = [tuple(filled[at : at + size]) for at in range(0, len(filled), size)]
        self._units_per_window = max(1, window // size)
        rows = [sum(group.num_rows for group in unit) for unit in self._units]
        self._rows = np.array(rows, dtype=np.int64)
        self._batches = -(-self._rows // batch_size)

    @property
    def num_batches(self) -> int:
        """Batches, so also steps, of an epoch."""
        return int(self._batches.sum())

    @property
    def num_pairs(self) -> int:
        """Pairs of an epoch."""
        return int(self._rows.sum())

    @property
    def num_windows(self) -> int:
        """Windows of an epoch."""
        return -(-len(self._units) // self._units_per_window)

    def window(self, epoch: int, number: int) -> Window:
        """Return the window of that number, with all its batches in order."""
        units = self._units_in_order(epoch)
        start = number * self._units_per_window
        first_batch = int(self._batches[units[:start]].sum())
        chosen = units[start : start + self._units_per_window]
        dealt = [rows for unit in chosen for rows in self._deal(epoch, int(unit))]
        order = _permutation(len(dealt), self._seed, epoch, 2, number)
        return Window(
            tuple(
                BatchRows(Cursor(epoch, first_batch + place), *dealt[at])
                for place, at in enumerate(order)
            )
        )

    def window_of(self, cursor: Cursor) -> int:
        """Return the number of the window that holds a batch."""
        assert 0 <= cursor.batch < self.num_batches
        batches = self._batches[self._units_in_order(cursor.epoch)]
        unit = int(np.searchsorted(np.cumsum(batches), cursor.batch, side="right"))
        return unit // self._units_per_window

    def windows(self, epoch: int, first_batch: int = 0) -> Iterator[Window]:
        """Yield the windows of an epoch from a batch on; the first one begins with that batch."""
        if first_batch >= self.num_batches:
            return
        first = self.window_of(Cursor(epoch, first_batch))
        for number in range(first, self.num_windows):
            batches = self.window(epoch, number).batches
            yield Window(tuple(batch for batch in batches if batch.cursor.batch >= first_batch))

    def batch(self, cursor: Cursor) -> BatchRows:
        """Return which pairs make the batch at a cursor."""
        batches = self.window(cursor.epoch, self.window_of(cursor)).batches
        return batches[cursor.batch - batches[0].cursor.batch]

    def _units_in_order(self, epoch: int) -> NDArray[np.int64]:
        return _permutation(len(self._units), self._seed, epoch, 0)

    def _deal(self, epoch: int, unit: int) -> list[tuple[tuple[RowGroup, ...], tuple[int, ...]]]:
        rows = _permutation(int(self._rows[unit]), self._seed, epoch, 1, unit)
        parts = np.array_split(rows, int(self._batches[unit]))
        return [(self._units[unit], tuple(part.tolist())) for part in parts]


def _row_groups_per_unit(largest: int, batch_size: int) -> int:
    for_full_batches = math.lcm(largest, batch_size) // largest
    if for_full_batches <= _MAX_ROW_GROUPS_FOR_FULL_BATCHES:
        return for_full_batches
    # Eight batches or so a unit: evening them out then costs little of the batch size.
    return -(-_MAX_ROW_GROUPS_FOR_FULL_BATCHES * batch_size // largest)


def _permutation(length: int, *key: int) -> NDArray[np.int64]:
    generator = np.random.PCG64(np.random.SeedSequence(key))
    return np.argsort(generator.random_raw(length), kind="stable").astype(np.int64)
