"""What a training says of itself while it runs: to MLflow and to the command line."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.checkpoint_store import CheckpointStore
from cluster.commands.progress import ProgressDisplay
from cluster.config import Config
from cluster.rank_machine import (
    RankMachine,
    change_since,
    machine_line,
    machine_warnings,
    to_file,
)
from cluster.run_state import RunState
from cluster.tracking.tracker import Tracker

if TYPE_CHECKING:
    from cluster.worker_group import WorkerGroup

TrainingReport = ProgressDisplay
"""What hears how far a training is: called with phase, done and total, and with messages."""

_MESSAGE_INTERVAL_S = 10.0


class RunRecord:
    """Sends what the controller says to MLflow and to the command line."""

    def __init__(
        self,
        tracker: Tracker,
        report: TrainingReport,
        workers: "WorkerGroup",
        store: CheckpointStore,
        config: Config,
    ) -> None:
        self._tracker, self._report = tracker, report
        self._workers, self._store = workers, store
        self._config = config
        self._message_s = time.monotonic()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics; show losses of validation, and others every ten seconds."""
        self._tracker.log(metrics, step)
        now_s = time.monotonic()
        if "valid/loss" in metrics:
            self._report.message(
                f"step {step:,}: held-out perplexity {metrics['valid/perplexity']:,.2f}"
            )
        elif now_s - self._message_s > _MESSAGE_INTERVAL_S:
            self._message_s = now_s
            self._report.message(
                f"step {step:,}, epoch {metrics['train/epoch']:.2f}: "
                f"perplexity {metrics['train/perplexity']:,.2f}, "
                f"{metrics['throughput/words_per_second']:,.0f} words/s"
            )

    def progress(self, step: int, total_steps: int) -> None:
        """Show how far the run is."""
        self._report("training", step, total_steps)

    def state(self, state: RunState, step: int) -> None:
        """Show what takes long and moves no bar; record where the ranks came to be."""
        if state is RunState.STARTING:
            self._report.message("starting the ranks")
        elif state is RunState.LOADING:
            self._tracker.set_tag("baton.num_nodes", str(self._workers.num_nodes))
            self._machines(self._workers.machines)

    def saved(self, path: Path, step: int) -> None:
        """Record where the newest checkpoint is."""
        self._tracker.set_tag("baton.checkpoint", str(path))
        self._tracker.log_text("checkpoint.txt", f"{path}\nstep {step}\n")

    def _machines(self, machines: Sequence[RankMachine]) -> None:
        """Record and show what the ranks compute with, and keep it with checkpoints."""
        self._tracker.set_tag("baton.machine", machine_line(machines))
        tell, config = self._report.message, self._config
        tell(f"{config.training.precision} on {machine_line(machines)}")
        pin_cores = config.cluster.pin_cores
        for line in machine_warnings(machines, config.training.precision, pin_cores=pin_cores):
            tell(f"warning: {line}")
        stored = self._store.resumed_machine
        change = None if stored is None else change_since(stored, machines)
        if change is not None:
            tell(f"warning: {change}")
        self._store.keep_machine(to_file(machines))
