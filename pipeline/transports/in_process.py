"""A transport between the threads of one process, for tests and debuggers."""

import queue
import threading

import torch
from torch import Tensor

from pipeline.transports.transport import Arrived, Pending, SumTransport, TransportError


class _Hub:
    """What the threads of an in-process group share."""

    def __init__(self, num_ranks: int, timeout_s: float, member: str) -> None:
        self.timeout_s = timeout_s
        self.member = member
        self.queues: dict[tuple[int, int], queue.SimpleQueue[tuple[int, Tensor] | None]] = {
            (source, destination): queue.SimpleQueue()
            for source in range(num_ranks)
            for destination in range(num_ranks)
        }
        self.barrier = threading.Barrier(num_ranks)
        self.terms: list[Tensor | None] = [None] * num_ranks


class InProcessTransport(SumTransport):
    """One rank's end of a group of threads; make all of them with `in_process_transports`.

    It sends every term of a sum to every rank, so `bytes_sent` is more than on a ring.
    """

    def __init__(self, rank: int, num_ranks: int, hub: _Hub) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.bytes_sent = 0
        self._hub = hub
        self._early: dict[tuple[int, int], Tensor] = {}
        self._num_sums = 0

    def send(self, tensor: Tensor, destination: int, tag: int) -> None:
        """Hand over a copy, as a real network would."""
        if tensor.numel():
            self._hub.queues[self.rank, destination].put((tag, tensor.clone()))
            self.bytes_sent += tensor.nbytes

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, tag: int) -> Pending:
        """Look into the queue when the tensor is waited for."""
        expected = torch.empty(shape, dtype=dtype)
        if not expected.numel():
            return Arrived(expected)
        return _InProcessPending(self, expected, source, tag)

    def take(self, source: int, tag: int) -> Tensor:
        """Return a message from a rank, and lay aside those that came before it."""
        while (source, tag) not in self._early:
            arrived, tensor = self._next(source)
            self._early[source, arrived] = tensor
        return self._early.pop((source, tag))

    def _next(self, source: int) -> tuple[int, Tensor]:
        arrivals, member = self._hub.queues[source, self.rank], self._hub.member
        try:
            message = arrivals.get(timeout=self._hub.timeout_s)
        except queue.Empty:
            raise TransportError(
                f"{member} {self.rank} got nothing from {member} {source} in "
                f"{self._hub.timeout_s} s; see what that does, or raise the timeout"
            ) from None
        if message is None:
            # The mark stays, for whoever looks again.
            arrivals.put(None)
            raise TransportError(
                f"{member} {source} left while {member} {self.rank} waited for it; see its error"
            )
        return message

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Add in rank order, on every rank."""
        self._hub.terms[self.rank] = tensor.clone()
        self._meet()
        terms = [term for term in self._hub.terms if term is not None]
        self._meet()
        total = terms[0].clone()
        for term in terms[1:]:
            total += term
        return total

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        """Send this rank's term to the others; they are added up, in rank order, by the wait."""
        assert tensor.is_contiguous()
        self._num_sums += 1
        tag = -self._num_sums  # other messages have tags from 0
        for other in range(self.num_ranks):
            if other != self.rank:
                self.send(tensor, other, tag)
        return _InProcessSum(self, tensor, tag)

    def _meet(self) -> None:
        try:
            self._hub.barrier.wait(self._hub.timeout_s)
        except threading.BrokenBarrierError:
            raise TransportError(
                f"{self._hub.member} {self.rank} was left alone in a sum; see the others' errors"
            ) from None

    def flush(self) -> None:
        """Nothing is ever on its way here."""

    def close(self) -> None:
        """Release everyone who waits, or will wait, for this rank."""
        self._hub.barrier.abort()
        for destination in range(self.num_ranks):
            self._hub.queues[self.rank, destination].put(None)


class _InProcessPending:
    def __init__(
        self, transport: InProcessTransport, expected: Tensor, source: int, tag: int
    ) -> None:
        self._transport, self._source = transport, source
        self._expected, self._tag = expected, tag

    def wait(self) -> Tensor:
        tensor = self._transport.take(self._source, self._tag)
        assert (tensor.shape, tensor.dtype) == (self._expected.shape, self._expected.dtype)
        return tensor


class _InProcessSum:
    def __init__(self, transport: InProcessTransport, tensor: Tensor, tag: int) -> None:
        self._transport, self._tensor, self._tag = transport, tensor, tag

    def wait(self) -> Tensor:
        transport = self._transport
        if not self._tensor.numel():
            return self._tensor
        terms = [
            self._tensor.clone() if rank == transport.rank else transport.take(rank, self._tag)
            for rank in range(transport.num_ranks)
        ]
        self._tensor.copy_(terms[0])
        for term in terms[1:]:
            self._tensor += term
        return self._tensor


def in_process_transports(
    num_ranks: int, timeout_s: float = 60.0, member: str = "rank"
) -> list[InProcessTransport]:
    """Make the ends of a group of threads, one a rank; errors call a rank a `member`."""
    hub = _Hub(num_ranks, timeout_s, member)
    return [InProcessTransport(rank, num_ranks, hub) for rank in range(num_ranks)]
