"""Reads the sentence pairs of one input shard as a stream, and says exactly where text is broken.

Only a line feed ends a line, after which one carriage return is dropped: Unicode has other line
ends (U+2028, U+0085) that stand inside sentences, and splitting at them would shift the two sides
against each other. No more than a block of pairs is held at a time.
"""

import gzip
import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from cluster.corpus.files import CorpusError, InputShard

BLOCK_PAIRS = 4096

_BOM = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"

Block = tuple[list[str], list[str]]


def read_blocks(shard: InputShard) -> Iterator[Block]:
    """Yield the shard's pairs in order, as lists of source and of target sentences.

    Raises CorpusError with file, line and byte for invalid UTF-8, with both counts for files of
    different numbers of lines, and for missing columns and files that cannot be read.
    """
    if shard.form == "parquet":
        return _parquet_blocks(shard)
    return _tsv_blocks(shard) if shard.form == "tsv" else _text_blocks(shard)


def read_lines(path: str) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, plain or gzip, without their ends.

    Raises CorpusError for invalid UTF-8 and for files that cannot be read to their end.
    """
    offset = 0
    number = 0
    with _open(path) as file:
        for number, raw in enumerate(_raw_lines(file, path), start=1):
            body = raw.removesuffix(b"\n").removesuffix(b"\r")
            start = len(_BOM) if number == 1 and body.startswith(_BOM) else 0
            try:
                yield body[start:].decode("utf-8")
            except UnicodeDecodeError as error:
                byte = error.start + start
                raise CorpusError(
                    f"{path} line {number} is not valid UTF-8 at byte {byte + 1} of the line "
                    f"(byte {offset + byte} of the text: 0x{body[byte]:02x}); "
                    "convert the file to UTF-8"
                ) from None
            offset += len(raw)
    if number == 0:
        raise CorpusError(f"{path} is empty; it needs one sentence a line")


def _open(path: str) -> IO[bytes]:
    try:
        with Path(path).open("rb") as file:
            compressed = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        return cast(IO[bytes], gzip.open(path) if compressed else Path(path).open("rb"))
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from None


def _raw_lines(file: IO[bytes], path: str) -> Iterator[bytes]:
    try:
        yield from file
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(
            f"{path} cannot be read to its end: {error}; the file is damaged or incomplete"
        ) from None


def _text_blocks(shard: InputShard) -> Iterator[Block]:
    assert shard.target is not None
    sources, targets = read_lines(shard.source), read_lines(shard.target)
    num_lines = 0
    while True:
        source = list(itertools.islice(sources, BLOCK_PAIRS))
        target = list(itertools.islice(targets, BLOCK_PAIRS))
        if len(source) != len(target):
            num_source = num_lines + len(source) + sum(1 for _ in sources)
            num_target = num_lines + len(target) + sum(1 for _ in targets)
            raise CorpusError(
                f"{shard.source} has {num_source} lines and {shard.target} has {num_target}; "
                "aligned files need equal numbers of lines"
            )
        if not source:
            return
        num_lines += len(source)
        yield source, target


def _tsv_blocks(shard: InputShard) -> Iterator[Block]:
    lines = enumerate(read_lines(shard.source), start=1)
    while chunk := list(itertools.islice(lines, BLOCK_PAIRS)):
        pairs = [_columns(shard.source, number, line) for number, line in chunk]
        yield [source for source, _ in pairs], [target for _, target in pairs]


def _columns(path: str, number: int, line: str) -> tuple[str, str]:
    # Further columns, such as scores, are not ours to judge.
    columns = line.split("\t", 2)
    if len(columns) < 2:
        if not line.strip():
            return "", ""
        raise CorpusError(f"{path} line {number} has no tab; each line needs source, tab, target")
    return columns[0], columns[1]


def _parquet_blocks(shard: InputShard) -> Iterator[Block]:
    import pyarrow
    import pyarrow.parquet

    columns = [shard.source_column, shard.target_column]
    try:
        with pyarrow.parquet.ParquetFile(shard.source, page_checksum_verification=True) as file:
            _check_columns(shard.source, file.schema_arrow, columns)
            if file.metadata.num_rows == 0:
                raise CorpusError(f"{shard.source} is empty; it needs at least one pair")
            for batch in file.iter_batches(BLOCK_PAIRS, columns=columns):
                source, target = (batch.column(name).to_pylist() for name in columns)
                yield [text or "" for text in source], [text or "" for text in target]
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise CorpusError(
            f"{shard.source} cannot be read as Parquet: {reason}; it is damaged or not Parquet"
        ) from None


def _check_columns(path: str, schema: object, columns: list[str]) -> None:
    import pyarrow

    assert isinstance(schema, pyarrow.Schema)
    types = pyarrow.types
    for name in columns:
        if name not in schema.names:
            raise CorpusError(
                f"{path} has no column {name!r}; its columns are {', '.join(schema.names)}: set "
                "corpus.source_column and corpus.target_column"
            )
        kind = schema.field(name).type
        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
            raise CorpusError(f"{path} column {name!r} has type {kind}; sentences are strings")
