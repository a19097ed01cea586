"""What becomes of ranks that die, hang or raise: one failure that names the cause, no leftovers."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cluster.worker_calls as worker_calls
from cluster.config.sections import ClusterConfig
from cluster.cores import automatic_threads
from cluster.failure_policy import FailureKind, WorkerFailure
from cluster.interruption import Interrupted, Interruption
from cluster.resources import ClusterError
from cluster.worker_group import WorkerGroup
from tests.batches import random_batch
from tests.cluster.groups import SMALL_SHARE, plan_of

Start = Callable[[ClusterConfig], WorkerGroup]


@pytest.fixture
def start(ray_cluster: None) -> Iterator[Start]:
    """Start three ranks of the paper's layout; they are ended after the test."""
    groups: list[WorkerGroup] = []

    def start_group(cluster: ClusterConfig) -> WorkerGroup:
        groups.append(WorkerGroup(plan_of("paper", 2, 1, k=2), cluster))
        groups[-1].start()
        return groups[-1]

    yield start_group
    for group in groups:
        group.shutdown()


def is_gone(pid: int, within_s: float = 20.0) -> bool:
    """Wait for a process to end; a zombie has ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat")
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def train_until_failure(group: WorkerGroup, first_step: int) -> WorkerFailure:
    """Submit steps, and collect them until one fails."""
    for step in range(first_step, first_step + 3):
        group.submit_step(step, random_batch(5, seed=step), 0.1)
    with pytest.raises(WorkerFailure) as caught:
        for _ in range(3):
            group.collect_step()
    return caught.value


def test_a_killed_rank_is_named_and_all_others_end(start: Start) -> None:
    group = start(SMALL_SHARE)
    pids = [status.pid for status in group.statuses]
    assert len(set(pids)) == 3
    machines = group.machines
    expected = automatic_threads(machines[0].num_cores, 3)
    assert [machine.num_threads for machine in machines] == [expected] * 3
    assert all(machine.keeps_memory for machine in machines)
    group.submit_step(1, random_batch(5), 0.1)
    assert group.collect_step().loss.num_tokens > 0
    os.kill(pids[1], signal.SIGKILL)
    error = train_until_failure(group, 2)
    assert error.failure.kind is FailureKind.DIED
    assert (error.failure.rank, error.failure.step) == (1, 2)
    assert error.failure.node == group.statuses[1].node
    assert "\n" not in str(error)
    assert str(error).startswith("rank 1 on node ")
    assert "its process died" in str(error)
    assert "memory" not in str(error), "nothing is known of a lack of memory"
    group.shutdown()
    assert all(is_gone(pid) for pid in pids)


def test_a_killed_rank_of_a_replica_is_named_and_those_of_the_others_end(
    ray_cluster: None,
) -> None:
    group = WorkerGroup(plan_of("paper", 1, 1, k=2, replicas=2), SMALL_SHARE)
    try:
        group.start()
        pids = [status.pid for status in group.statuses]
        assert len(set(pids)) == 4
        group.submit_step(1, random_batch(5), 0.1)
        outcome = group.collect_step()
        assert (len(outcome.busy_s), len(outcome.wait_s)) == (4, 4)
        os.kill(pids[3], signal.SIGKILL)
        error = train_until_failure(group, 2)
        assert error.failure.kind is FailureKind.DIED
        assert (error.failure.rank, error.failure.replica, error.failure.step) == (1, 1, 2)
        assert str(error).startswith("rank 1 of replica 1 on node ")
    finally:
        group.shutdown()
    assert all(is_gone(pid) for pid in pids)


def test_an_error_inside_a_rank_comes_back_typed_and_later_calls_fail(
    start: Start, tmp_path: Path
) -> None:
    group = start(SMALL_SHARE)
    group.submit_step(1, random_batch(5), math.inf)
    group.collect_step()
    error = train_until_failure(group, 2)
    assert error.failure.kind is FailureKind.USER_ERROR
    assert error.failure.step == 2
    assert "the gradient's norm is nan" in str(error)
    with pytest.raises(WorkerFailure, match="it had stopped"):
        group.load(tmp_path)


@pytest.mark.slow
def test_a_rank_that_hangs_is_found_by_its_silence(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_calls, "PROBE_S", 2.0)
    monkeypatch.setattr(worker_calls, "SETTLE_S", 1.0)
    group = start(ClusterConfig(cpus_per_rank=0.1, timeout_s=6.0))
    pids = [status.pid for status in group.statuses]
    os.kill(pids[2], signal.SIGSTOP)
    try:
        error = train_until_failure(group, 1)
        assert error.failure.kind is FailureKind.NOT_ANSWERING
        assert error.failure.rank == 2
        group.shutdown()
        assert all(is_gone(pid) for pid in pids)
    finally:
        for pid in pids:
            if not is_gone(pid, 0.1):
                os.kill(pid, signal.SIGKILL)


def test_a_wait_ends_when_the_user_wants_an_end(ray_cluster: None) -> None:
    interruption = Interruption()
    interruption.request()
    group = WorkerGroup(plan_of("single"), SMALL_SHARE, check=interruption.check)
    with pytest.raises(Interrupted):
        group.start()
    group.shutdown()
    assert group.actors == []


def test_a_layout_beyond_the_cluster_is_refused_in_one_line(ray_cluster: None) -> None:
    group = WorkerGroup(plan_of("paper", 4, 4), ClusterConfig(cpus_per_rank=50.0))
    with pytest.raises(ClusterError, match=r"8 ranks need 400 CPUs and the Ray cluster has 16;"):
        group.start()
