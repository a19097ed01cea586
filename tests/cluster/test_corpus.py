"""`prepare_corpus`: what the folder holds, that it repeats, is whole, is never silently wrong."""

import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.corpus.files import CorpusError
from cluster.corpus.preparation import prepare_corpus
from cluster.corpus.prepared import PreparedCorpus
from model.vocabulary import UNK_ID, VocabularyError
from tests.cluster.corpora import corpus_config, sentences, write_text

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_TRAIN = 500


@pytest.fixture(scope="module")
def prepared(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    root = tmp_path_factory.mktemp("corpus")
    odd = [("", "x"), ("x", "  "), ("w " * 13, "w"), ("a b c d", "a"), ("E\u0301te\u0301", "x")]
    config = corpus_config(
        root / "prepared",
        train=write_text(root, "train", [*sentences(NUM_TRAIN), *odd]),
        valid=write_text(root, "valid", [*sentences(20, 1), ("a" + " b" * 99, "c"), ("", "x")]),
        max_length=12,
    )
    return prepare_corpus(config, seed=1)


def hashes(directory: Path) -> dict[str, str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "manifest.json"  # it names the input's paths
    }


def test_every_kept_pair_is_encoded_once(prepared: PreparedCorpus) -> None:
    texts = [pair for pair in sentences(NUM_TRAIN) if len(pair[0].split()) <= 12]
    assert 0 < len(texts) < NUM_TRAIN
    rows = [row for file in prepared.files("train") for row in pq.read_table(file).to_pylist()]
    by_index = {row["index"]: row for row in rows}
    given = sentences(NUM_TRAIN)
    for index, row in by_index.items():
        if index < NUM_TRAIN:
            for number, side in enumerate(("source", "target")):
                vocabulary = prepared.vocabulary(side)  # type: ignore[arg-type]
                assert row[side] == vocabulary.encode(given[index][number])
    assert len(rows) == len(by_index) == len(texts) + 1  # the last odd pair is a good one
    assert NUM_TRAIN + 4 in by_index


def test_dropped_pairs_are_counted_by_reason(prepared: PreparedCorpus) -> None:
    too_long = sum(len(source.split()) > 12 for source, _ in sentences(NUM_TRAIN))
    dropped = prepared.split("train").dropped
    assert dropped == {"empty": 2, "too_long": too_long + 1, "ratio": 1}
    assert prepared.split("valid").dropped == {"empty": 1, "too_long": 0, "ratio": 0}


def test_the_counts_are_those_of_the_files(prepared: PreparedCorpus) -> None:
    for name in prepared.split_names:
        entry = prepared.split(name)
        rows = [row for file in prepared.files(name) for row in pq.read_table(file).to_pylist()]
        tokens = Counter(word == UNK_ID for row in rows for word in row["source"])
        assert entry.num_pairs == len(rows)
        assert entry.num_source_tokens == tokens.total()
        assert entry.num_target_tokens == sum(len(row["target"]) for row in rows)
        assert entry.source_unknown_fraction == pytest.approx(tokens[True] / tokens.total())


def test_row_groups_hold_pairs_of_about_the_same_length(prepared: PreparedCorpus) -> None:
    shortest_allowed = 0
    for path, entry in zip(prepared.files("train"), prepared.split("train").files, strict=True):
        with pq.ParquetFile(path) as file:
            assert file.num_row_groups == len(entry.row_groups)
            for number, group in enumerate(entry.row_groups):
                lengths = [len(ids) for ids in file.read_row_group(number)["source"].to_pylist()]
                assert (len(lengths), max(lengths)) == (group.num_rows, group.max_source_length)
                assert lengths == sorted(lengths) and lengths[0] >= shortest_allowed
                shortest_allowed = lengths[-1]
    sizes = [group.num_rows for group in prepared.row_groups("train")]
    assert set(sizes[:-1]) == {64} and 0 < sizes[-1] <= 64


def test_held_out_text_keeps_its_order_and_its_long_sentences(prepared: PreparedCorpus) -> None:
    expected = [*sentences(20, 1), ("a" + " b" * 99, "c")]
    assert prepared.reference_texts("valid") == expected
    assert prepared.reference_texts("valid", limit=3) == expected[:3]


def test_vocabularies_are_of_the_training_text(prepared: PreparedCorpus) -> None:
    vocabulary = prepared.vocabulary("source")
    assert len(vocabulary) == 60
    assert prepared.manifest.vocabularies["source"].sha256 == vocabulary.sha256
    assert UNK_ID not in vocabulary.encode("the red dog sings été")


def test_the_same_text_gives_the_same_bytes_however_it_is_cut(
    prepared: PreparedCorpus, tmp_path: Path
) -> None:
    given = prepared.manifest.corpus
    parts: dict[str, list[str]] = {"source": [], "target": []}
    for side in parts:
        lines = Path(given["train"][side][0]).read_bytes().splitlines(keepends=True)
        for number, part in enumerate((lines[:100], lines[100:101], lines[101:])):
            path = tmp_path / f"{number}.{side}.gz"
            path.write_bytes(gzip.compress(b"".join(part)))
            parts[side].append(str(path))
    config = corpus_config(tmp_path / "again", train=parts, valid=given["valid"], max_length=12)
    again = prepare_corpus(config, seed=2)
    assert hashes(again.directory) == hashes(prepared.directory)
    again.verify()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_prepared_folder_is_reused_replaced_or_left_alone(tmp_path: Path) -> None:
    train = write_text(tmp_path, "train", sentences(80))
    directory = tmp_path / "prepared"
    first = prepare_corpus(corpus_config(directory, train=train), seed=1)
    written = (directory / "manifest.json").stat().st_mtime_ns
    same = prepare_corpus(corpus_config(directory, train=train, shuffle_window=3), seed=1)
    assert (directory / "manifest.json").stat().st_mtime_ns == written
    assert same.fingerprint == first.fingerprint

    changed = write_text(tmp_path, "train", sentences(90))
    other = prepare_corpus(corpus_config(directory, train=changed), seed=1)
    assert other.fingerprint != first.fingerprint and other.split("train").num_pairs == 90

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    with pytest.raises(CorpusError, match="not a prepared corpus"):
        prepare_corpus(corpus_config(foreign, train=train), seed=1)
    assert (foreign / "thesis.txt").read_text() == "precious"


def test_broken_text_ends_in_its_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    train = write_text(tmp_path, "train", sentences(10))
    Path(train["target"]).write_bytes(b"only\n\xff\n")
    with pytest.raises(CorpusError, match=r"train\.target line 2 is not valid UTF-8") as raised:
        prepare_corpus(corpus_config(tmp_path / "prepared", train=train), seed=1)
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.source", "train.target"]


def test_a_split_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    train = write_text(tmp_path, "train", sentences(10))
    valid = write_text(tmp_path, "valid", [("", "x"), ("", "")])
    with pytest.raises(CorpusError, match=r"no pair of corpus\.valid is left of 2 \(dropped: 2 e"):
        prepare_corpus(corpus_config(tmp_path / "prepared", train=train, valid=valid), seed=1)


def test_pieces_and_bytes_are_prepared_too(tmp_path: Path) -> None:
    train = write_text(tmp_path, "train", sentences(200))
    config = corpus_config(
        tmp_path / "prepared",
        train=train,
        max_length=100,
        source_vocabulary={"kind": "bpe", "size": 90},
        target_vocabulary={"kind": "bytes"},
    )
    corpus = prepare_corpus(config, seed=1)
    assert (corpus.vocabulary("source").kind, corpus.vocabulary("target").kind) == ("bpe", "bytes")
    row = pq.read_table(corpus.files("train")[0]).to_pylist()[5]
    assert corpus.vocabulary("source").decode(row["source"]) == sentences(200)[row["index"]][0]
    assert corpus.vocabulary("target").decode(row["target"]) == sentences(200)[row["index"]][1]


def test_settings_that_no_text_can_meet_are_refused_early(tmp_path: Path) -> None:
    train = write_text(tmp_path, "train", sentences(20))
    fields = {"train": train, "target_vocabulary": {"kind": "word", "size": 50, "language": "xx"}}
    with pytest.raises(VocabularyError, match="'xx'"):
        prepare_corpus(corpus_config(tmp_path / "prepared", **fields), seed=1)
    fields = {"train": train, "source_vocabulary": {"kind": "bpe", "size": 5000}}
    with pytest.raises(VocabularyError, match="5000 pieces"):
        prepare_corpus(corpus_config(tmp_path / "prepared", **fields), seed=1)


def test_a_folder_that_is_no_corpus_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="run `baton prepare CONFIG` first"):
        PreparedCorpus.open(tmp_path)


@pytest.mark.parametrize("damage", ["{", "[]", '{"format_version": 1}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "manifest.json").write_text(damage)
    with pytest.raises(CorpusError, match=r"manifest\.json is damaged .*baton prepare"):
        PreparedCorpus.open(tmp_path)


def test_a_manifest_of_another_version_is_named(prepared: PreparedCorpus, tmp_path: Path) -> None:
    manifest = json.loads(prepared.manifest.model_dump_json())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 9}))
    with pytest.raises(CorpusError, match="format version 9"):
        PreparedCorpus.open(tmp_path)


def test_an_absent_split_is_named(prepared: PreparedCorpus) -> None:
    with pytest.raises(CorpusError, match="no split 'test', only train, valid"):
        prepared.split("test")
