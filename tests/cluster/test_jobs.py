"""A job takes along what it needs, runs on a cluster of several nodes, and says how it ended."""

import asyncio
import io
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from ray.job_submission import JobStatus

from cluster import job_package, jobs
from cluster.config import Config
from cluster.config.file import ConfigError
from cluster.job_package import LAUNCHER, PackageError, corpus_travels, stage_package
from cluster.jobs import JobError, JobResult, submit
from model.checkpoint import Checkpoint
from model.translator import load_model
from tests.cluster.corpora import sentences, write_text

if TYPE_CHECKING:
    from tests.cluster.conftest import MultiNodeCluster

CONFIG = """\
name: tiny
corpus:
  directory: data/prepared
  train: {source: a.en, target: a.fr}
  source_vocabulary: {kind: word, size: 100}
  target_vocabulary: {kind: word, size: 100}
checkpoint: {directory: runs/tiny/checkpoints}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A working directory with a configuration, a small prepared corpus, and much else."""
    files = {
        "configs/tiny.yaml": CONFIG,
        "data/prepared/manifest.json": "{}",
        "data/raw.txt": "raw",
        "notes/plan.txt": "plan",
        "notes/private/key.txt": "secret",
        "runs/tiny/metrics.jsonl": "",
        "mlflow.db": "",
        ".venv/bin/python": "",
        ".gitignore": "/data/\n/runs/\nignored.txt\n",
        ".rayignore": "# not for the cluster\nnotes/private/\n",
    }
    for name, text in files.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "project"


def stage(project: Path, staging: Path, config: Path, corpus: Path | None = None) -> set[str]:
    staging.mkdir(exist_ok=True)
    package = stage_package(staging, project, config, corpus, python=sys.executable)
    assert package.num_bytes > 0
    return {str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file()}


# What travels.


@pytest.mark.parametrize("with_git", [False, True])
def test_the_package_holds_what_the_job_needs(
    project: Path, tmp_path: Path, with_git: bool
) -> None:
    if with_git:
        subprocess.run(["git", "init", "-q", str(project)], check=True)
    config = project / "configs/tiny.yaml"
    files = stage(project, tmp_path / "staging", config, Path("data/prepared"))
    expected = {"configs/tiny.yaml", "data/prepared/manifest.json", "notes/plan.txt", LAUNCHER}
    code = {name for name in files if name.startswith(job_package.PACKAGES)}
    assert files - code == expected | {".rayignore"}
    # Installed code, since this project has none of its own.
    assert {"cluster/cli.py", "model/errors.py", "pipeline/__init__.py"} <= code
    assert not any("__pycache__" in name for name in code)


def test_a_configuration_from_elsewhere_travels(project: Path, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(CONFIG)
    files = stage(project, tmp_path / "staging", tmp_path / "other.yaml")
    assert "submitted/other.yaml" in files
    assert "data/prepared/manifest.json" not in files


def test_small_relative_corpora_travel(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert corpus_travels(project, Path("data/prepared"))
    assert not corpus_travels(project, project / "data/prepared")
    assert not corpus_travels(project, Path("data/missing"))
    assert not corpus_travels(project, Path("../project/data/prepared"))
    monkeypatch.setattr(job_package, "MAX_CORPUS_BYTES", 1)
    assert not corpus_travels(project, Path("data/prepared"))


def test_too_much_to_send_names_the_culprit(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_package, "MAX_PACKAGE_BYTES", 2**20)
    (project / "notes/big.bin").write_bytes(b"0" * 2**21)
    with pytest.raises(PackageError, match=r"notes/big.bin \(2\.0 MiB\).*\.rayignore") as caught:
        stage(project, tmp_path / "staging", project / "configs/tiny.yaml")
    assert "\n" not in str(caught.value)


def test_paths_of_the_job_are_those_of_the_submitter(project: Path) -> None:
    config = Config.load(project / "configs/tiny.yaml")
    pinned = jobs._pinned_paths(config, project, corpus_travels=True)
    assert pinned == [
        f'tracking.uri="sqlite:///{project}/mlflow.db"',
        f'checkpoint.directory="{project}/runs/tiny/checkpoints"',
    ]
    config = Config.load(project / "configs/tiny.yaml", ["tracking.uri=http://host:5000"])
    pinned = jobs._pinned_paths(config, project, corpus_travels=False)
    assert pinned[0] == 'tracking.uri="http://host:5000"'
    assert pinned[2] == f'corpus.directory="{project}/data/prepared"'
    # The overrides mean what they say to the command that gets them.
    again = Config.load(project / "configs/tiny.yaml", pinned)
    assert again.corpus.directory == project / "data/prepared"


def run_launcher(folder: Path, python: str, path: str) -> subprocess.CompletedProcess[str]:
    text = job_package._LAUNCHER_TEXT.format(python=python)
    (folder / LAUNCHER).write_text(text)
    return subprocess.run(
        ["/bin/sh", LAUNCHER, "config", "show", "--help"],
        cwd=folder,
        env={"PATH": path, "PYTHONPATH": str(Path(jobs.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_launcher_finds_a_python_that_has_ray(tmp_path: Path) -> None:
    beside_ray = str(Path(sys.executable).parent)
    assert run_launcher(tmp_path, sys.executable, "/nowhere").returncode == 0
    assert run_launcher(tmp_path, "/no/such/python", beside_ray).returncode == 0
    lost = run_launcher(tmp_path, "/no/such/python", "/nowhere")
    assert lost.returncode == 127
    assert "no Python on the PATH" in lost.stderr


# What the user may get wrong.


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:1", "nothing answers at http://127.0.0.1:1"),
        ("127.0.0.1:1", "nothing answers at http://127.0.0.1:1"),
        ("ray://127.0.0.1:1", "nothing answers at ray://127.0.0.1:1"),
        ("http://127.0.0.1:port", "nothing answers"),
        ("redis://127.0.0.1:1", "no address of a Ray job server"),
    ],
)
def test_a_wrong_address_is_one_line(project: Path, address: str, said: str) -> None:
    with pytest.raises(JobError, match=said) as caught:
        submit(project / "configs/tiny.yaml", [], address=address, follow=False)
    assert "\n" not in str(caught.value)
    assert "such as http://host:8265" in str(caught.value)


def test_a_wrong_setting_is_found_before_anything_is_sent(project: Path) -> None:
    with pytest.raises(ConfigError, match="epoch"):
        submit(
            project / "configs/tiny.yaml",
            ["training.epoch=1"],
            address="http://127.0.0.1:1",
            follow=False,
        )


# Following a log, without a cluster.


class FakeClient:
    """A job server's client whose job writes `pieces` and then has `status`."""

    def __init__(self, pieces: list[str], status: JobStatus, *, interrupt: bool = False) -> None:
        self.pieces, self.status, self.interrupt = pieces, status, interrupt

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        for piece in self.pieces:
            yield piece
            await asyncio.sleep(0)
        if self.interrupt:
            raise KeyboardInterrupt

    def get_job_status(self, _: str) -> JobStatus:
        return self.status

    def get_job_info(self, _: str) -> SimpleNamespace:
        return SimpleNamespace(message="runtime environment failed\nin detail")


def follow(client: FakeClient, output: io.StringIO) -> JobResult:
    return jobs._follow(client, "http://host:8265", "job", output)  # type: ignore[arg-type]


def test_the_log_is_copied_and_names_the_run() -> None:
    output = io.StringIO()
    pieces = ["step 1\nst", 'ep 2\n{"run_', 'id": "abc", "steps": 2}\n']
    result = follow(FakeClient(pieces, JobStatus.SUCCEEDED), output)
    assert result == JobResult("job", "SUCCEEDED", "abc")
    assert output.getvalue() == "".join(pieces)


def test_a_failed_job_tells_its_last_line() -> None:
    pieces = ["step 1\n", "error: rank 3 died; restart\n"]
    with pytest.raises(JobError, match="job failed: error: rank 3 died; restart") as caught:
        follow(FakeClient(pieces, JobStatus.FAILED), io.StringIO())
    assert caught.value.last_lines == ("step 1", "error: rank 3 died; restart")
    with pytest.raises(JobError, match="failed: runtime environment failed$"):
        follow(FakeClient([], JobStatus.FAILED), io.StringIO())


def test_interrupting_leaves_the_job_running() -> None:
    output = io.StringIO()
    result = follow(FakeClient(["step 1\n"], JobStatus.RUNNING, interrupt=True), output)
    assert result.status == "RUNNING"
    assert "ray job stop --address http://host:8265 job" in output.getvalue()


# A real cluster of several nodes.


TRAINING_CONFIG = """\
name: small
corpus:
  directory: data/prepared
  train: {source: data/train.source, target: data/train.target}
  valid: {source: data/valid.source, target: data/valid.target}
  row_group_size: 16
  shuffle_window: 2
  source_vocabulary: {kind: word, size: 60}
  target_vocabulary: {kind: word, size: 60}
model: {num_layers: 2, hidden_size: 8, embedding_size: 8}
training: {batch_size: 8, max_steps: 12, log_every_steps: 3}
# Four ranks of two CPUs fill two nodes of four.
pipeline: {placement: paper, softmax_ranks: 2, time_chunks: 2}
cluster: {cpus_per_rank: 2.0}
checkpoint: {directory: runs/small/checkpoints}
evaluation: {beam_size: 2, max_length: 8, num_samples: 3}
tracking: {experiment: jobs}
"""


@pytest.fixture
def training_project(tmp_path: Path, ray_cluster: None) -> Path:
    """A working directory with a prepared corpus, from which ranks of two layers can be trained."""
    from cluster.corpus.preparation import prepare_corpus

    folder = tmp_path / "project"
    for split, num_pairs in (("train", 80), ("valid", 12)):
        write_text(folder / "data", split, sentences(num_pairs, seed=num_pairs))
    (folder / "small.yaml").write_text(TRAINING_CONFIG)
    absolute = [f"corpus.directory={folder}/data/prepared"] + [
        f"corpus.{split}.{side}={folder}/data/{split}.{side}"
        for split in ("train", "valid")
        for side in ("source", "target")
    ]
    config = Config.load(folder / "small.yaml", absolute)
    prepare_corpus(config.corpus, seed=1)
    return folder


def submit_by_command(project: Path, config: str, *overrides: str, address: str) -> dict[str, Any]:
    """Run `baton submit` in `project` and return what it prints for scripts."""
    arguments = ["submit", config, *overrides, "--address", address, "--follow", "--json"]
    finished = subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(Path(jobs.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    [line] = finished.stdout.splitlines()
    answer: dict[str, Any] = json.loads(line)
    return answer


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_submitted_trainings_stand_finished_side_by_side(
    training_project: Path, multi_node_cluster: "MultiNodeCluster"
) -> None:
    from mlflow.tracking import MlflowClient

    server, output = multi_node_cluster.job_server, io.StringIO()
    earlier = submit(
        training_project / "small.yaml",
        ["pipeline.placement=single", "checkpoint.directory=runs/earlier/checkpoints"],
        address=server,
        follow=True,
        working_dir=training_project,
        output=output,
    )
    assert earlier.status == "SUCCEEDED", output.getvalue()
    answer = submit_by_command(training_project, "small.yaml", "seed=2", address=server)
    assert answer["status"] == "SUCCEEDED"
    assert answer["address"] == server

    client = MlflowClient(tracking_uri=f"sqlite:///{training_project}/mlflow.db")
    experiment = client.get_experiment_by_name("jobs")
    assert experiment is not None
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {earlier.run_id, answer["run_id"]}
    for run_id, folder, num_ranks, num_nodes in (
        (earlier.run_id, "earlier", "1", "1"),
        (answer["run_id"], "small", "4", "2"),
    ):
        assert run_id is not None
        run = runs[run_id]
        assert run.info.status == "FINISHED"
        losses = client.get_metric_history(run_id, "train/loss")
        assert [point.step for point in losses] == [3, 6, 9, 12]
        assert run.data.params["num_ranks"] == num_ranks
        assert run.data.tags["baton.num_nodes"] == num_nodes
        checkpoint = Checkpoint.open(Path(run.data.tags["baton.checkpoint"]))
        assert checkpoint.path.parent == training_project / "runs" / folder / "checkpoints"
        assert (checkpoint.info.step, checkpoint.info.run_id) == (12, run_id)
        assert load_model(checkpoint).config == checkpoint.info.model


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_fails_tells_why(
    project: Path, multi_node_cluster: "MultiNodeCluster", monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray would prefer this to the address that it is given.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    output = io.StringIO()
    with pytest.raises(JobError, match="failed: error: .*data/prepared") as caught:
        submit(
            project / "configs/tiny.yaml",
            ["seed=7"],
            address=multi_node_cluster.job_server,
            follow=True,
            working_dir=project,
            output=output,
        )
    # The corpus travelled, and its manifest is not one.
    assert any("data/prepared" in line for line in caught.value.last_lines)
    assert caught.value.last_lines[-1] in output.getvalue()
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"
