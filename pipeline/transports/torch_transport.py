"""The transport of real runs: torch.distributed point to point, gloo on CPU or nccl on CUDA.

Its groups are its own and not torch's global ones, so that one can be thrown away and another made
after a failure.
"""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import Work

from pipeline.transports.torch_groups import Group, Groups, gloo_groups, nccl_groups
from pipeline.transports.torch_store import attempt_store
from pipeline.transports.transport import Arrived, Pending, SumTransport, TransportError

Backend = Literal["gloo", "nccl"]


class TorchTransport(SumTransport):
    """One rank's end of a group, made by `connect`; a group of one rank needs no network.

    Over gloo, tensors of a CUDA device go through the host's memory.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        groups: Groups | None,
        device: str,
        wire_device: str,
        member: str = "rank",
    ) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self.bytes_sent = 0
        self._groups = groups
        self._device, self._wire_device = device, wire_device
        self._member = member
        self._ids = count()
        # Work and buffers live here and nowhere else: whoever keeps a piece of work, be it the
        # traceback of an error, keeps the connections open, and then the peers would not notice.
        self._receives: dict[int, tuple[Work, Tensor]] = {}
        self._sends: list[tuple[Work, Tensor, int]] = []
        self._sums: dict[int, tuple[Work, Tensor]] = {}

    @classmethod
    def connect(
        cls,
        host: str,
        port: int,
        rank: int,
        num_ranks: int,
        timeout_s: float = 60.0,
        attempt: int = 0,
        backend: Backend = "gloo",
        device: str = "cpu",
        group: str = "pipeline",
        member: str = "rank",
    ) -> "TorchTransport":
        """Meet the other ranks of a group at a StoreServer's address.

        Every wait, this one and later ones, ends after `timeout_s`. `attempt` counts the lives of
        the group between failures; ranks of different attempts or groups never meet. `device` is
        where received tensors shall be; nccl wants one CUDA device for each rank. `member` is what
        errors call a rank of this group. Raises TransportError.
        """
        assert backend in ("gloo", "nccl"), backend
        wire_device = device if backend == "nccl" else "cpu"
        if num_ranks == 1:
            return cls(rank, num_ranks, None, device, wire_device, member)
        store = attempt_store(host, port, timeout_s, group, attempt)
        timeout = timedelta(seconds=timeout_s)
        try:
            if backend == "nccl":
                groups = nccl_groups(store, rank, num_ranks, timeout, torch.device(device))
            else:
                groups = gloo_groups(store, rank, num_ranks, timeout)
        except RuntimeError as error:
            raise TransportError(
                f"{member} {rank} of {num_ranks} could not join attempt {attempt} of its group "
                f"({_reason(error)}); see whether all ranks started"
            ) from None
        transport = cls(rank, num_ranks, groups, device, wire_device, member)
        if backend == "nccl":
            # nccl's first sum blocks until all ranks are in it; later each has an order of its own.
            transport.all_reduce_sum(torch.zeros(1, dtype=torch.float64))
        return transport

    def send(self, tensor: Tensor, destination: int, tag: int) -> None:
        """Start to send; the tensor is kept until `flush`."""
        if not tensor.numel():
            return
        wired = tensor.to(self._wire_device)
        with self._naming(destination):
            work = self._group_to(destination).send([wired], destination, tag)
            self._sends.append((work, wired, destination))
        self.bytes_sent += tensor.nbytes

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, tag: int) -> Pending:
        """Post the receive into a new buffer."""
        buffer = torch.empty(shape, dtype=dtype, device=self._wire_device)
        if not buffer.numel():
            return Arrived(buffer.to(self._device))
        number = next(self._ids)
        with self._naming(source):
            work = self._group_from(source).recv([buffer], source, tag)
            self._receives[number] = work, buffer
        return _TorchPending(lambda: self._finish(number, source))

    def _finish(self, number: int, source: int) -> Tensor:
        self._open_groups()
        with self._naming(source):
            self._receives[number][0].wait()
        return self._receives.pop(number)[1].to(self._device)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks on the host; each part is summed on one rank and shared."""
        total = tensor.to(self._wire_device, copy=True)
        if self.num_ranks > 1:
            with self._naming(None):
                self._open_groups()[0].allreduce([total]).wait()
        return total.cpu()

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        """Start the sum in gloo's threads, or in a stream of nccl's.

        Around a ring: every rank sends 2 (R - 1) / R of the bytes.
        """
        assert tensor.is_contiguous()
        if self.num_ranks == 1 or not tensor.numel():
            return Arrived(tensor)
        wired = tensor.to(self._wire_device)
        number = next(self._ids)
        with self._naming(None):
            self._sums[number] = self._open_groups()[0].allreduce([wired]), wired
        self.bytes_sent += 2 * (self.num_ranks - 1) * tensor.nbytes // self.num_ranks
        return _TorchPending(lambda: self._finish_sum(number, tensor))

    def _finish_sum(self, number: int, tensor: Tensor) -> Tensor:
        self._open_groups()
        with self._naming(None):
            self._sums[number][0].wait()
        wired = self._sums.pop(number)[1]
        return tensor if wired is tensor else tensor.copy_(wired)

    def flush(self) -> None:
        """Wait for all sends, and let go of their tensors."""
        for index in range(len(self._sends)):
            with self._naming(self._sends[index][2]):
                self._sends[index][0].wait()
        self._sends.clear()

    def close(self) -> None:
        """Drop the connections; those of sums under way as soon as the sums end.

        It does not end a wait of this rank in another thread: only a peer's end or the timeout
        does.
        """
        held: list[object] = [self._groups, *self._sums.values()]
        has_sums = bool(self._sums)
        self._groups = None
        self._receives.clear()
        self._sends.clear()
        self._sums.clear()
        if has_sums:
            # Gloo lets go of a group only after the sums that the peers have still to join; they
            # end, since a peer joins in the end or closes its own group, but not at once.
            threading.Thread(target=held.clear, daemon=True).start()

    def _open_groups(self) -> Groups:
        if self._groups is None:
            raise TransportError(f"{self._member} {self.rank} has left its group; connect it again")
        return self._groups

    def _group_to(self, destination: int) -> Group:
        return self._open_groups()[0 if destination > self.rank else 1]

    def _group_from(self, source: int) -> Group:
        return self._open_groups()[0 if source < self.rank else 1]

    @contextmanager
    def _naming(self, peer: int | None) -> Iterator[None]:
        """Name both ends in torch's errors, and leave the group: it is dead after one."""
        try:
            yield
        except RuntimeError as error:
            self.close()
            lost = "its group" if peer is None else f"{self._member} {peer}"
            raise TransportError(
                f"{self._member} {self.rank} lost {lost} ({_reason(error)}); see whether that "
                "lives, and restart from the last checkpoint"
            ) from None


class _TorchPending:
    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish = finish

    def wait(self) -> Tensor:
        return self._finish()


def _reason(error: RuntimeError) -> str:
    """Return the first sentence of torch's message, without its place in torch's source."""
    first = re.sub(r"^\[[^]]*\]\s*", "", str(error)).splitlines()[0]
    return first.split(". ")[0].rstrip(".")
