"""Precision `auto` is replaced once: by the device, or by the checkpoint of a resumed run."""

from pathlib import Path

import pytest

import cluster.precision_choice as precision_choice
from cluster.precision_choice import for_training, precision_of, with_precision
from model.checkpoint import CheckpointError
from model.network import ModelConfig
from pipeline.costs.arithmetic import arithmetic_costs
from pipeline.costs.file import save_costs
from tests.cluster.groups import oracle, save
from tests.cluster.test_checkpoint_store import config_of


@pytest.fixture(autouse=True)
def fast_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_choice, "automatic_precision", lambda device: "bfloat16")


def test_auto_is_what_the_device_has_fast(tmp_path: Path) -> None:
    config = config_of(tmp_path, training__precision="auto")
    assert with_precision(config).training.precision == "bfloat16"
    emulated = config_of(tmp_path, training__precision="auto", cluster__device="emulated")
    assert precision_of(emulated) == "float32"


def test_what_is_given_stays(tmp_path: Path) -> None:
    config = config_of(tmp_path, training__precision="float64")
    assert with_precision(config, "float32") is config
    assert for_training(config) is config


def test_a_resumed_run_keeps_the_precision_of_its_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    path = save(oracle(), folder)
    for resume in ("auto", str(path)):
        config = config_of(tmp_path, training__precision="auto", checkpoint__resume=resume)
        assert for_training(config).training.precision == "float64"
    given = config_of(tmp_path, training__precision="float32", checkpoint__resume="auto")
    assert for_training(given).training.precision == "float32"


def test_a_run_that_is_planned_from_measured_costs_has_their_precision(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    save_costs(path, arithmetic_costs(ModelConfig(9, 9, 1, 3, 2), precision="float32"))
    config = config_of(tmp_path, training__precision="auto", pipeline__costs=str(path))
    assert for_training(config).training.precision == "float32"


def test_without_a_checkpoint_the_device_decides(tmp_path: Path) -> None:
    config = config_of(tmp_path, training__precision="auto", checkpoint__resume="auto")
    assert for_training(config).training.precision == "bfloat16"
    missing = config_of(
        tmp_path, training__precision="auto", checkpoint__resume=str(tmp_path / "none")
    )
    with pytest.raises(CheckpointError, match="is not there"):
        for_training(missing)
