"""Threads and cores of ranks that share a machine, and quotas of control groups."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cores import (
    MOST_THREADS,
    automatic_threads,
    cores_of_rank,
    num_usable_cores,
    usable_cores,
)

PINNED = """
import os, threading
from cluster.cores import pin_to, usable_cores
core = usable_cores()[-1:]
start = threading.Event()
seen = []
older = threading.Thread(target=lambda: (start.wait(), seen.append(os.sched_getaffinity(0))))
older.start()
print(pin_to(core), pin_to((100_000,)))
start.set()
older.join()
newer = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
newer.start()
newer.join()
print([set(core) == cores for cores in (*seen, os.sched_getaffinity(0))])
"""


def test_ranks_share_the_cores_and_have_at_least_one_thread() -> None:
    assert [automatic_threads(8, ranks) for ranks in (1, 2, 3, 8, 9)] == [8, 4, 2, 1, 1]
    assert automatic_threads(256, 1) == MOST_THREADS


def test_every_rank_has_cores_of_its_own_or_none_has() -> None:
    cores = (0, 1, 4, 5)
    assert [cores_of_rank(cores, 2, 2, index) for index in range(2)] == [(0, 1), (4, 5)]
    assert [cores_of_rank(cores, 1, 3, index) for index in range(3)] == [(0,), (1,), (4,)]
    assert cores_of_rank(cores, 2, 3, 0) is None


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, len(usable_cores())),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, len(usable_cores())),
        ({}, len(usable_cores())),
    ],
)
def test_a_quota_limits_the_cores(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert num_usable_cores(tmp_path) == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no processes")
def test_pinning_holds_for_threads_that_were_there_and_for_new_ones() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PINNED], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["True False", "[True, True, True]"]
