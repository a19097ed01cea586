"""Fixtures of the cluster layer: a Ray cluster of several nodes with a job server."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("multi_node.py")
NUM_NODES = 3
CPUS_PER_NODE = 4


@dataclass(frozen=True)
class MultiNodeCluster:
    """A running cluster: `job_server` takes jobs, `gcs_address` is what `ray.init` takes."""

    job_server: str
    gcs_address: str
    num_nodes: int


@pytest.fixture(scope="session")
def multi_node_cluster() -> Iterator[MultiNodeCluster]:
    """Three nodes of four CPUs on this machine; starting them takes up to a minute."""
    # Paths of Ray's sockets are limited to about 100 characters, so pytest's folders are too long.
    ray_folder = tempfile.mkdtemp(prefix="bt-", dir="/tmp")
    environment = {**os.environ, "RAY_TMPDIR": ray_folder, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    with (Path(ray_folder) / "cluster.log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(NUM_NODES), str(CPUS_PER_NODE)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                log.seek(0)
                pytest.fail(f"the cluster did not start:\n{log.read()[-3000:]}")
            yield MultiNodeCluster(**json.loads(line))
        finally:
            process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
    shutil.rmtree(ray_folder, ignore_errors=True)
