"""`BatchStream`: the pure order through Ray Data, resuming anywhere, evaluation, damaged shards."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from cluster.corpus.files import CorpusError
from cluster.corpus.preparation import prepare_corpus
from cluster.corpus.prepared import PreparedCorpus
from cluster.ingest.stream import BatchStream
from model.batching import Batch
from model.data_order import Cursor
from tests.cluster.corpora import corpus_config, sentences, write_text

NUM_TRAIN = 700


@pytest.fixture(scope="module")
def prepared(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    root = tmp_path_factory.mktemp("ingest")
    config = corpus_config(
        root / "prepared",
        train=write_text(root, "train", sentences(NUM_TRAIN)),
        valid=write_text(root, "valid", sentences(150, 1)),
    )
    return prepare_corpus(config, seed=1)


def stream_of(corpus: PreparedCorpus, split: str = "train", *, seed: int = 1) -> BatchStream:
    return BatchStream(corpus, split, batch_size=16, seed=seed, shuffle_window=3)


def same(first: Batch, second: Batch) -> bool:
    return torch.equal(first.source, second.source) and torch.equal(first.target, second.target)


def sources(batches: list[tuple[Cursor, Batch]]) -> list[tuple[int, ...]]:
    return [
        tuple(row[:length])
        for _, batch in batches
        for row, length in zip(batch.source.tolist(), batch.source_lengths.tolist(), strict=True)
    ]


def test_an_epoch_holds_every_pair_once(prepared: PreparedCorpus) -> None:
    stream = stream_of(prepared)
    batches = list(stream.epoch(0))
    assert [cursor for cursor, _ in batches] == [Cursor(0, n) for n in range(stream.num_batches)]
    ordered = [(Cursor(0, 0), item.batch) for item in stream.in_order()]
    assert len(sources(batches)) == NUM_TRAIN
    assert sorted(sources(batches)) == sorted(sources(ordered))


def test_the_stream_resumes_at_any_cursor(prepared: PreparedCorpus) -> None:
    stream = stream_of(prepared)
    whole = list(stream.epoch(2))
    for first in (1, 13, len(whole) - 1):
        tail = list(stream.epoch(2, first))
        assert [cursor for cursor, _ in tail] == [cursor for cursor, _ in whole[first:]]
        assert all(same(a, b) for (_, a), (_, b) in zip(tail, whole[first:], strict=True))
    assert list(stream.epoch(2, len(whole))) == []


def test_any_batch_can_be_read_again_alone(prepared: PreparedCorpus) -> None:
    stream = stream_of(prepared)
    for cursor, batch in stream.epoch(1):
        assert same(stream.read_batch(cursor), batch)


def test_epochs_and_seeds_give_other_orders(prepared: PreparedCorpus) -> None:
    first = sources(list(stream_of(prepared).epoch(0)))
    assert first == sources(list(stream_of(prepared).epoch(0)))
    assert first != sources(list(stream_of(prepared).epoch(1)))
    assert first != sources(list(stream_of(prepared, seed=2).epoch(0)))


def test_batches_are_of_about_equal_length(prepared: PreparedCorpus) -> None:
    batches = [batch for _, batch in stream_of(prepared).epoch(0)]
    num_positions = sum(batch.num_positions for batch in batches)
    assert sum(batch.num_words for batch in batches) > 0.85 * num_positions


def test_evaluation_can_put_results_back_in_place(prepared: PreparedCorpus) -> None:
    vocabulary = prepared.vocabulary("source")
    stream = BatchStream(
        prepared, "valid", batch_size=16, seed=1, shuffle_window=1, reverse_source=False
    )
    found: dict[int, list[int]] = {}
    for item in stream.in_order():
        lengths = item.batch.source_lengths.tolist()
        assert lengths == sorted(lengths, reverse=True)
        for place, row, length in zip(
            item.indices, item.batch.source.tolist(), lengths, strict=True
        ):
            found[place] = row[: length - 1]
    texts = prepared.reference_texts("valid")
    assert [found[place] for place in range(150)] == [vocabulary.encode(s) for s, _ in texts]


def test_a_stream_that_is_left_early_does_no_harm(prepared: PreparedCorpus) -> None:
    stream = stream_of(prepared)
    cursor, batch = next(iter(stream.epoch(0)))
    again, same_batch = next(iter(stream.epoch(0)))
    assert cursor == again and same(batch, same_batch)


def _last_byte_of_source_ids(shard: Path) -> int:
    column = pq.read_metadata(shard).row_group(0).column(1)
    assert column.path_in_schema.startswith("source.")
    start = column.dictionary_page_offset or column.data_page_offset
    return int(start + column.total_compressed_size - 1)


@pytest.mark.parametrize("damage", ["flipped", "deleted", "cut"])
def test_a_damaged_shard_is_named(prepared: PreparedCorpus, tmp_path: Path, damage: str) -> None:
    shutil.copytree(prepared.directory, tmp_path / "copy")
    corpus = PreparedCorpus.open(tmp_path / "copy")
    shard = Path(corpus.files("train")[0])
    data = bytearray(shard.read_bytes())
    if damage == "flipped":
        data[_last_byte_of_source_ids(shard)] ^= 0x10
        shard.write_bytes(data)
    elif damage == "cut":
        shard.write_bytes(data[: len(data) // 2])
    else:
        shard.unlink()
    with pytest.raises(CorpusError, match=r"part-00000\.parquet") as raised:
        list(stream_of(corpus).epoch(0))
    assert "\n" not in str(raised.value) and "baton prepare" in str(raised.value)
    with pytest.raises(CorpusError, match=r"part-00000\.parquet"):
        corpus.verify()


def test_a_changed_vocabulary_is_refused(prepared: PreparedCorpus, tmp_path: Path) -> None:
    shutil.copytree(prepared.directory, tmp_path / "copy")
    corpus = PreparedCorpus.open(tmp_path / "copy")
    path = corpus.directory / "target_vocabulary.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(CorpusError, match=r"target_vocabulary\.json has changed"):
        corpus.vocabulary("target")
