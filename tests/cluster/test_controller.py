"""The training loop against plain objects: what happens at which step, and how runs end."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.controller import (
    STEPS_IN_FLIGHT,
    Controller,
    LoopSettings,
    steps_of,
)
from cluster.failure_policy import Decision, Failure, FailureKind, WorkerFailure
from cluster.interruption import Interrupted, Interruption
from cluster.run_state import IllegalTransition, RunState, RunStates
from cluster.tracking.run_metrics import StepOutcome
from model.batching import Batch, make_batch
from model.checkpoint_writer import PartRecord
from model.loss import LossSum
from model.optimizer import LearningRateSchedule

STEPS_PER_EPOCH = 4


@dataclass
class FakeWorkers:
    """Ranks that only write down what they are told."""

    fail_at: int | None = None
    events: list[str] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    in_flight: list[int] = field(default_factory=list)
    most_in_flight: int = 0

    def start(self) -> None:
        self.events.append("start")

    def load(self, checkpoint: Path, step: int) -> None:
        self.events.append(f"load {step}")

    def write_parts(self, staging: Path) -> list[PartRecord]:
        return []

    def submit_step(self, step: int, batch: Batch, learning_rate: float) -> None:
        self.in_flight.append(step)
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        self.rates.append(learning_rate)

    def collect_step(self) -> StepOutcome:
        step = self.in_flight.pop(0)
        if step == self.fail_at:
            raise WorkerFailure(Failure(FailureKind.DIED, "killed", rank=1, step=step))
        self.events.append(f"step {step}")
        return StepOutcome(
            step, LossSum(2.0 * step, 2), 1.0, 0.5, (0.25, 0.5), (0.2, 0.0), 100, (step, 7)
        )

    def evaluate(self, batches: Iterable[Batch]) -> LossSum:
        assert not self.in_flight
        self.events.append("evaluate")
        return LossSum(float(len(list(batches))), 1)

    def shutdown(self) -> None:
        self.events.append("shutdown")


@dataclass
class FakeBatches:
    """Equal batches without end."""

    num_valid: int = 2
    steps_per_epoch: int = STEPS_PER_EPOCH

    def training_batches(
        self, first_step: int, last_step: int, check: Callable[[], None]
    ) -> Iterator[Batch]:
        return (make_batch([([2], [3, 4])]) for _ in range(first_step, last_step))

    def validation_batches(self) -> Iterator[Batch] | None:
        batches = [make_batch([([2], [3])])] * self.num_valid
        return iter(batches) if batches else None


@dataclass
class FakeCheckpoints:
    """Checkpoints without files."""

    start: tuple[int, int, int] = (0, 0, 0)
    saved: list[tuple[int, int, int]] = field(default_factory=list)

    def restore(self, workers: object) -> tuple[int, int, int]:
        return self.start

    def save(self, workers: object, step: int, num_pairs: int, num_words: int) -> Path:
        self.saved.append((step, num_pairs, num_words))
        return Path(f"step-{step}")


@dataclass
class FakeRecord:
    """Keeps what it hears."""

    logged: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.logged.append((step, dict(metrics)))

    def progress(self, step: int, total_steps: int) -> None:
        assert step <= total_steps

    def state(self, state: RunState, step: int) -> None:
        pass

    def saved(self, checkpoint: Path, step: int) -> None:
        self.checkpoints.append(step)

    def steps_with(self, name: str) -> list[int]:
        return [step for step, metrics in self.logged if name in metrics]


def controller(
    total_steps: int = 10,
    *,
    log: int = 3,
    validate: int | None = None,
    save: int | None = None,
    workers: FakeWorkers | None = None,
    batches: FakeBatches | None = None,
    checkpoints: FakeCheckpoints | None = None,
    check: Callable[[], None] = lambda: None,
) -> Controller:
    """Make a controller of fakes with rate 1, halved after 1.5 epochs and each half epoch."""
    settings = LoopSettings(total_steps, LearningRateSchedule(1.0, 1.5, 0.5), log, validate, save)
    return Controller(
        settings,
        workers or FakeWorkers(),
        batches or FakeBatches(),
        checkpoints or FakeCheckpoints(),
        FakeRecord(),
        check,
    )


def fakes(run: Controller) -> tuple[FakeWorkers, FakeCheckpoints, FakeRecord]:
    workers, checkpoints, record = run.workers, run.checkpoints, run.record
    assert isinstance(workers, FakeWorkers)
    assert isinstance(checkpoints, FakeCheckpoints)
    assert isinstance(record, FakeRecord)
    return workers, checkpoints, record


def test_by_default_each_epoch_ends_with_validation_and_checkpoint_and_so_does_the_run() -> None:
    run = controller(10)
    run.run()
    workers, checkpoints, record = fakes(run)
    assert record.steps_with("valid/loss") == [4, 8, 10]
    assert record.checkpoints == [step for step, _, _ in checkpoints.saved] == [4, 8, 10]
    assert [e for e in workers.events if e.startswith("step")] == [
        f"step {s + 1}" for s in range(10)
    ]
    assert workers.events[0] == "start"
    assert workers.events[-1] == "shutdown"
    assert run.states.current is RunState.FINISHED
    assert run.checkpoint == Path("step-10")
    assert run.epoch == 2.5


def test_intervals_are_counted_in_steps_of_the_whole_run() -> None:
    run = controller(11, log=5, validate=3, save=7)
    run.run()
    _, checkpoints, record = fakes(run)
    assert record.steps_with("train/loss") == [5, 10, 11]
    assert record.steps_with("valid/perplexity") == [3, 6, 9, 11]
    assert [step for step, _, _ in checkpoints.saved] == [7, 11]


def test_the_learning_rate_follows_the_epochs_done_before_each_step() -> None:
    run = controller(10)
    run.run()
    assert fakes(run)[0].rates == [1.0] * 6 + [0.5, 0.5, 0.25, 0.25]


def test_several_steps_are_in_flight_and_none_at_a_validation() -> None:
    run = controller(12, validate=6, save=12)
    run.run()
    assert fakes(run)[0].most_in_flight == STEPS_IN_FLIGHT


def test_metrics_are_sums_divided_once() -> None:
    run = controller(4, log=4)
    run.run()
    _, _, record = fakes(run)
    metrics = record.logged[0][1]
    assert metrics["train/loss"] == pytest.approx((2 + 4 + 6 + 8) / 8)
    assert metrics["train/epoch"] == 1.0
    assert metrics["pipeline/rank0_busy"] == pytest.approx(0.5)
    assert metrics["pipeline/bubble_fraction"] == pytest.approx(1 - (0.5 + 1.0) / 2)
    assert (metrics["memory/rank0_peak_bytes"], metrics["memory/rank1_peak_bytes"]) == (4, 7)
    assert all(name.count("/") == 1 for _, logged in record.logged for name in logged)


def test_a_resumed_run_counts_on_from_its_checkpoint() -> None:
    run = controller(10, checkpoints=FakeCheckpoints((6, 60, 600)))
    run.run()
    workers, checkpoints, record = fakes(run)
    assert [e for e in workers.events if e.startswith("step")] == [
        f"step {s}" for s in range(7, 11)
    ]
    assert workers.rates == [0.5, 0.5, 0.25, 0.25]
    # One pair a batch, of two words and three, end symbols counted.
    assert checkpoints.saved == [(8, 62, 610), (10, 64, 620)]
    assert record.steps_with("valid/loss") == [8, 10]


def test_a_run_resumed_at_its_end_trains_no_more() -> None:
    run = controller(6, checkpoints=FakeCheckpoints((6, 6, 30)))
    run.run()
    assert "step 7" not in fakes(run)[0].events
    assert run.states.current is RunState.FINISHED


def test_without_held_out_text_nothing_is_validated() -> None:
    run = controller(4, batches=FakeBatches(num_valid=0))
    run.run()
    assert RunState.VALIDATING not in run.states.history
    assert fakes(run)[1].saved


def test_a_failed_rank_fails_the_run_and_ends_the_others() -> None:
    run = controller(workers=FakeWorkers(fail_at=6))
    with pytest.raises(WorkerFailure, match="rank 1 failed at step 6: killed"):
        run.run()
    assert run.states.current is RunState.FAILED
    assert fakes(run)[0].events[-1] == "shutdown"
    assert run.step == 5
    assert run.checkpoint == Path("step-4")


def test_what_happens_after_a_failure_is_the_policys_decision() -> None:
    heard: list[tuple[Failure, Sequence[Failure]]] = []

    class Recorder:
        def decide(self, failure: Failure, history: Sequence[Failure]) -> Decision:
            heard.append((failure, history))
            return Decision.STOP

    run = controller(workers=FakeWorkers(fail_at=2))
    run.policy = Recorder()
    with pytest.raises(WorkerFailure):
        run.run()
    assert [(failure.step, history) for failure, history in heard] == [(2, ())]


def test_an_interrupted_run_is_killed_not_failed() -> None:
    interruption = Interruption()
    workers = FakeWorkers()

    def check() -> None:
        if len(workers.events) > 4:
            interruption.request()
        interruption.check()

    run = controller(workers=workers, check=check)
    with pytest.raises(Interrupted, match="SIGTERM"):
        run.run()
    assert run.states.current is RunState.KILLED
    assert workers.events[-1] == "shutdown"


def test_a_bug_fails_the_run_and_stays_what_it_is() -> None:
    def check() -> None:
        raise KeyError("bug")

    run = controller(check=check)
    with pytest.raises(KeyError):
        run.run()
    assert run.states.current is RunState.FAILED


def test_a_run_that_ended_has_no_next_state() -> None:
    for end in (RunState.FINISHED, RunState.FAILED, RunState.KILLED):
        for state in RunState:
            with pytest.raises(IllegalTransition):
                RunStates(current=end).enter(state)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (RunState.STARTING, RunState.TRAINING),
        (RunState.LOADING, RunState.CHECKPOINTING),
        (RunState.VALIDATING, RunState.FINISHED),
    ],
)
def test_states_cannot_be_skipped(before: RunState, after: RunState) -> None:
    with pytest.raises(IllegalTransition, match=after.value):
        RunStates(current=before).enter(after)


@pytest.mark.parametrize(
    ("epochs", "steps_per_epoch", "max_steps", "steps"),
    [(7.5, 10, None, 75), (0.1, 30, None, 3), (1.01, 10, None, 11), (2.0, 5, 7, 7), (0.1, 1, 9, 1)],
)
def test_epochs_become_steps(
    epochs: float, steps_per_epoch: int, max_steps: int | None, steps: int
) -> None:
    assert steps_of(epochs, steps_per_epoch, max_steps) == steps


@settings(deadline=None)
@given(
    total=st.integers(1, 30),
    log=st.integers(1, 9),
    validate=st.integers(1, 9) | st.none(),
    save=st.integers(1, 9) | st.none(),
    start=st.integers(0, 30),
)
def test_every_step_is_made_once_and_the_last_one_is_kept(
    total: int, log: int, validate: int | None, save: int | None, start: int
) -> None:
    start = min(start, total)
    run = controller(
        total, log=log, validate=validate, save=save, checkpoints=FakeCheckpoints((start, 0, 0))
    )
    run.run()
    workers, checkpoints, record = fakes(run)
    made = [e for e in workers.events if e.startswith("step")]
    assert made == [f"step {s}" for s in range(start + 1, total + 1)]
    if made:
        assert checkpoints.saved[-1][0] == total
        assert record.steps_with("train/loss")[-1] == total
