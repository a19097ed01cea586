"""The meeting point of a torch.distributed group, kept outside its ranks.

Whoever starts the ranks opens it and tells them its address. It outlives them, so that survivors
and newcomers can meet again under the next attempt's number.
"""

import socket
from datetime import timedelta

# torch.distributed has these names too, but does not export them to type checkers.
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from pipeline.transports.transport import TransportError


class StoreServer:
    """Serves a store at `host`:`port` until it is closed.

    It listens on that address only: torch by itself would listen on all interfaces of the machine.
    """

    def __init__(self, host: str = "127.0.0.1", timeout_s: float = 60.0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.bind((host, 0))
            listening.listen(1024)
        except OSError as error:
            listening.close()
            raise TransportError(
                f"cannot listen on {host!r}: {error.strerror}; give an address of this machine"
            ) from None
        self.host = host
        self.port: int = listening.getsockname()[1]
        # The store owns the socket from here on.
        self._store: Store | None = TCPStore(
            host,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listening.detach(),
        )

    def close(self) -> None:
        """Stop serving; groups that have met already do not need the store."""
        self._store = None


def attempt_store(host: str, port: int, timeout_s: float, group: str, attempt: int) -> Store:
    """Join a store from a rank; what other groups and attempts left in it does not show.

    Raises TransportError when nobody serves there.
    """
    try:
        store = TCPStore(
            host,
            port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise TransportError(
            f"no store answers at {host}:{port} ({reason}); see whether the run's driver lives"
        ) from None
    return PrefixStore(f"{group}/attempt{attempt}", store)
