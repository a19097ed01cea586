"""Shared memory between ranks of a machine: nothing is overwritten, and nobody waits for ever."""

import multiprocessing
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stage import Stage
from pipeline.transports import shared_memory_meeting
from pipeline.transports.shared_memory import SharedMemoryTransport, connect_ranks
from pipeline.transports.shared_memory_link import PeerLink
from pipeline.transports.shared_memory_meeting import machine_id, meet_on_machine
from pipeline.transports.shared_memory_segments import MAX_UNREAD_PASSES, Arena, Segment
from pipeline.transports.torch_store import StoreServer, attempt_store
from pipeline.transports.torch_transport import TorchTransport
from pipeline.transports.transport import Transport, TransportError
from tests.batches import random_batch
from tests.pipeline.plans import small_plan
from tests.pipeline.test_transport import connect_all, connect_on_two_machines, on_each

pytestmark = pytest.mark.skipif(machine_id() is None, reason="only Linux has what this takes")


@pytest.fixture
def store() -> Iterator[StoreServer]:
    server = StoreServer(timeout_s=20)
    yield server
    server.close()


@pytest.fixture
def pair(store: StoreServer) -> Iterator[list[SharedMemoryTransport]]:
    made = shared(store, 2)
    yield made
    for transport in made:
        transport.close()


def shared(store: StoreServer, num_ranks: int) -> list[SharedMemoryTransport]:
    made = connect_all(store, num_ranks, 20.0, shared_memory=True)
    found = [transport for transport in made if isinstance(transport, SharedMemoryTransport)]
    assert len(found) == num_ranks
    return found


@pytest.fixture
def links() -> Iterator[list[PeerLink]]:
    ends = socket.socketpair()
    made = [PeerLink(rank, 1 - rank, end, 20.0, lambda: None) for rank, end in enumerate(ends)]
    yield made
    for link in made:
        link.close()


def test_receivers_read_the_same_memory(store: StoreServer) -> None:
    transports = shared(store, 3)
    transports[0].multicast(torch.zeros(4), [(1, 0), (2, 0)])
    first, second = (t.receive((4,), torch.float32, 0, 0).wait() for t in transports[1:])
    first[2] = 7.0
    assert second.tolist() == [0.0, 0.0, 7.0, 0.0]
    for transport in transports:
        transport.close()
    # The memory outlives the group while somebody looks at it.
    assert first.tolist() == [0.0, 0.0, 7.0, 0.0]


@pytest.mark.parametrize("count", [3000])
def test_sends_never_block_however_many_nobody_reads(
    pair: list[SharedMemoryTransport], count: int
) -> None:
    def work(transport: SharedMemoryTransport) -> list[float]:
        other = 1 - transport.rank
        for tag in range(count):
            transport.send(torch.tensor([float(tag)]), other, tag)
        pending = [transport.receive((1,), torch.float32, other, tag) for tag in range(count)]
        found = [float(each.wait()) for each in reversed(pending)]
        transport.flush()
        return found[::-1]

    expected = [float(tag) for tag in range(count)]
    assert on_each(pair, work) == [expected, expected]


def test_what_was_made_in_shared_memory_is_sent_without_a_copy(
    pair: list[SharedMemoryTransport],
) -> None:
    made = pair[0].empty((2, 3), torch.float64)
    made.fill_(3.0)
    pair[0].send(made, 1, 0)
    received = pair[1].receive((2, 3), torch.float64, 0, 0).wait()
    assert received.tolist() == [[3.0] * 3] * 2
    received[1, 2] = 5.0
    assert made.tolist() == [[3.0] * 3, [3.0, 3.0, 5.0]]
    # Another layout of the same memory is another tensor.
    pair[0].send(made.t(), 1, 1)
    turned = pair[1].receive((3, 2), torch.float64, 0, 1).wait()
    assert turned.tolist() == [[3.0, 3.0], [3.0, 3.0], [3.0, 5.0]]


@given(
    passes=st.lists(st.lists(st.integers(1, 3000), max_size=4), min_size=1, max_size=8),
    delays=st.lists(st.sampled_from([0.0, 0.0, 0.002]), min_size=8, max_size=8),
)
@settings(max_examples=40, deadline=None)
def test_nothing_is_overwritten_while_a_slow_rank_may_read_it(
    passes: list[list[int]], delays: list[float]
) -> None:
    ends = socket.socketpair()
    sender, reader = (
        PeerLink(rank, 1 - rank, end, 20.0, lambda: None) for rank, end in enumerate(ends)
    )
    # Small segments, so that passes fill several and some messages need one of their own.
    arena = Arena(segment_bytes=4096)

    def send() -> None:
        for number, sizes in enumerate(passes):
            for tag, size in enumerate(sizes):
                tensor = torch.full((size,), float(number * 10 + tag))
                segment, offset = arena.reserve(tensor.nbytes)
                segment.mapped.tensor(offset, (size,), torch.float32).copy_(tensor)
                sender.announce(tag, segment, offset)
            arena.end_pass([sender])

    def read() -> list[bool]:
        same: list[bool] = []
        for number, sizes in enumerate(passes):
            places = [reader.take(tag) for tag in range(len(sizes))]
            time.sleep(delays[number])
            for tag, (size, place) in enumerate(zip(sizes, places, strict=True)):
                tensor = place.segment.tensor(place.offset, (size,), torch.float32)
                same.append(bool((tensor == number * 10 + tag).all()))
            reader.tell_read()
        return same

    with ThreadPoolExecutor(2) as threads:
        sending, reading = threads.submit(send), threads.submit(read)
        sending.result()
        assert all(reading.result())
    sender.close()
    reader.close()
    arena.close()


def test_steps_that_meet_at_their_ends_use_the_same_memory_again(
    pair: list[SharedMemoryTransport],
) -> None:
    def work(transport: SharedMemoryTransport) -> int:
        for _ in range(10):
            transport.send(torch.ones(1000), 1 - transport.rank, 0)
            transport.receive((1000,), torch.float32, 1 - transport.rank, 0).wait()
            transport.flush()
            transport.all_reduce_sum(torch.ones(1, dtype=torch.float64))
        return transport.arena.num_segments

    assert on_each(pair, work) == [1, 1]


def test_a_rank_is_only_so_many_passes_ahead_of_its_readers(
    pair: list[SharedMemoryTransport],
) -> None:
    sent: list[int] = []

    def run_ahead() -> None:
        for number in range(10):
            pair[0].send(torch.full((5,), float(number)), 1, 0)
            sent.append(number)
            pair[0].flush()

    thread = threading.Thread(target=run_ahead)
    thread.start()
    for number in range(10):
        received = pair[1].receive((5,), torch.float32, 0, 0).wait()
        time.sleep(0.01)
        assert received.tolist() == [float(number)] * 5
        assert len(sent) <= number + MAX_UNREAD_PASSES + 1
        pair[1].flush()
    thread.join()
    assert pair[0].arena.num_segments <= MAX_UNREAD_PASSES + 1


def test_what_was_laid_aside_is_not_told_as_read(links: list[PeerLink]) -> None:
    arena = Arena(4096)
    for tag in range(3):
        links[0].announce(tag, *arena.reserve(4))
    links[1].take(1)
    links[1].tell_read()
    assert not links[0].has_read(1)
    links[1].take(0)
    links[1].tell_read()
    links[0].wait_until_read(2)
    assert not links[0].has_read(3)
    arena.close()


@given(sizes=st.lists(st.integers(0, 400_000), max_size=6))
@settings(max_examples=20, deadline=None)
def test_bytes_of_any_size_pass_both_ways_at_once(sizes: list[int]) -> None:
    ends = socket.socketpair()
    links = [PeerLink(rank, 1 - rank, end, 20.0, lambda: None) for rank, end in enumerate(ends)]
    payloads = [bytes([index + 1]) * size for index, size in enumerate(sizes)]
    for link in links:
        for payload in payloads:
            link.send_bytes(payload)
    for link in links:
        assert [link.take_bytes() for _ in payloads] == payloads
    for link in links:
        link.close()


def wait_for_peer(address: tuple[str, int]) -> None:
    """Be rank 1: send a message, then wait for one that never comes."""
    torch.set_num_threads(1)
    transport = connect_ranks(*address, 1, 2, 60.0)
    transport.send(torch.ones(3), 0, 0)
    transport.receive((3,), torch.float32, 0, 0).wait()


def test_a_killed_process_is_noticed_at_once_by_who_waits_for_it(store: StoreServer) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=wait_for_peer, args=((store.host, store.port),))
    process.start()
    assert process.pid is not None
    transport = connect_ranks(store.host, store.port, 0, 2, 60.0)
    assert isinstance(transport, SharedMemoryTransport)
    received = transport.receive((3,), torch.float32, 1, 0).wait()
    killing = threading.Timer(0.3, os.kill, (process.pid, signal.SIGKILL))
    killing.start()
    start = time.monotonic()
    with pytest.raises(TransportError, match=r"rank 0 lost rank 1 \(.*\); see whether that lives"):
        transport.receive((3,), torch.float32, 1, 1).wait()
    assert time.monotonic() - start < 30.0, "it waited for its timeout"
    process.join()
    # What the dead rank sent is still there.
    assert received.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(TransportError, match="rank 0 has left its group"):
        transport.send(torch.ones(3), 1, 0)


def test_who_sends_to_a_rank_that_left_is_told_so(pair: list[SharedMemoryTransport]) -> None:
    pair[1].close()
    with pytest.raises(TransportError, match="rank 0 lost rank 1"):
        pair[0].send(torch.ones(3), 1, 0)
    assert not pair[0].links


def test_ranks_of_other_machines_use_the_network(
    store: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory_meeting, "machine_id", lambda: str(threading.get_ident()))
    transports = connect_all(store, 2, 20.0, shared_memory=True)
    assert all(isinstance(transport, TorchTransport) for transport in transports)
    for transport in transports:
        transport.close()


def test_without_shared_memory_ranks_use_the_network(
    store: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory_meeting, "machine_id", lambda: None)
    transports = connect_all(store, 2, 20.0, shared_memory=True)
    assert all(isinstance(transport, TorchTransport) for transport in transports)
    for transport in transports:
        transport.close()


def forbidden(name: str, flags: int) -> int:
    raise PermissionError(13, "Permission denied")


def test_where_shared_memory_cannot_be_had_ranks_use_the_network(
    store: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "memfd_create", forbidden)
    transports = connect_all(store, 2, 20.0, shared_memory=True)
    assert all(isinstance(transport, TorchTransport) for transport in transports)
    for transport in transports:
        transport.close()


def test_copies_of_one_machine_with_other_addresses_use_the_network(
    store: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def address_towards(host: str, port: int) -> str:
        asked.append((host, port))
        return f"192.0.2.{len(asked)}"

    monkeypatch.setattr(shared_memory_meeting, "_address_towards", address_towards)
    transports = connect_all(store, 2, 20.0, shared_memory=True)
    assert all(isinstance(transport, TorchTransport) for transport in transports)
    assert asked == [(store.host, store.port)] * 2
    for transport in transports:
        transport.close()


def test_the_address_is_that_of_the_way_to_the_store() -> None:
    assert shared_memory_meeting._address_towards("127.0.0.1", 80) == "127.0.0.1"


def test_a_socket_of_another_user_is_refused(
    store: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def user_of(connection: socket.socket) -> int:
        # Only the calling side, rank 1, is deceived.
        return os.geteuid() + int(connection.getsockname() == "")

    monkeypatch.setattr(shared_memory_meeting, "_user_of", user_of)

    def meet(rank: int) -> str:
        found = attempt_store(store.host, store.port, 2.0, "group", 0)
        with pytest.raises(TransportError) as caught:
            meet_on_machine(found, store.host, store.port, rank, 2, 2.0)
        return str(caught.value)

    with ThreadPoolExecutor(2) as threads:
        answering, calling = threads.map(meet, range(2))
    assert "the socket of rank 0 belongs to another user" in calling
    assert "a rank hung up" in answering


def test_calls_as_a_rank_that_is_not_awaited_are_refused() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(shared_memory_meeting._HELLO.pack(7))
    with pytest.raises(ConnectionRefusedError, match="rank 7"):
        shared_memory_meeting._caller(ours, {1, 2}, time.monotonic() + 5.0)
    assert ours.fileno() < 0
    theirs.close()


@contextmanager
def no_file_descriptors() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_receiver_without_file_descriptors_says_so(pair: list[SharedMemoryTransport]) -> None:
    pair[0].send(torch.ones(3), 1, 0)
    pending = pair[1].receive((3,), torch.float32, 0, 0)
    with (
        no_file_descriptors(),
        pytest.raises(TransportError, match=r"rank 1 lost rank 0 \(no file descriptors left\)"),
    ):
        pending.wait()
    assert not pair[1].links


def test_a_sender_without_file_descriptors_says_so(pair: list[SharedMemoryTransport]) -> None:
    with (
        no_file_descriptors(),
        pytest.raises(TransportError, match="rank 0 got no shared memory for 12 bytes"),
    ):
        pair[0].send(torch.ones(3), 1, 0)
    with pytest.raises(TransportError, match="rank 1 lost rank 0"):
        pair[1].receive((3,), torch.float32, 0, 0).wait()


def test_a_segment_that_cannot_be_mapped_leaves_no_file_descriptor() -> None:
    lowest_free = os.dup(0)
    os.close(lowest_free)
    with pytest.raises(OSError, match="File too large|Cannot allocate memory"):
        Segment(0, 1 << 62)
    after = os.dup(0)
    os.close(after)
    assert after <= lowest_free


def test_who_cannot_open_one_link_leaves_the_group(
    store: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(PeerLink):
        def __init__(
            self,
            rank: int,
            peer: int,
            connection: socket.socket,
            timeout_s: float,
            leave: Callable[[], None],
        ) -> None:
            if (rank, peer) == (0, 2):
                raise OSError("out of luck")
            super().__init__(rank, peer, connection, timeout_s, leave)

    monkeypatch.setattr("pipeline.transports.shared_memory.PeerLink", Failing)

    def run(rank: int) -> str:
        try:
            transport = connect_ranks(store.host, store.port, rank, 3, 20.0)
        except OSError as error:
            return str(error)
        with pytest.raises(TransportError) as caught:
            transport.receive((3,), torch.float32, 0, 0).wait()
        return str(caught.value)

    with ThreadPoolExecutor(3) as threads:
        errors = list(threads.map(run, range(3)))
    assert errors[0] == "out of luck"
    assert all("lost rank 0 (it has left the group" in error for error in errors[1:])


def test_an_error_of_the_network_closes_the_ways_within_the_machine(store: StoreServer) -> None:
    transports = connect_on_two_machines(store, 3, 20.0)
    transports[1].close()
    with pytest.raises(TransportError):
        transports[0].receive((3,), torch.float32, 1, 0).wait()
    # Rank 2 shares the machine of rank 0, and learns of its end where it waits for it.
    with pytest.raises(TransportError, match="rank 2 lost rank 0"):
        transports[2].receive((3,), torch.float32, 0, 0).wait()


def test_who_goes_on_sending_to_a_rank_that_does_not_read_and_leaves_is_told_so(
    links: list[PeerLink],
) -> None:
    payload = bytes(1 << 20)
    for _ in range(3):
        links[0].send_bytes(payload)
    links[1].close()
    thread = links[0]._outbox._thread
    assert thread is not None, "the socket took it all"
    thread.join()
    with pytest.raises(TransportError, match="rank 0 lost rank 1"):
        links[0].send_bytes(payload)


def test_a_rank_that_does_not_come_to_the_meeting_is_a_clear_error(store: StoreServer) -> None:
    found = attempt_store(store.host, store.port, 1.0, "group", 0)
    with pytest.raises(TransportError, match="rank 0 of 2 could not meet the ranks of its machine"):
        meet_on_machine(found, store.host, store.port, 0, 2, 1.0)


def test_training_and_evaluation_give_the_same_bits_as_over_the_network(
    store: StoreServer,
) -> None:
    plan = small_plan((2, 2), num_microbatches=2, num_chunks=3, precision="float32")
    batches = [random_batch(5, seed=seed) for seed in range(4)]

    def work(transport: Transport) -> list[torch.Tensor]:
        stage = Stage(plan, transport.rank, transport)
        for batch in batches:
            stage.train_step(batch, 0.7, 0.5)
        # Nothing holds the ranks together between evaluations.
        losses = [stage.evaluate(batch).loss.total for batch in batches * 3]
        values = [parameter.value for parameter in stage.parameters().values()]
        return [*values, torch.tensor(losses, dtype=torch.float64)]

    ways: list[list[list[torch.Tensor]]] = []
    for attempt, shared_memory in enumerate([False, True]):
        transports = connect_all(store, 4, 20.0, attempt, shared_memory=shared_memory)
        ways.append(on_each(transports, work))
        for transport in transports:
            transport.close()
    for network, memory in zip(*ways, strict=True):
        assert all(torch.equal(*pair) for pair in zip(network, memory, strict=True))
