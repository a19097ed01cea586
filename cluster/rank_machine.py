"""What every rank computes with on its node: told by the rank, reported and compared by the driver.

The last bits of results depend on the number of threads, on the instruction set of torch's kernels
and on torch itself. So these are kept with every checkpoint, and a resumed run tells what changed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from cluster.cores import automatic_threads, cores_of_rank, num_usable_cores, pin_to, usable_cores
from model.precision import Precision
from model.process_memory import keeps_freed_memory
from model.processor import has_fast_bfloat16, this_processor
from pipeline.placements.description import counted


@dataclass(frozen=True)
class NodeShare:
    """A rank's place among the `num_ranks` of its run on the same node: number `index`."""

    num_ranks: int = 1
    index: int = 0


@dataclass(frozen=True)
class RankMachine:
    """What a rank computes with.

    `kernels` is the instruction set of torch's own kernels, `cores` those that the rank is kept on
    (none: the system moves it), `num_cores` those that its node lets it use.
    `has_fast_bfloat16` is None where the device was not found; `keeps_memory` says whether freed
    tensors leave their pages with the process.
    """

    processor: str
    kernels: str
    torch_version: str
    num_threads: int
    num_cores: int
    cores: tuple[int, ...]
    has_fast_bfloat16: bool | None
    keeps_memory: bool


def set_up_rank(
    threads: int | Literal["auto"], share: NodeShare, *, pin_cores: bool, device: str
) -> RankMachine:
    """Choose the threads of the calling rank, pin its cores if that is wanted, and tell both."""
    num_cores = num_usable_cores()
    num_threads = rank_threads(threads, share.num_ranks, num_cores, device)
    cores: tuple[int, ...] = ()
    if pin_cores:
        # A quota of time without cores of one's own leaves nothing to be pinned to.
        mine = cores_of_rank(usable_cores()[:num_cores], num_threads, share.num_ranks, share.index)
        cores = mine if mine is not None and pin_to(mine) else ()
    torch.set_num_threads(num_threads)
    processor = this_processor()
    return RankMachine(
        processor=processor.name,
        kernels=processor.kernels,
        torch_version=torch.__version__,
        num_threads=num_threads,
        num_cores=num_cores,
        cores=cores,
        has_fast_bfloat16=has_fast_bfloat16(device),
        keeps_memory=keeps_freed_memory(),
    )


def rank_threads(
    threads: int | Literal["auto"], num_ranks: int, num_cores: int, device: str = "cpu"
) -> int:
    """Return the threads of a rank that shares so many cores with its run's other ranks."""
    if threads != "auto":
        return threads
    return 1 if device == "emulated" else automatic_threads(num_cores, num_ranks)


def node_shares(nodes: Sequence[str]) -> list[NodeShare]:
    """Return every worker's share; `nodes` has the node of each."""
    seen: dict[str, int] = {}
    shares = []
    for node in nodes:
        shares.append(NodeShare(nodes.count(node), seen.get(node, 0)))
        seen[node] = seen.get(node, 0) + 1
    return shares


def machine_line(machines: Sequence[RankMachine]) -> str:
    """Say in a line what the ranks compute with."""
    parts = [
        _each([counted(machine.num_threads, "thread") for machine in machines]) + " a rank",
        _each([f"{machine.kernels} kernels" for machine in machines]),
        _pinning(machines),
    ]
    if not all(machine.keeps_memory for machine in machines):
        parts.append("freed memory goes back to the system")
    return ", ".join(parts)


def machine_warnings(
    machines: Sequence[RankMachine], precision: str, *, pin_cores: bool
) -> list[str]:
    """Return what is amiss, in lines: slow arithmetic, and cores that could not be pinned."""
    lines = []
    slow = [rank for rank, machine in enumerate(machines) if machine.has_fast_bfloat16 is False]
    if slow and Precision(precision).compute == torch.bfloat16:
        lines.append(
            f"training.precision={precision}, but {_ranks(slow)} on {machines[slow[0]].processor} "
            "without fast bfloat16 arithmetic, which takes several times as long as float32; use "
            "training.precision=float32, or nodes that have it"
        )
    free = [rank for rank, machine in enumerate(machines) if not machine.cores]
    if free and pin_cores:
        num_cores = machines[free[0]].num_cores
        lines.append(
            f"cluster.pin_cores=true, but {_ranks(free)} not pinned: the node's {num_cores} "
            "usable cores are fewer than this run's threads there, or its system does not let "
            "processes choose their cores; use fewer ranks or threads a node, or "
            "cluster.pin_cores=false"
        )
    return lines


def to_file(machines: Sequence[RankMachine]) -> bytes:
    """Return what a checkpoint keeps: all that the last bits of results depend on."""
    return json.dumps(_last_bits(machines), indent=1, sort_keys=True).encode()


def change_since(stored: bytes, machines: Sequence[RankMachine]) -> str | None:
    """Return a line if a checkpoint's machine and this one round differently; None if they agree.

    Which rank had what does not count, since layouts may differ.
    """
    try:
        then = json.loads(stored)
        changed = [
            f"{name} {', '.join(then[name])} then and {', '.join(now)} now"
            for name, now in _last_bits(machines).items()
            if then[name] != now
        ]
    except (ValueError, KeyError, TypeError):
        return None  # of another version: nothing can be said
    if not changed:
        return None
    return (
        f"the last bits will differ from those of a run without a break: {'; '.join(changed)}; "
        "cluster.threads_per_rank and ATEN_CPU_CAPABILITY can set the former ones"
    )


def _last_bits(machines: Sequence[RankMachine]) -> dict[str, list[str]]:
    return {
        "threads a rank": sorted({str(machine.num_threads) for machine in machines}),
        "kernels": sorted({machine.kernels for machine in machines}),
        "torch": sorted({machine.torch_version for machine in machines}),
    }


def _pinning(machines: Sequence[RankMachine]) -> str:
    if not any(machine.cores for machine in machines):
        return "cores not pinned"
    return "cores " + " | ".join(
        ",".join(map(str, machine.cores)) if machine.cores else "not pinned" for machine in machines
    )


def _each(values: Sequence[str]) -> str:
    """Return the value that all have, or all of them in the order of the ranks."""
    return values[0] if len(set(values)) == 1 else " | ".join(values)


def _ranks(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"rank {numbers[0]} is"
    return f"ranks {', '.join(map(str, numbers))} are"
