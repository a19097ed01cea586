"""The first pass over a corpus: is the text sound, how many pairs has each shard, what checksums.

Only after it can pairs be numbered through all shards, a reading task begin anywhere, and a corpus
that was prepared from the same text be recognised.
"""

from dataclasses import dataclass
from typing import Any

import ray

from cluster.config.corpus import CorpusConfig
from cluster.corpus.files import CorpusError, InputShard, ProgressReport, find_shards
from cluster.corpus.stages import read_shard, survey_shard
from cluster.ingest.data_streams import stream, stream_settings, tables

_SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class SurveyedSplit:
    """A split's input shards in order, with the pairs and the file checksums of each."""

    name: str
    shards: list[InputShard]
    num_pairs: list[int]
    checksums: list[list[str]]

    def read(self) -> "ray.data.Dataset":
        """Return the text of all its pairs in order, as `read_shard` gives it."""
        first = [sum(self.num_pairs[:number]) for number in range(len(self.shards))]
        shards = self.shards
        return stream(len(shards), lambda number: read_shard(shards[number], first[number]))


def survey(config: CorpusConfig, progress: ProgressReport) -> dict[str, SurveyedSplit]:
    """Read every file of a corpus to its end, in parallel; return its splits by name.

    Raises CorpusError with the first problem in the order of the files.
    """
    files = {name: getattr(config, name) for name in _SPLITS}
    shards = {
        name: find_shards(
            given, source_column=config.source_column, target_column=config.target_column
        )
        for name, given in files.items()
        if given is not None
    }
    flat = [shard for split in shards.values() for shard in split]
    surveyed = iter(_survey_shards(flat, progress))
    result = {}
    for name, split in shards.items():
        rows = [next(surveyed) for _ in split]
        result[name] = SurveyedSplit(
            name, split, [row["num_pairs"] for row in rows], [row["sha256"] for row in rows]
        )
    return result


def _survey_shards(shards: list[InputShard], progress: ProgressReport) -> list[dict[str, Any]]:
    progress("reading the text", 0, len(shards))
    rows: list[dict[str, Any]] = []
    with stream_settings():
        surveyed = stream(len(shards), lambda number: iter([survey_shard(shards[number])]), cpus=1)
        for table in tables(surveyed):
            rows += table.to_pylist()
            progress("reading the text", len(rows), len(shards))
            for row in rows:
                if row["problem"]:
                    raise CorpusError(row["problem"])
    return rows
