"""Memory that several processes map: where a rank puts what it sends to ranks of its machine.

A segment has no name, only a file descriptor that goes over a socket. So no folder has to be large
enough for it, and the system frees it with the last process that maps it, however that ends.
"""

import mmap
import os
from collections import deque
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

SEGMENT_BYTES = 64 << 20
"""Size of a segment; pages that nobody has touched take no memory."""
# How far a rank may be ahead of the readers of what it has sent. In a training it never is: the
# norm is summed over all ranks between two passes.
MAX_UNREAD_PASSES = 2
# A multiple of every number format's size, and the length of a line of the processors' caches.
_ALIGNMENT = 64


class Reader(Protocol):
    """A rank that reads what was sent to it."""

    num_sent: int
    """Tensors that were sent to it so far."""

    def has_read(self, count: int) -> bool:
        """Return whether it is done with the first `count` of them, without waiting."""

    def wait_until_read(self, count: int) -> None:
        """Wait for that; raises TransportError."""


class MappedSegment:
    """A segment as one process sees it; its tensors keep the memory mapped while they live."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        self._bytes = torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)
        self._as: dict[torch.dtype, Tensor] = {torch.uint8: self._bytes}

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the tensor that lies at an offset."""
        if dtype not in self._as:
            self._as[dtype] = self._bytes.view(dtype)
        # Less than half of what it takes to cut the memory and then give it a shape.
        return self._as[dtype].as_strided(shape, _strides(shape), offset // dtype.itemsize)


class Segment:
    """New memory of this process, which others can map through `fd`."""

    def __init__(self, number: int, num_bytes: int) -> None:
        self.number, self.num_bytes = number, num_bytes
        self.fd = os.memfd_create("baton", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, num_bytes)
            self.mapped = MappedSegment(self.fd, num_bytes)
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> None:
        """Take no more readers; the memory goes with the last tensor that lies in it."""
        os.close(self.fd)


@cache
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


class _SentPass(NamedTuple):
    segments: list[Segment]
    read_when: list[tuple[Reader, int]]


class Arena:
    """The segments of a rank, filled from the start again in each pass.

    What was written in a pass stays until all readers have read it. A pass finds the segments of
    the one before it free again; if a reader is late, it takes others.
    """

    def __init__(self, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._segment_bytes = segment_bytes
        self._all: list[Segment] = []
        self._free: list[Segment] = []
        self._filled: list[Segment] = []
        self._unread: deque[_SentPass] = deque()
        self._end = 0

    @property
    def num_segments(self) -> int:
        """How many segments there are, filled or free."""
        return len(self._all)

    def reserve(self, num_bytes: int) -> tuple[Segment, int]:
        """Return a segment and an offset where there is room for a tensor."""
        start = self._end
        if not self._filled or start + num_bytes > self._filled[-1].num_bytes:
            self._filled.append(self._next(num_bytes))
            start = 0
        self._end = -(-(start + num_bytes) // _ALIGNMENT) * _ALIGNMENT
        return self._filled[-1], start

    def end_pass(self, readers: Sequence[Reader]) -> None:
        """Write no more into what is filled; it is free once the readers have read all of it."""
        if self._filled:
            read_when = [(reader, reader.num_sent) for reader in readers]
            self._unread.append(_SentPass(self._filled, read_when))
            self._filled = []

    def close(self) -> None:
        """Give all segments back."""
        for segment in self._all:
            segment.close()
        self._all.clear()

    def _next(self, num_bytes: int) -> Segment:
        self._reclaim()
        fitting = [segment for segment in self._free if segment.num_bytes >= num_bytes]
        if fitting:
            segment = min(fitting, key=lambda found: found.num_bytes)
            self._free.remove(segment)
            return segment
        # Powers of two, so that slowly growing messages do not each leave a segment behind.
        size = max(self._segment_bytes, 1 << (num_bytes - 1).bit_length())
        self._all.append(Segment(len(self._all), size))
        return self._all[-1]

    def _reclaim(self) -> None:
        while self._unread:
            oldest = self._unread[0]
            if len(self._unread) > MAX_UNREAD_PASSES:
                for reader, count in oldest.read_when:
                    reader.wait_until_read(count)
            elif not all(reader.has_read(count) for reader, count in oldest.read_when):
                return
            self._free += self._unread.popleft().segments
