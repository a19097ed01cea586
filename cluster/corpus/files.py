"""Which files a corpus is made of: from the paths of a configuration to input shards in order.

An input shard is what one task reads from end to end: two aligned text files, or one file that
holds both sides. Everything here happens before any text is read.
"""

import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.config.corpus import CorpusFiles
from model.errors import UserError

_TEXT_ENDINGS = (".gz", ".txt")
_TSV_ENDINGS = (".tsv", ".tsv.gz")


# Called with what is under way, how much of it is done, and how much there is, if that is known.
ProgressReport = Callable[[str, int, int | None], None]


class CorpusError(UserError):
    """The text of a corpus, or what was prepared from it, cannot be used."""


def no_progress(phase: str, done: int, total: int | None) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class InputShard:
    """Where some sentence pairs lie; paths are absolute, for tasks run in other folders.

    `target` is the second file of aligned text, None for the forms that hold both sides in one.
    The columns are those of Parquet.
    """

    form: Literal["text", "tsv", "parquet"]
    source: str
    target: str | None
    source_column: str
    target_column: str

    @property
    def paths(self) -> tuple[str, ...]:
        """Its one or two files."""
        return (self.source,) if self.target is None else (self.source, self.target)


def find_shards(files: CorpusFiles, *, source_column: str, target_column: str) -> list[InputShard]:
    """Resolve globs and folders; the order is that of the lists, then of the names.

    In a folder, text files pair up by the two columns' names: `a.en.gz` with `a.fr.gz` where
    `source_column` is `en` and `target_column` is `fr`. Raises CorpusError when a file does not
    exist or is empty, a pattern matches nothing, or the two sides have different numbers of files.
    """
    columns = (source_column, target_column)
    if files.folder is not None:
        return _folder_shards(Path(files.folder), columns)
    if files.tsv is not None:
        return [InputShard("tsv", path, None, *columns) for path in _resolve(files.tsv)]
    if files.parquet is not None:
        return [InputShard("parquet", path, None, *columns) for path in _resolve(files.parquet)]
    assert files.source is not None and files.target is not None
    return _text_shards(_resolve(files.source), _resolve(files.target), columns)


def _text_shards(
    sources: list[str], targets: list[str], columns: tuple[str, str]
) -> list[InputShard]:
    if len(sources) != len(targets):
        raise CorpusError(
            f"the patterns match {len(sources)} source and {len(targets)} target files, for "
            f"example {sources[0]} and {targets[0]}; each source file needs its target file"
        )
    return [
        InputShard("text", source, target, *columns)
        for source, target in zip(sources, targets, strict=True)
    ]


def _folder_shards(folder: Path, columns: tuple[str, str]) -> list[InputShard]:
    if not folder.is_dir():
        raise CorpusError(f"there is no folder {folder}; give the folder of the corpus's shards")
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    root = folder.absolute()
    shards = [_shard_of_file(root / name, names, columns) for name in names]
    found = [shard for shard in shards if shard is not None]
    if not found:
        raise CorpusError(
            f"folder {folder} holds no shards among its {len(names)} files; it needs *.parquet, "
            f"*.tsv, *.tsv.gz, or text files that end in .{columns[0]} and .{columns[1]}: "
            "corpus.source_column and corpus.target_column name these endings"
        )
    _check_no_orphan(root, names, found, columns)
    for path in (path for shard in found for path in shard.paths):
        _check_file(path)
    return found


def _check_no_orphan(
    root: Path, names: list[str], found: list[InputShard], columns: tuple[str, str]
) -> None:
    paired = {shard.target for shard in found}
    for path in (root / name for name in names if name.endswith(_text_names("", columns[1]))):
        if str(path) not in paired:
            raise CorpusError(
                f"{path} has no file for its source side in the folder; add it, ending in "
                f".{columns[0]}, or remove this one"
            )


def _text_names(stem: str, column: str) -> tuple[str, ...]:
    return tuple(f"{stem}.{column}{more}" for more in ("", *_TEXT_ENDINGS))


def _shard_of_file(path: Path, names: list[str], columns: tuple[str, str]) -> InputShard | None:
    if path.name.endswith(".parquet"):
        return InputShard("parquet", str(path), None, *columns)
    if path.name.endswith(_TSV_ENDINGS):
        return InputShard("tsv", str(path), None, *columns)
    for ending in _text_names("", columns[0]):
        if not path.name.endswith(ending):
            continue
        stem = path.name.removesuffix(ending)
        partners = _text_names(stem, columns[1])
        present = [name for name in partners if name in names]
        if len(present) != 1:
            raise CorpusError(
                f"{path} has {len(present)} files for its target side in the folder; it needs "
                f"exactly one, such as {partners[0]}"
            )
        return InputShard("text", str(path), str(path.parent / present[0]), *columns)
    return None


def _resolve(patterns: tuple[str, ...]) -> list[str]:
    return [path for pattern in patterns for path in _matches(pattern)]


def _matches(pattern: str) -> list[str]:
    # A file whose name holds `*` or `[` is meant as it stands.
    if glob.has_magic(pattern) and not Path(pattern).exists():
        paths = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - absolute patterns too
        if not paths:
            raise CorpusError(f"no file matches {pattern}; see the paths of the section corpus")
    else:
        paths = [pattern]
    for path in paths:
        _check_file(path)
    return [str(Path(path).absolute()) for path in paths]


def _check_file(path: str) -> None:
    if not Path(path).is_file():
        raise CorpusError(f"there is no file {path}; see the paths of the section corpus")
    if Path(path).stat().st_size == 0:
        raise CorpusError(f"{path} is empty (0 bytes); it needs one sentence a line")
