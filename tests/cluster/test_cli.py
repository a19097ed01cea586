"""The command line from outside: help, exit codes, what stands on which stream."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster import cli
from cluster.commands.options import load_config
from cluster.config import ConfigError
from cluster.interruption import Interrupted
from model.errors import UserError

ROOT = Path(__file__).parents[2]
COMMANDS = ["fetch", "prepare", "train", "evaluate", "translate", "submit", "config show"]


def baton(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = CliRunner().invoke(cli.app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert f"baton {command}" in result.output
    assert "Example:" in result.output
    assert "--json" in result.output


def test_help_lists_the_commands_and_the_usual_order() -> None:
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command.split()[0] in result.output
    assert "baton fetch bible data/quickstart" in result.output


def test_help_and_configuration_do_without_heavy_libraries() -> None:
    code = (
        "import sys; from cluster import cli; from cluster.config import Config; "
        "Config.load('configs/paper.yaml'); "
        "sys.exit(bool({'torch', 'ray', 'mlflow', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_show_config_gives_the_papers_weights_as_json() -> None:
    result = baton("config", "show", "configs/paper.yaml", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    shown = json.loads(result.stdout.splitlines()[-1])
    assert shown["num_parameters"] == 384_000_000
    assert shown["num_ranks"] == 8
    assert shown["training"]["learning_rate"] == 0.7


def test_show_config_prints_a_configuration_that_can_be_used(tmp_path: Path) -> None:
    overrides = ["training.learning_rate=1e-3", "name=again"]
    result = CliRunner().invoke(
        cli.app, ["config", "show", str(ROOT / "configs/numbers.yaml"), *overrides]
    )
    assert result.exit_code == 0
    assert "# num_ranks: 3" in result.stdout
    copy = tmp_path / "copy.yaml"
    copy.write_text(result.stdout, encoding="utf-8")
    assert load_config(copy, None) == load_config(ROOT / "configs/numbers.yaml", overrides)


@pytest.mark.parametrize("command", ["prepare", "train", "config show"])
def test_user_error_is_told_in_lines_without_traceback(command: str) -> None:
    result = baton(*command.split(), "configs/paper.yaml", "modle.x=1", "seed=-1", "--json")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: override 'modle.x=1': unknown key modle; did you mean model?",
        "error: override 'seed=-1': seed is -1; it must be at least 0 "
        "(Start of everything that is drawn at random)",
    ]


def test_missing_file_is_one_line() -> None:
    result = baton("train", "configs/nothing.yaml")
    assert result.returncode == 1
    assert result.stderr == (
        "error: configs/nothing.yaml: no such configuration file; check the path\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["train"],
        ["trian", "configs/paper.yaml"],
        ["train", "configs/paper.yaml", "--no-such-option"],
        ["submit", "configs/paper.yaml"],
        ["fetch", "wikipedia", "data"],
        ["fetch", "bible", "data", "--limit", "5000"],
        ["translate", "checkpoint", "--beam-size", "0"],
        ["translate", "checkpoint", "--beam-size", "1000000"],
        ["translate", "checkpoint", "--max-length", "1000000000"],
        ["evaluate", "checkpoint", "--device", "tpu"],
        ["evaluate", "checkpoint", "--split", "train"],
    ],
)
def test_wrong_usage_exits_with_two(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (UserError("a fact; a remedy"), 1, ["error: a fact; a remedy"]),
        (ConfigError("one", "two"), 1, ["error: one", "error: two"]),
        (Interrupted("stopped by SIGINT"), 130, ["error: stopped by SIGINT"]),
    ],
)
def test_main_words_user_errors(
    error: UserError,
    code: int,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == code
    assert capsys.readouterr().err.splitlines() == lines


def test_error_out_of_an_actor_is_shown_without_rays_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class RemoteUserError(UserError):
        cause = UserError("the fact")

    def fail() -> None:
        raise RemoteUserError("Traceback ...\nof an actor")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == "error: the fact\n"


def test_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_interrupt_exits_with_130(tmp_path: Path) -> None:
    pipe = tmp_path / "config.yaml"
    os.mkfifo(pipe)  # reading it waits for ever, as long work would
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "config", "show", str(pipe)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    writer = None
    for _ in range(600):
        try:
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)  # fails until it is being read
            break
        except OSError:
            time.sleep(0.1)
    assert writer is not None
    # A signal between Python's last look at its flag and the read that blocks would go unheard.
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    os.close(writer)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_options_have_the_last_word_and_are_plain_text() -> None:
    config = load_config(
        ROOT / "configs/paper.yaml",
        ["cluster.address=auto"],
        {"cluster.address": "10.0.0.1:6379", "checkpoint.resume": "null"},
    )
    assert config.cluster.address == "10.0.0.1:6379"
    assert config.checkpoint.resume == "null"
