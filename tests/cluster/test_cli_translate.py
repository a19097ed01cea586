"""`baton translate` on a real checkpoint: streams, n-best lists, JSON, input that is no text."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.commands.translate import SENTENCES_AT_ONCE
from cluster.translation.lines import InputError
from model.checkpoint_manifest import CheckpointError
from tests.cluster.noise import noise_checkpoint

FAST = ["--beam-size", "2", "--max-length", "3"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_checkpoint(tmp_path_factory.mktemp("checkpoints"))


def translate(checkpoint: Path, *options: str, text: str | bytes = "") -> Result:
    return CliRunner().invoke(app, ["translate", str(checkpoint), *FAST, *options], input=text)


def test_as_many_lines_come_out_as_go_in(checkpoint: Path) -> None:
    # Python's own idea of a line would also end at U+2028, U+0085 and a form feed.
    text = "one\n\ntwo \u2028 parts\r\nthree\x85\x0cparts\nlast without an end"
    result = translate(checkpoint, text=text)
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 5
    assert result.stdout.split("\n")[1] == ""


def test_no_text_gives_no_translation(checkpoint: Path) -> None:
    result = translate(checkpoint, text="")
    assert (result.exit_code, result.stdout) == (0, "")


def test_n_best_list_has_the_form_of_moses(checkpoint: Path) -> None:
    result = translate(checkpoint, "--n-best", "2", text="one\ntwo\n")
    lines = result.stdout.removesuffix("\n").split("\n")
    parsed = [re.fullmatch(r"(\d+) \|\|\| (.*) \|\|\| (-?\d+\.\d{6})", line) for line in lines]
    assert all(parsed)
    assert [int(m[1]) for m in parsed if m] == [0, 0, 1, 1]
    scores = [float(m[3]) for m in parsed if m]
    assert scores[0] >= scores[1]


def test_numbers_go_on_over_groups(checkpoint: Path) -> None:
    num_sentences = SENTENCES_AT_ONCE + 2
    result = translate(checkpoint, "--n-best", "1", text="a\n" * num_sentences)
    numbers = [int(line.split(" ")[0]) for line in result.stdout.removesuffix("\n").split("\n")]
    assert numbers == list(range(num_sentences))
    assert f"translate: {SENTENCES_AT_ONCE} sentences" in result.stderr


def test_json_holds_texts_and_scores_on_one_line(checkpoint: Path) -> None:
    result = translate(checkpoint, "--json", "--n-best", "2", text="one\ntwo\n")
    (line,) = result.stdout.removesuffix("\n").split("\n")
    fields = json.loads(line)
    assert fields["num_sentences"] == 2
    assert [entry["source"] for entry in fields["translations"]] == ["one", "two"]
    assert [len(entry["translations"]) for entry in fields["translations"]] == [2, 2]


def test_files_are_read_and_written(checkpoint: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    result = translate(checkpoint, "--input", str(source), "--output", str(target), "--json")
    assert json.loads(result.stdout).keys() == {"num_sentences", "num_resumed", "seconds"}
    written = target.read_bytes().decode()
    assert written == translate(checkpoint, text="one\ntwo\n").stdout


def test_byte_that_is_no_text_is_named(checkpoint: Path) -> None:
    result = translate(checkpoint, text=b"good\nb\xe9d\n")
    assert isinstance(result.exception, InputError)
    assert "stdin, line 2, byte 2: not UTF-8" in str(result.exception)


def test_missing_input_and_checkpoint_are_user_errors(checkpoint: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "no.txt")
    assert isinstance(translate(checkpoint, "--input", missing).exception, InputError)
    assert isinstance(
        translate(checkpoint, "--output", f"{missing}/x", text="a").exception, InputError
    )
    assert isinstance(translate(tmp_path / "no").exception, CheckpointError)


@pytest.mark.parametrize("option", ["--workers=2", "--restart"])
def test_streams_have_no_workers_and_nothing_to_restart(checkpoint: Path, option: str) -> None:
    result = translate(checkpoint, option, text="one\n")
    assert isinstance(result.exception, InputError)
    assert "need a file for both" in str(result.exception)
