"""From what the ranks measured in each step to the named metrics of a run.

Metrics are averages over the steps since they were last taken: losses are summed and divided once,
times are added. Names have one slash, which is what MLflow's charts are grouped by.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from model.batching import Batch
from model.loss import LossSum


@dataclass(frozen=True)
class StepOutcome:
    """One step over the ranks of all replicas, numbered from 1.

    `step_s` is the time of the slowest one; `busy_s[w]` the part of its time in which worker w
    computed, which is rank w where there is one replica, and `wait_s[w]` that in which it waited
    for others; `bytes_sent` is what all of them sent to each other; `peak_memory_bytes[w]` the
    most that worker w has held since it started.
    """

    step: int
    loss: LossSum
    gradient_norm: float
    step_s: float
    busy_s: tuple[float, ...]
    wait_s: tuple[float, ...]
    bytes_sent: int
    peak_memory_bytes: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepInput:
    """What the driver knows of a step when it submits it; `wait_s` is how long the data took."""

    step: int
    num_pairs: int
    num_words: int
    num_positions: int
    learning_rate: float
    wait_s: float

    @classmethod
    def of(cls, step: int, batch: Batch, learning_rate: float, wait_s: float) -> "StepInput":
        """Read the counts off a batch."""
        counts = batch.num_sentences, batch.num_words, batch.num_positions
        return cls(step, *counts, learning_rate, wait_s)


@dataclass
class RunMetrics:
    """The steps since the last `take`, and the clock time in which they were made.

    The clock runs from the first `resume`, and stands still between `pause` and `resume`, so that
    validation and checkpoints do not count as slow steps.
    """

    steps_per_epoch: int
    clock: Callable[[], float] = time.monotonic
    _steps: list[tuple[StepInput, StepOutcome]] = field(default_factory=list)
    _elapsed_s: float = 0.0
    _since: float | None = None

    def resume(self) -> None:
        """Let the clock run."""
        self._since = self.clock()

    def pause(self) -> None:
        """Stop the clock."""
        self._elapsed_s = self._elapsed()
        self._since = None

    def add(self, submitted: StepInput, outcome: StepOutcome) -> None:
        """Count a step that was made."""
        assert submitted.step == outcome.step
        self._steps.append((submitted, outcome))

    @property
    def num_steps(self) -> int:
        """Steps since the last `take`."""
        return len(self._steps)

    def take(self) -> dict[str, float]:
        """Return the metrics of the steps since the last call; at least one must be there."""
        inputs = [submitted for submitted, _ in self._steps]
        outcomes = [outcome for _, outcome in self._steps]
        elapsed_s = self._elapsed()
        metrics = self._training(inputs, outcomes)
        metrics |= _throughput(inputs, elapsed_s)
        metrics |= _pipeline(outcomes)
        peaks = outcomes[-1].peak_memory_bytes
        metrics |= {f"memory/rank{rank}_peak_bytes": float(peak) for rank, peak in enumerate(peaks)}
        self._steps = []
        self._elapsed_s = 0.0
        if self._since is not None:
            self._since = self.clock()
        return metrics

    def _elapsed(self) -> float:
        running_s = 0.0 if self._since is None else self.clock() - self._since
        return self._elapsed_s + running_s

    def _training(
        self, inputs: Sequence[StepInput], outcomes: Sequence[StepOutcome]
    ) -> dict[str, float]:
        loss = sum((outcome.loss for outcome in outcomes), LossSum())
        return {
            "train/loss": loss.mean,
            "train/perplexity": loss.perplexity,
            "train/grad_norm": sum(o.gradient_norm for o in outcomes) / len(outcomes),
            "train/learning_rate": inputs[-1].learning_rate,
            "train/epoch": outcomes[-1].step / self.steps_per_epoch,
        }


def _throughput(inputs: Sequence[StepInput], elapsed_s: float) -> dict[str, float]:
    num_words = sum(submitted.num_words for submitted in inputs)
    num_positions = sum(submitted.num_positions for submitted in inputs)
    return {
        "throughput/words_per_second": num_words / elapsed_s if elapsed_s else 0.0,
        "throughput/step_seconds": elapsed_s / len(inputs),
        "data/padding_fraction": 1.0 - num_words / num_positions if num_positions else 0.0,
        "data/wait_seconds": sum(submitted.wait_s for submitted in inputs) / len(inputs),
    }


def _pipeline(outcomes: Sequence[StepOutcome]) -> dict[str, float]:
    total_s = sum(outcome.step_s for outcome in outcomes)
    busy = _fractions([outcome.busy_s for outcome in outcomes], total_s)
    waiting = _fractions([outcome.wait_s for outcome in outcomes], total_s)
    metrics = {f"pipeline/rank{rank}_busy": fraction for rank, fraction in enumerate(busy)}
    return metrics | {
        "pipeline/bubble_fraction": 1.0 - sum(busy) / len(busy),
        "pipeline/wait_fraction": sum(waiting) / len(waiting),
        "pipeline/bytes_sent": sum(o.bytes_sent for o in outcomes) / len(outcomes),
    }


def _fractions(times_s: Sequence[tuple[float, ...]], total_s: float) -> list[float]:
    """Return what share of the steps' time each rank's times are; one tuple of ranks a step."""
    return [sum(rank) / total_s if total_s else 0.0 for rank in zip(*times_s, strict=True)]
