"""The command quickstart: all the others in a row, on a small real corpus."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import AsJson, Overrides, load_config
from cluster.commands.output import print_result, reserved_stdout


def quickstart(
    config_file: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="Configuration of the run.")
    ] = Path("configs/quickstart.yaml"),
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Fetch text, prepare it, train on it and show what was learnt, in about five minutes.

    Example:  baton quickstart
    """
    config = load_config(config_file, overrides)
    from cluster.commands.progress import progress_display
    from cluster.quickstart import quickstart as run_quickstart
    from cluster.quickstart import summary_lines

    with reserved_stdout() as stdout, progress_display() as report:
        # The text lies beside what `prepare` makes of it, as the configuration's file names say.
        result = run_quickstart(config, config.corpus.directory.parent, report=report)
    training, evaluation = result.training, result.evaluation
    print_result(
        stdout,
        as_json=as_json,
        result={
            "run_id": training.run_id,
            "status": training.status,
            "step": training.step,
            "checkpoint": str(training.checkpoint),
            "tracking_uri": training.tracking_uri,
            "metrics": evaluation.metrics,
            "baseline_metrics": evaluation.baseline_metrics,
            "samples": evaluation.samples,
            "seconds": result.seconds,
        },
        lines=summary_lines(result),
    )
