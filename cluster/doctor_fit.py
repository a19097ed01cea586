"""Whether a configuration fits the machine: ranks, threads, GPUs, and memory by the memory model.

Ranks are taken to run on this machine; where `cluster.address` names a cluster they need not, and
what does not fit here is then no failure.
"""

import os
from collections.abc import Iterator, Sequence

import torch

from cluster.config import Config
from cluster.cores import num_usable_cores
from cluster.doctor import Finding
from cluster.host import host_memory
from cluster.layout import layout_words, plan_of
from cluster.memory_table import GIB, memory_by_model
from cluster.precision_choice import for_training
from cluster.rank_machine import rank_threads
from pipeline.placements.description import counted
from pipeline.plan import Plan

PROCESS_BYTES = 350 << 20
"""What a rank's process takes beside its tensors, for Python, torch and Ray."""


def examine_fit(config: Config) -> list[Finding]:
    """Return how a configuration would run on this machine. Raises UserError if it cannot at all.

    Batches are taken to be full of the longest sentences that `corpus.max_length` allows.
    """
    config = for_training(config)
    sizes = config.corpus.source_vocabulary.size, config.corpus.target_vocabulary.size
    plan = plan_of(config, config.model_config_for(*sizes))
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    is_here = address in (None, "", "local")
    return [
        _layout(config, plan),
        *_cores(config, plan),
        *_device(config, plan, is_here=is_here),
        *_memory(config, plan, is_here=is_here),
    ]


def _layout(config: Config, plan: Plan) -> Finding:
    return Finding(
        config.name,
        f"{plan.model.num_parameters():,} weights in {plan.precision} on {layout_words(plan)}",
        values={
            "weights": plan.model.num_parameters(),
            "precision": plan.precision,
            "workers": plan.num_workers,
        },
    )


def _cores(config: Config, plan: Plan) -> Iterator[Finding]:
    cluster, num_cores, count = config.cluster, num_usable_cores(), plan.num_workers
    threads = rank_threads(cluster.threads_per_rank, count, num_cores, cluster.device)
    is_crowded = cluster.device == "cpu" and threads * count > num_cores
    yield Finding(
        "threads",
        f"{counted(count, 'rank')} of {counted(threads, 'thread')} on "
        f"{counted(num_cores, 'usable core')} of this machine"
        + ("" if cluster.pin_cores else "; cores are not pinned"),
        remedy="ranks will wait for cores; use fewer ranks or threads, or more machines"
        if is_crowded
        else "",
        values={"threads_per_rank": threads, "pin_cores": cluster.pin_cores},
    )


def _device(config: Config, plan: Plan, *, is_here: bool) -> Iterator[Finding]:
    if config.cluster.device != "cuda":
        return
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    is_short = found < plan.num_workers
    yield Finding(
        "gpus",
        f"cluster.device=cuda takes {counted(plan.num_workers, 'GPU')}; this machine has {found}",
        remedy="set cluster.address to a Ray cluster that has them, or cluster.device=cpu"
        if is_short
        else "",
        is_failure=is_short and is_here,
        values={"cuda_devices_needed": plan.num_workers, "cuda_devices_here": found},
    )


def _memory(config: Config, plan: Plan, *, is_here: bool) -> Iterator[Finding]:
    device = config.cluster.device
    if device == "emulated":
        return
    num_positions = config.corpus.max_length + 1
    tensors = memory_by_model(plan, config.training.batch_size, num_positions)
    fact = (
        f"{_gib(tensors)} GiB of tensors a rank, in batches full of {num_positions} + "
        f"{num_positions} positions"
    )
    values = {"rank_tensor_bytes": list(tensors)}
    if device == "cuda":
        yield _on_gpus(fact, tensors, values, is_here=is_here)
        return
    needed = sum(tensors) + plan.num_workers * PROCESS_BYTES
    memory = host_memory()
    fact += f"; {needed / GIB:.1f} GiB for all processes"
    if memory is None:
        yield Finding("memory", fact, values=values)
        return
    total, free = memory.total_bytes, memory.available_bytes
    fact += f", of {free / GIB:.1f} GiB free here ({total / GIB:.1f} GiB in all)"
    remedy = ""
    if needed > free:
        remedy = (
            "use a smaller training.batch_size, corpus.max_length or more pipeline.microbatches"
            if needed > total
            else "end what takes memory on this machine, or use a smaller training.batch_size"
        )
    yield Finding("memory", fact, remedy, is_failure=needed > total and is_here, values=values)


def _on_gpus(
    fact: str, tensors: Sequence[int], values: dict[str, list[int]], *, is_here: bool
) -> Finding:
    if not torch.cuda.is_available():
        return Finding("memory", f"{fact}; no GPU here to compare with", values=values)
    size = torch.cuda.get_device_properties("cuda:0").total_memory
    is_short = max(tensors) > size
    return Finding(
        "memory",
        f"{fact}, of {size / GIB:.0f} GiB of a GPU",
        remedy="use more ranks, or a smaller training.batch_size" if is_short else "",
        is_failure=is_short and is_here,
        values=values,
    )


def _gib(sizes: Sequence[int]) -> str:
    least, most = f"{min(sizes) / GIB:.1f}", f"{max(sizes) / GIB:.1f}"
    return most if least == most else f"{least} to {most}"
