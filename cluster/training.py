"""The training of one configuration from end to end: what `baton train` does.

It opens what the run needs, from the cheapest to the dearest, so that a mistake is told before Ray
or MLflow start; hands over to the controller; and closes MLflow's run as it truly ended.
"""

import logging
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.checkpoint_store import CheckpointStore
from cluster.config import Config
from cluster.controller import Controller, LoopSettings, steps_of
from cluster.corpus.prepared import PreparedCorpus
from cluster.evaluation_run import evaluate_checkpoint
from cluster.failure_policy import WorkerFailure
from cluster.ingest.corpus_batches import CorpusBatches
from cluster.interruption import Interrupted, Interruption, watch_signals
from cluster.layout import layout_words, plan_of
from cluster.memory_table import measured_memory, memory_by_model, memory_lines
from cluster.precision_choice import for_training
from cluster.resources import connect
from cluster.run_record import RunRecord, TrainingReport
from cluster.timeline import PAGE, TimelineRecorder, write_files
from cluster.tracking.run_facts import describe, run_facts
from cluster.tracking.tracker import Tracker
from model.optimizer import LearningRateSchedule
from model.processor import AUTO
from pipeline.plan import Plan

logger = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

SCORED_SENTENCES = 200
"""Held-out sentences that are translated at the end; `baton evaluate` takes all."""


@dataclass(frozen=True)
class TrainingResult:
    """How a training ended.

    `metrics` are the newest values by name; `checkpoint` is the newest one, None if there is none.
    `memory_lines` are a table of what every rank held at most.
    """

    run_id: str
    experiment_id: str
    status: RunStatus
    step: int
    epoch: float
    checkpoint: Path | None
    metrics: dict[str, float]
    tracking_uri: str
    memory_lines: tuple[str, ...] = ()


def train(config: Config, *, report: TrainingReport) -> TrainingResult:
    """Train as configured; Ray is started, or connected to, unless that was done before.

    SIGINT or SIGTERM end the run as KILLED, which the result says. Raises UserError, after the run
    was marked as FAILED, for everything that the user can mend and for ranks that fail.
    """
    run = _Run(config, report)
    with (
        connect(config.cluster, num_ranks=config.num_workers, warn=report.message),
        watch_signals() as interruption,
    ):
        return run.to_end(interruption)


class _Run:
    """One training: what it is made of, before anything is started."""

    def __init__(self, config: Config, report: TrainingReport) -> None:
        given, config = config, for_training(config)
        self._config = config
        self._report = report
        if given.training.precision == AUTO:
            report.message(f"training.precision=auto: {config.training.precision}")
        self._corpus = PreparedCorpus.open(config.corpus.directory)
        self._batches = CorpusBatches(self._corpus, config)
        self._plan = _plan(config, self._corpus)
        if config.pipeline.placement == "auto" and config.training.schedule is None:
            report.message(f"the planner chose {layout_words(self._plan)}")
        self._store = CheckpointStore(
            config, self._corpus, self._plan.model, self._batches.steps_per_epoch
        )
        self._total_steps = steps_of(
            config.training.epochs, self._batches.steps_per_epoch, config.training.max_steps
        )
        self._recorder = self._timeline_recorder()
        self._scores: dict[str, float] = {}

    def to_end(self, interruption: Interruption) -> TrainingResult:
        """Train, score, and close MLflow's run."""
        tracker = self._tracker()
        status: RunStatus = "FAILED"
        problem: str | None = None
        try:
            self._store.begin(tracker.run_id)
            controller = self._controller(tracker, interruption)
            try:
                self._train(controller, tracker)
                self._log_results(tracker, controller.checkpoint, interruption)
                status = "FINISHED"
            except Interrupted as error:
                status, problem = "KILLED", str(error)
            self._report.message(_ending(status, problem, controller))
        except BaseException as error:
            problem = next(iter(str(error).splitlines()), type(error).__name__)
            tracker.log_text("failure.txt", _details(error))
            raise
        finally:
            self._batches.close()
            tracker.finish(status, error=problem)
        return TrainingResult(
            run_id=tracker.run_id,
            experiment_id=tracker.experiment_id,
            status=status,
            step=controller.step,
            epoch=controller.epoch,
            checkpoint=controller.checkpoint,
            metrics={**controller.metrics, **self._scores},
            tracking_uri=tracker.uri,
            memory_lines=tuple(self._memory_lines(controller.metrics)),
        )

    def _tracker(self) -> Tracker:
        tracking = self._config.tracking
        resumed = self._store.resumed
        tags = {
            "baton.attempt": str(self._store.attempt),
            "mlflow.source.name": "baton train",
        }
        if self._store.run_id is None:
            # Later on the note belongs to whoever edits it in the UI.
            tags["mlflow.note.content"] = describe(self._config, self._plan)
        facts = run_facts(self._plan, self._corpus, self._batches.steps_per_epoch)
        if resumed is not None:
            tags["baton.resumed_from"] = str(resumed.path)
        tracker = Tracker.start(
            tracking.uri,
            tracking.experiment,
            tracking.run_name or self._config.name,
            params={**self._config.flat(), **facts},
            tags=tags,
            run_id=self._store.run_id,
            spool=self._store.directory.parent / "metrics.jsonl",
        )
        tracker.log_text("config.yaml", self._config.to_yaml())
        for side in ("source", "target"):
            data = self._corpus.vocabulary_bytes(side)
            tracker.log_text(f"vocabularies/{side}_vocabulary.json", data.decode())
        return tracker

    def _controller(self, tracker: Tracker, interruption: Interruption) -> Controller:
        from cluster.worker_group import WorkerGroup

        config, training = self._config, self._config.training
        workers = WorkerGroup(
            self._plan,
            config.cluster,
            clip_norm=training.clip_norm,
            attempt=self._store.attempt,
            check=interruption.check,
            recorder=self._recorder,
        )
        settings = LoopSettings(
            total_steps=self._total_steps,
            schedule=LearningRateSchedule(
                training.learning_rate, training.halve_after_epochs, training.halve_every_epochs
            ),
            log_every_steps=training.log_every_steps,
            validate_every_steps=training.validate_every_steps,
            checkpoint_every_steps=config.checkpoint.every_steps,
        )
        return Controller(
            settings,
            workers,
            self._batches,
            self._store,
            RunRecord(tracker, self._report, workers, self._store, config),
            interruption.check,
            checkpoint=self._store.resumed.path if self._store.resumed else None,
        )

    def _memory_lines(self, metrics: Mapping[str, float]) -> list[str]:
        num_positions = self._config.corpus.max_length + 1
        told: tuple[int, ...] = ()
        if self._config.cluster.device != "emulated":
            num_sentences = self._config.training.batch_size
            told = memory_by_model(self._plan, num_sentences, num_positions)
        return memory_lines(measured_memory(metrics), told, num_positions)

    def _train(self, controller: Controller, tracker: Tracker) -> None:
        try:
            controller.run()
        finally:
            self._log_timeline(tracker)

    def _timeline_recorder(self) -> TimelineRecorder | None:
        pipeline = self._config.pipeline
        if not pipeline.timeline:
            return None
        num_steps_ahead = self._total_steps - self._store.position[0]
        return TimelineRecorder(self._plan, pipeline.timeline_steps, num_steps_ahead)

    def _log_timeline(self, tracker: Tracker) -> None:
        """Keep the drawn steps beside the checkpoints and in MLflow, however the run ended."""
        files = self._recorder.files(self._config.name) if self._recorder is not None else {}
        if not files:
            return
        folder = self._store.directory.parent / "timeline"
        write_files(folder, files)
        for name, text in files.items():
            tracker.log_text(name, text)
        self._report.message(f"timeline of a few steps: {folder / PAGE}")

    def _log_results(
        self, tracker: Tracker, checkpoint: Path | None, interruption: Interruption
    ) -> None:
        """Record where the checkpoint is, and what it makes of held-out sentences."""
        if self._config.cluster.device == "emulated":
            self._report.message("emulated devices learn nothing: no checkpoint, no scores")
            return
        assert checkpoint is not None, "the controller saves after the last step"
        tracker.set_tag("baton.checkpoint", str(checkpoint))
        if self._batches.num_valid_pairs == 0:
            return

        def progress(done: int, total: int) -> None:
            interruption.check()
            self._report("translating", done, total)

        result = evaluate_checkpoint(
            checkpoint,
            split="valid",
            corpus=self._config.corpus.directory,
            limit=SCORED_SENTENCES,
            num_samples=self._config.evaluation.num_samples,
            progress=progress,
        )
        self._scores = {f"valid/{name}": result.metrics[name] for name in ("bleu", "chrf")}
        tracker.log(self._scores)
        columns = ("source", "hypothesis", "reference")
        table = {column: [sample[column] for sample in result.samples] for column in columns}
        tracker.log_table("translations.json", table)
        tracker.log_text("scores.txt", _signature_text(result.signatures))


def _plan(config: Config, corpus: PreparedCorpus) -> Plan:
    sizes = (len(corpus.vocabulary(side)) for side in ("source", "target"))
    return plan_of(config, config.model_config_for(*sizes))


def _signature_text(signatures: Mapping[str, str]) -> str:
    lines = [f"{name}: {signature}\n" for name, signature in sorted(signatures.items())]
    return f"on the first {SCORED_SENTENCES} held-out sentences at most\n" + "".join(lines)


def _details(error: BaseException) -> str:
    """Return the traceback for whoever looks for a bug, out of the rank where it happened."""
    if isinstance(error, WorkerFailure) and error.failure.detail:
        return f"{error}\n\n{error.failure.detail}"
    return "".join(traceback.format_exception(error))


def _ending(status: RunStatus, problem: str | None, controller: Controller) -> str:
    where = f"{status} at step {controller.step:,}"
    reason = f" ({problem})" if problem else ""
    kept = f"; newest checkpoint: {controller.checkpoint}" if controller.checkpoint else ""
    return where + reason + kept
