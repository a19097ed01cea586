"""All ranks of all replicas as one thing: Ray actors that start, train and end together.

Calls go to every rank at once and their results are collected in order, so several steps can be in
flight. Of everything that then goes wrong in several places at the same time, one `WorkerFailure`
comes out, which names the first cause.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from torch import Tensor

from cluster.actor_process import create_actor
from cluster.config.sections import ClusterConfig
from cluster.failure_policy import Failure, FailureKind, WorkerFailure, first_cause
from cluster.rank_machine import RankMachine, node_shares
from cluster.resources import Reservation, reserve
from cluster.stage_actor import (
    MAX_BATCHES,
    GroupAddress,
    RankStatus,
    StageError,
)
from cluster.timeline import TimelineRecorder
from cluster.tracking.run_metrics import StepOutcome
from model.batching import Batch
from model.checkpoint_writer import PartRecord
from model.softmax import LossSum
from pipeline.plan import Plan
from pipeline.stage import StageResult
from pipeline.transports.torch_store import StoreServer

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0
"""For processes to come up and import torch; on a busy machine eight take half a minute."""
SETTLE_S = 3.0
"""How long to look for the cause after a rank lost its peers; they know within 0.3 s."""
PROBE_S = 10.0
_POLL_S = 0.5


class WorkerGroup:
    """The workers of `plan`, each an actor in its own process, in the order of replicas and ranks.

    `check` is called now and then while waiting; what it raises ends the wait. Every method but
    `shutdown` raises WorkerFailure, after which only `shutdown` may be called. `attempt` numbers
    the lives of a run, so that ranks of an earlier one cannot meet those of this one. `recorder`
    gets the timelines of the steps that it wants.
    """

    def __init__(
        self,
        plan: Plan,
        cluster: ClusterConfig,
        *,
        clip_norm: float | None = 5.0,
        attempt: int = 1,
        check: Callable[[], None] = lambda: None,
        recorder: TimelineRecorder | None = None,
    ) -> None:
        self.plan = plan
        self.actors: list[Any] = []
        self.statuses: list[RankStatus] = []
        self._cluster = cluster
        self._clip_norm = clip_norm
        self._attempt = attempt
        self._check = check
        self._recorder = recorder
        self._reservation: Reservation | None = None
        self._store: StoreServer | None = None
        self._in_flight: deque[tuple[int, list[Any]]] = deque()
        self._step = 0
        self._num_turns = 0

    def start(self) -> None:
        """Reserve places, create the actors in parallel, connect them and build their stages.

        Raises ClusterError when the cluster has no room.
        """
        self.shutdown()
        self._reservation = reserve(self._cluster, self.plan.num_workers, check=self._check)
        self._num_turns = 0
        self.actors = [
            create_actor(self.plan, worker, self._cluster, self._reservation)
            for worker in range(self.plan.num_workers)
        ]
        cluster = self._cluster
        refs = [
            actor.prepare.remote(cluster.threads_per_rank, share, cluster.pin_cores)
            for actor, share in zip(self.actors, node_shares(self._reservation.nodes), strict=True)
        ]
        self.statuses = self._gather(refs, "start", patience_s=START_TIMEOUT_S)
        address = self._meeting_place()
        self._gather([actor.connect.remote(address) for actor in self.actors], "connect")

    @property
    def num_nodes(self) -> int:
        """Nodes that hold a rank."""
        return self._reservation.num_nodes if self._reservation else 0

    @property
    def machines(self) -> list[RankMachine]:
        """What every worker computes with, once they have started."""
        return [status.machine for status in self.statuses if status.machine is not None]

    def replan(self, plan: Plan) -> None:
        """Let the same actors follow another plan for as many, from its initial values."""
        assert plan.num_workers == self.plan.num_workers
        assert not self._in_flight
        self.plan = plan
        self._gather([actor.replan.remote(plan) for actor in self.actors], "replan")

    def load(self, checkpoint: Path, step: int = 0) -> None:
        """Load a verified checkpoint, taken after `step` steps, into all ranks."""
        assert not self._in_flight
        self._step = step
        self._gather([actor.load.remote(checkpoint) for actor in self.actors], "load")

    def submit_step(self, step: int, batch: Batch, learning_rate: float) -> None:
        """Hand step number `step` to all ranks, each with the whole batch; returns at once.

        Only replica 0 is recorded: the others do the same with other sentences.
        """
        assert len(self._in_flight) < MAX_BATCHES
        stored, turn = ray.put(batch), self._take_turn()
        record = self._recorder is not None and self._recorder.wants(step)
        refs = [
            actor.train_step.remote(
                turn,
                step,
                stored,
                learning_rate,
                self._clip_norm,
                record and worker < self.plan.num_ranks,
            )
            for worker, actor in enumerate(self.actors)
        ]
        self._in_flight.append((step, refs))

    def collect_step(self) -> StepOutcome:
        """Wait for the oldest submitted step."""
        self._step, refs = self._in_flight.popleft()
        try:
            results: list[StageResult] = self._gather(refs, "train_step")
        except WorkerFailure:
            # What was handed out behind it fails as well.
            self._in_flight.clear()
            raise
        if self._recorder is not None:
            ranks = slice(self.plan.num_ranks)
            nodes = [status.node for status in self.statuses[ranks]]
            self._recorder.add(self._step, results[ranks], nodes)
        return _outcome(self._step, results)

    def evaluate(self, batches: Iterable[Batch]) -> LossSum:
        """Return the loss over some batches, without an update; no step may be under way."""
        assert not self._in_flight
        loss = LossSum()
        waiting: deque[list[Any]] = deque()
        for batch in batches:
            stored, turn = ray.put(batch), self._take_turn()
            waiting.append([a.evaluate.remote(turn, self._step, stored) for a in self.actors])
            if len(waiting) == MAX_BATCHES:
                loss += _loss(self._gather(waiting.popleft(), "evaluate"))
        while waiting:
            loss += _loss(self._gather(waiting.popleft(), "evaluate"))
        return loss

    def write_parts(self, staging: Path) -> list[PartRecord]:
        """Let replica 0's ranks write their parts of a checkpoint; returns their records in order.

        All replicas have the same parameters. No step may be under way.
        """
        assert not self._in_flight
        actors = self._of_replica(0)
        refs = [actor.write_part.remote(staging, self._step) for actor in actors]
        records: list[PartRecord] = self._gather(refs, "write_part")
        return records

    def parameters(self, replica: int = 0) -> dict[str, Tensor]:
        """Return copies of all pieces of a replica's parameters by key; the model must fit here."""
        assert not self._in_flight
        refs = [actor.parameters.remote() for actor in self._of_replica(replica)]
        pieces: list[dict[str, Tensor]] = self._gather(
            refs, "parameters", first=replica * self.plan.num_ranks
        )
        return {key: value for held in pieces for key, value in held.items()}

    def shutdown(self) -> None:
        """Kill all ranks and give their places back; never raises, and may be called again."""
        self._in_flight.clear()
        try:
            for actor in self.actors:
                ray.kill(actor, no_restart=True)
            if self._reservation is not None:
                self._reservation.release()
        except RayError as error:
            # The cluster itself may be gone; the ranks then end with it.
            logger.warning("ranks could not be ended: %s", _first_line(error))
        if self._store is not None:
            self._store.close()
        self.actors, self._reservation, self._store = [], None, None

    def _take_turn(self) -> int:
        self._num_turns += 1
        return self._num_turns - 1

    def _of_replica(self, replica: int) -> list[Any]:
        first = replica * self.plan.num_ranks
        return self.actors[first : first + self.plan.num_ranks]

    def _meeting_place(self) -> GroupAddress:
        """Host the store in this process: it outlives every rank, and ends with the run."""
        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._store = StoreServer(host, self._cluster.timeout_s)
        cluster = self._cluster
        return GroupAddress(
            host, self._store.port, self._attempt, cluster.timeout_s, cluster.shared_memory
        )

    def _gather(
        self,
        refs: Sequence[Any],
        operation: str,
        *,
        first: int = 0,
        patience_s: float | None = None,
    ) -> list[Any]:
        """Return the results of one call to the workers from `first` on, or raise WorkerFailure.

        After `patience_s` without news, ranks that do not even tell their status have failed; the
        others may take as long as they need, since ranks that wait have a timeout of their own.
        """
        patience_s = patience_s or self._cluster.timeout_s
        pending = {ref: worker for worker, ref in enumerate(refs, first)}
        results: dict[int, Any] = {}
        quiet_since = time.monotonic()
        while pending:
            self._check()
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=_POLL_S)
            for ref in ready:
                worker = pending.pop(ref)
                try:
                    results[worker] = ray.get(ref)
                except RayError as error:
                    failure = self._failure_of(error, worker, operation)
                    raise WorkerFailure(self._cause(failure, pending, operation)) from None
                quiet_since = time.monotonic()
            if time.monotonic() - quiet_since > patience_s:
                if failures := self._not_answering(pending.values(), operation):
                    raise WorkerFailure(failures[0])
                quiet_since = time.monotonic()
        return [results[worker] for worker in range(first, first + len(refs))]

    def _cause(self, first: Failure, pending: Mapping[Any, int], operation: str) -> Failure:
        """Look at the other ranks: the failure that was heard of first may follow from theirs."""
        failures = [first]
        silent = dict(pending)
        deadline = time.monotonic() + SETTLE_S
        while silent and _is_consequence(failures) and time.monotonic() < deadline:
            ready, _ = ray.wait(list(silent), num_returns=1, timeout=_POLL_S)
            for ref in ready:
                worker = silent.pop(ref)
                try:
                    ray.get(ref)
                except RayError as error:
                    failures.append(self._failure_of(error, worker, operation))
        if silent and _is_consequence(failures):
            failures += self._not_answering(silent.values(), operation)
        for failure in failures:
            logger.debug("%s\n%s", failure, failure.detail)
        return first_cause(failures)

    def _not_answering(self, workers: Iterable[int], operation: str) -> list[Failure]:
        """Ask ranks for their status; those that say nothing hang or are cut off."""
        refs = {self.actors[worker].status.remote(): worker for worker in workers}
        if not refs:
            return []
        _, silent = ray.wait(list(refs), num_returns=len(refs), timeout=PROBE_S)
        return [
            self._failure(
                FailureKind.NOT_ANSWERING,
                refs[ref],
                operation,
                f"it does not answer within {PROBE_S:g} s: it hangs, or its node is cut off",
            )
            for ref in silent
        ]

    def _failure_of(self, error: RayError, worker: int, operation: str) -> Failure:
        if isinstance(error, RayTaskError):
            cause = error.cause
            if isinstance(cause, StageError):
                return cause.failure
            kind, text = FailureKind.ERROR, f"{type(cause).__name__}: {cause}"
            return self._failure(kind, worker, operation, " ".join(text.split()), str(error))
        if isinstance(error, RayActorError | OutOfMemoryError):
            return self._failure(FailureKind.DIED, worker, operation, _death(error), str(error))
        return self._failure(FailureKind.ERROR, worker, operation, _first_line(error), str(error))

    def _failure(
        self, kind: FailureKind, worker: int, operation: str, cause: str, detail: str = ""
    ) -> Failure:
        node = self.statuses[worker].node if worker < len(self.statuses) else None
        replica, rank = divmod(worker, self.plan.num_ranks)
        named = replica if self.plan.num_replicas > 1 else None
        return Failure(kind, cause, rank, node, self._step or None, operation, detail, named)


def _is_consequence(failures: Sequence[Failure]) -> bool:
    """Whether all that is known so far is that ranks lost their peers."""
    return first_cause(failures).kind is FailureKind.CONNECTION


def _outcome(step: int, results: Sequence[StageResult]) -> StepOutcome:
    return StepOutcome(
        step=step,
        loss=_loss(results),
        gradient_norm=results[0].gradient_norm,
        step_s=max(result.step_s for result in results),
        busy_s=tuple(result.busy_s for result in results),
        wait_s=tuple(result.wait_s for result in results),
        bytes_sent=sum(result.bytes_sent for result in results),
        peak_memory_bytes=tuple(result.peak_memory_bytes for result in results),
    )


def _loss(results: Sequence[StageResult]) -> LossSum:
    return sum((result.loss for result in results), LossSum())


def _death(error: RayError) -> str:
    """Word why an actor is gone, as far as Ray knows."""
    text = " ".join(str(error).split())
    if isinstance(error, OutOfMemoryError) or "NODE_OUT_OF_MEMORY" in text:
        return (
            "Ray killed its process because its node ran low on memory; use a smaller "
            "training.batch_size, more ranks, or a node with more memory"
        )
    _, found, detail = text.partition("Worker exit detail: ")
    # What follows the first sentences are Ray's guesses.
    facts = detail.partition(" Some common causes")[0].rstrip(". ")
    return f"its process died ({facts[:200]})" if found else "its process died"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
