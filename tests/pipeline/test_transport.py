"""What every transport promises, over threads and over torch.distributed alike."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from pipeline.transports.in_process import in_process_transports
from pipeline.transports.torch_store import StoreServer
from pipeline.transports.torch_transport import TorchTransport
from pipeline.transports.transport import Transport, TransportError

Result = TypeVar("Result")
Make = Callable[[int, float], list[Transport]]


def on_each(transports: list[Transport], work: Callable[[Transport], Result]) -> list[Result]:
    """Run something on all ranks at once; return results or raise an error."""
    with ThreadPoolExecutor(len(transports)) as threads:
        return list(threads.map(work, transports))


def connect_all(
    store: StoreServer, num_ranks: int, timeout_s: float, attempt: int = 0
) -> list[Transport]:
    def connect(rank: int) -> Transport:
        return TorchTransport.connect(store.host, store.port, rank, num_ranks, timeout_s, attempt)

    with ThreadPoolExecutor(num_ranks) as threads:
        return list(threads.map(connect, range(num_ranks)))


@pytest.fixture(params=["in process", "torch"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    made: list[Transport] = []
    store = StoreServer(timeout_s=20)

    def make_group(num_ranks: int, timeout_s: float) -> list[Transport]:
        if request.param == "torch":
            made.extend(connect_all(store, num_ranks, timeout_s))
        else:
            made.extend(in_process_transports(num_ranks, timeout_s))
        return made

    yield make_group
    for transport in made:
        transport.close()
    store.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_messages_arrive_whole_whichever_is_waited_for_first(
    make: Make, dtype: torch.dtype
) -> None:
    first = torch.arange(6).reshape(2, 3).to(dtype)
    second = torch.full((4,), 7.0).to(dtype)

    def work(transport: Transport) -> list[torch.Tensor]:
        if transport.rank == 0:
            transport.send(first, 1, 0)
            transport.send(second, 1, 1)
            transport.flush()
            return []
        pending = [transport.receive((2, 3), dtype, 0, 0), transport.receive((4,), dtype, 0, 1)]
        late = pending[1].wait()
        return [pending[0].wait(), late]

    transports = make(2, 20.0)
    _, received = on_each(transports, work)
    assert torch.equal(received[0], first)
    assert torch.equal(received[1], second)
    assert [t.bytes_sent for t in transports] == [10 * first.element_size(), 0]


def test_tensors_without_elements_do_not_travel(make: Make) -> None:
    transports = make(2, 20.0)
    transports[0].send(torch.zeros(0, 3), 1, 0)
    received = transports[1].receive((0, 3), torch.float32, 0, 0).wait()
    assert received.shape == (0, 3)
    assert transports[0].bytes_sent == 0


def test_sums_have_the_same_bits_on_all_ranks(make: Make) -> None:
    torch.manual_seed(1)
    terms = torch.rand(3, 50, dtype=torch.float64)
    sums = on_each(make(3, 20.0), lambda t: t.all_reduce_sum(terms[t.rank]))
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])
    torch.testing.assert_close(sums[0], terms.sum(0))


def test_a_sum_leaves_its_terms_as_they_are(make: Make) -> None:
    terms = [torch.tensor([1.0 + rank], dtype=torch.float64) for rank in range(2)]
    on_each(make(2, 20.0), lambda t: t.all_reduce_sum(terms[t.rank]))
    assert [float(term) for term in terms] == [1.0, 2.0]


def test_one_rank_sums_alone(make: Make) -> None:
    (transport,) = make(1, 20.0)
    assert float(transport.all_reduce_sum(torch.tensor([2.5], dtype=torch.float64))) == 2.5
    transport.flush()


def test_who_waits_for_a_closed_rank_is_told_which(make: Make) -> None:
    transports = make(3, 20.0)
    on_each(transports, lambda t: t.all_reduce_sum(torch.zeros(1, dtype=torch.float64)))
    pending = transports[2].receive((3,), torch.float32, 1, 0)
    closing = threading.Timer(0.2, transports[1].close)
    closing.start()
    with pytest.raises(TransportError, match=r"(?s)rank 2.*rank 1|rank 1.*rank 2"):
        pending.wait()
    closing.join()


def test_a_rank_alone_in_a_sum_is_released_when_the_others_close(make: Make) -> None:
    transports = make(2, 20.0)
    closing = threading.Timer(0.2, transports[1].close)
    closing.start()
    with pytest.raises(TransportError, match="rank 0"):
        transports[0].all_reduce_sum(torch.zeros(1, dtype=torch.float64))
    closing.join()


def test_a_silent_rank_is_given_up_after_the_timeout(make: Make) -> None:
    transports = make(2, 1.0)
    with pytest.raises(TransportError, match="rank 0 .*rank 1"):
        transports[0].receive((3,), torch.float32, 1, 0).wait()


def test_a_lost_group_says_so_and_the_next_attempt_works() -> None:
    store = StoreServer(timeout_s=20)
    first = connect_all(store, 2, 20.0)
    first[1].close()
    with pytest.raises(TransportError, match="rank 0 lost rank 1"):
        first[0].receive((3,), torch.float32, 1, 0).wait()
    with pytest.raises(TransportError, match="rank 0 has left its group"):
        first[0].send(torch.ones(3), 1, 0)
    second = connect_all(store, 2, 20.0, attempt=1)
    sums = on_each(second, lambda t: t.all_reduce_sum(torch.ones(1, dtype=torch.float64)))
    assert [float(total) for total in sums] == [2.0, 2.0]
    for transport in second:
        transport.close()
    store.close()


def test_a_rank_that_never_comes_is_a_clear_error() -> None:
    store = StoreServer(timeout_s=2)
    with pytest.raises(TransportError, match="rank 0 of 2 could not join attempt 3"):
        TorchTransport.connect(store.host, store.port, 0, 2, 1.0, 3)
    store.close()


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="only Linux lists sockets there")
def test_the_store_listens_on_the_given_address_only() -> None:
    store = StoreServer("127.0.0.1", timeout_s=2)
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    rows = [line.split() for table in tables for line in table.read_text().splitlines()]
    # Of a listening socket: its address and port in hexadecimal digits, and state 0A.
    port = f":{store.port:04X}"
    listening = [row[1] for row in rows if row[1].endswith(port) and row[3] == "0A"]
    assert listening == ["0100007F" + port]
    store.close()


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(TransportError, match=r"cannot listen on '192\.0\.2\.1'"):
        StoreServer("192.0.2.1")
