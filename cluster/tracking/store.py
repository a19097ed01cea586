"""Where MLflow keeps runs: opening a store, naming it, and clearing up after runs that died.

Every function takes or returns an explicit client; MLflow's module-wide "active run" is never
used. Import of MLflow is slow (seconds), so it happens inside the functions.
"""

import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from model.errors import UserError

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

HEARTBEAT_TAG = "baton.heartbeat"
"""Seconds since the epoch at which the driver of a run last showed life."""
STALE_TAG = "baton.stale"
STALE_AFTER_S = 300.0
UI_PORT = 5000

_SQLITE = "sqlite:///"
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_SERVER = ("http://", "https://")
_ENVIRONMENT: Mapping[str, str] = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    # The last line of our standard output belongs to --json.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # With MLflow's defaults one request to a dead server takes four minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


class TrackingError(UserError):
    """The tracking store or the experiment cannot be used as configured."""


def prepare_environment() -> None:
    """Set what MLflow reads when it is imported and called, unless the user set it already."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def absolute_uri(uri: str, base: Path | None = None) -> str:
    """Make a relative SQLite address absolute against `base` (or the working directory).

    Another process, such as a Ray job or the UI, then means the same file. Other addresses are
    returned as they are.
    """
    if not uri.startswith(_SQLITE) or uri.startswith(_SQLITE + "/"):
        return uri
    return f"{_SQLITE}{(base or Path.cwd()).resolve() / uri.removeprefix(_SQLITE)}"


def open_client(uri: str) -> "MlflowClient":
    """Return a client of the store at `uri` that was seen to answer.

    Raises TrackingError: the address is of no kind that can be used, or nothing answers there.
    """
    check_uri(uri)
    prepare_environment()
    for name in ("mlflow.store.db.utils", "alembic"):
        # First use migrates a new database in dozens of log lines that mean nothing to the user.
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    except Exception as error:
        # MLflow, SQLAlchemy, requests and the JSON decoder each raise their own.
        raise TrackingError(
            f"the tracking store {uri} does not answer as an MLflow store: {first_line(error)}; "
            "start it or set tracking.uri (sqlite:///mlflow.db needs no server)"
        ) from error
    return client


def check_uri(uri: str) -> None:
    """Refuse addresses that MLflow would fail on late, slowly or in many lines.

    Raises TrackingError: with the address and the remedy.
    """
    remedy = "use tracking.uri=sqlite:///mlflow.db or the http address of an MLflow server"
    if uri.startswith(_SQLITE):
        _check_sqlite(Path(absolute_uri(uri).removeprefix(_SQLITE)))
    elif uri.startswith("file:") or "://" not in uri:
        raise TrackingError(f"tracking.uri={uri!r} is a folder, which MLflow gave up; {remedy}")
    elif not uri.startswith((*_SERVER, *_DATABASES)):
        raise TrackingError(f"tracking.uri={uri!r} is of an unknown kind; {remedy}")


def _check_sqlite(path: Path) -> None:
    if not path.parent.is_dir():
        raise TrackingError(
            f"the folder {path.parent} of the tracking database does not exist here; create it or "
            "change tracking.uri"
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise TrackingError(f"the tracking database {path} cannot be written; change tracking.uri")
    if path.is_dir():
        raise TrackingError(f"the tracking database {path} is a folder; name a file in it")
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            magic = file.read(16)
        if magic != b"SQLite format 3\0":
            raise TrackingError(f"{path} is no SQLite database; change tracking.uri")


def get_experiment(client: "MlflowClient", uri: str, name: str) -> str:
    """Return the id of the experiment called `name`, which is created if there is none.

    A server chooses where artifacts go; with an embedded database they go beside it, so that runs
    started from different working directories (a job's, for example) keep them in one place.

    Raises TrackingError: the name is not allowed, or belongs to a deleted experiment.
    """
    if not name.strip():
        raise TrackingError("tracking.experiment is empty; name an experiment, such as baton")
    try:
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            return str(client.create_experiment(name, _artifact_location(uri, name)))
    except Exception as error:
        raise TrackingError(
            f"the experiment {name!r} cannot be used: {first_line(error)}; change "
            "tracking.experiment"
        ) from error
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"the experiment {name!r} was deleted; restore it with `mlflow experiments restore -x "
            f"{experiment.experiment_id}` or change tracking.experiment"
        )
    return str(experiment.experiment_id)


def _artifact_location(uri: str, experiment: str) -> str | None:
    if not uri.startswith(_SQLITE):
        return None
    folder = Path(absolute_uri(uri).removeprefix(_SQLITE)).parent / "mlruns"
    return (folder / quote(experiment, safe="")).as_uri()


def close_stale_runs(
    client: "MlflowClient",
    experiment_id: str,
    *,
    older_than_s: float = STALE_AFTER_S,
    except_run_id: str | None = None,
) -> list[str]:
    """Mark as FAILED the runs whose driver died without a word, and return their ids.

    Such a run stays RUNNING for ever. Only runs with our heartbeat are touched; each gets the
    time of its last heartbeat as its end, and a tag that says who closed it and why.
    """
    now_s = time.time()
    closed = []
    for run in _running(client, experiment_id):
        beat = run.data.tags.get(HEARTBEAT_TAG, "")
        run_id = str(run.info.run_id)
        if run_id == except_run_id or not beat.isdigit() or now_s - int(beat) < older_than_s:
            continue
        reason = f"no heartbeat since {_clock(int(beat))}; closed at {_clock(now_s)} by a later run"
        client.set_tag(run_id, STALE_TAG, reason)
        client.set_terminated(run_id, "FAILED", end_time=int(beat) * 1000)
        closed.append(run_id)
    return closed


def _running(client: "MlflowClient", experiment_id: str) -> list["Run"]:
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment_id], filter_string="attributes.status = 'RUNNING'", page_token=token
        )
        runs.extend(page)
        token = page.token
        if not token:
            return runs


def ui_command(uri: str) -> str:
    """Return the command that opens the UI on a store (for a server: its address).

    One server process and no job runner: MLflow's default starts 15 processes and takes 3.6 GB.
    """
    if uri.startswith(_SERVER):
        return f"open {uri}"
    mlflow = Path(sys.executable).with_name("mlflow")
    program = str(mlflow) if mlflow.exists() else "mlflow"
    return (
        "MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false "
        f"{program} server --workers 1 --port {UI_PORT} --backend-store-uri {absolute_uri(uri)}"
    )


def run_url(uri: str, experiment_id: str, run_id: str | None = None) -> str:
    """Return the address of a run, or of the whole experiment, once the UI is up."""
    root = uri.rstrip("/") if uri.startswith(_SERVER) else f"http://127.0.0.1:{UI_PORT}"
    page = f"/runs/{run_id}" if run_id else ""
    # Without the parameter a first visit opens MLflow's side for language model applications.
    return f"{root}/#/experiments/{experiment_id}{page}?workflowType=machine_learning"


def first_line(error: BaseException) -> str:
    """Return an error's first line, for errors of libraries that carry pages of text."""
    lines = str(error).splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
