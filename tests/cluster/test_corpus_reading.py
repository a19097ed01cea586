"""Input files: which are found, how lines are told apart, and what is said of broken ones."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config.corpus import CorpusFiles
from cluster.corpus.files import CorpusError, InputShard, find_shards
from cluster.corpus.pair_filter import EMPTY, KEPT, RATIO, TOO_LONG, PairFilter
from cluster.corpus.reading import BLOCK_PAIRS, read_blocks, read_lines


def shards_of(**files: object) -> list[InputShard]:
    given = CorpusFiles.model_validate(files)
    return find_shards(given, source_column="en", target_column="fr")


def pairs_of(shards: list[InputShard]) -> list[tuple[str, str]]:
    blocks = [block for shard in shards for block in read_blocks(shard)]
    return [pair for source, target in blocks for pair in zip(source, target, strict=True)]


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def test_only_line_feeds_end_lines(tmp_path: Path) -> None:
    text = "\ufeffone\r\ntwo\u2028still two\u0085and two\x0b\x0c\x1c\n\nwith\rin\0side\nlast"
    lines = list(read_lines(write(tmp_path / "a", text.encode())))
    assert lines == [
        "one",
        "two\u2028still two\u0085and two\x0b\x0c\x1c",
        "",
        "with\rin\0side",
        "last",
    ]


def test_gzip_is_told_by_its_contents(tmp_path: Path) -> None:
    path = write(tmp_path / "plain.txt", gzip.compress(b"one\ntwo\n"))
    assert list(read_lines(path)) == ["one", "two"]


def test_a_cut_gzip_file_is_named(tmp_path: Path) -> None:
    data = gzip.compress(bytes(range(32, 127)) * 1000)
    path = write(tmp_path / "a.gz", data[: len(data) // 2])
    with pytest.raises(CorpusError, match=r"a\.gz cannot be read to its end"):
        list(read_lines(path))


def test_invalid_utf8_is_placed_by_file_line_and_byte(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a", "été\nun caf\xe9\n".encode("latin-1").replace(b"\xe9t\xe9", b"abc")
    )
    with pytest.raises(CorpusError, match=r"/a line 2 .* byte 7 of the line \(byte 10 .*0xe9\)"):
        list(read_lines(path))


def test_sides_of_different_length_give_both_counts(tmp_path: Path) -> None:
    longer = BLOCK_PAIRS + 7
    source = write(tmp_path / "s", b"x\n" * longer)
    target = write(tmp_path / "t", b"y\n" * 3)
    for sides in ((source, target), (target, source)):
        with pytest.raises(CorpusError) as raised:
            pairs_of(shards_of(source=sides[0], target=sides[1]))
        assert f"{source} has {longer}" in str(raised.value)
        assert f"{target} has 3" in str(raised.value)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a", b"")
    with pytest.raises(CorpusError, match="is empty"):
        shards_of(tsv=path)
    with pytest.raises(CorpusError, match="is empty"):
        list(read_lines(write(tmp_path / "b", gzip.compress(b""))))


def test_a_missing_file_and_an_idle_pattern_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"there is no file .*/nowhere"):
        shards_of(tsv=str(tmp_path / "nowhere"))
    with pytest.raises(CorpusError, match=r"no file matches .*/\*\.tsv"):
        shards_of(tsv=str(tmp_path / "*.tsv"))
    with pytest.raises(CorpusError, match="no folder"):
        shards_of(folder=str(tmp_path / "nowhere"))
    with pytest.raises(CorpusError, match="holds no shards"):
        shards_of(folder=str(tmp_path))


def test_patterns_pair_up_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path / f"{name}.en", f"{name} en\n".encode())
        write(tmp_path / f"{name}.fr", f"{name} fr\n".encode())
    found = shards_of(source=str(tmp_path / "*.en"), target=str(tmp_path / "*.fr"))
    assert pairs_of(found) == [("a en", "a fr"), ("b en", "b fr")]
    with pytest.raises(CorpusError, match="2 source and 1 target"):
        shards_of(source=str(tmp_path / "*.en"), target=str(tmp_path / "a.*r"))


def test_tsv_takes_the_first_two_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", b"one\tun\ntwo\tdeux\t0.5\r\n\n")
    assert pairs_of(shards_of(tsv=path)) == [("one", "un"), ("two", "deux"), ("", "")]
    broken = write(tmp_path / "b.tsv", b"one\tun\nno tab\n")
    with pytest.raises(CorpusError, match=r"b\.tsv line 2 has no tab"):
        pairs_of(shards_of(tsv=broken))


def test_parquet_takes_the_configured_columns(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"fr": ["un", None], "other": [1, 2], "en": ["one", "two"]}), path)
    assert pairs_of(shards_of(parquet=path)) == [("one", "un"), ("two", "")]


@pytest.mark.parametrize(
    ("columns", "fact"),
    [
        ({"en": ["one"]}, r"has no column 'fr'; its columns are en"),
        ({"en": ["one"], "fr": [1]}, "column 'fr' has type int64"),
        ({"en": pa.array([], pa.string()), "fr": pa.array([], pa.string())}, "is empty"),
    ],
)
def test_parquet_of_another_shape_is_refused(
    tmp_path: Path, columns: dict[str, object], fact: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=fact):
        pairs_of(shards_of(parquet=str(tmp_path / "a.parquet")))


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", b"something else")
    with pytest.raises(CorpusError, match="cannot be read as Parquet"):
        pairs_of(shards_of(parquet=path))


def test_a_folder_mixes_shards_of_all_forms(tmp_path: Path) -> None:
    pq.write_table(pa.table({"en": ["one"], "fr": ["un"]}), tmp_path / "1.parquet")
    write(tmp_path / "2.tsv", b"two\tdeux\n")
    write(tmp_path / "3.en.gz", gzip.compress(b"three\n"))
    write(tmp_path / "3.fr", b"trois\n")
    write(tmp_path / "README", b"not a shard\n")
    found = shards_of(folder=str(tmp_path))
    assert pairs_of(found) == [("one", "un"), ("two", "deux"), ("three", "trois")]
    write(tmp_path / "4.en", b"alone\n")
    with pytest.raises(CorpusError, match=r"4\.en has 0 files for its target side"):
        shards_of(folder=str(tmp_path))
    (tmp_path / "4.en").rename(tmp_path / "4.fr.txt")
    with pytest.raises(CorpusError, match=r"4\.fr\.txt has no file for its source side"):
        shards_of(folder=str(tmp_path))


def test_the_filter_gives_the_first_reason() -> None:
    bounds = PairFilter(max_length=6, max_length_ratio=2.0)
    assert bounds.judge_ids([1] * 3, [1] * 6) == KEPT
    assert bounds.judge_ids([], [1] * 9) == EMPTY
    assert bounds.judge_ids([1] * 7, [1] * 6) == TOO_LONG
    assert bounds.judge_ids([1] * 5, [1] * 2) == RATIO
    assert PairFilter().judge_ids([1], [1] * 1000) == KEPT


def test_text_alone_is_judged_before_it_is_encoded() -> None:
    bounds = PairFilter(max_length=3)
    assert bounds.judge_text(" \t\u2003", "a") == EMPTY
    assert bounds.judge_text("a b c", "a  b\u2028c ") == KEPT
    assert bounds.judge_text("a b c d", "a") == TOO_LONG
    assert bounds.judge_text("word " * 1_000_000, "a") == TOO_LONG
    assert PairFilter().judge_text("a b c d", "a") == KEPT
