"""The cores that this process may use, and how many threads of them a rank takes.

A container may see more cores than it may use: the affinity of the process and the quota of its
control group both limit it.
"""

import math
import os
import sys
from pathlib import Path

MOST_THREADS = 32
"""Of a rank that may choose; more ranks do more with further cores than more threads do."""
_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> tuple[int, ...]:
    """Return the numbers of the cores that this process may run on, in order."""
    if sys.platform.startswith("linux"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def num_usable_cores(cgroup: Path = _CGROUP) -> int:
    """Count the cores whose time this process can have, at least 1."""
    num_cores = len(usable_cores())
    quota = _quota(cgroup)
    return num_cores if quota is None else max(1, min(num_cores, math.ceil(quota)))


def automatic_threads(num_cores: int, num_ranks: int) -> int:
    """Return the threads of each of so many ranks that share a machine's cores, at least 1."""
    return max(1, min(MOST_THREADS, num_cores // max(1, num_ranks)))


def cores_of_rank(
    cores: tuple[int, ...], num_threads: int, num_ranks: int, index: int
) -> tuple[int, ...] | None:
    """Return the cores of rank `index` of those that share a machine; None if there are too few."""
    if num_threads * num_ranks > len(cores):
        return None
    return cores[index * num_threads : (index + 1) * num_threads]


def pin_to(cores: tuple[int, ...]) -> bool:
    """Keep all threads of this process, and those that they start, on some cores.

    Returns False where the system cannot, or a core is not there.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(thread.name), cores)
    except OSError:
        return False
    return True


def _quota(cgroup: Path) -> float | None:
    """Return the cores' worth of time that the control group allows; None without a limit."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()[:2]
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:  # version 1
        limit_us = int((cgroup / "cpu" / "cpu.cfs_quota_us").read_text())
        period_us = int((cgroup / "cpu" / "cpu.cfs_period_us").read_text())
        return limit_us / period_us if limit_us > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
