"""What a user is told about a file or an override that cannot be used."""

import pickle
from pathlib import Path

import pytest

from cluster.config import Config, ConfigError

GOOD = """\
name: tiny
corpus:
  directory: d
  train: {tsv: a.tsv}
  source_vocabulary: {size: 100}
  target_vocabulary: {size: 100}
checkpoint: {directory: runs}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Config.load(path, overrides)
    return list(caught.value.problems)


def test_missing_sections_take_the_papers_values(file: Path) -> None:
    config = Config.load(file)
    assert (config.model.num_layers, config.training.batch_size, config.num_ranks) == (4, 128, 8)
    assert config.corpus.valid is None


def test_every_problem_of_a_file_is_told_with_its_line(file: Path) -> None:
    file.write_text(
        GOOD + "training: {batch_size: 0, learning_rat: 1}\nseed: 1.5\nmodle: {}\n",
        encoding="utf-8",
    )
    assert problems(file) == [
        f"{file}:9: seed is 1.5; it must be a whole number "
        "(Start of everything that is drawn at random)",
        f"{file}:8: training.batch_size is 0; it must be at least 1 "
        "(Sentence pairs of one step; the gradient is divided by this number)",
        f"{file}:8: unknown key training.learning_rat; did you mean training.learning_rate?",
        f"{file}:10: unknown key modle; did you mean model?",
    ]


def test_missing_key_is_named_with_its_meaning(file: Path) -> None:
    file.write_text(GOOD.replace("  directory: d\n", ""), encoding="utf-8")
    assert problems(file) == [
        f"{file}:2: corpus.directory is missing; add it "
        "(Folder that `baton prepare` writes and `baton train` reads)"
    ]


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("trainng.epochs=1", "unknown key trainng; did you mean training?"),
        ("training.epoch=1", "unknown key training.epoch; did you mean training.epochs?"),
        ("batch_size=1", "unknown key batch_size; did you mean"),
        ("training.hidden_size=1", "did you mean model.hidden_size?"),
        ("model.zzz=1", "known keys here: num_layers, hidden_size"),
        ("training.epochs.x=1", "training.epochs has no keys under it"),
        ("training.epochs", "is not of the form section.key=value"),
        ("=1", "is not of the form section.key=value"),
        ("corpus.train.tsv=*.tsv", "quote text that has special characters"),
        ("training.epochs={a: 1, a: 2}", "keep one of them"),
    ],
)
def test_bad_override_is_told_with_a_suggestion(file: Path, override: str, hint: str) -> None:
    (problem,) = problems(file, override)
    assert problem.startswith(f"override {override!r}: ")
    assert hint in problem


def test_overrides_are_yaml_and_the_last_one_wins(file: Path) -> None:
    config = Config.load(
        file,
        [
            "training.learning_rate=1e-3",
            "training.max_steps=5",
            "training.max_steps=null",
            "corpus.valid.tsv=['*.tsv', b]",
            "tracking.uri=http://localhost:5000",
            "cluster.address=",
        ],
    )
    assert config.training.learning_rate == 0.001
    assert config.training.max_steps is None
    assert config.corpus.valid is not None
    assert config.corpus.valid.tsv == ("*.tsv", "b")
    assert config.tracking.uri == "http://localhost:5000"
    assert config.cluster.address is None


def test_wrong_value_of_an_override_is_told_as_such(file: Path) -> None:
    (problem,) = problems(file, "training.batch_size=many")
    assert problem.startswith("override 'training.batch_size=many': training.batch_size is 'many';")


def test_override_mends_the_file(file: Path) -> None:
    file.write_text(GOOD + "training: {batch_size: 0}\n", encoding="utf-8")
    assert Config.load(file, ["training.batch_size=2"]).training.batch_size == 2


def test_problems_of_overrides_and_file_come_together(file: Path) -> None:
    file.write_text(GOOD + "seed: -1\n", encoding="utf-8")
    assert len(problems(file, "a.b=1", "training.epochs=0")) == 3


def test_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "no.yaml"
    assert problems(path) == [f"{path}: no such configuration file; check the path"]


def test_folder_is_no_file(tmp_path: Path) -> None:
    assert problems(tmp_path) == [f"{tmp_path}: cannot be read: Is a directory"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds nothing; a configuration is a mapping of sections"),
        (b"# only this\n", "holds nothing"),
        (b"- a\n- b\n", "holds ['a', 'b']"),
        (b"name: a\nx: \xff\n", ":2: byte 11 is not UTF-8"),
        (b"name: a\0\n", ":1: character U+0000 is not allowed"),
        (b"name: [a\n", "not YAML"),
        (b"a: 1\n---\nb: 2\n", "not YAML"),
        (b"x" * 300_000, "300000 bytes; a configuration has at most 256000"),
    ],
)
def test_content_that_is_no_configuration(file: Path, content: bytes, expected: str) -> None:
    file.write_bytes(content)
    (problem,) = problems(file)
    assert expected in problem


def test_byte_order_mark_and_carriage_returns_do_no_harm(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert Config.load(file).name == "tiny"


def test_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("one", "two")))
    assert str(error) == "one\ntwo"
    assert error.problems == ("one", "two")
