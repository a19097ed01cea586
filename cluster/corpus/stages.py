"""What the tasks of `baton prepare` do to blocks of sentence pairs; free of Ray itself.

A task gets and returns Arrow tables. Between reading and the other stages they have the columns
`index` (the pair's position in the input), `source` and `target` (text as it was read).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.corpus.files import InputShard
from cluster.corpus.pair_filter import KEPT, PairFilter
from cluster.corpus.prepared import Side
from cluster.corpus.reading import read_blocks
from model.durable_files import file_sha256
from model.errors import UserError
from model.vocabulary import Vocabulary, normalise
from model.word_vocabulary import WordSplitter

SIDES: tuple[Side, Side] = ("source", "target")
IDS = pa.list_(pa.int32())

_ENCODED = [
    ("reason", pa.int8()),
    ("source_length", pa.int32()),
    ("target_length", pa.int32()),
    ("index", pa.int64()),
    ("source", IDS),
    ("target", IDS),
]
_TEXTS = [("source_text", pa.string()), ("target_text", pa.string())]


def survey_shard(shard: InputShard) -> pa.Table:
    """Read a shard to its end; one row with its pairs, its files' checksums, or what is wrong."""
    checksums: list[str] = []
    num_pairs, problem = 0, ""
    try:
        num_pairs = sum(len(source) for source, _ in read_blocks(shard))
        checksums = [file_sha256(Path(path)) for path in shard.paths]
    except UserError as error:
        problem = str(error)
    return pa.table({"num_pairs": [num_pairs], "sha256": [checksums], "problem": [problem]})


def read_shard(shard: InputShard, first_index: int) -> Iterator[pa.Table]:
    """Yield a shard's pairs, whose positions in the input begin with `first_index`."""
    for source, target in read_blocks(shard):
        index = np.arange(first_index, first_index + len(source))
        first_index += len(source)
        texts = (pa.array(side, pa.string()) for side in (source, target))
        yield pa.table([pa.array(index), *texts], names=["index", *SIDES])


@dataclass(frozen=True)
class VocabularyEvidence:
    """Collects from training pairs what the vocabularies are built from, a block at a time.

    For a side in `languages` it counts words, split by that language's rules; for a side in
    `sampled` it picks about the fraction `sample_fraction` of the sentences by a hash of `seed` and
    the pair's position. Pairs that the filter drops by their text alone have no say.
    """

    languages: dict[Side, str | None]
    sampled: tuple[Side, ...]
    sample_fraction: float
    seed: int
    pair_filter: PairFilter

    def __call__(self, pairs: pa.Table) -> pa.Table:
        """Return rows (side, text, count): distinct words, and sampled sentences of count 0."""
        columns = {side: [normalise(text) for text in pairs[side].to_pylist()] for side in SIDES}
        judged = map(self.pair_filter.judge_text, columns["source"], columns["target"])
        usable = np.fromiter((reason == KEPT for reason in judged), bool, pairs.num_rows)
        tables = [self._count(side, columns[side], usable) for side in self.languages]
        chosen = usable & (_uniform(pairs["index"].to_numpy(), self.seed) < self.sample_fraction)
        tables += [_evidence(side, _pick(columns[side], chosen), None) for side in self.sampled]
        return pa.concat_tables(tables)

    def _count(self, side: Side, texts: Sequence[str], usable: NDArray[np.bool_]) -> pa.Table:
        splitter = _splitter(self.languages[side])
        counts = Counter(word for text in _pick(texts, usable) for word in splitter.split(text))
        return _evidence(side, list(counts), list(counts.values()))


@dataclass(frozen=True)
class PairEncoder:
    """Turns blocks of text into ids and judges the pairs.

    The vocabularies' files are read once per process. `with_texts` adds the text in NFC.
    """

    vocabulary_files: tuple[str, str]
    pair_filter: PairFilter
    with_texts: bool

    def __call__(self, pairs: pa.Table) -> pa.Table:
        """Return a row per pair, in order; a dropped pair has a reason, lengths 0 and no ids."""
        encoders = [_load_vocabulary(path).encode for path in self.vocabulary_files]
        sources, targets = (pairs[side].to_pylist() for side in SIDES)
        rows = [
            _encode(source, target, encoders, self.pair_filter)
            for source, target in zip(sources, targets, strict=True)
        ]
        columns = [
            [reason for reason, _, _ in rows],
            [len(source) for _, source, _ in rows],
            [len(target) for _, _, target in rows],
            pairs["index"].to_pylist(),
            [source for _, source, _ in rows],
            [target for _, _, target in rows],
        ]
        fields = [*_ENCODED]
        if self.with_texts:
            columns += [[normalise(text) for text in side] for side in (sources, targets)]
            fields += _TEXTS
        return pa.table(
            [pa.array(column, kind) for column, (_, kind) in zip(columns, fields, strict=True)],
            names=[name for name, _ in fields],
        )


def _encode(
    source: str,
    target: str,
    encoders: Sequence[Callable[[str], list[int]]],
    pair_filter: PairFilter,
) -> tuple[int, list[int], list[int]]:
    reason = pair_filter.judge_text(source, target)
    if reason != KEPT:
        return reason, [], []
    source_ids, target_ids = encoders[0](source), encoders[1](target)
    reason = pair_filter.judge_ids(source_ids, target_ids)
    return (reason, source_ids, target_ids) if reason == KEPT else (reason, [], [])


def _evidence(side: str, texts: Sequence[str], counts: Sequence[int] | None) -> pa.Table:
    sides = pa.array([side] * len(texts), pa.string())
    numbers = pa.array([0] * len(texts) if counts is None else counts, pa.int64())
    return pa.table([sides, pa.array(texts, pa.string()), numbers], names=["side", "text", "count"])


def _pick(texts: Sequence[str], chosen: NDArray[np.bool_]) -> list[str]:
    return [texts[at] for at in np.flatnonzero(chosen).tolist()]


def _uniform(index: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    # The finaliser of SplitMix64 (Steele, Lea & Flood 2014): a hash, so that whether a pair is
    # chosen depends on its position alone and not on how the input was cut into blocks.
    mixed = index.astype(np.uint64) + np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15)
    mixed += np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53


@lru_cache(maxsize=4)
def _splitter(language: str | None) -> WordSplitter:
    return WordSplitter(language)


@lru_cache(maxsize=4)
def _load_vocabulary(path: str) -> Vocabulary:
    return Vocabulary.from_bytes(Path(path).read_bytes())
