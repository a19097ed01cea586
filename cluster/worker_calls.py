"""Collects what calls to all workers return, or the one failure that explains the others.

Of everything that goes wrong in several places at the same time, one `WorkerFailure` comes out,
which names the first cause.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from cluster.failure_policy import Failure, FailureKind, WorkerFailure, first_cause
from cluster.stage_actor import RankStatus, StageError
from pipeline.plan import Plan

logger = logging.getLogger(__name__)

SETTLE_S = 3.0
"""How long to look for the cause after a rank lost its peers; they know within 0.3 s."""
PROBE_S = 10.0
_POLL_S = 0.5


class WorkerCalls:
    """The workers of `plan` as far as their calls go.

    `actors` are in the order of replicas and ranks, `statuses` what they said of themselves, and
    `step` the one that failures belong to. `check` is called now and then while waiting; what it
    raises ends the wait.
    """

    def __init__(self, plan: Plan, check: Callable[[], None], timeout_s: float) -> None:
        self.plan = plan
        self.actors: list[Any] = []
        self.statuses: list[RankStatus] = []
        self.step = 0
        self._check = check
        self._timeout_s = timeout_s

    def results(
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
        patience_s = patience_s or self._timeout_s
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
        return self._failure(FailureKind.ERROR, worker, operation, first_line(error), str(error))

    def _failure(
        self, kind: FailureKind, worker: int, operation: str, cause: str, detail: str = ""
    ) -> Failure:
        node = self.statuses[worker].node if worker < len(self.statuses) else None
        replica, rank = divmod(worker, self.plan.num_ranks)
        named = replica if self.plan.num_replicas > 1 else None
        return Failure(kind, cause, rank, node, self.step or None, operation, detail, named)


def _is_consequence(failures: Sequence[Failure]) -> bool:
    """Whether all that is known so far is that ranks lost their peers."""
    return first_cause(failures).kind is FailureKind.CONNECTION


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


def first_line(error: BaseException) -> str:
    """Return the start of what an error says, or its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
