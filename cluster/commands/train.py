"""The commands that lead to a trained network: fetch, prepare, train, submit, config show."""

import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.commands.options import AsJson, ConfigFile, Overrides, load_config
from cluster.commands.output import print_result, reserved_stdout, table

if TYPE_CHECKING:
    from cluster.corpus.prepared import PreparedCorpus
    from cluster.training import TrainingResult


class PublicCorpus(StrEnum):
    """Corpora that `baton fetch` can get."""

    BIBLE = "bible"
    NUMBERS = "numbers"


def fetch(
    corpus: Annotated[
        PublicCorpus,
        typer.Argument(
            help="bible: clauses of public-domain English and French Bibles. "
            "numbers: numbers spelt in both languages, a task that is checked exactly."
        ),
    ],
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIRECTORY", help="Folder for train.en, train.fr, valid.en and so on."
        ),
    ],
    limit: Annotated[
        int | None,
        typer.Option(
            min=1000,
            max=200_000,
            show_default=False,
            help="How many numbers, from 0 on (corpus numbers only). Default: 20000.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Get a small real corpus, as aligned text files with one sentence a line.

    Example:  baton fetch bible data/quickstart
    """
    from cluster.commands.progress import progress_display

    if limit is not None and corpus is not PublicCorpus.NUMBERS:
        raise typer.BadParameter("--limit is for the corpus numbers only")
    with reserved_stdout() as stdout, progress_display() as report:
        if corpus is PublicCorpus.BIBLE:
            from cluster.corpus.bible import fetch_bible

            num_pairs = fetch_bible(directory, progress=report)
        else:
            from cluster.corpus.numbers import fetch_numbers

            options = {} if limit is None else {"limit": limit}
            num_pairs = fetch_numbers(directory, progress=report, **options)
    print_result(
        stdout,
        as_json=as_json,
        result={"corpus": corpus.value, "directory": str(directory), "num_pairs": num_pairs},
        lines=[f"{directory} holds, in sentence pairs:", *table(list(num_pairs.items()))],
    )


def prepare(config_file: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Turn text into what training reads: filtered, cut into tokens, grouped by length.

    Reads the files of corpus.train, valid and test, builds the vocabularies, and writes
    everything to corpus.directory. Tells how many pairs were dropped and why.

    Example:  baton prepare configs/quickstart.yaml corpus.max_length=30
    """
    config = load_config(config_file, overrides)
    from cluster.commands.progress import progress_display
    from cluster.corpus.preparation import prepare_corpus
    from cluster.resources import connect

    with (
        reserved_stdout() as stdout,
        progress_display() as report,
        connect(config.cluster, warn=report.message),
    ):
        prepared = prepare_corpus(config.corpus, seed=config.seed, progress=report)
    summary = _summary(prepared)
    print_result(
        stdout,
        as_json=as_json,
        result=summary,
        lines=[f"prepared corpus in {config.corpus.directory}:", *table(_dotted(summary))],
    )


def train(
    config_file: ConfigFile,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            show_default=False,
            help="Ray cluster to train on, for example auto or 10.0.0.1:6379, from one of its "
            "nodes. Default: RAY_ADDRESS if set, else Ray starts on this machine.",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            show_default=False,
            help="Checkpoint folder to go on from; auto: the newest one of this configuration.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train the network on a prepared corpus, as a pipeline of Ray actors.

    The run is recorded in MLflow; checkpoints go to checkpoint.directory.

    Example:  baton train configs/quickstart.yaml training.epochs=1
    """
    settings = {"cluster.address": address, "checkpoint.resume": resume}
    config = load_config(config_file, overrides, settings)
    from cluster.commands.progress import progress_display
    from cluster.training import train as train_network

    with reserved_stdout() as stdout, progress_display() as report:
        result = train_network(config, report=report)
    fields = {
        "run_id": result.run_id,
        "status": result.status,
        "step": result.step,
        "epoch": result.epoch,
        "checkpoint": None if result.checkpoint is None else str(result.checkpoint),
        "metrics": dict(result.metrics),
        "tracking_uri": result.tracking_uri,
        "experiment_id": result.experiment_id,
    }
    print_result(stdout, as_json=as_json, result=fields, lines=_training_lines(result))
    if result.status != "FINISHED":
        raise typer.Exit(130 if result.status == "KILLED" else 1)


def _training_lines(result: "TrainingResult") -> list[str]:
    from cluster.tracking.store import run_url, ui_command

    lines = [
        f"run {result.run_id}: {result.status} at step {result.step:,}, epoch {result.epoch:.2f}",
        *table([row for row in sorted(result.metrics.items()) if not row[0].startswith("memory/")]),
        *result.memory_lines,
    ]
    if result.checkpoint is not None:
        lines += [
            f"checkpoint: {result.checkpoint}",
            f"translate:  echo 'some text' | baton translate {result.checkpoint}",
            f"evaluate:   baton evaluate {result.checkpoint}",
        ]
    uri = result.tracking_uri
    page = run_url(uri, result.experiment_id, result.run_id)
    return [*lines, f"see it:     {ui_command(uri)}", f"            {page}"]


def submit(
    config_file: ConfigFile,
    address: Annotated[
        str,
        typer.Option(
            metavar="URL", help="Dashboard of the Ray cluster, for example http://10.0.0.1:8265."
        ),
    ],
    overrides: Overrides = None,
    follow: Annotated[
        bool, typer.Option(help="Show the job's log until it ends, or return at once.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Send the working directory to a Ray cluster and train there, as a job.

    Example:  baton submit configs/paper.yaml --address http://10.0.0.1:8265
    """
    from cluster.jobs import submit as submit_job

    with reserved_stdout() as stdout:
        job = submit_job(
            config_file, overrides or (), address=address, follow=follow, output=sys.stderr
        )
    run = "" if job.run_id is None else f", MLflow run {job.run_id}"
    result = {
        "submission_id": job.submission_id,
        "status": job.status,
        "run_id": job.run_id,
        "address": address,
    }
    lines = [f"job {job.submission_id}: {job.status}{run}"]
    print_result(stdout, as_json=as_json, result=result, lines=lines)
    if job.status in ("FAILED", "STOPPED"):
        raise typer.Exit(1)


def show_config(
    config_file: ConfigFile, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Check a configuration and print all of it, defaults and overrides resolved.

    Adds the number of weights (biases not counted, as in the paper), of ranks of a replica, and of
    workers, which are the ranks of all replicas.

    Example:  baton config show configs/paper.yaml model.num_layers=8
    """
    with reserved_stdout() as stdout:
        config = load_config(config_file, overrides)
        counts = {
            "num_parameters": config.num_parameters,
            "num_ranks": config.num_ranks,
            "num_workers": config.num_workers,
        }
    comments = [f"# {name}: {value:,}" for name, value in counts.items()]
    print_result(
        stdout,
        as_json=as_json,
        result={**config.to_dict(), **counts},
        lines=[config.to_yaml().rstrip(), *comments],
    )


def config_reference() -> None:
    """Print every setting with its type, default and meaning, as Markdown.

    Example:  baton config reference > docs/configuration.md
    """
    from cluster.config.reference import reference

    sys.stdout.write(reference())


def _summary(prepared: "PreparedCorpus") -> dict[str, Any]:
    """Give what a reader wants to know of a prepared corpus: not its files and row groups."""
    manifest = prepared.manifest
    return {
        "directory": str(prepared.directory),
        "fingerprint": prepared.fingerprint,
        "vocabulary_sizes": {side: entry.size for side, entry in manifest.vocabularies.items()},
        "splits": {
            name: split.model_dump(exclude={"files"}) for name, split in manifest.splits.items()
        },
    }


def _dotted(fields: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for key, value in fields.items():
        if isinstance(value, Mapping):
            rows += _dotted(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows
