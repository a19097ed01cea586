"""What every transport promises: threads, torch.distributed, shared memory, and some of both."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from pipeline.transports.in_process import in_process_transports
from pipeline.transports.shared_memory import SharedMemoryTransport, connect_ranks
from pipeline.transports.torch_store import StoreServer
from pipeline.transports.torch_transport import TorchTransport
from pipeline.transports.transport import Transport, TransportError

Kind = TypeVar("Kind", bound=Transport)
Result = TypeVar("Result")
Make = Callable[[int, float], list[Transport]]


def on_each(transports: Sequence[Kind], work: Callable[[Kind], Result]) -> list[Result]:
    """Run something on all ranks at once; return results or raise an error."""
    with ThreadPoolExecutor(len(transports)) as threads:
        return list(threads.map(work, transports))


def connect_all(
    store: StoreServer,
    num_ranks: int,
    timeout_s: float,
    attempt: int = 0,
    *,
    shared_memory: bool = False,
) -> list[Transport]:
    def connect(rank: int) -> Transport:
        place = store.host, store.port, rank, num_ranks, timeout_s, attempt
        return connect_ranks(*place, shared_memory=shared_memory)

    with ThreadPoolExecutor(num_ranks) as threads:
        return list(threads.map(connect, range(num_ranks)))


def connect_on_two_machines(
    store: StoreServer, num_ranks: int, timeout_s: float
) -> list[Transport]:
    """Let even ranks not see that they share a machine with odd ones."""
    transports = connect_all(store, num_ranks, timeout_s, shared_memory=True)
    for transport in transports:
        if isinstance(transport, SharedMemoryTransport):
            for other in list(transport.links):
                if other % 2 != transport.rank % 2:
                    transport.links.pop(other).close()
    return transports


@pytest.fixture(params=["in process", "torch", "shared memory", "two machines"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    made: list[Transport] = []
    store = StoreServer(timeout_s=20)

    def make_group(num_ranks: int, timeout_s: float) -> list[Transport]:
        match request.param:
            case "in process":
                made.extend(in_process_transports(num_ranks, timeout_s))
            case "two machines":
                made.extend(connect_on_two_machines(store, num_ranks, timeout_s))
            case way:
                shared = way == "shared memory"
                made.extend(connect_all(store, num_ranks, timeout_s, shared_memory=shared))
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


def test_one_tensor_goes_to_several_ranks(make: Make) -> None:
    transports = make(4, 20.0)
    sent = torch.arange(6.0).reshape(2, 3)

    def work(transport: Transport) -> torch.Tensor:
        if transport.rank == 2:
            transport.multicast(sent, [(0, 0), (1, 0), (3, 0)])
            transport.flush()
            return sent
        return transport.receive((2, 3), torch.float32, 2, 0).wait().clone()

    assert all(torch.equal(received, sent) for received in on_each(transports, work))
    assert transports[2].bytes_sent == 3 * sent.nbytes


def test_tensors_of_several_passes_arrive_as_they_were_sent(make: Make) -> None:
    """Tags begin anew in each pass, and the sender may be ahead of the receivers."""
    shape = (70, 1000)

    def work(transport: Transport) -> list[float]:
        found: list[float] = []
        for number in range(8):
            if transport.rank == 0:
                for tag in range(3):
                    value = torch.full(shape, float(3 * number + tag))
                    transport.multicast(value, [(1, tag), (2, tag)])
            else:
                pending = [transport.receive(shape, torch.float32, 0, tag) for tag in range(3)]
                tensors = [each.wait() for each in pending]
                assert all(bool((tensor == tensor[0, 0]).all()) for tensor in tensors)
                found += [float(tensor[0, 0]) for tensor in tensors]
            transport.flush()
        return found

    _, *received = on_each(make(3, 20.0), work)
    assert received == [[float(number) for number in range(24)]] * 2


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


def test_sums_in_the_background_are_in_place_and_in_order(make: Make) -> None:
    torch.manual_seed(2)
    # The last one has no elements, and the one before it fewer than there are ranks.
    sizes = (100_000, 7, 2, 0)
    terms = [torch.rand(3, size, dtype=torch.float32) for size in sizes]

    def work(transport: Transport) -> list[torch.Tensor]:
        own = [term[transport.rank].clone() for term in terms]
        started = [transport.start_all_reduce(tensor) for tensor in own]  # type: ignore[attr-defined]
        transport.send(torch.full((5,), float(transport.rank)), (transport.rank + 1) % 3, 0)
        source = (transport.rank + 2) % 3
        beside = transport.receive((5,), torch.float32, source, 0).wait()
        assert beside.tolist() == [float(source)] * 5
        for tensor, pending in zip(own, started, strict=True):
            assert pending.wait() is tensor
        transport.flush()
        return own

    transports = make(3, 20.0)
    ranks = on_each(transports, work)
    for index, term in enumerate(terms):
        torch.testing.assert_close(ranks[0][index], term.sum(0))
        assert torch.equal(ranks[0][index], ranks[1][index])
        assert torch.equal(ranks[0][index], ranks[2][index])
    assert all(transport.bytes_sent >= 4 * 100_000 for transport in transports)


def test_closing_during_a_sum_does_not_wait_for_it_and_tells_the_others(make: Make) -> None:
    transports = make(2, 10.0)
    transports[0].start_all_reduce(torch.ones(3))  # type: ignore[attr-defined]
    transports[0].close()

    # The one that closed had begun a first sum, so that one ends; it never joins the second.
    def two_sums() -> None:
        for pending in [
            transports[1].start_all_reduce(torch.ones(3))  # type: ignore[attr-defined]
            for _ in range(2)
        ]:
            pending.wait()

    with pytest.raises(TransportError, match="rank 1|rank 0"):
        two_sums()


def test_errors_call_ranks_what_they_are() -> None:
    transports = in_process_transports(2, 5.0, member="replica")
    transports[1].close()
    with pytest.raises(TransportError, match="replica 1 left while replica 0 waited"):
        transports[0].receive((3,), torch.float32, 1, 0).wait()
    store = StoreServer(timeout_s=20)
    with pytest.raises(TransportError, match="replica 0 of 2 could not join attempt 0"):
        TorchTransport.connect(store.host, store.port, 0, 2, 1.0, member="replica")
    store.close()


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


@pytest.mark.parametrize("shared_memory", [False, True])
def test_a_lost_group_says_so_and_the_next_attempt_works(shared_memory: bool) -> None:
    store = StoreServer(timeout_s=20)
    first = connect_all(store, 2, 20.0, shared_memory=shared_memory)
    first[1].close()
    with pytest.raises(TransportError, match="rank 0 lost rank 1"):
        first[0].receive((3,), torch.float32, 1, 0).wait()
    with pytest.raises(TransportError, match="rank 0 has left its group"):
        first[0].send(torch.ones(3), 1, 0)
    second = connect_all(store, 2, 20.0, attempt=1, shared_memory=shared_memory)
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
