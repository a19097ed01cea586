"""What two ranks of one machine tell each other over a Unix socket, while tensors lie in memory.

That is where each tensor lies, and how many of them have been read. A record is a tag and two
numbers. A tag from 0 on announces a tensor; the others are below.
"""

import errno
import os
import socket
import struct
import threading
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from pipeline.transports.shared_memory_segments import MappedSegment, Segment
from pipeline.transports.transport import TransportError

_RECORD = struct.Struct("<iIQ")
_SEGMENT = -1
"""A new segment, its number and size; its file descriptor comes along."""
_READ = -2
"""How many of the receiver's tensors were read."""
_BYTES = -3
"""So many bytes follow."""
_BUFFER_BYTES = 16384
_MAX_FDS = 16


class Arrival(NamedTuple):
    """Where a tensor lies, and its place among all that came from its sender."""

    number: int
    segment: MappedSegment
    offset: int


class PeerLink:
    """One rank's end of the way to another rank of its machine.

    Nothing blocks but to wait for the peer, and no wait is longer than `timeout_s`. On every
    TransportError `leave` is called before, so that the other ranks learn of it as well.
    """

    def __init__(
        self,
        rank: int,
        peer: int,
        connection: socket.socket,
        timeout_s: float,
        leave: Callable[[], None],
    ) -> None:
        self._rank, self._peer = rank, peer
        self._timeout_s = timeout_s
        self._leave = leave
        self._socket = connection
        self._outbox = _Outbox(connection)
        # The system ends a read after this time by itself, which saves a call before each.
        whole_s = int(timeout_s)
        timeout = struct.pack("@ll", whole_s, int((timeout_s - whole_s) * 1e6))
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)

        self.num_sent = 0
        self._num_read_by_peer = 0
        self._known_segments: set[int] = set()

        self._num_arrived = self._num_taken = self._num_told = 0
        self._arrivals: defaultdict[int, list[Arrival]] = defaultdict(list)
        self._payloads: deque[bytes] = deque()
        self._segments: dict[int, MappedSegment] = {}
        self._fds: deque[int] = deque()
        self._partial = b""
        # Not at the import, which must work where the system has no such messages.
        self._fds_space = socket.CMSG_SPACE(_MAX_FDS * array("i").itemsize)

    def announce(self, tag: int, segment: Segment, offset: int) -> None:
        """Tell the peer where the message `tag` lies."""
        if segment.number not in self._known_segments:
            record = _RECORD.pack(_SEGMENT, segment.number, segment.num_bytes)
            self._write(record, (segment.fd,))
            self._known_segments.add(segment.number)
        self._write(_RECORD.pack(tag, segment.number, offset))
        self.num_sent += 1

    def take(self, tag: int) -> Arrival:
        """Wait for the next message `tag`; what comes before it is laid aside."""
        arrivals = self._arrivals[tag]
        while not arrivals:
            self._read()
        self._num_taken += 1
        return arrivals.pop(0)

    def send_bytes(self, payload: bytes) -> None:
        """Send a few bytes within the socket."""
        self._write(_RECORD.pack(_BYTES, 0, len(payload)) + payload)

    def take_bytes(self) -> bytes:
        """Wait for the next bytes."""
        while not self._payloads:
            self._read()
        return self._payloads.popleft()

    def tell_read(self) -> None:
        """Tell the peer that everything that was taken has been read."""
        count = self._num_arrived
        if self._num_taken < count:
            count = min(found[0].number for found in self._arrivals.values() if found)
        if count > self._num_told:
            self._num_told = count
            self._write(_RECORD.pack(_READ, 0, count))

    def has_read(self, count: int) -> bool:
        """Return whether the peer has read the first `count` tensors sent to it."""
        while self._num_read_by_peer < count and self._read(socket.MSG_DONTWAIT):
            pass
        return self._num_read_by_peer >= count

    def wait_until_read(self, count: int) -> None:
        """Wait until the peer has read the first `count` tensors sent to it."""
        while self._num_read_by_peer < count:
            self._read()

    def close(self) -> None:
        """Leave; the peer hears it at once."""
        self._outbox.close()
        self._socket.close()
        while self._fds:
            os.close(self._fds.popleft())

    def _write(self, record: bytes, fds: Sequence[int] = ()) -> None:
        try:
            self._outbox.put(record, fds)
        except OSError as error:
            raise self._lost(error.strerror or str(error)) from None

    def _read(self, flags: int = 0) -> bool:
        """Take in what has come; if nothing has, wait for something, or return False at once."""
        try:
            data, attached, outcome, _ = self._socket.recvmsg(
                _BUFFER_BYTES, self._fds_space, flags | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            if flags & socket.MSG_DONTWAIT:
                return False
            raise self._lost(f"nothing came in {self._timeout_s:g} s") from None
        except OSError as error:
            raise self._lost(error.strerror or str(error)) from None
        if not data:
            raise self._lost("it has left the group, or died")
        for _, _, content in attached:
            self._fds.extend(array("i", content))
        if outcome & socket.MSG_CTRUNC:
            raise self._lost("no file descriptors left")
        self._understand(self._partial + data)
        return True

    def _understand(self, data: bytes) -> None:
        start, size = 0, _RECORD.size
        while start + size <= len(data):
            tag, number, amount = _RECORD.unpack_from(data, start)
            if tag >= 0:
                arrival = Arrival(self._num_arrived, self._segments[number], amount)
                self._arrivals[tag].append(arrival)
                self._num_arrived += 1
            elif tag == _SEGMENT:
                self._segments[number] = self._mapped(self._fds.popleft(), amount)
            elif tag == _READ:
                self._num_read_by_peer = amount
            else:
                end = start + size + amount
                if end > len(data):
                    break
                self._payloads.append(data[start + size : end])
                start += amount
            start += size
        self._partial = data[start:]

    def _mapped(self, fd: int, num_bytes: int) -> MappedSegment:
        try:
            return MappedSegment(fd, num_bytes)
        except OSError as error:
            raise self._lost(f"cannot map its memory: {error.strerror}") from None
        finally:
            os.close(fd)

    def _lost(self, reason: str) -> TransportError:
        """Leave the group; return the error to raise."""
        if self._socket.fileno() < 0:
            return TransportError(f"rank {self._rank} has left its group; connect it again")
        self._leave()
        return TransportError(
            f"rank {self._rank} lost rank {self._peer} ({reason}); see whether that lives, and "
            "restart from the last checkpoint"
        )


class _Outbox:
    """Writes to a socket and never blocks: what the socket does not take, a thread writes later.

    A socket takes some hundred records. Two ranks that send each other more before either of them
    reads would block for ever otherwise.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._waiting: deque[tuple[bytes, Sequence[int]]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._open = True

    def put(self, record: bytes, fds: Sequence[int]) -> None:
        """Write a record, after all earlier ones. Raises OSError when the peer has gone."""
        if not self._waiting:
            try:
                num_sent = self._send(record, fds, socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
            else:
                if num_sent == len(record):
                    return
                record, fds = record[num_sent:], ()
        with self._changed:
            if not self._open:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
            self._waiting.append((record, fds))
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_waiting, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write no more; wake whoever is blocked on the socket."""
        with self._changed:
            self._open = False
            self._changed.notify()
        with suppress(OSError):  # the peer may have been faster
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join()

    def _write_waiting(self) -> None:
        """Write what waits; a record leaves the queue when all of it is written."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or not self._open)
                if not self._open:
                    return
                record, fds = self._waiting[0]
            try:
                while record:
                    record = record[self._send(record, fds, 0) :]
                    fds = ()
            except OSError:
                # The peer has gone, which this rank learns when it reads, or puts more here.
                with self._changed:
                    self._open = False
                return
            with self._changed:
                self._waiting.popleft()

    def _send(self, record: bytes, fds: Sequence[int], flags: int) -> int:
        if fds:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))]
            return self._socket.sendmsg([record], rights, flags)
        return self._socket.send(record, flags)
