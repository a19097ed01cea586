"""The quickstart's own decisions; that it works is what `make quickstart` shows."""

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.commands.progress import PlainProgress
from cluster.config import Config
from cluster.interruption import Interrupted
from cluster.quickstart import quickstart, with_unused_folder

CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_second_quickstart_leaves_the_first_ones_checkpoints_alone(tmp_path: Path) -> None:
    first = tmp_path / "runs" / "checkpoints"
    override = f"checkpoint.directory={first}"
    config = Config.load(CONFIGS / "quickstart.yaml", [override, "checkpoint.keep=1"])

    assert with_unused_folder(config).checkpoint.directory == first
    first.mkdir(parents=True)
    assert with_unused_folder(config).checkpoint.directory == first.with_name("checkpoints-2")
    first.with_name("checkpoints-2").mkdir()
    third = with_unused_folder(config)

    assert third.checkpoint.directory == first.with_name("checkpoints-3")
    assert (third.checkpoint.keep, third.training) == (1, config.training)


def test_an_interrupted_training_ends_the_quickstart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.load(CONFIGS / "quickstart.yaml", [f"checkpoint.directory={tmp_path / 'c'}"])
    killed = SimpleNamespace(status="KILLED", step=7, checkpoint=None)
    monkeypatch.setattr("cluster.corpus.bible.fetch_bible", lambda *_, **__: None)
    monkeypatch.setattr("cluster.corpus.preparation.prepare_corpus", lambda *_, **__: None)
    monkeypatch.setattr("cluster.resources.connect", lambda *_, **__: nullcontext())
    monkeypatch.setattr("cluster.training.train", lambda *_, **__: killed)

    with pytest.raises(Interrupted, match="after 7 steps"):
        quickstart(config, tmp_path, report=PlainProgress(sys.stderr))
