"""Writes a split's Parquet files from a stream of encoded pairs, one row group in memory at a time.

The same pairs in the same order give the same bytes, whatever the blocks in which they come.
"""

from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.corpus.pair_filter import KEPT, REASONS
from cluster.corpus.prepared import FileEntry, RowGroupEntry, SplitEntry
from model.durable_files import file_sha256, sync_file
from model.vocabulary import UNK_ID

_ROW_GROUPS_PER_FILE = 64
_WORKING_COLUMNS = ["reason", "source_length", "target_length"]


class SplitWriter:
    """Collects pairs into row groups, and row groups into files of a folder.

    Use it as a context manager; `entry` then says what was written.
    """

    def __init__(self, root: Path, split: str, row_group_size: int) -> None:
        """Take the corpus folder, the split's name, and the pairs of a row group."""
        self._root = root
        self._folder = root / split
        self._folder.mkdir()
        self._row_group_size = row_group_size
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0
        self._writer: pq.ParquetWriter | None = None
        self._files: list[tuple[Path, list[RowGroupEntry]]] = []
        self._dropped = Counter[str]()
        self._tokens = Counter[str]()
        self._unknown = Counter[str]()

    @property
    def num_pairs(self) -> int:
        """Pairs written so far."""
        return sum(group.num_rows for _, groups in self._files for group in groups)

    def add(self, encoded: pa.Table) -> None:
        """Take the next pairs, of which those with a reason are counted and left out."""
        for reason in pc.value_counts(encoded["reason"]).to_pylist():
            if reason["values"] != KEPT:
                self._dropped[REASONS[reason["values"]]] += reason["counts"]
        kept = encoded.filter(pc.equal(encoded["reason"], KEPT))
        self._waiting.append(kept)
        self._num_waiting += kept.num_rows
        if self._num_waiting >= self._row_group_size:
            self._write_full_row_groups()

    def __enter__(self) -> Self:
        """Return the writer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write what still waits, and close; after an error only close."""
        if error is None and self._num_waiting:
            self._write_row_group(pa.concat_tables(self._waiting))
        self._close_file()

    def entry(self) -> SplitEntry:
        """Return the manifest's entry of the split."""
        return SplitEntry(
            num_pairs=self.num_pairs,
            num_source_tokens=self._tokens["source"],
            num_target_tokens=self._tokens["target"],
            source_unknown_fraction=self._unknown["source"] / max(1, self._tokens["source"]),
            target_unknown_fraction=self._unknown["target"] / max(1, self._tokens["target"]),
            dropped={reason: self._dropped[reason] for reason in REASONS.values()},
            files=[
                FileEntry(
                    file=str(path.relative_to(self._root)),
                    sha256=file_sha256(path),
                    row_groups=groups,
                )
                for path, groups in self._files
            ],
        )

    def _write_full_row_groups(self) -> None:
        table = pa.concat_tables(self._waiting)
        size = self._row_group_size
        full = table.num_rows // size * size
        for start in range(0, full, size):
            self._write_row_group(table.slice(start, size))
        # Combining copies the rest, so that the blocks it came from can be freed.
        self._waiting = [table.slice(full).combine_chunks()]
        self._num_waiting = table.num_rows - full

    def _write_row_group(self, table: pa.Table) -> None:
        if self._writer is None or len(self._files[-1][1]) == _ROW_GROUPS_PER_FILE:
            self._open_file(table.schema)
        assert self._writer is not None
        for side in ("source", "target"):
            ids = pc.list_flatten(table[side])
            self._tokens[side] += len(ids)
            self._unknown[side] += int(pc.sum(pc.equal(ids, UNK_ID)).as_py() or 0)
        self._writer.write_table(
            table.drop_columns(_WORKING_COLUMNS).combine_chunks(), row_group_size=table.num_rows
        )
        entry = RowGroupEntry(
            num_rows=table.num_rows,
            max_source_length=pc.max(table["source_length"]).as_py(),
            max_target_length=pc.max(table["target_length"]).as_py(),
        )
        self._files[-1][1].append(entry)

    def _open_file(self, schema: pa.Schema) -> None:
        self._close_file()
        path = self._folder / f"part-{len(self._files):05d}.parquet"
        kept = pa.schema([field for field in schema if field.name not in _WORKING_COLUMNS])
        self._writer = pq.ParquetWriter(
            path, kept, compression="zstd", write_page_checksum=True, store_schema=False
        )
        self._files.append((path, []))

    def _close_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            sync_file(self._files[-1][0])
