"""All ranks of all replicas as one thing: Ray actors that start, train and end together.

Calls go to every rank at once and their results are collected in order, so several steps can be in
flight. What goes wrong comes out as one `WorkerFailure` (see `cluster.worker_calls`).
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from torch import Tensor

from cluster.actor_process import create_actor
from cluster.config.sections import ClusterConfig
from cluster.failure_policy import WorkerFailure
from cluster.rank_machine import RankMachine, node_shares
from cluster.resources import Reservation, reserve
from cluster.stage_actor import (
    MAX_BATCHES,
    GroupAddress,
    RankStatus,
)
from cluster.timeline import TimelineRecorder
from cluster.tracking.run_metrics import StepOutcome
from cluster.worker_calls import WorkerCalls, first_line
from model.batching import Batch
from model.checkpoint_writer import PartRecord
from model.loss import LossSum
from pipeline.plan import Plan
from pipeline.stage import StageResult
from pipeline.transports.torch_store import StoreServer

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0
"""For processes to come up and import torch; on a busy machine eight take half a minute."""


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
        self._calls = WorkerCalls(plan, check, cluster.timeout_s)
        self._cluster = cluster
        self._clip_norm = clip_norm
        self._attempt = attempt
        self._check = check
        self._recorder = recorder
        self._reservation: Reservation | None = None
        self._store: StoreServer | None = None
        self._in_flight: deque[tuple[int, list[Any]]] = deque()
        self._num_turns = 0

    def start(self) -> None:
        """Reserve places, create the actors in parallel, connect them and build their stages.

        Raises ClusterError when the cluster has no room.
        """
        self.shutdown()
        self._reservation = reserve(self._cluster, self.plan.num_workers, check=self._check)
        self._num_turns = 0
        self._calls.actors = [
            create_actor(self.plan, worker, self._cluster, self._reservation)
            for worker in range(self.plan.num_workers)
        ]
        cluster = self._cluster
        refs = [
            actor.prepare.remote(cluster.threads_per_rank, share, cluster.pin_cores)
            for actor, share in zip(self.actors, node_shares(self._reservation.nodes), strict=True)
        ]
        self._calls.statuses = self._calls.results(refs, "start", patience_s=START_TIMEOUT_S)
        address = self._meeting_place()
        self._calls.results([actor.connect.remote(address) for actor in self.actors], "connect")

    @property
    def plan(self) -> Plan:
        """What the workers are of."""
        return self._calls.plan

    @property
    def actors(self) -> list[Any]:
        """The workers' actors; none before the start and after the end."""
        return self._calls.actors

    @property
    def statuses(self) -> list[RankStatus]:
        """What every worker said of itself when it had started."""
        return self._calls.statuses

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
        self._calls.plan = plan
        self._calls.results([actor.replan.remote(plan) for actor in self.actors], "replan")

    def load(self, checkpoint: Path, step: int = 0) -> None:
        """Load a verified checkpoint, taken after `step` steps, into all ranks."""
        assert not self._in_flight
        self._calls.step = step
        self._calls.results([actor.load.remote(checkpoint) for actor in self.actors], "load")

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
        self._calls.step, refs = self._in_flight.popleft()
        try:
            results: list[StageResult] = self._calls.results(refs, "train_step")
        except WorkerFailure:
            # What was handed out behind it fails as well.
            self._in_flight.clear()
            raise
        if self._recorder is not None:
            ranks = slice(self.plan.num_ranks)
            nodes = [status.node for status in self.statuses[ranks]]
            self._recorder.add(self._calls.step, results[ranks], nodes)
        return _outcome(self._calls.step, results)

    def evaluate(self, batches: Iterable[Batch]) -> LossSum:
        """Return the loss over some batches, without an update; no step may be under way."""
        assert not self._in_flight
        loss = LossSum()
        waiting: deque[list[Any]] = deque()
        for batch in batches:
            stored, turn = ray.put(batch), self._take_turn()
            waiting.append([a.evaluate.remote(turn, self._calls.step, stored) for a in self.actors])
            if len(waiting) == MAX_BATCHES:
                loss += _loss(self._calls.results(waiting.popleft(), "evaluate"))
        while waiting:
            loss += _loss(self._calls.results(waiting.popleft(), "evaluate"))
        return loss

    def write_parts(self, staging: Path) -> list[PartRecord]:
        """Let replica 0's ranks write their parts of a checkpoint; returns their records in order.

        All replicas have the same parameters. No step may be under way.
        """
        assert not self._in_flight
        actors = self._of_replica(0)
        refs = [actor.write_part.remote(staging, self._calls.step) for actor in actors]
        records: list[PartRecord] = self._calls.results(refs, "write_part")
        return records

    def parameters(self, replica: int = 0) -> dict[str, Tensor]:
        """Return copies of all pieces of a replica's parameters by key; the model must fit here."""
        assert not self._in_flight
        refs = [actor.parameters.remote() for actor in self._of_replica(replica)]
        pieces: list[dict[str, Tensor]] = self._calls.results(
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
            logger.warning("ranks could not be ended: %s", first_line(error))
        if self._store is not None:
            self._store.close()
        self._calls.actors, self._reservation, self._store = [], None, None

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
