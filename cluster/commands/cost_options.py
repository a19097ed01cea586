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


def costs_of(options: CostOptions, config: "Config", model: "ModelConfig") -> "Costs":
    """Return the costs to simulate with; raises UserError where options exclude each other."""
    from pipeline.costs.file import load_costs

    path = None if options.costs == "arithmetic" else options.costs or config.pipeline.costs
    if path is None:
        return _counted(options, config, model)
    if options.device_tflops is not None:
        raise UserError(
            f"--device-tflops={options.device_tflops:g} does not go with the measured costs of "
            f"{path}; leave it out, or use --costs arithmetic"
        )
    costs = load_costs(Path(path))
    costs.check(model)
    batch = replace(
        costs.batch,
        num_sentences=config.training.batch_size,
        source_positions=options.source_length or costs.batch.source_positions,
        target_positions=options.target_length or costs.batch.target_positions,
    )
    link = _link(options) if options.has_link else costs.link
    return replace(costs, batch=batch, link=link)


def _counted(options: CostOptions, config: "Config", model: "ModelConfig") -> "Costs":
    from pipeline.costs.arithmetic import arithmetic_costs

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
        link=_link(options),
        precision=config.training.precision,
    )


def _link(options: CostOptions) -> "Link":
    from pipeline.costs.operation_costs import Link

    rate = float("inf") if options.link_gb_per_s is None else options.link_gb_per_s * 1e9
    return Link((options.link_latency_us or 0.0) * 1e-6, rate)


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


def is_relative(costs: "Costs", options: CostOptions) -> bool:
    """Whether seconds mean nothing but parts of the step of one device."""
    return options.device_tflops is None and costs.origin.startswith("arithmetic")


def costs_line(costs: "Costs", options: CostOptions) -> str:
    """Say in a line what the figures rest on."""
    batch, link = costs.batch, costs.link
    text = (
        f"{batch.num_sentences} sentences of {batch.source_positions} + {batch.target_positions} "
        f"positions; costs: {costs.origin}"
    )
    if options.device_tflops is not None:
        text += f", {options.device_tflops:g} TFLOP/s"
    if link.latency_s == 0.0 and link.bytes_per_s == float("inf"):
        return f"{text}; messages take no time"
    return f"{text}; messages {link.latency_s * 1e6:g} us + {link.bytes_per_s / 1e9:g} GB/s"
