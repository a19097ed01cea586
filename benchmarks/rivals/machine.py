"""What the contest runs on."""

import os
import platform
from pathlib import Path

import torch


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware (AMX or AVX512-BF16)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def description() -> str:
    """Return the processor, its cores, torch and its instruction set, and the load, in a line."""
    bits = "with" if fast_bfloat16() else "without"
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
