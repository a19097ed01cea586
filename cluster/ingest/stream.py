"""Streams a prepared corpus to training: batches in the pure data order, read ahead by Ray Data.

Ray Data gets the numbers of windows and gives back their batches, in order; which pairs those are
follows from `model.data_order` alone. So a stream can begin at any cursor, and any step's batch can
be read again without Ray.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from cluster.corpus.prepared import PreparedCorpus, read_row_group
from cluster.ingest.window_reading import batches_of, pairs_of, read_window
from model.batching import Batch, length_order, make_batch
from model.data_order import Cursor, DataOrder, Window

if TYPE_CHECKING:
    import ray.data

# Windows that are read at once, and how much of what was read may wait for training.
_WINDOWS_IN_FLIGHT = 2
_MAX_BYTES_AHEAD = 64 << 20


@dataclass(frozen=True)
class OrderedBatch:
    """A batch of pairs that are neighbours in the split.

    `indices` holds, for each row of the batch, the place of its pair in the split, from 0.
    """

    batch: Batch
    indices: tuple[int, ...]


class BatchStream:
    """The batches of a split for batches of `batch_size` pairs.

    `epoch` needs an initialised Ray; its tasks take `cpus_per_task` of a processor, by default
    none, since training may have reserved them all and reading costs little.
    """

    def __init__(
        self,
        corpus: PreparedCorpus,
        split: str = "train",
        *,
        batch_size: int,
        seed: int,
        shuffle_window: int,
        reverse_source: bool = True,
        cpus_per_task: float = 0.0,
    ) -> None:
        """Take the corpus; CorpusError when it has no such split."""
        self._row_groups = corpus.row_groups(split)
        self._files = corpus.files(split)
        self._batch_size = batch_size
        self._reverse_source = reverse_source
        self._cpus_per_task = cpus_per_task
        self.order = DataOrder(
            self._row_groups, batch_size=batch_size, seed=seed, window=shuffle_window
        )

    @property
    def num_batches(self) -> int:
        """Batches of an epoch."""
        return self.order.num_batches

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[Cursor, Batch]]:
        """Yield the batches of an epoch in order, each with its own cursor, from one on.

        Raises CorpusError that names the shard when one is damaged.
        """
        if first_batch >= self.num_batches:
            return
        from cluster.ingest.data_streams import stream_settings, tables

        with stream_settings(_MAX_BYTES_AHEAD):
            windows = self._windows(epoch, first_batch)
        for table in tables(windows, prefetch=1):
            for cursor, row in batches_of(table):
                yield cursor, self._batch(row)

    def read_batch(self, cursor: Cursor) -> Batch:
        """Read the batch at a cursor, without Ray: the same as the stream gives there."""
        table = read_window(Window((self.order.batch(cursor),)), self._files)
        return self._batch(table)

    def in_order(self) -> Iterator[OrderedBatch]:
        """Yield every pair of the split once, in the order of its files, without Ray.

        For evaluation; only the last batch can have fewer pairs than `batch_size`.
        """
        waiting: list[tuple[list[int], list[int]]] = []
        start = 0
        for group in self._row_groups:
            table = read_row_group(self._files[group.file], group, ("source", "target"))
            waiting += zip(table["source"].to_pylist(), table["target"].to_pylist(), strict=True)
            while len(waiting) >= self._batch_size:
                yield self._ordered_batch(waiting[: self._batch_size], start)
                start += self._batch_size
                del waiting[: self._batch_size]
        if waiting:
            yield self._ordered_batch(waiting, start)

    def _windows(self, epoch: int, first_batch: int) -> "ray.data.Dataset":
        from cluster.ingest.data_streams import stream

        order, files = self.order, self._files
        first = order.window_of(Cursor(epoch, first_batch))

        def read(number: int) -> Iterator[pa.Table]:
            batches = order.window(epoch, first + number).batches
            wanted = tuple(batch for batch in batches if batch.cursor.batch >= first_batch)
            yield read_window(Window(wanted), files)

        return stream(
            order.num_windows - first,
            read,
            cpus=self._cpus_per_task,
            concurrency=_WINDOWS_IN_FLIGHT,
        )

    def _batch(self, row: pa.Table) -> Batch:
        return make_batch(pairs_of(row), reverse_source=self._reverse_source)

    def _ordered_batch(self, pairs: list[tuple[list[int], list[int]]], start: int) -> OrderedBatch:
        batch = make_batch(pairs, reverse_source=self._reverse_source)
        return OrderedBatch(batch, tuple(start + row for row in length_order(pairs)))
