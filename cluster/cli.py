"""The command `baton`: its commands by name, and the one place that words errors for the user.

Exit codes: 0 done; 1 something the user can mend, told in lines that begin with `error:`; 2 wrong
usage; 130 interrupted. A bug of ours keeps its traceback. The commands import what they need when
they run, so that `baton --help` does not wait for torch and Ray.
"""

import sys

import typer

from cluster.commands import (
    batch,
    bench,
    bench_training,
    doctor,
    plan,
    profile,
    quickstart,
    simulate,
    train,
    translate,
)
from cluster.interruption import Interrupted
from model.errors import UserError

app = typer.Typer(
    name="baton",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(no_args_is_help=True)


@app.callback()
def _baton() -> None:
    """Train deep LSTM translators as a pipeline over the devices of a Ray cluster.

    The usual order is fetch, prepare, train, evaluate, translate. Try:

    baton fetch bible data/quickstart

    baton prepare configs/quickstart.yaml

    baton train configs/quickstart.yaml
    """


@config_app.callback()
def _config() -> None:
    """Look at configurations."""


app.command()(quickstart.quickstart)
app.command()(doctor.doctor)
app.command()(train.fetch)
app.command()(train.prepare)
app.command()(batch.batch)
app.command()(train.train)
app.command()(translate.evaluate)
app.command()(translate.translate)
app.command()(train.submit)
app.command()(profile.profile)
app.command()(simulate.simulate)
app.command()(plan.plan)
bench.app.command("training")(bench_training.training)
app.add_typer(bench.app, name="bench")
app.add_typer(config_app, name="config")
config_app.command("show")(train.show_config)
config_app.command("reference")(train.config_reference)


def main() -> None:
    """Run the command line; the entry point of the distribution."""
    try:
        app()
    except UserError as error:
        # An error out of an actor carries Ray's traceback in its text; its cause is the original.
        original = getattr(error, "cause", error)
        for line in str(original).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(130 if isinstance(original, Interrupted) else 1)


if __name__ == "__main__":
    main()
