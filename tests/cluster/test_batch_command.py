"""`baton batch` shows what a step trains on: the very pairs that the stream gives there."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import Config
from cluster.corpus.preparation import prepare_corpus
from cluster.corpus.prepared import PreparedCorpus
from cluster.ingest.corpus_batches import CorpusBatches
from tests.cluster.corpora import corpus_config, sentences, write_text

NUM_TRAIN = 70


@pytest.fixture(scope="module")
def config_file(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("batch_command")
    # Large enough for every word, so that the text comes back whole.
    vocabulary = {"kind": "word", "size": 200}
    corpus = corpus_config(
        root / "prepared",
        train=write_text(root, "train", sentences(NUM_TRAIN)),
        source_vocabulary=vocabulary,
        target_vocabulary=vocabulary,
    )
    prepare_corpus(corpus, seed=1)
    settings = {
        "name": "tiny",
        "corpus": corpus.model_dump(mode="json"),
        "training": {"batch_size": 16},
        "checkpoint": {"directory": str(root / "checkpoints")},
    }
    config = Config.from_dict(settings)
    path = root / "tiny.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    return path


def shown(config_file: Path, step: int) -> dict[str, object]:
    result = CliRunner().invoke(app, ["batch", str(config_file), "--step", str(step), "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_the_steps_of_an_epoch_hold_every_pair_once_as_text(config_file: Path) -> None:
    config = Config.load(config_file)
    num_steps = CorpusBatches(PreparedCorpus.open(config.corpus.directory), config).steps_per_epoch
    batches = [shown(config_file, step) for step in range(1, num_steps + 1)]

    pairs = [(p["source"], p["target"]) for batch in batches for p in batch["pairs"]]  # type: ignore[attr-defined]
    assert sorted(pairs) == sorted(sentences(NUM_TRAIN))
    assert [batch["batch"] for batch in batches] == list(range(num_steps))
    assert shown(config_file, num_steps + 1)["epoch"] == 1


def test_a_step_shows_what_training_reads_there(config_file: Path) -> None:
    config = Config.load(config_file)
    batches = CorpusBatches(PreparedCorpus.open(config.corpus.directory), config)
    for step, batch in enumerate(batches.training_batches(0, 3), start=1):
        assert batch.num_words == shown(config_file, step)["num_words"]
        assert batches.training_batch(step).source.equal(batch.source)
    batches.close()
