"""The transport of ranks of which some share a machine: those hand tensors over in shared memory.

A tensor is written into memory that sender and receivers map, by whoever makes it or by one copy,
however many receivers it has; they read it in place. Everything else goes through
torch.distributed, as do all tensors of CUDA devices, whose own libraries know better ways.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

from pipeline.transports.shared_memory_link import PeerLink
from pipeline.transports.shared_memory_meeting import meet_on_machine
from pipeline.transports.shared_memory_segments import Arena, Segment
from pipeline.transports.torch_store import attempt_store
from pipeline.transports.torch_transport import Backend, TorchTransport
from pipeline.transports.transport import Arrived, Pending, SumTransport, TransportError


def connect_ranks(
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
    *,
    shared_memory: bool = True,
) -> SumTransport:
    """Meet the other ranks of a group, like TorchTransport.connect, and take the best way to each.

    `shared_memory` must be the same on all ranks. Raises TransportError.
    """
    network = TorchTransport.connect(
        host, port, rank, num_ranks, timeout_s, attempt, backend, device, group, member
    )
    if not shared_memory or num_ranks == 1 or device != "cpu":
        return network
    try:
        store = attempt_store(host, port, timeout_s, group, attempt)
        sockets = meet_on_machine(store, host, port, rank, num_ranks, timeout_s)
    except BaseException:
        network.close()
        raise
    if not sockets:
        return network
    transport = SharedMemoryTransport(network)
    try:
        for peer, connection in sockets.items():
            transport.links[peer] = PeerLink(rank, peer, connection, timeout_s, transport.close)
    except BaseException:
        transport.close()
        for connection in sockets.values():
            connection.close()
        raise
    return transport


class SharedMemoryTransport(SumTransport):
    """One rank's end of a group, made by `connect_ranks`.

    Received tensors must not be changed, since others may read the same memory. They hold until
    `flush`.
    """

    def __init__(self, network: TorchTransport) -> None:
        self.rank, self.num_ranks = network.rank, network.num_ranks
        self.bytes_sent = 0
        self.links: dict[int, PeerLink] = {}
        self._network = network
        self.arena = Arena()
        self._places: dict[int, tuple[Segment, int]] = {}

    def send(self, tensor: Tensor, destination: int, tag: int) -> None:
        """Send to one rank."""
        self.multicast(tensor, ((destination, tag),))

    def multicast(self, tensor: Tensor, receivers: Sequence[tuple[int, int]]) -> None:
        """Copy the tensor once for all receivers on this machine; send it to the others."""
        num_bytes = tensor.nbytes
        if not num_bytes:
            return
        place = self._places.get(tensor.data_ptr()) if tensor.is_contiguous() else None
        for destination, tag in receivers:
            link = self.links.get(destination)
            if link is None:
                with self.leaving_on_error():
                    self._network.send(tensor, destination, tag)
            else:
                place = place or self._copied(tensor)
                link.announce(tag, *place)
            self.bytes_sent += num_bytes

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory that the ranks of this machine can read, so that it needs no copy."""
        segment, offset = self._reserve(prod(shape) * dtype.itemsize)
        tensor = segment.mapped.tensor(offset, shape, dtype)
        self._places[tensor.data_ptr()] = segment, offset
        return tensor

    def _copied(self, tensor: Tensor) -> tuple[Segment, int]:
        segment, offset = self._reserve(tensor.nbytes)
        segment.mapped.tensor(offset, tuple(tensor.shape), tensor.dtype).copy_(tensor)
        return segment, offset

    def _reserve(self, num_bytes: int) -> tuple[Segment, int]:
        try:
            return self.arena.reserve(num_bytes)
        except OSError as error:
            self.close()
            raise TransportError(
                f"rank {self.rank} got no shared memory for {num_bytes} bytes ({error.strerror}); "
                "raise the limit, or set cluster.shared_memory: false"
            ) from None

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, tag: int) -> Pending:
        """Look where the tensor lies when it is waited for."""
        link = self.links.get(source)
        if link is None:
            with self.leaving_on_error():
                return _Networked(self, self._network.receive(shape, dtype, source, tag))
        if not prod(shape):
            return Arrived(torch.empty(shape, dtype=dtype))
        return _Announced(link, shape, dtype, tag)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Add in the order of ranks on rank 0, where all share a machine."""
        if len(self.links) < self.num_ranks - 1:
            with self.leaving_on_error():
                return self._network.all_reduce_sum(tensor)
        total = tensor.clone()
        if self.rank:
            self.links[0].send_bytes(_bytes_of(total))
            return _from_bytes(self.links[0].take_bytes(), total)
        others = [link for _, link in sorted(self.links.items())]
        for link in others:
            total += _from_bytes(link.take_bytes(), total)
        for link in others:
            link.send_bytes(_bytes_of(total))
        return total

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        """Leave large sums to the network's own algorithms.

        Here so that a group is the same to whoever connects it, whichever ways it has.
        """
        before = self._network.bytes_sent
        with self.leaving_on_error():
            pending = _Networked(self, self._network.start_all_reduce(tensor))
        self.bytes_sent += self._network.bytes_sent - before
        return pending

    def flush(self) -> None:
        """End a pass: what was received until now is not read any more."""
        # First, since what goes over the network may lie in memory that was received here.
        with self.leaving_on_error():
            self._network.flush()
        for link in self.links.values():
            link.tell_read()
        self._places.clear()
        self.arena.end_pass(list(self.links.values()))

    def close(self) -> None:
        """Leave the group on every way."""
        links, self.links = self.links, {}
        # First, since these peers hear of it at once.
        for link in links.values():
            link.close()
        self._network.close()
        self.arena.close()

    @contextmanager
    def leaving_on_error(self) -> Iterator[None]:
        """Leave on every way if the network fails, so that the ranks of this machine learn it."""
        try:
            yield
        except TransportError:
            self.close()
            raise


class _Networked:
    __slots__ = ("_pending", "_transport")

    def __init__(self, transport: SharedMemoryTransport, pending: Pending) -> None:
        self._transport, self._pending = transport, pending

    def wait(self) -> Tensor:
        with self._transport.leaving_on_error():
            return self._pending.wait()


class _Announced:
    __slots__ = ("_dtype", "_link", "_shape", "_tag")

    def __init__(
        self, link: PeerLink, shape: tuple[int, ...], dtype: torch.dtype, tag: int
    ) -> None:
        self._link, self._tag = link, tag
        self._shape, self._dtype = shape, dtype

    def wait(self) -> Tensor:
        _, segment, offset = self._link.take(self._tag)
        return segment.tensor(offset, self._shape, self._dtype)


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def _from_bytes(data: bytes, like: Tensor) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=like.dtype).view(like.shape)
