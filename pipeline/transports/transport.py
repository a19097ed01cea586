"""What moves tensors between ranks: the protocol that all transports follow.

Between each ordered pair of ranks, messages arrive in the order in which they were sent, and
receives are posted in that order. Both sides know every shape beforehand, so only numbers travel;
tensors of no elements do not travel at all.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from model.errors import UserError


class TransportError(UserError):
    """A tensor could not be moved: a peer died, hung beyond the timeout, or closed the transport.

    The transport is closed then, so that the peers learn of it; connect a new one.
    """


class Pending(Protocol):
    """A tensor that is on its way."""

    def wait(self) -> Tensor:
        """Return the tensor once it is there; raises TransportError."""


class Transport(Protocol):
    """The ways between this rank and the `num_ranks` ranks of its group, itself among them."""

    rank: int
    num_ranks: int
    bytes_sent: int

    def send(self, tensor: Tensor, destination: int, tag: int) -> None:
        """Send without waiting; the caller must not change the tensor before `flush`."""

    def multicast(self, tensor: Tensor, receivers: Sequence[tuple[int, int]]) -> None:
        """Send one tensor to several ranks, each given as (destination, tag)."""
        for destination, tag in receivers:
            self.send(tensor, destination, tag)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Return memory for a tensor that is to be sent, if that saves a copy, or else None.

        It holds until `flush`.
        """
        return None

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, tag: int) -> Pending:
        """Post the receive of the next message from a rank; `tag` must be the sender's.

        The tensor must not be changed, and holds until `flush`.
        """

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a float64 vector over the ranks, with the same bits on all of them."""

    def flush(self) -> None:
        """Wait until all that was sent has left."""

    def close(self) -> None:
        """Leave the group; peers that still wait for this rank get a TransportError."""


class SumTransport(Transport, Protocol):
    """A transport that also sums large tensors while its rank does other things."""

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        """Start to sum a contiguous tensor over the ranks, in place, with the same bits on all.

        All ranks start the same sums in the same order. Nobody may use the tensor until the wait,
        which returns it.
        """


class Arrived:
    """A tensor that needed no way."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> Tensor:
        """Return it."""
        return self._tensor
