"""The life of a run: the training loop as it is read from top to bottom.

Nothing here imports Ray. The ranks, the data, the checkpoints and the record are protocols, so that
the loop is tested with plain objects, and what to do after a failure is a policy's decision.

A step is one optimiser update, and all epochs have the same number of batches. So the state after s
steps is at s / (steps an epoch) epochs, and the batch of the next step is number s of the order.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

from cluster.failure_policy import (
    Decision,
    Failure,
    FailurePolicy,
    StopOnFailure,
    WorkerFailure,
)
from cluster.interruption import Interrupted
from cluster.run_state import RunState, RunStates
from cluster.tracking.run_metrics import RunMetrics, StepInput, StepOutcome
from model.batching import Batch
from model.checkpoint_writer import PartRecord
from model.loss import LossSum
from model.optimizer import LearningRateSchedule

STEPS_IN_FLIGHT = 3
"""Steps that are submitted and not collected: the ranks wait for neither driver nor data."""


class Workers(Protocol):
    """The ranks of one pipeline as one thing that trains.

    Every method raises WorkerFailure when a rank cannot go on, and Interrupted when the user wants
    an end; after either only `shutdown` may be called.
    """

    def start(self) -> None:
        """Create the ranks and connect them; returns when all are ready."""

    def submit_step(self, step: int, batch: Batch, learning_rate: float) -> None:
        """Hand step number `step` to all ranks; returns at once."""

    def collect_step(self) -> StepOutcome:
        """Wait for the oldest submitted step that was not collected."""

    def evaluate(self, batches: Iterable[Batch]) -> LossSum:
        """Return the loss over some batches, without an update; no step may be under way."""

    def load(self, checkpoint: Path, step: int) -> None:
        """Load a verified checkpoint, taken after `step` steps, into all ranks."""

    def write_parts(self, staging: Path) -> list[PartRecord]:
        """Let every rank write its part of a checkpoint, and return their records."""

    def shutdown(self) -> None:
        """End the ranks, in bounded time, whatever state they are in; never raises."""


class BatchSource(Protocol):
    """Where batches come from."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, the same for all; at least 1."""

    def training_batches(
        self, first_step: int, last_step: int, check: Callable[[], None]
    ) -> Iterator[Batch]:
        """Yield the batches of the steps after `first_step` up to `last_step`, over all epochs.

        `check` is called while waiting for data; what it raises ends the wait.
        """

    def validation_batches(self) -> Iterator[Batch] | None:
        """Return the held-out batches in order; None if there are none."""


class Checkpoints(Protocol):
    """What keeps and restores the state of the ranks."""

    def restore(self, workers: Workers) -> tuple[int, int, int]:
        """Load what the run resumes from; return the steps, pairs and words it has behind it."""

    def save(self, workers: Workers, step: int, num_pairs: int, num_words: int) -> Path | None:
        """Keep the state after `step` steps, and return where; None if there is none to keep."""


class Record(Protocol):
    """What hears of the run: its metrics, its states, its progress."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics at a step."""

    def progress(self, step: int, total_steps: int) -> None:
        """Hear how far the run is."""

    def state(self, state: RunState, step: int) -> None:
        """Hear of a new state."""

    def saved(self, checkpoint: Path, step: int) -> None:
        """Hear of a committed checkpoint."""


@dataclass(frozen=True)
class LoopSettings:
    """How long to train, how fast, and when to log, validate and save.

    `total_steps` counts from the beginning of the run, not from where it resumes. None for
    `validate_every_steps` or `checkpoint_every_steps` means at each epoch's end; both also happen
    after the last step.
    """

    total_steps: int
    schedule: LearningRateSchedule
    log_every_steps: int = 10
    validate_every_steps: int | None = None
    checkpoint_every_steps: int | None = None


def steps_of(epochs: float, steps_per_epoch: int, max_steps: int | None) -> int:
    """Return the steps of so many epochs, of which the last may be a part, at most `max_steps`."""
    # A product such as 0.1 * 30 may lie just above the whole number that was meant.
    steps = max(1, math.ceil(round(epochs * steps_per_epoch, 6)))
    return steps if max_steps is None else min(steps, max_steps)


@dataclass
class Controller:
    """Runs one training from its first or restored step to its last."""

    settings: LoopSettings
    workers: Workers
    batches: BatchSource
    checkpoints: Checkpoints
    record: Record
    check_interrupted: Callable[[], None] = lambda: None
    policy: FailurePolicy = field(default_factory=StopOnFailure)
    states: RunStates = field(default_factory=RunStates)
    step: int = 0
    num_pairs: int = 0
    num_words: int = 0
    checkpoint: Path | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    _failures: list[Failure] = field(default_factory=list)

    def run(self) -> None:
        """Train to the end, and leave no rank behind in any case.

        `step`, `checkpoint` (the newest one of this run) and `metrics` (the newest values) tell
        how far it came, whatever ended it. Raises WorkerFailure when a rank could not go on and
        the policy said to stop, and Interrupted when the user wanted an end.
        """
        try:
            self._train_with_policy()
        except Interrupted:
            self._enter(RunState.KILLED)
            raise
        except BaseException:
            self._enter(RunState.FAILED)
            raise
        finally:
            self.workers.shutdown()

    @property
    def epoch(self) -> float:
        """Epochs trained so far."""
        return self.step / self.batches.steps_per_epoch

    def _train_with_policy(self) -> None:
        while True:
            try:
                self._train()
                return
            except WorkerFailure as error:
                decision = self.policy.decide(error.failure, tuple(self._failures))
                self._failures.append(error.failure)
                if decision is Decision.STOP:
                    raise

    def _train(self) -> None:
        total = self.settings.total_steps
        self.record.state(self.states.current, self.step)
        self.workers.start()
        self._enter(RunState.LOADING)
        restored = self.checkpoints.restore(self.workers)
        self.step, self.num_pairs, self.num_words = restored
        self._enter(RunState.TRAINING)
        # A run may be resumed at or behind its end, for example with fewer epochs.
        self.record.progress(self.step, max(self.step, total))
        batches = self.batches.training_batches(self.step, total, self.check_interrupted)
        metrics = RunMetrics(self.batches.steps_per_epoch)
        while self.step < total:
            self._train_until(self._next_stop(), batches, metrics)
            if self._is_due(self.settings.validate_every_steps):
                self._validate()
            if self._is_due(self.settings.checkpoint_every_steps):
                self._save()
        self._enter(RunState.FINISHED)

    def _train_until(self, stop: int, batches: Iterator[Batch], metrics: RunMetrics) -> None:
        """Make the steps up to number `stop`, several in flight, and collect them all."""
        metrics.resume()
        in_flight: deque[StepInput] = deque()
        for step, batch, wait_s in _numbered(batches, self.step + 1, stop):
            self.check_interrupted()
            rate = self.settings.schedule.at((step - 1) / self.batches.steps_per_epoch)
            self.workers.submit_step(step, batch, rate)
            in_flight.append(StepInput.of(step, batch, rate, wait_s))
            if len(in_flight) == STEPS_IN_FLIGHT:
                self._collect(in_flight.popleft(), metrics)
        while in_flight:
            self._collect(in_flight.popleft(), metrics)
        metrics.pause()
        assert self.step == stop, f"the data ended after step {self.step} of {stop}"

    def _collect(self, submitted: StepInput, metrics: RunMetrics) -> None:
        metrics.add(submitted, self.workers.collect_step())
        self.step = submitted.step
        self.num_pairs += submitted.num_pairs
        self.num_words += submitted.num_words
        total = self.settings.total_steps
        if self.step % self.settings.log_every_steps == 0 or self.step == total:
            self._log(metrics.take())
        self.record.progress(self.step, total)

    def _validate(self) -> None:
        batches = self.batches.validation_batches()
        if batches is None:
            return
        self._enter(RunState.VALIDATING)
        loss = self.workers.evaluate(batches)
        self._log({"valid/loss": loss.mean, "valid/perplexity": loss.perplexity})
        self._enter(RunState.TRAINING)

    def _save(self) -> None:
        self._enter(RunState.CHECKPOINTING)
        self.checkpoint = self.checkpoints.save(
            self.workers, self.step, self.num_pairs, self.num_words
        )
        if self.checkpoint is not None:
            self.record.saved(self.checkpoint, self.step)
        self._enter(RunState.TRAINING)

    def _next_stop(self) -> int:
        """Return the next step after which no step may be under way."""
        ends = (
            (self.step // every + 1) * every
            for every in map(
                self._interval,
                (self.settings.validate_every_steps, self.settings.checkpoint_every_steps),
            )
        )
        return min(self.settings.total_steps, *ends)

    def _is_due(self, every_steps: int | None) -> bool:
        is_last = self.step == self.settings.total_steps
        return is_last or self.step % self._interval(every_steps) == 0

    def _interval(self, every_steps: int | None) -> int:
        return every_steps or self.batches.steps_per_epoch

    def _log(self, metrics: Mapping[str, float]) -> None:
        self.metrics.update(metrics)
        self.record.log(metrics, self.step)

    def _enter(self, state: RunState) -> None:
        self.states.enter(state)
        self.record.state(state, self.step)


def _numbered(
    batches: Iterator[Batch], first: int, last: int
) -> Iterator[tuple[int, Batch, float]]:
    """Yield the next batches with their steps' numbers and the seconds they were waited for."""
    for step in range(first, last + 1):
        start_s = time.monotonic()
        for batch in islice(batches, 1):
            yield step, batch, time.monotonic() - start_s
