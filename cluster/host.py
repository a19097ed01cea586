"""The machine that this process runs on, in figures: memory, and how fast products are.

What it can do in principle is in `model.processor`, which cores it may use in `cluster.cores`.
"""

import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

_MEMORY = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# A batch of 128 sentences through one layer of 1000 cells: large enough for the full rate.
_ROWS, _INNER, _COLUMNS = 512, 1000, 4000
_TRIALS_S = 0.3


@dataclass(frozen=True)
class HostMemory:
    """Bytes that the host has, or that the control group allows, and how many are free for use."""

    total_bytes: int
    available_bytes: int


def host_memory(meminfo: Path = _MEMORY, cgroup: Path = _CGROUP) -> HostMemory | None:
    """Return the memory of the host; None where the system does not tell."""
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        total, available = (
            int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable")
        )
    elif sys.platform == "darwin":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        available = total
    else:
        return None
    limit, used = _group_memory(cgroup)
    if limit is not None and limit < total:
        total, available = limit, min(available, max(0, limit - used))
    return HostMemory(total, available)


def product_rate(dtype: torch.dtype, num_threads: int = 1) -> float:
    """Measure the floating-point operations a second of large products on so many threads.

    Takes about half a second; a multiply-add counts as two. The caller's threads are left as they
    were.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        left = torch.ones(_ROWS, _INNER, dtype=dtype)
        right = torch.ones(_COLUMNS, _INNER, dtype=dtype)
        times = [_seconds(left, right)]
        end = time.perf_counter() + _TRIALS_S
        while time.perf_counter() < end or len(times) < 2:
            times.append(_seconds(left, right))
    finally:
        torch.set_num_threads(before)
    return 2.0 * _ROWS * _INNER * _COLUMNS / statistics.median(times[1:])


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.nn.functional.linear(left, right)
    return time.perf_counter() - start


def _group_memory(cgroup: Path) -> tuple[int | None, int]:
    """Return the limit of the control group in bytes, None without one, and what is used of it."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit = (cgroup / limit_name).read_text().strip()
            used = int((cgroup / used_name).read_text()) - _cached_files(cgroup / used_name)
            return (None if limit == "max" else int(limit)), used
        except (OSError, ValueError):
            continue
    return None, 0


def _cached_files(used: Path) -> int:
    """Return how many of the used bytes the system takes back when they are needed."""
    statistics_file = used.with_name("memory.stat")
    lines = statistics_file.read_text().splitlines() if statistics_file.exists() else []
    for line in lines:
        name, _, value = line.partition(" ")
        # Version 1 of control groups gives the sum over a group's children another name.
        if name == ("inactive_file" if used.name == "memory.current" else "total_inactive_file"):
            return int(value)
    return 0
