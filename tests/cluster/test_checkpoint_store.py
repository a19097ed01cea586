"""Which checkpoint a run goes on from, what does not fit together, what a save leaves behind."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from cluster.checkpoint_store import CheckpointStore, ResumeError
from cluster.config import Config
from cluster.corpus.prepared import PreparedCorpus
from model.byte_vocabulary import ByteVocabulary
from model.checkpoint import Checkpoint, CheckpointError, committed
from model.checkpoint_writer import PartRecord, part_name, write_part
from model.data_order import Cursor
from model.network import ModelConfig
from model.seq2seq import Seq2Seq

STEPS_PER_EPOCH = 4
MODEL = ModelConfig(258, 258, num_layers=1, hidden_size=3, embedding_size=2)


@dataclass
class OneRank:
    """A single device that writes and loads as ranks do."""

    model: Seq2Seq = field(default_factory=lambda: Seq2Seq(MODEL))
    loaded: list[tuple[Path, int]] = field(default_factory=list)

    def load(self, checkpoint: Path, step: int) -> None:
        self.loaded.append((checkpoint, step))
        self.model.load(Checkpoint.open(checkpoint).tensors())

    def write_parts(self, staging: Path) -> list[PartRecord]:
        pieces = [(p.rows, p.value) for p in self.model.parameters().values()]
        return [write_part(staging, part_name(0, 1), pieces)]


def config_of(directory: Path, **overrides: Any) -> Config:
    fields: dict[str, Any] = {
        "name": "test",
        "corpus": {
            "directory": "unused",
            "train": {"tsv": "unused.tsv"},
            "source_vocabulary": {"kind": "bytes"},
            "target_vocabulary": {"kind": "bytes"},
        },
        "model": {"num_layers": 1, "hidden_size": 3, "embedding_size": 2},
        "training": {"precision": "float32"},
        "pipeline": {"placement": "single"},
        "checkpoint": {"directory": str(directory / "checkpoints")},
    }
    for dotted, value in overrides.items():
        section, _, key = dotted.partition("__")
        if key:
            fields.setdefault(section, {})[key] = value
        else:
            fields[section] = value
    return Config.from_dict(fields)


def store_of(
    directory: Path,
    *,
    fingerprint: str = "f" * 64,
    model: ModelConfig = MODEL,
    steps_per_epoch: int = STEPS_PER_EPOCH,
    **overrides: Any,
) -> CheckpointStore:
    corpus = SimpleNamespace(
        fingerprint=fingerprint, vocabulary_bytes=lambda side: ByteVocabulary().to_bytes()
    )
    config = config_of(directory, **overrides)
    return CheckpointStore(config, cast(PreparedCorpus, corpus), model, steps_per_epoch)


def saved_run(directory: Path, *steps: int, run_id: str = "run1") -> OneRank:
    store, rank = store_of(directory), OneRank()
    store.begin(run_id)
    for step in steps:
        store.save(rank, step, num_pairs=10 * step, num_words=100 * step)
    return rank


def test_a_saved_state_is_restored_with_its_place_in_the_data(tmp_path: Path) -> None:
    rank = saved_run(tmp_path, 4, 6)
    store = store_of(tmp_path, checkpoint__resume="auto")
    other = OneRank(Seq2Seq(MODEL, seed=9))
    assert store.restore(other) == (6, 60, 600)
    assert other.loaded == [(tmp_path.absolute() / "checkpoints" / "step-00000006", 6)]
    for name, parameter in other.model.parameters().items():
        assert torch.equal(parameter.value, rank.model.parameters()[name].value)
    assert store.resumed is not None
    assert store.resumed.info.cursor == Cursor(1, 2)
    assert store.resumed.file("target_vocabulary.json") == ByteVocabulary().to_bytes()
    assert Config.load(store.resumed.path / "config.yaml") == config_of(tmp_path)


def test_a_new_run_restores_nothing(tmp_path: Path) -> None:
    for resume in (None, "auto"):
        store, rank = store_of(tmp_path, checkpoint__resume=resume), OneRank()
        assert store.restore(rank) == (0, 0, 0)
        assert rank.loaded == []
        assert (store.run_id, store.attempt) == (None, 1)


def test_going_on_keeps_the_run_and_counts_its_lives(tmp_path: Path) -> None:
    saved_run(tmp_path, 4)
    store = store_of(tmp_path, checkpoint__resume="auto")
    assert (store.run_id, store.attempt) == ("run1", 2)
    store.begin("run1")
    assert store.attempt == 2


def test_a_copy_from_elsewhere_begins_a_new_run(tmp_path: Path) -> None:
    saved_run(tmp_path / "a", 4)
    path = tmp_path / "a" / "checkpoints" / "step-00000004"
    store = store_of(tmp_path / "b", checkpoint__resume=str(path))
    assert (store.run_id, store.attempt) == (None, 1)
    assert store.restore(OneRank()) == (4, 40, 400)


def test_going_back_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    saved_run(tmp_path, 4, 8)
    older = tmp_path / "checkpoints" / "step-00000004"
    with pytest.raises(ResumeError, match="older than step-00000008 .* checkpoint.resume=auto"):
        store_of(tmp_path, checkpoint__resume=str(older))
    assert store_of(tmp_path / "b", checkpoint__resume=str(older)).position == (4, 40, 400)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = store_of(tmp_path, checkpoint__keep=2)
    store.begin("run1")
    for step in (1, 2, 3):
        store.save(OneRank(), step, 0, 0)
    names = [path.name for path in committed(store.directory)]
    assert names == ["step-00000003", "step-00000002"]
    assert not list(store.directory.glob(".step*"))


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path: Path) -> None:
    saved_run(tmp_path, 4)
    with pytest.raises(
        ResumeError, match="from an earlier run; go on with it by checkpoint.resume"
    ):
        store_of(tmp_path)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"fingerprint": "0" * 64}, "the prepared corpus was ffffffffffff and is now 000000000000"),
        ({"model": ModelConfig(258, 258, 2, 3, 2)}, "the network's sizes"),
        ({"training__batch_size": 7}, "training.batch_size was 128 and is now 7"),
        ({"seed": 5}, "seed was 1 and is now 5"),
        ({"steps_per_epoch": 3}, "the position in the data"),
        ({"corpus__shuffle_window": 2}, "corpus.shuffle_window was 16 and is now 2"),
    ],
)
def test_settings_that_decide_the_next_batch_must_not_change(
    tmp_path: Path, change: dict[str, Any], fact: str
) -> None:
    saved_run(tmp_path, 4)
    with pytest.raises(ResumeError, match=fact) as caught:
        store_of(tmp_path, checkpoint__resume="auto", **change)
    assert "\n" not in str(caught.value)


def test_other_settings_may_change(tmp_path: Path) -> None:
    saved_run(tmp_path, 4)
    store = store_of(
        tmp_path, checkpoint__resume="auto", training__learning_rate=0.1, training__epochs=99.0
    )
    assert store.position == (4, 40, 400)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not there"):
        store_of(tmp_path, checkpoint__resume=str(tmp_path / "nowhere"))
