"""What `baton doctor` finds out: what the machine is, and which path training takes on it.

Every finding is a fact; where something is amiss it has a remedy, and it is a failure only where
nothing can be trained until that is mended.
"""

import importlib.metadata
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed

from cluster.cores import automatic_threads, num_usable_cores, usable_cores
from cluster.host import host_memory, product_rate
from cluster.memory_table import GIB
from model.process_memory import keep_freed_memory, keeps_freed_memory
from model.processor import Processor, automatic_precision, this_processor
from pipeline.transports.shared_memory_meeting import machine_id

_MUCH_FASTER = 1.2
_LIBRARIES = ("ray", "mlflow", "pyarrow", "safetensors", "sentencepiece")


@dataclass(frozen=True)
class Finding:
    """One fact, in words and as values for scripts; `remedy` is empty where all is well."""

    name: str
    fact: str
    remedy: str = ""
    is_failure: bool = False
    values: Mapping[str, Any] = field(default_factory=dict)


def examine_machine(*, measure: bool = True) -> list[Finding]:
    """Return what this machine is; measuring products takes about a second."""
    processor = this_processor()
    return [
        _python(),
        *_processor(processor),
        *([_products(processor)] if measure else []),
        _cores(),
        _memory(),
        _allocator(),
        _transport(),
        _shared_memory(),
        *_gpus(),
        _recurrence(),
        *_libraries(),
    ]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    fact = f"Python {version} on {sys.platform}, torch {torch.__version__}"
    return Finding("software", fact, values={"python": version, "torch": torch.__version__})


def _processor(processor: Processor) -> Iterator[Finding]:
    lowered = ", ".join(processor.lowered_by)
    yield Finding(
        "processor",
        f"{processor.name} ({processor.architecture}); torch uses its {processor.kernels} kernels",
        remedy=f"{lowered} may hold newer instructions back; unset it" if lowered else "",
        values={
            "processor": processor.name,
            "architecture": processor.architecture,
            "kernels": processor.kernels,
            "lowered_by": list(processor.lowered_by),
        },
    )
    units = " and ".join(processor.bfloat16_units)
    precision = automatic_precision()
    yield Finding(
        "precision",
        f"training.precision=auto is {precision} on this processor: it "
        + (f"multiplies bfloat16 by {units}" if units else "has no fast bfloat16 instructions"),
        values={"bfloat16_units": list(processor.bfloat16_units), "auto_precision": precision},
    )


def _products(processor: Processor) -> Finding:
    rates = {
        name: product_rate(dtype)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    remedy = ""
    is_faster = rates["bfloat16"] > _MUCH_FASTER * rates["float32"]
    if is_faster and not processor.has_fast_bfloat16:
        remedy = "bfloat16 is faster here than auto knows; set training.precision=bfloat16"
    if processor.has_fast_bfloat16 and rates["bfloat16"] < rates["float32"]:
        remedy = "bfloat16 is slower here than auto expects; set training.precision=float32"
    each = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in rates.items())
    return Finding(
        "products",
        f"{each}, measured on one thread",
        remedy,
        values={f"{name}_flop_per_s": rate for name, rate in rates.items()},
    )


def _cores() -> Finding:
    allowed, num_cores = usable_cores(), num_usable_cores()
    ranks = sorted({1, 2, num_cores})
    threads = ", ".join(f"{automatic_threads(num_cores, count)} with {count}" for count in ranks)
    return Finding(
        "cores",
        f"{num_cores} usable; cluster.threads_per_rank=auto is {threads} "
        f"{'rank' if ranks[-1] == 1 else 'ranks'} on this machine",
        values={"usable_cores": num_cores, "affinity": list(allowed)},
    )


def _memory() -> Finding:
    memory = host_memory()
    if memory is None:
        return Finding("memory", "this system does not tell how much there is")
    return Finding(
        "memory",
        f"{memory.total_bytes / GIB:.1f} GiB, of which {memory.available_bytes / GIB:.1f} GiB "
        "are free",
        values={
            "memory_bytes": memory.total_bytes,
            "free_memory_bytes": memory.available_bytes,
        },
    )


def _allocator() -> Finding:
    is_kept = keep_freed_memory() and keeps_freed_memory()
    fact = "ranks keep the memory of freed tensors (GNU C library)"
    if not is_kept:
        fact = "freed tensors go back to the system, so that every large one costs page faults"
    return Finding("allocator", fact, values={"keeps_freed_memory": is_kept})


def _transport() -> Finding:
    has_gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    names = [name for name, found in (("gloo", has_gloo), ("NCCL", has_nccl)) if found]
    return Finding(
        "transport",
        f"torch.distributed with {' and '.join(names) or 'neither gloo nor NCCL'}"
        + ("" if has_nccl else "; NCCL, for ranks on GPUs, is not there"),
        remedy="" if has_gloo else "install a build of torch that has gloo",
        is_failure=not has_gloo,
        values={"gloo": has_gloo, "nccl": has_nccl},
    )


def _shared_memory() -> Finding:
    is_usable = machine_id() is not None
    fact = "ranks of this machine can hand tensors over in shared memory"
    if not is_usable:
        fact = "no shared memory without a name (memfd); ranks here use the network"
    return Finding("link", fact, values={"shared_memory": is_usable})


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        reason = "torch is built without CUDA"
        if torch.version.cuda is not None:
            reason = "torch has CUDA, but finds no driver or no GPU"
        yield Finding("gpu", f"no CUDA device: {reason}", values={"cuda_devices": []})
        return
    for number in range(torch.cuda.device_count()):
        device = f"cuda:{number}"
        major, minor = torch.cuda.get_device_capability(device)
        size = torch.cuda.get_device_properties(device).total_memory
        yield Finding(
            f"gpu {number}",
            f"{torch.cuda.get_device_name(device)}, capability {major}.{minor}, "
            f"{size / GIB:.0f} GiB; training.precision=auto is {automatic_precision(device)}",
            values={f"cuda_{number}_capability": [major, minor], f"cuda_{number}_bytes": size},
        )


def _recurrence() -> Finding:
    return Finding(
        "recurrence", "torch's own operations, position by position, with hand-written gradients"
    )


def _libraries() -> Iterator[Finding]:
    versions: dict[str, str | None] = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    missing = [name for name, version in versions.items() if version is None]
    yield Finding(
        "libraries",
        ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items()),
        remedy=f"install {' and '.join(missing)}, see pyproject.toml" if missing else "",
        is_failure=bool(missing),
        values={"libraries": versions},
    )
