"""`baton prepare`: from text files to a folder of encoded, checksummed Parquet shards.

Three passes over the input, each a stream of blocks through Ray Data: the survey (is the text
sound, how many pairs, what checksums), the evidence for the vocabularies, and the encoding, after
which the training pairs are sorted by length. The driver holds a row group, the distinct words, and
at most half a million sentences a side for SentencePiece, never the corpus. The same input and
settings give the same bytes.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.config.corpus import CorpusConfig, VocabularyConfig
from cluster.corpus.files import CorpusError, ProgressReport, no_progress
from cluster.corpus.pair_filter import PairFilter
from cluster.corpus.prepared import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    PreparedCorpus,
    Side,
    SplitEntry,
    VocabularyEntry,
)
from cluster.corpus.stages import SIDES, PairEncoder
from cluster.corpus.survey import SurveyedSplit, survey
from cluster.corpus.vocabularies import (
    sampled_sides,
    train_filter,
    vocabulary_config,
    write_vocabularies,
)
from cluster.corpus.writing import SplitWriter
from cluster.ingest.data_streams import WORKER_CPUS, stream_settings, tables
from model.durable_files import sync_file, sync_folder
from model.word_vocabulary import WordSplitter

__all__ = ["ProgressReport", "no_progress", "prepare_corpus"]

# What a prepared corpus depends on besides the text itself.
_SETTINGS_OF_CONTENT = {
    "max_length",
    "max_length_ratio",
    "row_group_size",
    "source_vocabulary",
    "target_vocabulary",
}


def prepare_corpus(
    config: CorpusConfig, *, seed: int, progress: ProgressReport = no_progress
) -> PreparedCorpus:
    """Prepare the corpus of a configuration, or find that it has been prepared already.

    Ray must be initialised. `seed` chooses the sentences from which SentencePiece learns. The
    folder appears whole or not at all; another prepared corpus in its place is replaced.

    Raises CorpusError for input that cannot be used and for a folder that holds something else,
    VocabularyError for vocabularies that the text cannot give.
    """
    for side in SIDES:
        _check_vocabulary(vocabulary_config(config, side))
    splits = survey(config, progress)
    fingerprint = _fingerprint(config, seed, splits)
    finished = _already_prepared(config.directory, fingerprint)
    if finished is not None:
        return finished
    with _replacing(config.directory) as folder:
        vocabularies = write_vocabularies(config, seed, splits["train"], folder, progress)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            fingerprint=fingerprint,
            corpus=config.model_dump(mode="json"),
            vocabularies=vocabularies,
            splits={
                name: _write_split(config, split, vocabularies, folder, progress)
                for name, split in splits.items()
            },
        )
        manifest_file = folder / MANIFEST_NAME
        manifest_file.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        sync_file(manifest_file)
    return PreparedCorpus.open(config.directory)


def _fingerprint(config: CorpusConfig, seed: int, splits: dict[str, SurveyedSplit]) -> str:
    parts = {
        "format_version": FORMAT_VERSION,
        "settings": config.model_dump(mode="json", include=_SETTINGS_OF_CONTENT),
        "seed": seed if sampled_sides(config) else None,
        "columns": {
            split.name: [[s.form, s.source_column, s.target_column] for s in split.shards]
            for split in splits.values()
        },
        "input": {split.name: split.checksums for split in splits.values()},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _already_prepared(directory: Path, fingerprint: str) -> PreparedCorpus | None:
    """Return the intact corpus of this fingerprint; CorpusError if the folder is not ours."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return None
    if not (directory / MANIFEST_NAME).is_file():
        raise CorpusError(
            f"{directory} exists and is not a prepared corpus; set corpus.directory to another "
            "folder, or remove it"
        )
    try:
        corpus = PreparedCorpus.open(directory)
        corpus.verify()
    except CorpusError:
        return None  # ours, but damaged or of another version: prepared again
    return corpus if corpus.fingerprint == fingerprint else None


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """Give a folder to fill that takes the place of `directory` once it is complete."""
    parent = directory.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        working = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=parent))
    except OSError as error:
        raise CorpusError(
            f"folder {directory} cannot be written: {error.strerror}; set corpus.directory"
        ) from None
    folder = working / "new"
    try:
        folder.mkdir()
        yield folder
        for name in [path for path in folder.rglob("*") if path.is_dir()]:
            sync_folder(name)
        sync_folder(folder)
        if directory.exists():
            directory.rename(working / "old")
        folder.rename(directory)
        sync_folder(parent)
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _write_split(
    config: CorpusConfig,
    split: SurveyedSplit,
    vocabularies: dict[Side, VocabularyEntry],
    folder: Path,
    progress: ProgressReport,
) -> SplitEntry:
    is_train = split.name == "train"
    source_file, target_file = (str(folder / vocabularies[side].file) for side in SIDES)
    encode = PairEncoder(
        (source_file, target_file),
        train_filter(config) if is_train else PairFilter(),
        with_texts=not is_train,
    )
    phase, total, seen = f"encoding {split.name}", sum(split.num_pairs), 0
    progress(phase, 0, total)
    with SplitWriter(folder, split.name, config.row_group_size) as writer, stream_settings():
        encoded = split.read().map_batches(
            encode, batch_size=None, batch_format="pyarrow", num_cpus=WORKER_CPUS
        )
        if is_train:
            encoded = encoded.sort(["source_length", "target_length", "index"])
        for table in tables(encoded):
            writer.add(table)
            seen += table.num_rows
            progress(phase, seen, total)
    entry = writer.entry()
    if entry.num_pairs == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in entry.dropped.items())
        raise CorpusError(
            f"no pair of corpus.{split.name} is left of {total} (dropped: {reasons}); check its "
            "files, corpus.max_length and corpus.max_length_ratio"
        )
    return entry


def _check_vocabulary(settings: VocabularyConfig) -> None:
    WordSplitter(settings.language)  # raises for a language without rules, before any long work
