"""Arguments and options that several commands share, each described once."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from cluster.config import Config

ConfigFile = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG", help="Configuration of the run, for example configs/quickstart.yaml."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SECTION.KEY=VALUE ...",
        show_default=False,
        help="Settings that replace those of the file, for example training.epochs=1.",
    ),
]
Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Checkpoint that `baton train` wrote, or the folder of several: then the newest.",
    ),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="For scripts: the last line of stdout is one JSON object."),
]
# Where one of these three may be None, the configuration that the checkpoint carries decides.
_BEAM_SIZE = typer.Option(min=1, max=1000, help="Partial translations kept; 1 is greedy.")
_LENGTH_PENALTY = typer.Option(
    min=0.0, max=10.0, help="Exponent of the length by which scores are divided; 0: not at all."
)
_MAX_LENGTH = typer.Option(min=1, max=10_000, help="Tokens after which a translation is cut off.")
BeamSize = Annotated[int, _BEAM_SIZE]
LengthPenalty = Annotated[float, _LENGTH_PENALTY]
MaxLength = Annotated[int, _MAX_LENGTH]
ConfiguredBeamSize = Annotated[int | None, _BEAM_SIZE]
ConfiguredLengthPenalty = Annotated[float | None, _LENGTH_PENALTY]
ConfiguredMaxLength = Annotated[int | None, _MAX_LENGTH]
Device = Annotated[
    Literal["cpu", "cuda"], typer.Option(help="What to compute on: the processor or a GPU.")
]


def load_config(
    path: Path, overrides: Sequence[str] | None, settings: Mapping[str, str | None] | None = None
) -> "Config":
    """Read a configuration; `settings` are options such as `--address`, which have the last word.

    Raises ConfigError, which lists every problem, if anything is wrong with it.
    """
    from cluster.config import Config

    given = {key: value for key, value in (settings or {}).items() if value is not None}
    # A JSON string is a quoted YAML string, so that no value is taken for anything but text.
    options = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    return Config.load(path, [*(overrides or ()), *options])
