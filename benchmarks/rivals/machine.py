"""What the contest runs on."""

import os

import torch

from model.processor import has_fast_bfloat16, this_processor


def description() -> str:
    """Return the processor, its cores, torch and its instruction set, and the load, in a line."""
    bits = "with" if has_fast_bfloat16() else "without"
    instructions = torch.backends.cpu.get_cpu_capability()
    name = this_processor().name
    return (
        f"{name}, {os.cpu_count()} cores, {instructions}, {bits} bfloat16 in hardware; "
        f"torch {torch.__version__}; load {os.getloadavg()[0]:.1f}"
    )
