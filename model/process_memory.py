"""The memory of this process: kept for later use when tensors are freed, and measured.

By its defaults the GNU C library maps every large tensor anew and hands it back when it is freed,
so that a step pays for the same pages again and again: a system call, a fault and a page of zeros
for every 4 KiB. Kept memory is never handed back; a process then stays as large as it once was.
"""

import ctypes
import resource
import sys
from pathlib import Path

import torch

KEEPING_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}
"""What makes a process that starts with it keep its memory, in all threads from the first one."""
# Numbers of <malloc.h>. Other arenas than the first cannot grow beyond 64 MiB; large blocks of
# their threads would be mapped anew as before.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_PROBE_BYTES = 48 << 20
_KEPT_FAULTS = 64
_STATUS = Path("/proc/self/status")


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors; returns whether it can.

    Best called before other threads start. Does nothing, and returns False, where the C library is
    not GNU's.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
    return all(library.mallopt(number, value) == 1 for number, value in settings)


def keeps_freed_memory() -> bool:
    """Find out by trying whether a large tensor gets the pages of one that was freed before.

    Speaks for the calling thread, on Linux; takes some hundredths of a second and 48 MiB.
    """
    if not sys.platform.startswith("linux"):
        return False
    faults = 0
    # An aligned block needs a little room to spare, so a second one of the same size may not fit.
    for num_bytes in (_PROBE_BYTES, _PROBE_BYTES - (1 << 20)):
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        torch.ones(num_bytes // 4)
        faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
    return faults <= _KEPT_FAULTS


def peak_memory_bytes(device: str = "cpu") -> int:
    """Return the most that this process has held: of the GPU's memory for CUDA, else of the host's.

    On the host everything counts that was in memory at the same time, libraries and what is shared
    with other processes included; about 300 MB of it are there before any tensor.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
