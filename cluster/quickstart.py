"""`baton quickstart`: the whole journey on one small real corpus, for somebody new.

It takes the same steps as fetch, prepare, train and evaluate by hand, over one Ray, and ends with
what the network learnt: its scores beside those before training, and translations beside their
references.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.commands.output import sample_lines, table
from cluster.commands.progress import ProgressDisplay
from cluster.config import Config
from cluster.interruption import Interrupted

if TYPE_CHECKING:
    from cluster.evaluation_run import EvaluationResult
    from cluster.training import TrainingResult

SCORED_SENTENCES = 200
"""Test sentences that are translated, by the trained and by the untrained network."""


@dataclass(frozen=True)
class QuickstartResult:
    """The training and its evaluation on the test split; `seconds` counts from the fetching on."""

    config: Config
    training: "TrainingResult"
    evaluation: "EvaluationResult"
    seconds: float


def quickstart(config: Config, corpus: Path, *, report: ProgressDisplay) -> QuickstartResult:
    """Fetch the Bible corpus into `corpus`, prepare, train and evaluate. Raises UserError.

    An interrupted training ends it all with Interrupted: there is nothing to show yet.
    """
    from cluster.corpus.bible import fetch_bible
    from cluster.corpus.preparation import prepare_corpus
    from cluster.evaluation_run import evaluate_checkpoint
    from cluster.resources import connect
    from cluster.training import train

    start_s = time.monotonic()
    config = with_unused_folder(config)
    report.message("1/4 fetching real English-French text")
    fetch_bible(corpus, progress=report)
    with connect(config.cluster, num_ranks=config.num_workers, warn=report.message):
        report.message("2/4 preparing it with Ray Data: vocabularies, filters, shards by length")
        prepare_corpus(config.corpus, seed=config.seed, progress=report)
        report.message(f"3/4 training on {config.num_workers} Ray actors")
        training = train(config, report=report)
        if training.status != "FINISHED":
            raise Interrupted(f"the training was interrupted after {training.step:,} steps")
        report.message("4/4 translating text that no training saw, also without any training")
        evaluation = evaluate_checkpoint(
            training.checkpoint or config.checkpoint.directory,
            split="test",
            limit=SCORED_SENTENCES,
            num_samples=config.evaluation.num_samples,
            untrained_baseline=True,
            progress=lambda done, total: report("translating", done, total),
        )
    return QuickstartResult(config, training, evaluation, time.monotonic() - start_s)


def with_unused_folder(config: Config) -> Config:
    """Leave the checkpoints of earlier quickstarts alone: checkpoints, checkpoints-2 and so on."""
    first = config.checkpoint.directory
    numbered = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    unused = next(path for path in itertools.chain([first], numbered) if not path.exists())
    checkpoint = config.checkpoint.model_copy(update={"directory": unused})
    return config.model_copy(update={"checkpoint": checkpoint})


def summary_lines(result: QuickstartResult) -> Iterator[str]:
    """Tell what was learnt, and what to do next."""
    from cluster.tracking.store import run_url, ui_command

    training, evaluation = result.training, result.evaluation
    baseline = evaluation.baseline_metrics or {}
    yield from sample_lines(evaluation.samples)
    yield f"on {SCORED_SENTENCES} held-out sentences, untrained -> trained:"
    names = ("perplexity", "bleu", "chrf")
    yield from table(
        [(name, f"{baseline[name]:,.2f} -> {evaluation.metrics[name]:,.2f}") for name in names]
    )
    yield f"run {training.run_id}: {training.status} after {training.step:,} steps"
    yield f"all of it took {result.seconds:.0f} s"
    yield "to see the run in MLflow, start its server, then open the page:"
    yield f"  {ui_command(training.tracking_uri)}"
    yield f"  {run_url(training.tracking_uri, training.experiment_id, training.run_id)}"
    yield "to translate a line of your own:"
    yield f"  echo 'And God saw the light.' | .venv/bin/baton translate {training.checkpoint}"
