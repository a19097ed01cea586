"""Reads the row groups of a window and deals their pairs to batches, as one Arrow table.

It runs in Ray Data's tasks, so it needs neither torch nor Ray: a worker starts in little time.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.corpus.prepared import read_row_group
from model.data_order import BatchRows, Cursor, RowGroup, Window

_COLUMNS = ("source", "target")

IdPair = tuple[list[int], list[int]]


def read_window(window: Window, files: Sequence[str]) -> pa.Table:
    """Return a row per batch in order: epoch, batch, and the ids of its pairs on both sides.

    `files` are the Parquet files that the row groups count. Raises CorpusError for a damaged one.
    """
    needed = window.row_groups
    groups = {group: read_row_group(files[group.file], group, _COLUMNS) for group in needed}
    pairs = pa.concat_tables(groups.values())
    starts = dict(zip(groups, _starts([group.num_rows for group in groups]), strict=True))
    rows = [_rows_in_table(batch, starts) for batch in window.batches]
    dealt = pairs.take(np.concatenate(rows)).combine_chunks()
    ends = pa.array(np.cumsum([0, *map(len, rows)]), pa.int32())
    columns = {
        "epoch": pa.array([batch.cursor.epoch for batch in window.batches], pa.int64()),
        "batch": pa.array([batch.cursor.batch for batch in window.batches], pa.int64()),
    }
    for side in _COLUMNS:
        ids = pc.list_flatten(dealt[side]).combine_chunks()
        lengths = pc.fill_null(pc.list_value_length(dealt[side]), 0).to_numpy()
        offsets = pa.array(np.cumsum([0, *lengths]), pa.int32())
        sentences = pa.ListArray.from_arrays(offsets, ids)
        columns[side] = pa.ListArray.from_arrays(ends, sentences)
    return pa.table(columns)


def batches_of(table: pa.Table) -> list[tuple[Cursor, pa.Table]]:
    """Cut what `read_window` returned into one-row tables, without copying."""
    return [
        (Cursor(epoch, batch), table.slice(row, 1))
        for row, (epoch, batch) in enumerate(
            zip(table["epoch"].to_pylist(), table["batch"].to_pylist(), strict=True)
        )
    ]


def pairs_of(batch: pa.Table) -> list[IdPair]:
    """Return the pairs of a one-row table as lists of ids."""
    sources, targets = (batch[side][0].as_py() for side in _COLUMNS)
    return list(zip(sources, targets, strict=True))


def _rows_in_table(batch: BatchRows, starts: dict[RowGroup, int]) -> NDArray[np.int64]:
    # The batch counts rows through its own row groups; the table holds the whole window's.
    sizes = [group.num_rows for group in batch.row_groups]
    rows = np.asarray(batch.rows, dtype=np.int64)
    own_starts = np.asarray(_starts(sizes))
    part = np.searchsorted(own_starts, rows, side="right") - 1
    shift = np.asarray([starts[group] for group in batch.row_groups], np.int64) - own_starts
    moved: NDArray[np.int64] = rows + shift[part]
    return moved


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(sizes)[:-1].tolist()]
