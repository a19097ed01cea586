"""The second pass over a corpus: what the vocabularies are built from, and the building.

Words are counted and sentences sampled in parallel; the driver adds up the distinct words. Which
sentences SentencePiece learns from follows from the seed and their positions alone.
"""

import hashlib
from collections import Counter
from pathlib import Path

import pyarrow as pa

from cluster.config.corpus import CorpusConfig, VocabularyConfig
from cluster.corpus.files import ProgressReport
from cluster.corpus.pair_filter import PairFilter
from cluster.corpus.prepared import Side, VocabularyEntry
from cluster.corpus.stages import SIDES, VocabularyEvidence
from cluster.corpus.survey import SurveyedSplit
from cluster.ingest.data_streams import WORKER_CPUS, stream_settings, tables
from model.byte_vocabulary import ByteVocabulary
from model.durable_files import sync_file
from model.sentencepiece_vocabulary import SentencePieceVocabulary
from model.vocabulary import Vocabulary
from model.word_vocabulary import WordVocabulary

_MAX_SAMPLE = 500_000  # sentences a side from which SentencePiece learns


def write_vocabularies(
    config: CorpusConfig,
    seed: int,
    train: SurveyedSplit,
    folder: Path,
    progress: ProgressReport,
) -> dict[Side, VocabularyEntry]:
    """Build both vocabularies from the training text and write them into a folder."""
    counts, samples = _gather_evidence(config, seed, train, progress)
    progress("building the vocabularies", 0, len(SIDES))
    entries = {}
    for number, side in enumerate(SIDES, start=1):
        settings = vocabulary_config(config, side)
        vocabulary = _build_vocabulary(settings, counts[side], samples[side])
        data = vocabulary.to_bytes()
        path = folder / f"{side}_vocabulary.json"
        path.write_bytes(data)
        sync_file(path)
        entries[side] = VocabularyEntry(
            file=path.name,
            sha256=hashlib.sha256(data).hexdigest(),
            size=len(vocabulary),
            kind=vocabulary.kind,
        )
        progress("building the vocabularies", number, len(SIDES))
    return entries


def _gather_evidence(
    config: CorpusConfig, seed: int, train: SurveyedSplit, progress: ProgressReport
) -> tuple[dict[str, Counter[str]], dict[str, list[str]]]:
    counts: dict[str, Counter[str]] = {side: Counter() for side in SIDES}
    samples: dict[str, list[str]] = {side: [] for side in SIDES}
    settings = {side: vocabulary_config(config, side) for side in SIDES}
    num_pairs = sum(train.num_pairs)
    evidence = VocabularyEvidence(
        languages={s: settings[s].language for s in SIDES if settings[s].kind == "word"},
        sampled=sampled_sides(config),
        sample_fraction=min(1.0, _MAX_SAMPLE / num_pairs),
        seed=seed,
        pair_filter=train_filter(config),
    )
    if not evidence.languages and not evidence.sampled:
        return counts, samples
    progress("counting words", 0, None)
    with stream_settings():
        found = train.read().map_batches(
            evidence, batch_size=None, batch_format="pyarrow", num_cpus=WORKER_CPUS
        )
        for table in tables(found):
            _take_evidence(table, counts, samples)
            progress("counting words", sum(len(words) for words in counts.values()), None)
    return counts, samples


def _take_evidence(
    table: pa.Table, counts: dict[str, Counter[str]], samples: dict[str, list[str]]
) -> None:
    columns = (table[name].to_pylist() for name in ("side", "text", "count"))
    for side, text, count in zip(*columns, strict=True):
        if count:
            counts[side][text] += count
        else:
            samples[side].append(text)


def _build_vocabulary(
    settings: VocabularyConfig, counts: Counter[str], sample: list[str]
) -> Vocabulary:
    if settings.kind == "word":
        return WordVocabulary.from_counts(counts, settings.size, settings.language)
    if settings.kind == "bytes":
        return ByteVocabulary()
    return SentencePieceVocabulary.train(sample, settings.kind, settings.size)


def train_filter(config: CorpusConfig) -> PairFilter:
    """Return the bounds of training pairs."""
    return PairFilter(config.max_length, config.max_length_ratio)


def vocabulary_config(config: CorpusConfig, side: str) -> VocabularyConfig:
    """Return the settings of one side's vocabulary."""
    return config.source_vocabulary if side == "source" else config.target_vocabulary


def sampled_sides(config: CorpusConfig) -> tuple[Side, ...]:
    """Return the sides whose vocabularies are learnt from a sample of the sentences."""
    kinds = {side: vocabulary_config(config, side).kind for side in SIDES}
    return tuple(side for side in SIDES if kinds[side] in ("bpe", "unigram"))
