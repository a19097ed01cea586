"""What the contest runs on."""

import os
import platform
from pathlib import Path

import torch

from model.processor import has_fast_bfloat16


def description() -> str:
    """Return the processor, its cores, torch and its instruction set, and the load, in a line."""
    bits = "with" if has_fast_bfloat16() else "without"
    instructions = torch.backends.cpu.get_cpu_capability()
    return (
        f"{_processor()}, {os.cpu_count()} cores, {instructions}, {bits} bfloat16 in hardware; "
        f"torch {torch.__version__}; load {os.getloadavg()[0]:.1f}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
