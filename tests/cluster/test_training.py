"""Whole trainings with real actors, from configs/paper.yaml at a small size, into real MLflow."""

import json
import os
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from cluster.checkpoint_store import ResumeError
from cluster.config import Config
from cluster.corpus.files import CorpusError
from cluster.failure_policy import FailureKind, WorkerFailure
from cluster.training import TrainingResult, train
from model.checkpoint import Checkpoint, CheckpointError
from model.processor import automatic_precision

PAPER = Path(__file__).parents[2] / "configs" / "paper.yaml"
WORDS = [f"w{number}" for number in range(30)]
SINGLE = ("pipeline.placement=single",)


class Report:
    """Keeps what the command line would show, and may act on it."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.steps: list[tuple[int, int | None]] = []
        self.trained = threading.Event()

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        if phase == "training":
            self.steps.append((done, total))
            if done >= 2:
                self.trained.set()

    def message(self, text: str) -> None:
        self.messages.append(text)


def write_text(folder: Path, split: str, num_pairs: int, seed: int) -> None:
    """Write pairs whose target is the source in capitals, so that there is something to learn."""
    draw = random.Random(seed)
    source = [" ".join(draw.choices(WORDS, k=draw.randint(1, 8))) for _ in range(num_pairs)]
    (folder / f"{split}.en").write_text("\n".join(source) + "\n", encoding="utf-8")
    (folder / f"{split}.fr").write_text("\n".join(source).upper() + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def prepared(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny prepared corpus and the text that it was made from."""
    from cluster.corpus.preparation import prepare_corpus

    folder = tmp_path_factory.mktemp("corpus")
    write_text(folder, "train", 60, seed=1)
    write_text(folder, "valid", 12, seed=2)
    prepare_corpus(config_of(folder, folder).corpus, seed=1)
    return folder


def config_of(corpus: Path, run: Path, overrides: Sequence[str] = ()) -> Config:
    """Load the paper's configuration, made small, over the corpus of a folder."""
    files = {
        f"corpus.{split}": f"{{source: {corpus}/{split}.en, target: {corpus}/{split}.fr}}"
        for split in ("train", "valid")
    }
    settings = {
        "corpus.directory": f"{corpus}/prepared",
        **files,
        "corpus.test": "null",
        "corpus.row_group_size": 16,
        "corpus.shuffle_window": 2,
        "corpus.source_vocabulary.size": 32,
        "corpus.target_vocabulary.size": 32,
        "model.hidden_size": 6,
        "model.embedding_size": 6,
        "training.batch_size": 8,
        "training.epochs": 1.5,
        "training.validate_every_steps": "null",
        "training.log_every_steps": 2,
        "pipeline.time_chunks": 2,
        "cluster.device": "cpu",
        "cluster.cpus_per_rank": 0.1,
        "cluster.timeout_s": 30.0,
        "checkpoint.directory": f"{run}/checkpoints",
        "checkpoint.every_steps": 5,
        "evaluation.beam_size": 2,
        "evaluation.max_length": 8,
        "evaluation.num_samples": 3,
        "tracking.uri": f"sqlite:///{run}/mlflow.db",
    }
    given = [f"{key}={value}" for key, value in settings.items()]
    return Config.load(PAPER, [*given, *overrides])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One tracking database for the module: making one takes seconds."""
    folder = tmp_path_factory.mktemp("tracking")
    yield f"tracking.uri=sqlite:///{folder}/mlflow.db"


def run_of(result: TrainingResult) -> tuple[str, dict[str, float], dict[str, str], dict[str, str]]:
    """Read a run back from MLflow: status, metrics, parameters, tags."""
    from mlflow.tracking import MlflowClient

    run = MlflowClient(tracking_uri=result.tracking_uri).get_run(result.run_id)
    return run.info.status, run.data.metrics, run.data.params, run.data.tags


def artifacts_of(result: TrainingResult) -> set[str]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=result.tracking_uri)
    return {item.path for item in client.list_artifacts(result.run_id)}


def tensors_of(result: TrainingResult) -> dict[str, torch.Tensor]:
    assert result.checkpoint is not None
    return Checkpoint.open(result.checkpoint).tensors()


@pytest.mark.slow
def test_the_papers_layout_trains_on_8_actors_and_its_run_is_finished(
    prepared: Path, tmp_path: Path, store: str
) -> None:
    report = Report()
    config = config_of(prepared, tmp_path, [store])
    assert config.num_ranks == 8
    result = train(config, report=report)
    total = result.step
    assert result.status == "FINISHED"
    assert report.steps[-1] == (total, total)
    assert result.epoch == pytest.approx(1.5, abs=0.1)
    status, metrics, params, tags = run_of(result)
    assert status == "FINISHED"
    assert {
        "train/loss",
        "train/perplexity",
        "train/grad_norm",
        "train/learning_rate",
        "train/epoch",
        "valid/loss",
        "valid/perplexity",
        "valid/bleu",
        "valid/chrf",
        "throughput/words_per_second",
        "throughput/step_seconds",
        "data/padding_fraction",
        "data/wait_seconds",
        "pipeline/bubble_fraction",
        "pipeline/bytes_sent",
        *(f"pipeline/rank{rank}_busy" for rank in range(8)),
        *(f"memory/rank{rank}_peak_bytes" for rank in range(8)),
    } <= set(metrics)
    assert metrics["valid/perplexity"] == pytest.approx(result.metrics["valid/perplexity"])
    assert 0 <= metrics["pipeline/bubble_fraction"] < 1
    assert params["num_ranks"] == "8"
    assert params["pipeline.softmax_ranks"] == "4"
    assert tags["baton.checkpoint"] == str(result.checkpoint)
    assert {"config.yaml", "vocabularies", "translations.json", "checkpoint.txt"} <= artifacts_of(
        result
    )


def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(
    prepared: Path, tmp_path: Path, store: str
) -> None:
    unbroken = train(config_of(prepared, tmp_path / "a", [*SINGLE, store]), report=Report())
    again = config_of(prepared, tmp_path / "b", [*SINGLE, store, "training.max_steps=7"])
    first = train(again, report=Report())
    assert first.step == 7 < unbroken.step
    resumed = train(
        config_of(prepared, tmp_path / "b", [*SINGLE, store, "checkpoint.resume=auto"]),
        report=Report(),
    )
    assert resumed.run_id == first.run_id != unbroken.run_id
    assert resumed.step == unbroken.step
    expected = tensors_of(unbroken)
    for name, value in tensors_of(resumed).items():
        assert torch.equal(value, expected[name]), name
    assert any(not torch.equal(v, expected[n]) for n, v in tensors_of(first).items())
    assert resumed.metrics["valid/loss"] == unbroken.metrics["valid/loss"]
    assert run_of(resumed)[0] == "FINISHED"
    assert "timeline.html" not in artifacts_of(resumed)


def test_replicas_train_as_one_does_and_a_run_can_go_on_with_others(
    prepared: Path, tmp_path: Path, store: str
) -> None:
    def run(folder: str, *overrides: str) -> TrainingResult:
        settings = [*SINGLE, store, "training.precision=float64", *overrides]
        return train(config_of(prepared, tmp_path / folder, settings), report=Report())

    layout = "pipeline.placement=paper", "pipeline.layer_ranks=1", "pipeline.softmax_ranks=1"
    timeline = "pipeline.timeline=true", "pipeline.timeline_steps=1"
    alone = run("a")
    replicas = "pipeline.replicas=2"
    first = run("b", replicas, *layout, *timeline, "training.max_steps=6")
    resumed = run("b", "pipeline.replicas=3", "checkpoint.resume=auto")
    assert resumed.step == alone.step
    expected = tensors_of(alone)
    for name, value in tensors_of(resumed).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10)
    assert resumed.metrics["valid/loss"] == pytest.approx(alone.metrics["valid/loss"], rel=1e-10)
    _, metrics, params, tags = run_of(first)
    assert params["pipeline.replicas"] == "2"
    assert params["num_replicas"] == "2"
    assert "2 replicas of 2 ranks (placement paper)" in tags["mlflow.note.content"]
    assert {f"pipeline/rank{worker}_busy" for worker in range(4)} <= set(metrics)
    trace = json.loads((tmp_path / "b/timeline/timeline.trace.json").read_text(encoding="utf-8"))
    operations = [event for event in trace["traceEvents"] if "block" in event["args"]]
    assert {event["tid"] for event in operations} == {0, 1}, "only the first replica is drawn"


@pytest.mark.slow
def test_a_killed_rank_fails_the_run_in_one_line(
    prepared: Path, tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.worker_group import WorkerGroup

    pids: list[int] = []
    start = WorkerGroup.start

    def start_and_note(group: WorkerGroup) -> None:
        start(group)
        pids.extend(status.pid for status in group.statuses)

    monkeypatch.setattr(WorkerGroup, "start", start_and_note)
    report = Report()

    def kill_when_trained() -> None:
        report.trained.wait(120)
        os.kill(pids[1], signal.SIGKILL)

    killer = threading.Thread(target=kill_when_trained)
    killer.start()
    layout = ["model.num_layers=2", "pipeline.layer_ranks=2", "pipeline.softmax_ranks=1"]
    config = config_of(
        prepared, tmp_path, [store, *layout, "training.epochs=2000", "tracking.run_name=victim"]
    )
    with pytest.raises(WorkerFailure, match=r"^rank 1 on node \S+ failed at step \d+") as caught:
        train(config, report=report)
    killer.join()
    assert caught.value.failure.kind is FailureKind.DIED
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=config.tracking.uri)
    experiment = client.get_experiment_by_name("paper")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id], "attributes.run_name = 'victim'")
    assert run.info.status == "FAILED"
    assert run.data.tags["baton.error"] == str(caught.value)


def test_a_few_steps_are_drawn_beside_the_checkpoints_and_in_mlflow(
    prepared: Path, tmp_path: Path, store: str
) -> None:
    report = Report()
    layout = ["model.num_layers=2", "pipeline.layer_ranks=1", "pipeline.softmax_ranks=1"]
    timeline = ["pipeline.timeline=true", "pipeline.timeline_steps=2", "training.max_steps=6"]
    result = train(config_of(prepared, tmp_path, [store, *layout, *timeline]), report=report)
    assert {"timeline.html", "timeline.trace.json"} <= artifacts_of(result)
    folder = tmp_path / "timeline"
    trace = json.loads((folder / "timeline.trace.json").read_text(encoding="utf-8"))
    operations = [event for event in trace["traceEvents"] if "block" in event["args"]]
    # A run of six steps has four to warm up.
    assert {event["args"]["step"] for event in operations} == {5, 6}
    assert {event["tid"] for event in operations} == {0, 1}
    assert len(operations) == trace["otherData"]["operations"]
    assert (folder / "timeline.html").stat().st_size > 10_000
    assert f"timeline of a few steps: {folder / 'timeline.html'}" in report.messages
    _check_what_is_told_of_the_machine(result, report)


def _check_what_is_told_of_the_machine(result: TrainingResult, report: Report) -> None:
    """Precision, threads and memory of the ranks: shown, in MLflow, and with the checkpoint."""
    _, metrics, params, tags = run_of(result)
    precision = automatic_precision()
    assert f"training.precision=auto: {precision}" in report.messages
    assert params["training.precision"] == precision
    assert "a rank" in tags["baton.machine"]
    assert f"{precision} on {tags['baton.machine']}" in report.messages
    assert metrics["memory/rank1_peak_bytes"] > 100e6
    assert [line.split()[1] for line in result.memory_lines[-2:]] == ["0", "1"]
    assert result.checkpoint is not None
    checkpoint = Checkpoint.open(result.checkpoint)
    assert checkpoint.info.precision == precision
    assert json.loads(checkpoint.file("machine.json"))["torch"] == [torch.__version__]


def test_emulated_replicas_run_to_the_end_and_keep_nothing(
    prepared: Path, tmp_path: Path, store: str
) -> None:
    report = Report()
    overrides = ["cluster.device=emulated", "pipeline.replicas=2", "training.max_steps=3"]
    result = train(config_of(prepared, tmp_path, [store, *SINGLE, *overrides]), report=report)
    assert (result.status, result.step, result.checkpoint) == ("FINISHED", 3, None)
    assert "emulated devices learn nothing: no checkpoint, no scores" in report.messages
    _, metrics, params, tags = run_of(result)
    assert params["cluster.device"] == "emulated"
    assert tags["mlflow.note.content"].startswith("emulated")
    assert {"pipeline/rank0_busy", "pipeline/rank1_busy"} <= set(metrics)


def test_sigterm_ends_the_run_as_killed(prepared: Path, tmp_path: Path, store: str) -> None:
    report = Report()

    def terminate_when_trained() -> None:
        report.trained.wait(120)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=terminate_when_trained)
    stopper.start()
    config = config_of(prepared, tmp_path, [*SINGLE, store, "training.epochs=5000"])
    result = train(config, report=report)
    stopper.join()
    assert result.status == "KILLED"
    assert result.step >= 2
    status, _, _, tags = run_of(result)
    assert status == "KILLED"
    assert tags["baton.error"] == "stopped by SIGTERM"
    if result.checkpoint is not None:
        Checkpoint.open(result.checkpoint)


def test_mistakes_are_told_before_anything_starts(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="run `baton prepare CONFIG` first"):
        train(config_of(tmp_path, tmp_path), report=Report())
    missing = f"checkpoint.resume={tmp_path}/nowhere"
    with pytest.raises(CheckpointError, match="nowhere is not there"):
        train(config_of(prepared, tmp_path, [missing]), report=Report())
    assert not (tmp_path / "mlflow.db").exists()


def test_a_new_run_in_a_used_folder_is_refused(prepared: Path, tmp_path: Path, store: str) -> None:
    overrides = [*SINGLE, store, "training.max_steps=1"]
    train(config_of(prepared, tmp_path, overrides), report=Report())
    with pytest.raises(ResumeError, match="checkpoint.resume=auto"):
        train(config_of(prepared, tmp_path, overrides), report=Report())
