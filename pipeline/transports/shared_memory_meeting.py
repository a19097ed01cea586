"""Finds the ranks of a group that run on the same machine, and opens a socket to each of them.

Every rank publishes in the group's store on which machine it is and where it listens. Sockets are
in Linux's abstract namespace, which has no files; both ends check that the other has their user.
"""

import json
import os
import secrets
import socket
import struct
import sys
import time
from collections.abc import Iterable
from pathlib import Path

# torch.distributed has this name too, but does not export it to type checkers.
from torch._C._distributed_c10d import Store

from pipeline.transports.transport import TransportError

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_HELLO = struct.Struct("<I")
_CREDENTIALS = struct.Struct("@i2I")


def meet_on_machine(
    store: Store, host: str, port: int, rank: int, num_ranks: int, timeout_s: float
) -> dict[int, socket.socket]:
    """Return a connected socket for every other rank of this machine.

    All ranks of the group must call it; `store` is served at `host`:`port`. Raises TransportError.
    """
    machine, address = machine_id(), _address_towards(host, port)
    listener = _listen(num_ranks) if machine and address else None
    try:
        # Virtual machines that were restored from one snapshot differ only in their addresses.
        own = {
            "machine": f"{machine} {address}" if listener else None,
            "name": _name_of(listener),
        }
        store.set(_key(rank), json.dumps(own))
        published = [json.loads(text) for text in store.multi_get([*map(_key, range(num_ranks))])]
        peers = {
            other: found["name"]
            for other, found in enumerate(published)
            if other != rank and own["machine"] and found["machine"] == own["machine"]
        }
        if listener is None or not peers:
            return {}
        return _connect(listener, rank, peers, time.monotonic() + timeout_s)
    except (RuntimeError, OSError) as error:
        raise TransportError(
            f"rank {rank} of {num_ranks} could not meet the ranks of its machine "
            f"({str(error).splitlines()[0]}); see whether all of them live, or set "
            "cluster.shared_memory: false"
        ) from None
    finally:
        if listener is not None:
            listener.close()


def machine_id() -> str | None:
    """Return what all processes have in common that can share memory; None if none can."""
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        return None
    try:
        # Security settings may forbid this memory, and then it is time to learn it.
        os.close(os.memfd_create("baton", os.MFD_CLOEXEC))
        spaces = [str(Path("/proc/self/ns", kind).readlink()) for kind in ("net", "user")]
        return " ".join([_BOOT_ID.read_text().strip(), *spaces, str(os.geteuid())])
    except OSError:
        return None  # no such memory, or no /proc to tell


def _address_towards(host: str, port: int) -> str | None:
    """Return this machine's own address on the way to another; None if there is no way."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # chooses the way and sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _key(rank: int) -> str:
    return f"shared_memory/{rank}"


def _listen(num_ranks: int) -> socket.socket | None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(f"\0baton-{secrets.token_hex(16)}")
        listener.listen(num_ranks)
    except OSError:
        listener.close()
        return None
    return listener


def _name_of(listener: socket.socket | None) -> str:
    return listener.getsockname()[1:].decode() if listener else ""


def _connect(
    listener: socket.socket, rank: int, peers: dict[int, str], deadline: float
) -> dict[int, socket.socket]:
    """Call the lower ranks, whose listeners exist by now, and answer the higher ones."""
    found: dict[int, socket.socket] = {}
    try:
        for other in sorted(peer for peer in peers if peer < rank):
            found[other] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            found[other].settimeout(_left_s(deadline))
            found[other].connect(f"\0{peers[other]}")
            if _user_of(found[other]) != os.geteuid():
                raise PermissionError(f"the socket of rank {other} belongs to another user")
            found[other].sendall(_HELLO.pack(rank))
        higher = {peer for peer in peers if peer > rank}
        while higher:
            listener.settimeout(_left_s(deadline))
            connection, _ = listener.accept()
            if _user_of(connection) != os.geteuid():
                connection.close()
                continue
            other = _caller(connection, higher, deadline)
            found[other] = connection
            higher.remove(other)
    except BaseException:
        _close_all(found.values())
        raise
    return found


def _caller(connection: socket.socket, expected: set[int], deadline: float) -> int:
    try:
        connection.settimeout(_left_s(deadline))
        hello = connection.recv(_HELLO.size, socket.MSG_WAITALL)
        if len(hello) < _HELLO.size:
            raise ConnectionResetError("a rank hung up")
        (rank,) = _HELLO.unpack(hello)
        if rank not in expected:
            raise ConnectionRefusedError(f"a call as rank {rank}, which was not to call (again)")
    except BaseException:
        connection.close()
        raise
    return int(rank)


def _user_of(connection: socket.socket) -> int:
    """Return the user of the process at the other end."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(packed)
    return int(user)


def _left_s(deadline: float) -> float:
    # A timeout of 0 would mean not to wait at all, with another error.
    return max(0.001, deadline - time.monotonic())


def _close_all(sockets: Iterable[socket.socket]) -> None:
    for each in sockets:
        each.close()
