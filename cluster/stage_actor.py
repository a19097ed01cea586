"""One rank as a Ray actor: a stage of the pipeline, and what the controller may ask of it.

Tensors never pass through Ray here: the stages talk to each other over the transport. Calls that
compute run one after another, in the order in which they were submitted; `status` runs beside them.
Calls for batches arrive in several threads, so that the next one is ready when one ends, and take
turns; the others may only be made when no batch is under way.
After any error the rank leaves its group, so that its peers do not wait for it, and every later
call says so.
"""

import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar

import ray
import torch
from torch import Tensor

from cluster.failure_policy import Failure, FailureKind
from cluster.rank_machine import NodeShare, RankMachine, set_up_rank
from cluster.turns import Turns
from model.batching import Batch
from model.checkpoint import Checkpoint
from model.checkpoint_writer import PartRecord, part_name, write_part
from model.errors import UserError
from pipeline.emulation import make_device
from pipeline.plan import Plan
from pipeline.stage import PreparedBatch, Stage, StageResult
from pipeline.transports.shared_memory import connect_ranks
from pipeline.transports.torch_transport import TorchTransport
from pipeline.transports.transport import Transport, TransportError

CONTROL_GROUP, BATCH_GROUP = "control", "batches"
MAX_BATCHES = 3
"""Calls for batches that may be under way; with more, one could keep the next one's thread."""
CONCURRENCY = {CONTROL_GROUP: 1, BATCH_GROUP: MAX_BATCHES}
"""Threads of each group of calls; the others run in the actor's own thread."""
Connected = TypeVar("Connected", bound=Transport)


@dataclass(frozen=True)
class RankStatus:
    """What a worker is doing: the operation under way (empty: none) and the step it belongs to.

    `machine` is there once the worker was prepared.
    """

    worker: int
    pid: int
    node: str
    step: int | None
    operation: str
    machine: RankMachine | None = None


@dataclass(frozen=True)
class GroupAddress:
    """Where all ranks meet; a new `attempt` makes a new group."""

    host: str
    port: int
    attempt: int
    timeout_s: float
    shared_memory: bool = True


class StageError(Exception):
    """An error in a rank, with where and when, in a form that passes between processes."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


class StageActor:
    """Worker number `worker` of a plan; made in its own process by `cluster.worker_group`.

    Every method raises StageError.
    """

    def __init__(self, plan: Plan, worker: int, device: str) -> None:
        self._plan = plan
        self._worker = worker
        self._device = device
        self._num_threads = 1
        self._node: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._status = RankStatus(worker, os.getpid(), self._node, None, "")
        self._address: GroupAddress | None = None
        self._num_joined = 0
        self._transport: Transport | None = None
        self._replicas: TorchTransport | None = None
        self._stage: Stage | None = None
        self._failed = False
        self._turns = Turns()

    @ray.method(concurrency_group=CONTROL_GROUP)
    def status(self) -> RankStatus:
        """Answer at once, whatever is under way."""
        return self._status

    def prepare(
        self, threads: int | Literal["auto"], share: NodeShare, pin_cores: bool
    ) -> RankStatus:
        """Take threads and cores; once this returns, the process is up and has its libraries."""
        machine = set_up_rank(threads, share, pin_cores=pin_cores, device=self._device)
        self._num_threads = machine.num_threads
        self._status = replace(self._status, machine=machine)
        return self._status

    def connect(self, address: GroupAddress) -> None:
        """Meet the other ranks and build this rank's blocks with their initial values."""
        with self._operation("connect"):
            interface = interface_of(self._node)
            if interface is not None:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
            self._address = address
            self._join_groups()
            self._build_stage()

    def replan(self, plan: Plan) -> None:
        """Build another plan's blocks for as many workers, over the connections if they fit."""
        with self._operation("replan"):
            fits = (plan.num_ranks, plan.num_replicas) == (
                self._plan.num_ranks,
                self._plan.num_replicas,
            )
            self._plan = plan
            if not fits:
                self._leave()
                self._join_groups()
            self._build_stage()

    def load(self, path: Path) -> None:
        """Replace the parameters by those of a checkpoint, which was verified by the caller."""
        with self._operation("load"):
            checkpoint = Checkpoint.open(path, verify=False)
            for parameter in self._ready_stage().parameters().values():
                parameter.load(checkpoint.read_rows(parameter.rows))

    @ray.method(concurrency_group=BATCH_GROUP)
    def train_step(
        self,
        turn: int,
        step: int,
        batch: Batch,
        learning_rate: float,
        clip_norm: float | None,
        record: bool = False,
    ) -> StageResult:
        """Make step number `step` together with the other ranks; the batch is that of all.

        `turn` counts the calls for batches from 0.
        """
        with self._turn(turn, batch) as prepared, self._operation("train_step", step):
            stage = self._ready_stage()
            return stage.train_step(prepared, learning_rate, clip_norm, record=record)

    @ray.method(concurrency_group=BATCH_GROUP)
    def evaluate(self, turn: int, step: int, batch: Batch) -> StageResult:
        """Compute the loss of a batch after step number `step`, without an update."""
        with self._turn(turn, batch) as prepared, self._operation("evaluate", step):
            return self._ready_stage().evaluate(prepared)

    def write_part(self, staging: Path, step: int) -> PartRecord:
        """Write this rank's parameters into the staging folder of a checkpoint."""
        with self._operation("write_part", step):
            name = part_name(self._rank, self._plan.num_ranks)
            held = self._ready_stage().parameters().values()
            return write_part(staging, name, [(p.rows, p.value) for p in held])

    def parameters(self) -> dict[str, Tensor]:
        """Return copies of this rank's pieces of the parameters, by key."""
        with self._operation("parameters"):
            held = self._ready_stage().parameters()
            return {key: parameter.value.cpu().clone() for key, parameter in held.items()}

    @property
    def _rank(self) -> int:
        return self._worker % self._plan.num_ranks

    @property
    def _replica(self) -> int:
        return self._worker // self._plan.num_ranks

    def _join_groups(self) -> None:
        """Meet the other ranks of the replica, and the same rank of the other replicas."""
        plan, rank, replica = self._plan, self._rank, self._replica
        address = self._address
        assert address is not None, "connect comes first"
        self._num_joined += 1
        self._transport = self._connected(
            partial(connect_ranks, shared_memory=address.shared_memory),
            rank,
            plan.num_ranks,
            f"replica{replica}",
            "rank",
        )
        self._replicas = None
        if plan.num_replicas > 1:
            self._replicas = self._connected(
                TorchTransport.connect, replica, plan.num_replicas, f"rank{rank}", "replica"
            )

    def _connected(
        self,
        connect: Callable[..., Connected],
        rank: int,
        num_ranks: int,
        group: str,
        member: str,
    ) -> Connected:
        address = self._address
        assert address is not None
        return connect(
            address.host,
            address.port,
            rank,
            num_ranks,
            timeout_s=address.timeout_s,
            attempt=address.attempt,
            backend="nccl" if self._device == "cuda" else "gloo",
            device=make_device(self._plan, self._device).tensor_device,
            # What earlier groups of this attempt left in the store must not show.
            group=f"groups{self._num_joined}/{group}",
            member=member,
        )

    def _build_stage(self) -> None:
        assert self._transport is not None
        self._stage = Stage(self._plan, self._worker, self._transport, self._device, self._replicas)

    @contextmanager
    def _turn(self, number: int, batch: Batch) -> Iterator[Batch | PreparedBatch]:
        """Cut the batch while another is under way, then wait for the turn."""
        # OpenMP keeps the number for each calling thread.
        torch.set_num_threads(self._num_threads)
        prepared: Batch | PreparedBatch = batch
        # What cannot be cut is told in its turn, by the operation itself.
        with suppress(Exception):
            prepared = self._ready_stage().prepare(batch)
        with self._turns.take(number):
            yield prepared

    @contextmanager
    def _operation(self, name: str, step: int | None = None) -> Iterator[None]:
        if self._failed:
            raise StageError(self._failure(FailureKind.CONNECTION, name, step, "it had stopped"))
        self._status = replace(self._status, step=step, operation=name)
        try:
            yield
        except Exception as error:
            self._failed = True
            self._leave()
            detail = "".join(traceback.format_exception(error))
            failure = self._failure(_kind_of(error), name, step, one_line(error), detail)
            raise StageError(failure) from None
        self._status = replace(self._status, operation="")

    def _failure(
        self, kind: FailureKind, operation: str, step: int | None, cause: str, detail: str = ""
    ) -> Failure:
        replica = self._replica if self._plan.num_replicas > 1 else None
        return Failure(kind, cause, self._rank, self._node, step, operation, detail, replica)

    def _leave(self) -> None:
        for transport in (self._transport, self._replicas):
            if transport is not None:
                transport.close()

    def _ready_stage(self) -> Stage:
        assert self._stage is not None, "connect comes first"
        return self._stage


def one_line(error: BaseException) -> str:
    """Return what went wrong; for errors that are bugs of ours also their type and place."""
    text = " ".join(str(error).split())[:500]
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text} ({_place(error.__traceback__)})"


def interface_of(address: str) -> str | None:
    """Return the network interface that has an IPv4 address; None if it cannot be told.

    Gloo otherwise takes what the host's name resolves to, which other nodes may not reach.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = name.encode()[:15].ljust(40, b"\0")
            try:
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # it has no IPv4 address
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None


_SIOCGIFADDR = 0x8915


def _kind_of(error: Exception) -> FailureKind:
    if isinstance(error, TransportError):
        return FailureKind.CONNECTION
    return FailureKind.USER_ERROR if isinstance(error, UserError) else FailureKind.ERROR


def _place(trace: TracebackType | None) -> str:
    frames = traceback.extract_tb(trace)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown place"
