"""Freed memory stays with the process where that was asked for, in every thread, and is counted."""

import os
import platform
import subprocess
import sys

import pytest

from model.process_memory import KEEPING_ENVIRONMENT, peak_memory_bytes

PROGRAM = """
import sys
from threading import Thread
from model.process_memory import keep_freed_memory, keeps_freed_memory
if sys.argv[1] == "call":
    print(keep_freed_memory())
print(keeps_freed_memory())
thread = Thread(target=lambda: print(keeps_freed_memory()))
thread.start()
thread.join()
"""
GROWTH = """
import torch
from model.process_memory import peak_memory_bytes
before = peak_memory_bytes()
torch.ones(64 << 20, dtype=torch.uint8)
print(peak_memory_bytes() - before >> 20)
"""


def run(program: str, *arguments: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc",
    reason="only the GNU C library can be told to keep memory",
)
def test_a_process_keeps_memory_when_it_is_told_to_and_not_otherwise() -> None:
    assert run(PROGRAM, "as it is") == ["False", "False"]
    assert run(PROGRAM, "call") == ["True", "True", "True"]
    assert run(PROGRAM, "from the start", **KEEPING_ENVIRONMENT) == ["True", "True"]


def test_the_peak_counts_what_was_freed_again() -> None:
    assert 56 <= int(run(GROWTH)[0]) <= 80
    assert peak_memory_bytes() > 50e6
