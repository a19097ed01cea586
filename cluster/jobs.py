"""Running a training as a job of a Ray cluster that is up already.

The configuration is checked here first; then code, configuration and perhaps the corpus travel
(`cluster.job_package`), the job drives the training from the cluster's head node, and its log can
be followed. Paths that it writes are made absolute, so that its run stands in MLflow beside earlier
ones.
A `runtime_env` is built from nothing but the files that travel: it could install and run code.
"""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import shlex
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO
from urllib.parse import urlsplit

from cluster.config import Config
from cluster.job_package import LAUNCHER, corpus_travels, stage_package
from cluster.tracking.store import absolute_uri, first_line
from model.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

CONNECT_TIMEOUT_S = 5.0
STATUS_TIMEOUT_S = 30.0
NUM_LAST_LINES = 20
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_ADDRESS_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")


class JobError(UserError):
    """The job could not be submitted or followed, or it failed.

    `last_lines` are the last lines of its log, where there is one.
    """

    def __init__(self, message: str, last_lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.last_lines = tuple(last_lines)


@dataclass(frozen=True)
class JobResult:
    """A submitted job: its status (PENDING, RUNNING, STOPPED or SUCCEEDED) when this was made.

    `run_id` is the MLflow run that the followed log named, None if it named none.
    """

    submission_id: str
    status: str
    run_id: str | None


def submit(
    config_path: Path,
    overrides: Sequence[str],
    *,
    address: str,
    follow: bool,
    working_dir: Path | None = None,
    output: TextIO | None = None,
    python: str = sys.executable,
) -> JobResult:
    """Run `baton train CONFIG OVERRIDES... --json` as a job of the cluster at `address`.

    `address` is the job server (http://host:8265, also without http://) or ray://host:10001.
    A relative SQLite address of `tracking.uri` means `working_dir`. `python` is tried first on the
    head node, then python3 and python. With `follow` the job's log is copied to `output` (standard
    output) until the job ends; Ctrl-C ends the following, not the job.

    Raises ConfigError, PackageError, or JobError if the server cannot be used or the followed job
    fails.
    """
    output = output or sys.stdout
    base = (working_dir or Path.cwd()).resolve()
    config = Config.load(config_path, overrides)
    travelling = corpus_travels(base, config.corpus.directory)
    client = _connect(address)
    submission_id = f"baton-{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    with tempfile.TemporaryDirectory(prefix="baton-job-") as staging:
        corpus = config.corpus.directory if travelling else None
        package = stage_package(Path(staging), base, config_path, corpus, python=python)
        arguments = [
            *("train", str(package.config), *overrides),
            *_pinned_paths(config, base, corpus_travels=travelling),
            "--json",
        ]
        output.write(f"sending {package.num_bytes / 2**20:.1f} MiB to {address}\n")
        _send(client, submission_id, package.folder, shlex.join(["sh", LAUNCHER, *arguments]))
    output.write(f"submitted job {submission_id}\n")
    _warn_of_open_server(address, output)
    if follow:
        return _follow(client, address, submission_id, output)
    output.write(_how_to_go_on(address, submission_id))
    return JobResult(submission_id, str(client.get_job_status(submission_id)), None)


def _pinned_paths(config: Config, base: Path, *, corpus_travels: bool) -> list[str]:
    """Return overrides that make paths mean the same in the job's own, short-lived folder."""
    uri = absolute_uri(config.tracking.uri, base)
    pinned = {"tracking.uri": uri, "checkpoint.directory": str(base / config.checkpoint.directory)}
    if not corpus_travels:
        pinned["corpus.directory"] = str(base / config.corpus.directory)
    if config.checkpoint.resume not in (None, "auto"):
        pinned["checkpoint.resume"] = str(base / str(config.checkpoint.resume))
    return [f"{key}={json.dumps(value)}" for key, value in pinned.items()]


def _connect(address: str) -> "JobSubmissionClient":
    url = address if "://" in address else f"http://{address}"
    if not url.startswith(("http://", "https://", "ray://")):
        raise JobError(f"--address {address} is no address of a Ray job server; {_REMEDY}")
    _check_reachable(url)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with _without_ray_address():
            return JobSubmissionClient(url)
    except AuthenticationError as error:
        raise JobError(
            f"the cluster at {address} wants a token ({first_line(error)}); set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"
        ) from error
    except Exception as error:
        # requests, gRPC and Ray raise their own kinds, also plain RuntimeError.
        raise JobError(f"no Ray job server at {address}: {first_line(error)}; {_REMEDY}") from error


_REMEDY = "give the dashboard's address that `ray start --head` printed, such as http://host:8265"


def _check_reachable(url: str) -> None:
    """Find out in seconds what Ray would find out in minutes."""
    try:
        parts = urlsplit(url)
        default_port = 10001 if parts.scheme == "ray" else {"http": 80, "https": 443}[parts.scheme]
        where = (parts.hostname or "", parts.port or default_port)
        socket.create_connection(where, timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise JobError(f"nothing answers at {url} ({error}); {_REMEDY}") from error


@contextlib.contextmanager
def _without_ray_address() -> Iterator[None]:
    """Hide the variables that would silently overrule the address that the user gave."""
    saved = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def _send(client: "JobSubmissionClient", submission_id: str, folder: Path, entrypoint: str) -> None:
    try:
        client.submit_job(
            entrypoint=entrypoint,
            submission_id=submission_id,
            runtime_env={"working_dir": str(folder)},
        )
    except Exception as error:
        # The client raises RuntimeError with the server's text, or whatever requests raises.
        raise JobError(
            f"the job server did not take the job: {first_line(error)}; see the cluster's "
            "dashboard log"
        ) from error


def _warn_of_open_server(address: str, output: TextIO) -> None:
    host = urlsplit(address if "://" in address else f"http://{address}").hostname
    if os.environ.get("RAY_AUTH_MODE") != "token" and host not in _LOCAL_HOSTS:
        output.write(
            f"warning: the job server at {address} asked for no token, so whoever reaches it can "
            "run commands there; start Ray with RAY_AUTH_MODE=token\n"
        )


@dataclass
class _LogReader:
    """Copies a log and keeps what the end of the job needs: the last lines, the run's id."""

    output: TextIO
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=NUM_LAST_LINES))
    run_id: str | None = None
    _rest: str = ""

    def feed(self, text: str) -> None:
        """Take the next piece, which may end in the middle of a line."""
        self.output.write(text)
        self.output.flush()
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                self.last_lines.append(line)
            self._look_for_run(line)

    def _look_for_run(self, line: str) -> None:
        if not line.startswith("{") or '"run_id"' not in line:
            return
        try:
            found = json.loads(line)["run_id"]
        except (ValueError, KeyError, TypeError):
            return
        self.run_id = found if isinstance(found, str) else self.run_id


def _follow(
    client: "JobSubmissionClient", address: str, submission_id: str, output: TextIO
) -> JobResult:
    reader = _LogReader(output)
    try:
        asyncio.run(_copy_log(client, submission_id, reader))
        status = _final_status(client, submission_id)
    except KeyboardInterrupt:
        output.write(f"\nno longer following; {_how_to_go_on(address, submission_id)}")
        return JobResult(submission_id, str(client.get_job_status(submission_id)), reader.run_id)
    except Exception as error:
        # A dying server shows as an error of aiohttp, requests or Ray.
        raise JobError(
            f"lost sight of job {submission_id} ({first_line(error)}); if the cluster still runs, "
            f"see `ray job status --address {address} {submission_id}`",
            reader.last_lines,
        ) from error
    if status == "FAILED":
        reader.feed("\n")
        raise _failure(client, submission_id, reader)
    return JobResult(submission_id, status, reader.run_id)


async def _copy_log(client: "JobSubmissionClient", submission_id: str, reader: _LogReader) -> None:
    async for text in client.tail_job_logs(submission_id):
        reader.feed(text)


def _final_status(client: "JobSubmissionClient", submission_id: str) -> str:
    """Wait for the status to follow the log's end, which comes a moment earlier."""
    deadline = time.monotonic() + STATUS_TIMEOUT_S
    while not (status := client.get_job_status(submission_id)).is_terminal():
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return str(status)


def _failure(client: "JobSubmissionClient", submission_id: str, reader: _LogReader) -> JobError:
    lines = list(reader.last_lines)
    message = client.get_job_info(submission_id).message or "no reason given"
    reason = lines[-1].strip() if lines else first_line(RuntimeError(message))
    return JobError(f"job {submission_id} failed: {reason[:500]}", lines or message.splitlines())


def _how_to_go_on(address: str, submission_id: str) -> str:
    where = f"--address {address} {submission_id}"
    return (
        f"the job goes on: `ray job logs --follow {where}` shows it, `ray job stop {where}` ends "
        "it\n"
    )
