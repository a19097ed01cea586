"""Options of the commands that simulate: which devices, which costs, which link."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from model.errors import UserError

if TYPE_CHECKING:
    from cluster.config import Config
    from model.network import ModelConfig
    from pipeline.costs.operation_costs import Costs, Link

DEFAULT_POSITIONS = 29

Devices = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        show_default=False,
        help="Devices, one for each rank of each replica. Default: as many as the configuration's "
        "layout has.",
    ),
]
CostsOption = Annotated[
    str | None,
    typer.Option(
        metavar="arithmetic|FILE",
        show_default=False,
        help="arithmetic: multiply-adds, counted exactly, at one rate on all devices. FILE: "
        "measured costs. Default: pipeline.costs, or else arithmetic.",
    ),
]
SourceLength = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=10_000,
        show_default=False,
        help="Positions of the source side, </s> counted and padding too. Default: 29, or those of "
        "the costs file.",
    ),
]
TargetLength = Annotated[
    int | None,
    typer.Option(min=1, max=10_000, show_default=False, help="The same of the target side."),
]
LinkLatency = Annotated[
    float | None,
    typer.Option(min=0.0, show_default=False, help="Microseconds that every message takes."),
]
LinkRate = Annotated[
    float | None,
    typer.Option(
        min=0.000001, show_default=False, help="Gigabytes a second between any two devices."
    ),
]
DeviceRate = Annotated[
    float | None,
    typer.Option(
        min=0.000001,
        show_default=False,
        help="TFLOP/s of a device, a multiply-add counted as two (costs arithmetic only). Without "
        "it the step of one device takes one second.",
    ),
]


@dataclass(frozen=True)
class CostOptions:
    """What was given on the command line; None where nothing was."""

    costs: str | None
    source_length: int | None
    target_length: int | None
    link_latency_us: float | None
    link_gb_per_s: float | None
    device_tflops: float | None

    @property
    def has_link(self) -> bool:
        """Whether messages take time by what was given."""
        return self.link_latency_us is not None or self.link_gb_per_s is not None

    @property
    def changes_costs(self) -> bool:
        """Whether lengths, a link or a rate were given, which no setting of a training has."""
        given = (self.source_length, self.target_length, self.device_tflops)
        return self.has_link or any(value is not None for value in given)

    def path(self, config: "Config") -> str | None:
        """Return the costs file to read, if there is one."""
        if self.costs == "arithmetic":
            return None
        if self.costs is None and config.pipeline.costs is not None:
            return str(config.pipeline.costs)
        return self.costs


def costs_of(options: CostOptions, config: "Config", model: "ModelConfig") -> "Costs":
    """Return the costs to simulate with; raises UserError where options exclude each other.

    Precision `auto` is that of a costs file, else what this machine has fast.
    """
    from cluster.precision_choice import with_precision
    from pipeline.costs.file import load_costs

    path = options.path(config)
    if path is None:
        return _counted(options, config, model)
    if options.device_tflops is not None:
        raise UserError(
            f"--device-tflops={options.device_tflops:g} does not go with the measured costs of "
            f"{path}; leave it out, or use --costs arithmetic"
        )
    loaded = load_costs(Path(path))
    training = with_precision(config, loaded.precision).training
    costs = loaded.fitted_to(model, training.batch_size, training.precision)
    batch = replace(
        costs.batch,
        source_positions=options.source_length or costs.batch.source_positions,
        target_positions=options.target_length or costs.batch.target_positions,
    )
    return replace(costs, batch=batch, link=_link(options, costs.link))


def _counted(options: CostOptions, config: "Config", model: "ModelConfig") -> "Costs":
    from cluster.precision_choice import precision_of
    from pipeline.costs.arithmetic import arithmetic_costs
    from pipeline.costs.operation_costs import Link

    if options.has_link and options.device_tflops is None:
        raise UserError(
            "a link needs --device-tflops, since without a rate of the devices the seconds of a "
            "message compare with nothing; add it, or leave the link out"
        )
    rate = options.device_tflops
    return arithmetic_costs(
        model,
        config.training.batch_size,
        options.source_length or DEFAULT_POSITIONS,
        options.target_length or DEFAULT_POSITIONS,
        flop_per_s=None if rate is None else rate * 1e12,
        link=_link(options, Link()),
        precision=precision_of(config),
    )


def _link(options: CostOptions, known: "Link") -> "Link":
    """Return the known link with what was given in the place of its latency or rate."""
    latency_us, rate = options.link_latency_us, options.link_gb_per_s
    return replace(
        known,
        latency_s=known.latency_s if latency_us is None else latency_us * 1e-6,
        bytes_per_s=known.bytes_per_s if rate is None else rate * 1e9,
    )


def device_overrides(
    overrides: Sequence[str] | None, devices: int | None, replicas: int | None = None
) -> list[str]:
    """Return overrides for a number of devices, cut as it is best where nothing else is said.

    Replicas share the devices; with devices and no replicas given there is one. Raises UserError if
    they cannot be shared evenly.
    """
    given = list(overrides or ())
    named = [one.partition("=")[2] for one in given if one.startswith("pipeline.replicas=")]
    if replicas is None and named and named[-1].isdigit():
        replicas = int(named[-1])
    if devices is None:
        return given if replicas is None else [*given, f"pipeline.replicas={replicas}"]
    count = replicas or 1
    if devices % count:
        raise UserError(
            f"--devices={devices} cannot be shared evenly by {count} replicas; use a multiple of "
            f"{count} devices, or other replicas"
        )
    said = any(override.startswith("pipeline.layer_ranks=") for override in given)
    cut = [] if said else ["pipeline.layer_ranks=null"]
    return [*given, f"pipeline.ranks={devices // count}", f"pipeline.replicas={count}", *cut]


def lengths_override(options: CostOptions) -> list[str]:
    """Return the override that lets time be cut into as many chunks as given lengths allow."""
    given = [length for length in (options.source_length, options.target_length) if length]
    if not given:
        return []
    return [f"corpus.max_length={max(*given, DEFAULT_POSITIONS) - 1}"]


def is_relative(costs: "Costs") -> bool:
    """Whether seconds mean nothing but parts of the step of one device."""
    from pipeline.costs.arithmetic import RELATIVE

    return costs.origin == RELATIVE


def costs_line(costs: "Costs") -> str:
    """Say in a line what the figures rest on."""
    batch, link = costs.batch, costs.link
    text = (
        f"{batch.num_sentences} sentences of {batch.source_positions} + {batch.target_positions} "
        f"positions; costs: {costs.origin}"
    )
    if link.is_free:
        return f"{text}; messages take no time"
    return f"{text}; messages {link.latency_s * 1e6:g} us + {link.bytes_per_s / 1e9:g} GB/s"
