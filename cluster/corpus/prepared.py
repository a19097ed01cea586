"""The folder that `baton prepare` writes and everything else reads.

It holds `manifest.json`, the two vocabularies, and a folder of Parquet files for each split. A row
is a pair: `source` and `target` are word ids in natural order without the end symbol, `index` is
the pair's position in the input; `valid` and `test` also hold `source_text` and `target_text`. The
manifest is written last and names every other file with its SHA-256, so that a folder is either
whole or no prepared corpus at all.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.corpus.files import CorpusError
from model.data_order import RowGroup
from model.durable_files import file_sha256
from model.vocabulary import Vocabulary

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

Side = Literal["source", "target"]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RowGroupEntry(_Entry):
    """Pairs of a row group and the longest sentence of each side, in tokens."""

    num_rows: int
    max_source_length: int
    max_target_length: int


class FileEntry(_Entry):
    """A Parquet file of a split; the path is relative to the corpus folder."""

    file: str
    sha256: str
    row_groups: list[RowGroupEntry]


class SplitEntry(_Entry):
    """A split: what it holds, and how many pairs were dropped for what reason.

    Tokens are counted without end symbols; the unknown fractions are of these tokens.
    """

    num_pairs: int
    num_source_tokens: int
    num_target_tokens: int
    source_unknown_fraction: float
    target_unknown_fraction: float
    dropped: dict[str, int]
    files: list[FileEntry]


class VocabularyEntry(_Entry):
    """A vocabulary's file, its checksum, its kind, and how many ids it has."""

    file: str
    sha256: str
    size: int
    kind: str


class Manifest(_Entry):
    """The index that makes the files a prepared corpus."""

    format_version: int
    fingerprint: str
    corpus: dict[str, Any]
    vocabularies: dict[Side, VocabularyEntry]
    splits: dict[str, SplitEntry]


class PreparedCorpus:
    """A prepared corpus that was found at a path; its files are read when they are asked for."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """Take what `open` found."""
        self.directory = directory
        self.manifest = manifest

    @classmethod
    def open(cls, directory: Path | str) -> Self:
        """Read the manifest; CorpusError when there is none, or none that is ours and whole."""
        directory = Path(directory)
        path = directory / MANIFEST_NAME
        try:
            manifest = Manifest.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise CorpusError(
                f"there is no prepared corpus in {directory}; run `baton prepare CONFIG` first"
            ) from None
        except (ValidationError, OSError) as error:
            fact = str(error).partition("\n")[0]
            raise CorpusError(f"{path} is damaged ({fact}); run `baton prepare` again") from None
        if manifest.format_version != FORMAT_VERSION:
            raise CorpusError(
                f"{path} has format version {manifest.format_version} and this program reads "
                f"version {FORMAT_VERSION}; run `baton prepare` again"
            )
        return cls(directory, manifest)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the settings and the input that the corpus was prepared from."""
        return self.manifest.fingerprint

    @property
    def split_names(self) -> tuple[str, ...]:
        """The splits that were prepared: `train`, and `valid` and `test` where configured."""
        return tuple(self.manifest.splits)

    def split(self, name: str) -> SplitEntry:
        """Return what the manifest says of a split; CorpusError when it was not configured."""
        if name not in self.manifest.splits:
            raise CorpusError(
                f"the corpus in {self.directory} has no split {name!r}, only "
                f"{', '.join(self.split_names)}; add corpus.{name} and run `baton prepare` again"
            )
        return self.manifest.splits[name]

    def vocabulary_bytes(self, side: Side) -> bytes:
        """Return a side's vocabulary file as it stands; CorpusError when its checksum is wrong."""
        entry = self.manifest.vocabularies[side]
        self._check_file(entry.file, entry.sha256)
        return (self.directory / entry.file).read_bytes()

    def vocabulary(self, side: Side) -> Vocabulary:
        """Return the vocabulary of a side."""
        return self._vocabularies[side]

    @cached_property
    def _vocabularies(self) -> dict[Side, Vocabulary]:
        sides: tuple[Side, Side] = ("source", "target")
        return {side: Vocabulary.from_bytes(self.vocabulary_bytes(side)) for side in sides}

    def row_groups(self, split: str) -> list[RowGroup]:
        """Return a split's row groups in the order of its files, from short pairs to long ones."""
        return [
            RowGroup(number, index, group.num_rows)
            for number, file in enumerate(self.split(split).files)
            for index, group in enumerate(file.row_groups)
        ]

    def files(self, split: str) -> list[str]:
        """Return the absolute paths of a split's Parquet files."""
        return [str((self.directory / file.file).absolute()) for file in self.split(split).files]

    def reference_texts(self, split: str, limit: int | None = None) -> list[tuple[str, str]]:
        """Return (source, target) sentences of `valid` or `test` in input order, in NFC."""
        texts: list[tuple[str, str]] = []
        for table in self._text_tables(split):
            texts += zip(
                table["source_text"].to_pylist(), table["target_text"].to_pylist(), strict=True
            )
            if limit is not None and len(texts) >= limit:
                return texts[:limit]
        return texts

    def verify(self) -> None:
        """Check the SHA-256 of every file; CorpusError names the first one that is not intact."""
        for vocabulary in self.manifest.vocabularies.values():
            self._check_file(vocabulary.file, vocabulary.sha256)
        for split in self.manifest.splits.values():
            for file in split.files:
                self._check_file(file.file, file.sha256)

    def _text_tables(self, split: str) -> Iterator[pa.Table]:
        paths = self.files(split)
        for group in self.row_groups(split):
            yield read_row_group(paths[group.file], group, ["source_text", "target_text"])

    def _check_file(self, name: str, sha256: str) -> None:
        path = self.directory / name
        try:
            found = file_sha256(path)
        except OSError as error:
            raise CorpusError(
                f"{path} cannot be read ({error.strerror}); run `baton prepare` again"
            ) from None
        if found != sha256:
            raise CorpusError(
                f"{path} has changed since it was prepared (SHA-256 {found[:12]}, expected "
                f"{sha256[:12]}); run `baton prepare` again"
            )


def read_row_group(path: str, group: RowGroup, columns: Sequence[str]) -> pa.Table:
    """Read some columns of a row group, checking the pages' checksums.

    Raises CorpusError that names the file when it is missing, damaged, or of another shape than the
    manifest says.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read_row_group(group.index, columns=list(columns))
    except (OSError, pa.ArrowException, IndexError, KeyError, UnicodeDecodeError) as error:
        fact = str(error).partition("\n")[0] or type(error).__name__
        raise _damaged_shard(path, fact) from None
    if table.num_rows != group.num_rows or table.column_names != list(columns):
        raise _damaged_shard(
            path,
            f"row group {group.index} has {table.num_rows} rows of {table.column_names}, not "
            f"{group.num_rows} of {list(columns)}",
        )
    return table


def _damaged_shard(path: str, fact: str) -> CorpusError:
    return CorpusError(
        f"the corpus shard {path} is missing or damaged ({fact}); run `baton prepare` again"
    )
