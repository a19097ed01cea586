"""One MLflow run per training: what it was asked to do, how it went, and how it truly ended.

Only the driver writes the run; ranks return numbers and never import MLflow. `Tracker` never makes
training wait: points go to a local file (the spool) and a thread sends them. A store that is away
at the start is an error of the user's; one that goes away later costs a warning.
"""

import getpass
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cluster.tracking.metric_spool import Point, Spool
from cluster.tracking.metric_writer import Delivery, DeliveryReport, MetricWriter, RefusedError
from cluster.tracking.store import (
    HEARTBEAT_TAG,
    TrackingError,
    absolute_uri,
    close_stale_runs,
    first_line,
    get_experiment,
    open_client,
    run_url,
    ui_command,
)

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

__all__ = ["Tracker", "TrackingError", "check_metric_name", "run_url", "ui_command"]

logger = logging.getLogger(__name__)

Scalar = str | int | float | bool | None
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

ERROR_TAG = "baton.error"
CHANGED_TAG = "baton.changed."
NONFINITE = "train/nonfinite"
FINISH_TIMEOUT_S = 30.0

_METRIC_NAME = re.compile(r"[A-Za-z0-9_.: -]+/[A-Za-z0-9_.: -]+")
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")


def check_metric_name(name: str) -> None:
    """Refuse names that MLflow's UI would scatter over many sections, or none.

    A chart section is everything before the last slash, so a name is `section/metric`.

    Raises ValueError: there is not exactly one slash, or a character is not allowed.
    """
    if not _METRIC_NAME.fullmatch(name):
        raise ValueError(
            f"metric name {name!r} is not section/metric: exactly one slash, and letters, digits "
            "or _ . : - and space besides"
        )


class Tracker:
    """The MLflow run of one training, open until `finish`.

    Points, texts, files and tables are queued and sent by one thread; their methods return at
    once. `spool` holds every point as a line of JSON, whatever became of the store.
    """

    def __init__(
        self, client: "MlflowClient", uri: str, experiment_id: str, run_id: str, spool: Path
    ) -> None:
        self.uri = uri
        self.experiment_id = experiment_id
        self.run_id = run_id
        self._client = client
        self._num_nonfinite = 0
        self._bad_names: set[str] = set()
        self._report: DeliveryReport | None = None
        self._writer = MetricWriter(Spool(spool, run_id), self._send_points, self._send_heartbeat)

    @classmethod
    def start(
        cls,
        uri: str,
        experiment: str,
        run_name: str | None,
        *,
        params: Mapping[str, Scalar],
        tags: Mapping[str, str],
        run_id: str | None = None,
        spool: Path,
    ) -> "Tracker":
        """Open a run, or with `run_id` go on with an earlier one, and begin to send.

        Runs of the same experiment whose driver died without a word are marked as failed first.
        A parameter that differs from the earlier life's keeps its first value, which MLflow does
        not let change; the new value becomes a tag `baton.changed.<name>`.

        Raises TrackingError: the store does not answer, or experiment or run cannot be used.
        """
        uri = absolute_uri(uri)
        client = open_client(uri)
        experiment_id = get_experiment(client, uri, experiment)
        for stale in close_stale_runs(client, experiment_id, except_run_id=run_id):
            logger.warning("run %s ended without a word and is now marked FAILED", stale)
        all_tags = {**tags, HEARTBEAT_TAG: _now(), "mlflow.user": _user()}
        try:
            if run_id is None:
                run = client.create_run(experiment_id, tags=all_tags, run_name=run_name)
            else:
                run = _reopen(client, run_id, all_tags)
            _log_params(client, run, params)
        except TrackingError:
            raise
        except Exception as error:
            # Backends raise their own kinds; at the start all of them are the user's to mend.
            raise TrackingError(
                f"the run cannot be written to {uri}: {first_line(error)}; check tracking.uri"
            ) from error
        return cls(client, uri, str(run.info.experiment_id), str(run.info.run_id), spool)

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record one value per metric, at a step or (final scores) at none; returns at once.

        NaN and infinite values stay in the spool; MLflow's views break on them, so the run gets
        `train/nonfinite`, the number of such values so far, instead.
        """
        now_ms = int(time.time() * 1000)
        points = [Point(key, float(value), now_ms, step) for key, value in metrics.items()]
        num_nonfinite = sum(not math.isfinite(point.value) for point in points)
        if num_nonfinite:
            self._num_nonfinite += num_nonfinite
            points.append(Point(NONFINITE, float(self._num_nonfinite), now_ms, step))
        self._warn_of_names(metrics)
        self._writer.add(points)

    def log_text(self, artifact_path: str, text: str) -> None:
        """Queue a text as the artifact file `artifact_path`."""
        self._deliver(artifact_path, partial(self._client.log_text, self.run_id, text))

    def log_table(self, artifact_path: str, columns: Mapping[str, Sequence[Scalar]]) -> None:
        """Queue a table, which the UI shows and compares by run.

        A second table of the same path is appended to the first. Raises ValueError if
        `artifact_path` does not end in .json.
        """
        if not artifact_path.endswith(".json"):
            raise ValueError(f"a table's artifact path ends in .json, not {artifact_path!r}")
        table = {name: list(values) for name, values in columns.items()}
        self._deliver(artifact_path, partial(self._client.log_table, self.run_id, table))

    def set_tag(self, key: str, value: str) -> None:
        """Queue a tag, for example the latest checkpoint's folder."""
        self._deliver(f"tag {key}", lambda _: self._client.set_tag(self.run_id, key, value))

    def finish(
        self,
        status: RunStatus,
        *,
        error: str | None = None,
        timeout_s: float = FINISH_TIMEOUT_S,
    ) -> DeliveryReport:
        """Send what is left and close the run as `status`, in `timeout_s` whatever happens.

        `error` is kept as the tag `baton.error`. What could not be sent is said in a warning and
        in the report. A second call changes nothing.
        """
        if self._report is None:
            close = partial(self._close_run, status, error)
            self._report = self._writer.close(close, timeout_s=timeout_s)
            _warn_of_loss(self.run_id, status, self._report)
        return self._report

    def _send_points(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        sendable = [p for p in points if math.isfinite(p.value) and _METRIC_NAME.fullmatch(p.key)]
        metrics = [Metric(p.key, p.value, p.timestamp_ms, p.step or 0) for p in sendable]
        _refusable(lambda: self._client.log_batch(self.run_id, metrics=metrics, synchronous=True))

    def _send_heartbeat(self) -> None:
        self._client.set_tag(self.run_id, HEARTBEAT_TAG, _now())

    def _close_run(self, status: RunStatus, error: str | None) -> None:
        if error is not None:
            self._client.set_tag(self.run_id, ERROR_TAG, error[:5000])
        self._client.set_tag(self.run_id, HEARTBEAT_TAG, _now())
        self._client.set_terminated(self.run_id, status)

    def _deliver(self, artifact_path: str, send: Callable[[str], object]) -> None:
        self._writer.deliver(
            Delivery(artifact_path, lambda: _refusable(lambda: send(artifact_path)))
        )

    def _warn_of_names(self, metrics: Mapping[str, float]) -> None:
        """Say once that a name is wrong: that is our bug, but no reason to stop a training."""
        for name in metrics:
            if name in self._bad_names:
                continue
            try:
                check_metric_name(name)
            except ValueError as error:
                self._bad_names.add(name)
                logger.warning("%s; it is kept in the spool only", error)


def _reopen(client: "MlflowClient", run_id: str, tags: Mapping[str, str]) -> "Run":
    """Set an earlier run to RUNNING again."""
    try:
        run = client.get_run(run_id)
    except Exception as error:
        raise TrackingError(
            f"the run {run_id} to go on with is not in the tracking store ({first_line(error)}); "
            "use the tracking.uri it was started with, or start a new run"
        ) from error
    if run.info.lifecycle_stage != "active":
        raise TrackingError(
            f"the run {run_id} to go on with was deleted; restore it with `mlflow runs restore "
            f"--run-id {run_id}` or start a new run"
        )
    client.update_run(run_id, status="RUNNING")
    for key, value in tags.items():
        client.set_tag(run_id, key, value)
    return run


def _log_params(client: "MlflowClient", run: "Run", params: Mapping[str, Scalar]) -> None:
    from mlflow.entities import Param, RunTag

    old = run.data.params
    new = {key: str(value) for key, value in params.items()}
    changed = {key: value for key, value in new.items() if old.get(key, value) != value}
    client.log_batch(
        run.info.run_id,
        params=[Param(key, value) for key, value in new.items() if key not in old],
        tags=[RunTag(CHANGED_TAG + key, value) for key, value in changed.items()],
        synchronous=True,
    )


def _refusable(call: Callable[[], object]) -> None:
    """Call, and tell what a store will never accept from what it cannot take just now."""
    from mlflow.exceptions import MlflowException

    try:
        call()
    except MlflowException as error:
        if error.error_code in _REFUSALS:
            raise RefusedError(first_line(error)) from error
        raise
    except FileNotFoundError as error:
        raise RefusedError(f"{error.filename} is gone") from error


def _warn_of_loss(run_id: str, status: RunStatus, report: DeliveryReport) -> None:
    if report.complete:
        return
    logger.warning(
        "run %s: %d points not sent, %d refused, not sent: %s, %s; all points are in %s",
        run_id,
        report.unsent_points,
        report.refused_points,
        ", ".join(report.unsent_deliveries) or "no files",
        f"marked {status}" if report.closed else f"not marked {status}, it still says RUNNING",
        report.spool,
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        # A container's user need not have a name.
        return "unknown"


def _now() -> str:
    return str(int(time.time()))
