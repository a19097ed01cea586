"""The run that MLflow keeps is what happened: values, order, files, and the way it ended."""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.tracking import MlflowClient

from cluster.tracking.metric_spool import Point, Spool
from cluster.tracking.metric_writer import Delivery, MetricWriter, RefusedError
from cluster.tracking.store import (
    HEARTBEAT_TAG,
    STALE_TAG,
    UI_PORT,
    absolute_uri,
    close_stale_runs,
)
from cluster.tracking.tracker import (
    CHANGED_TAG,
    ERROR_TAG,
    NONFINITE,
    RunStatus,
    Tracker,
    TrackingError,
    check_metric_name,
    run_url,
    ui_command,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One real SQLite store for the file: the first use of a new one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def start(
    uri: str,
    tmp_path: Path,
    *,
    run_id: str | None = None,
    experiment: str = "baton",
    params: Mapping[str, str | float] | None = None,
) -> Tracker:
    return Tracker.start(
        uri,
        experiment,
        "a run",
        params=params or {},
        tags={"kind": "test"},
        run_id=run_id,
        spool=tmp_path / "metrics.jsonl",
    )


def points_in(spool: Path) -> list[Point]:
    points = (Point.from_json(line) for line in spool.read_bytes().splitlines())
    return [point for point in points if point is not None]


# The run in a real store.


def test_a_finished_run_holds_everything(store: str, tmp_path: Path) -> None:
    tracker = start(store, tmp_path, params={"model.num_layers": 4, "training.learning_rate": 0.7})
    for step in range(1, 41):
        tracker.log({"train/loss": 10.0 / step, "throughput/words_per_second": step}, step=step)
    tracker.log({"test/bleu": 31.5})
    tracker.log_text("config.yaml", "seed: 1\n")
    tracker.log_table("translations.json", {"source": ["one", "two"], "target": ["un", "deux"]})
    report = tracker.finish("FINISHED")

    client = MlflowClient(store)
    run = client.get_run(tracker.run_id)
    losses = sorted(client.get_metric_history(tracker.run_id, "train/loss"), key=lambda m: m.step)
    assert report.complete
    assert report.sent_points == 81
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a run"
    assert run.data.tags["kind"] == "test"
    assert run.data.params == {"model.num_layers": "4", "training.learning_rate": "0.7"}
    assert [(m.step, m.value) for m in losses] == [(n, 10.0 / n) for n in range(1, 41)]
    assert [m.timestamp for m in losses] == sorted(m.timestamp for m in losses)
    assert run.data.metrics["test/bleu"] == 31.5
    artifacts = {a.path for a in client.list_artifacts(tracker.run_id)}
    assert artifacts == {"config.yaml", "translations.json"}
    text = Path(client.download_artifacts(tracker.run_id, "config.yaml", str(tmp_path)))
    assert text.read_text() == "seed: 1\n"
    table = Path(client.download_artifacts(tracker.run_id, "translations.json", str(tmp_path)))
    assert json.loads(table.read_text())["data"] == [["one", "un"], ["two", "deux"]]


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_the_status_is_the_truth(store: str, tmp_path: Path, status: RunStatus) -> None:
    tracker = start(store, tmp_path)
    assert MlflowClient(store).get_run(tracker.run_id).info.status == "RUNNING"
    tracker.finish(status, error=None if status == "FINISHED" else "rank 3 died")
    run = MlflowClient(store).get_run(tracker.run_id)
    assert run.info.status == status
    assert run.data.tags.get(ERROR_TAG) == (None if status == "FINISHED" else "rank 3 died")


def test_finish_counts_only_once(store: str, tmp_path: Path) -> None:
    tracker = start(store, tmp_path)
    first = tracker.finish("FAILED", error="first")
    assert tracker.finish("FINISHED") == first
    assert MlflowClient(store).get_run(tracker.run_id).info.status == "FAILED"


def test_nan_is_counted_not_sent(store: str, tmp_path: Path) -> None:
    tracker = start(store, tmp_path)
    tracker.log({"train/loss": float("nan"), "train/grad_norm": 2.0}, step=1)
    tracker.log({"train/loss": float("inf")}, step=2)
    tracker.finish("FINISHED")
    metrics = MlflowClient(store).get_run(tracker.run_id).data.metrics
    assert metrics == {"train/grad_norm": 2.0, NONFINITE: 2.0}
    assert str(points_in(tmp_path / "metrics.jsonl")[0].value) == "nan"


def test_a_resumed_run_goes_on(store: str, tmp_path: Path) -> None:
    first = start(store, tmp_path, params={"epochs": 1, "seed": 1})
    first.log({"train/loss": 2.0}, step=1)
    first.finish("FAILED", error="node lost")
    second = start(store, tmp_path, run_id=first.run_id, params={"epochs": 2, "seed": 1, "new": 3})
    assert MlflowClient(store).get_run(first.run_id).info.status == "RUNNING"
    second.log({"train/loss": 1.0}, step=2)
    second.finish("FINISHED")

    client = MlflowClient(store)
    run = client.get_run(first.run_id)
    history = client.get_metric_history(first.run_id, "train/loss")
    assert second.run_id == first.run_id
    assert run.info.status == "FINISHED"
    assert {(m.step, m.value) for m in history} == {(1, 2.0), (2, 1.0)}
    assert run.data.params == {"epochs": "1", "seed": "1", "new": "3"}
    assert run.data.tags[CHANGED_TAG + "epochs"] == "2"


def test_what_a_killed_driver_left_is_sent_on_resume(store: str, tmp_path: Path) -> None:
    first = start(store, tmp_path)
    first.finish("FAILED")
    lost = Point("train/loss", 4.0, 1_700_000_000_000, 7)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(lost.to_json() + "\n" + '{"key": "train/lo')
    start(store, tmp_path, run_id=first.run_id).finish("FINISHED")
    history = MlflowClient(store).get_metric_history(first.run_id, "train/loss")
    assert [(m.step, m.value, m.timestamp) for m in history] == [(7, 4.0, 1_700_000_000_000)]


def test_points_of_another_run_stay_its_own(store: str, tmp_path: Path) -> None:
    start(store, tmp_path).finish("FINISHED")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(Point("train/loss", 4.0, 1_700_000_000_000, 7).to_json() + "\n")
    other = start(store, tmp_path)
    other.finish("FINISHED")
    assert MlflowClient(store).get_run(other.run_id).data.metrics == {}


def test_runs_that_died_silently_are_closed(store: str, tmp_path: Path) -> None:
    client = MlflowClient(store)
    dead, alive = (start(store, tmp_path / name, experiment="stale") for name in ("a", "b"))
    experiment = dead.experiment_id
    foreign = client.create_run(experiment).info.run_id
    client.set_tag(dead.run_id, HEARTBEAT_TAG, "1700000000")
    closed = close_stale_runs(client, experiment)
    run = client.get_run(dead.run_id)
    assert closed == [dead.run_id]
    assert (run.info.status, run.info.end_time) == ("FAILED", 1_700_000_000_000)
    assert "no heartbeat since 2023-11-14" in run.data.tags[STALE_TAG]
    assert client.get_run(alive.run_id).info.status == "RUNNING"
    assert client.get_run(foreign).info.status == "RUNNING"
    dead.finish("KILLED")
    alive.finish("FINISHED")


def test_a_wrong_metric_name_costs_a_warning(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(store, tmp_path)
    for _ in range(3):
        tracker.log({"pipeline/stage_0/busy": 1.0, "pipeline/rank0_busy": 0.5}, step=1)
    tracker.finish("FINISHED")
    metrics = MlflowClient(store).get_run(tracker.run_id).data.metrics
    assert metrics == {"pipeline/rank0_busy": 0.5}
    assert sum("one slash" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("name", ["loss", "a/b/c", "/loss", "train/", "train/é", ""])
def test_metric_names_have_one_slash(name: str) -> None:
    check_metric_name("throughput/words_per_second")
    with pytest.raises(ValueError, match="exactly one slash"):
        check_metric_name(name)


def test_paths_are_those_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute_uri("sqlite:///a/b.db", Path("/x")) == "sqlite:////x/a/b.db"
    assert absolute_uri("sqlite:////x/b.db") == "sqlite:////x/b.db"
    assert absolute_uri("http://host:5000") == "http://host:5000"
    assert f"--backend-store-uri sqlite:///{tmp_path}/mlflow.db" in ui_command(
        "sqlite:///mlflow.db"
    )
    assert run_url("http://host:5000/", "1", "abc") == (
        "http://host:5000/#/experiments/1/runs/abc?workflowType=machine_learning"
    )


# What the user may get wrong.


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("./mlruns", "is a folder"),
        ("file:///tmp/mlruns", "is a folder"),
        ("gopher://host", "unknown kind"),
        ("sqlite:////no/such/folder/mlflow.db", "/no/such/folder"),
        (f"http://127.0.0.1:{free_port()}", "does not answer"),
    ],
)
def test_a_wrong_store_is_one_line(uri: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=said) as caught:
        start(uri, tmp_path)
    assert "\n" not in str(caught.value)
    assert "tracking.uri" in str(caught.value)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("hello")
    with pytest.raises(TrackingError, match="no SQLite database"):
        start(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)


def test_experiments_that_cannot_be_used(store: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"tracking\.experiment is empty"):
        start(store, tmp_path, experiment=" ")
    with pytest.raises(TrackingError, match=r"change tracking\.experiment"):
        start(store, tmp_path, experiment="x" * 600)
    client = MlflowClient(store)
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(TrackingError, match="was deleted"):
        start(store, tmp_path, experiment="gone")


def test_a_run_that_is_not_there(store: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"0123456789abcdef.* is not in the tracking store"):
        start(store, tmp_path, run_id="0123456789abcdef0123456789abcdef")


# A real server, opened by the command that the user is told.


def start_server(store: str, port: int, log: Path) -> subprocess.Popen[bytes]:
    command = ui_command(store).replace(f"--port {UI_PORT}", f"--port {port}")
    server = subprocess.Popen(
        f"exec env {command}",
        shell=True,
        cwd=log.parent,
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    for _ in range(240):
        with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health"):
            return server
        assert server.poll() is None, log.read_text()[-2000:]
        time.sleep(0.5)
    raise AssertionError(f"no server within two minutes:\n{log.read_text()[-2000:]}")


@pytest.mark.slow
def test_a_server_that_dies_mid_run(store: str, tmp_path: Path) -> None:
    embedded = start(store, tmp_path / "embedded", experiment="ui")
    embedded.log_text("config.yaml", "seed: 1")
    embedded.finish("FINISHED")
    port = free_port()
    server = start_server(store, port, tmp_path / "server.log")
    try:
        root = f"http://127.0.0.1:{port}"
        with urlopen(f"{root}/get-artifact?run_id={embedded.run_id}&path=config.yaml") as page:
            assert page.read() == b"seed: 1"
        tracker = start(root, tmp_path / "served", experiment="served")
        tracker.log({"train/loss": 1.0}, step=1)
        tracker.log_text("config.yaml", "seed: 2")
        assert tracker.finish("FINISHED").complete
        orphan = start(root, tmp_path / "orphan", experiment="served")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    for step in range(1000):
        orphan.log({"train/loss": 1.0 / (step + 1)}, step=step)
    report = orphan.finish("FAILED", timeout_s=3.0)
    assert (report.unsent_points, report.closed) == (1000, False)
    assert len(points_in(report.spool)) == 1000
    # The database is still there: the next life of the run sends what this one could not.
    again = start(store, tmp_path / "orphan", experiment="served", run_id=orphan.run_id)
    assert again.finish("FINISHED").sent_points == 1000
    assert len(MlflowClient(store).get_metric_history(orphan.run_id, "train/loss")) == 1000


# The writer against stores that fail: no clock is waited for, events say when.


class FlakyStore:
    """Fails while `away`; keeps what arrived and says when anything was tried."""

    def __init__(self) -> None:
        self.away = threading.Event()
        self.tried = threading.Event()
        self.points: list[Point] = []

    def send(self, points: Sequence[Point]) -> None:
        self.tried.set()
        if self.away.is_set():
            raise ConnectionError("connection refused")
        if any(point.key == "bad/bad" for point in points):
            raise RefusedError("never")
        self.points.extend(points)


@pytest.fixture
def flaky() -> FlakyStore:
    return FlakyStore()


@pytest.fixture
def writer(flaky: FlakyStore, tmp_path: Path) -> Iterator[MetricWriter]:
    spool = Spool(tmp_path / "metrics.jsonl", "run")
    writer = MetricWriter(
        spool, flaky.send, lambda: None, interval_s=0.01, heartbeat_s=0.0, max_backoff_s=0.02
    )
    yield writer
    writer.close(lambda: None, timeout_s=5.0)


def point(step: int, key: str = "train/loss") -> Point:
    return Point(key, float(step), 1_700_000_000_000 + step, step)


def test_a_store_that_comes_back_gets_everything_in_order(
    flaky: FlakyStore, writer: MetricWriter, caplog: pytest.LogCaptureFixture
) -> None:
    flaky.away.set()
    for step in range(2500):
        writer.add([point(step)])
    assert flaky.tried.wait(20)
    assert flaky.points == []
    flaky.away.clear()
    report = writer.close(lambda: None)
    assert flaky.points == [point(step) for step in range(2500)]
    assert report.complete
    assert sum("is away" in record.message for record in caplog.records) == 1


def test_a_dead_store_costs_a_warning_and_no_point(
    flaky: FlakyStore, writer: MetricWriter, tmp_path: Path
) -> None:
    flaky.away.set()
    writer.add([point(step) for step in range(10)])

    def last() -> None:
        raise ConnectionError("connection refused")

    writer.deliver(Delivery("config.yaml", last))
    report = writer.close(last, timeout_s=0.5)
    assert (report.sent_points, report.unsent_points, report.closed) == (0, 10, False)
    assert report.unsent_deliveries == ("config.yaml",)
    assert points_in(report.spool) == [point(step) for step in range(10)]
    # The next life of the same run sends them.
    again = MetricWriter(Spool(report.spool, "run"), flaky.send, lambda: None, interval_s=0.01)
    flaky.away.clear()
    assert again.close(lambda: None).sent_points == 10
    assert flaky.points == [point(step) for step in range(10)]


def test_a_store_that_hangs_holds_nobody(tmp_path: Path) -> None:
    release, entered = threading.Event(), threading.Event()

    def hang(_: Sequence[Point]) -> None:
        entered.set()
        release.wait(60)

    writer = MetricWriter(
        Spool(tmp_path / "metrics.jsonl", "run"), hang, lambda: None, interval_s=0.01
    )
    writer.add([point(0)])
    assert entered.wait(20)
    for step in range(1, 1000):
        writer.add([point(step)])
    report = writer.close(lambda: None, timeout_s=0.2)
    release.set()
    assert report.unsent_points == 1000
    assert not report.closed


def test_what_is_refused_does_not_block_the_rest(
    flaky: FlakyStore, writer: MetricWriter, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise RefusedError("too large")

    with caplog.at_level(logging.WARNING):
        writer.add([point(1, "bad/bad")])
        writer.deliver(Delivery("huge.bin", refuse))
        report = writer.close(lambda: None)
    assert report.refused_points == 1
    assert report.unsent_deliveries == ("huge.bin",)
    assert report.closed
    assert not report.complete


def test_the_queue_of_files_is_bounded(flaky: FlakyStore, writer: MetricWriter) -> None:
    flaky.away.set()
    writer.add([point(1)])
    assert flaky.tried.wait(20)
    sent: list[int] = []
    for number in range(150):
        writer.deliver(Delivery(str(number), partial(sent.append, number)))
    flaky.away.clear()
    report = writer.close(lambda: None)
    assert sent == list(range(50, 150))
    assert report.unsent_deliveries == tuple(str(number) for number in range(50))


def test_a_full_disk_goes_through_memory(
    flaky: FlakyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path / "metrics.jsonl", "run")
    monkeypatch.setattr(spool, "_write", lambda text: False)
    writer = MetricWriter(spool, flaky.send, lambda: None, interval_s=0.01)
    writer.add([point(1)])
    writer.add([point(2)])
    assert writer.close(lambda: None).complete
    assert flaky.points == [point(1), point(2)]


@settings(max_examples=50, deadline=None)
@given(
    st.builds(
        Point,
        key=st.text(max_size=20),
        value=st.floats(allow_nan=False),
        timestamp_ms=st.integers(0, 2**53),
        step=st.none() | st.integers(0, 2**53),
    )
)
def test_a_point_survives_the_spool(point: Point) -> None:
    assert Point.from_json(point.to_json().encode()) == point
    assert "\n" not in point.to_json()
