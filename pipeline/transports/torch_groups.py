"""Makes torch's process groups for a transport, outside torch's global registry.

A transport has two: one for what goes to higher ranks, and one for what goes to lower ranks. With
gloo they are the same. nccl runs all transfers of a group between two ranks in one stream, so there
a receive posted ahead would hold up the very sends that it indirectly waits for.
"""

from collections.abc import Sequence
from datetime import timedelta
from itertools import combinations
from typing import Protocol, cast

import torch
from torch import Tensor
from torch import distributed as dist

# torch.distributed has these names too, but does not export them to type checkers.
from torch._C._distributed_c10d import PrefixStore, Store


class Group(Protocol):
    """What is used of a process group; torch's own annotations leave it out."""

    def send(self, tensors: Sequence[Tensor], destination: int, tag: int, /) -> dist.Work:
        """Start to send to a rank."""

    def recv(self, tensors: Sequence[Tensor], source: int, tag: int, /) -> dist.Work:
        """Start to receive into the tensors."""

    def allreduce(self, tensors: Sequence[Tensor], /) -> dist.Work:
        """Start to sum over ranks, in place."""


Groups = tuple[Group, Group]


def gloo_groups(store: Store, rank: int, num_ranks: int, timeout: timedelta) -> Groups:
    """Meet all ranks over TCP, on the interface that GLOO_SOCKET_IFNAME names if it is set."""
    group = cast(Group, dist.ProcessGroupGloo(store, rank, num_ranks, timeout))
    return group, group


def nccl_groups(
    store: Store, rank: int, num_ranks: int, timeout: timedelta, device: torch.device
) -> Groups:
    """Meet all ranks, each with its own CUDA device, and open the way between every two of them."""
    if device.index is not None:
        torch.cuda.set_device(device)
    upward = _nccl_group(PrefixStore("upward", store), rank, num_ranks, timeout)
    downward = _nccl_group(PrefixStore("downward", store), rank, num_ranks, timeout)
    # nccl opens a way at the first transfer and blocks until both ends are there, so all ranks go
    # through the pairs in one order here, before any schedule has an order of its own.
    one = torch.zeros(1, device=device)
    for low, high in combinations(range(num_ranks), 2):
        if rank == low:
            upward.send([one], high, 0).wait()
            downward.recv([one], high, 0).wait()
        elif rank == high:
            upward.recv([one], low, 0).wait()
            downward.send([one], low, 0).wait()
    return upward, downward


def _nccl_group(store: Store, rank: int, num_ranks: int, timeout: timedelta) -> Group:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return cast(Group, dist.ProcessGroupNCCL(store, rank, num_ranks, options))
