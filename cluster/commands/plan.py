"""The command plan: which layout to train with, for readers who never saw a pipeline schedule."""

import io
import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.commands.cost_options import (
    CostOptions,
    CostsOption,
    DeviceRate,
    Devices,
    LinkLatency,
    LinkRate,
    SourceLength,
    TargetLength,
    costs_line,
    costs_of,
)
from cluster.commands.options import AsJson, ConfigFile, Overrides, load_config
from cluster.commands.output import print_result, reserved_stdout

if TYPE_CHECKING:
    from pipeline.costs.operation_costs import Costs
    from pipeline.planning.planner import Candidate

ALWAYS_SHOWN = ("paper", "data_parallel")
_MOST_RANKS_LISTED = 16
_WORDS = (
    "A batch can be cut into M microbatches (groups of its sentences) and every sentence into K "
    "time chunks (groups of its words), so that a device starts on one piece while another works "
    "on the next. Speedup is over one device; busy is the part of the step in which the devices "
    "compute; memory is that of the fullest device."
)


def plan(
    config_file: ConfigFile,
    overrides: Overrides = None,
    devices: Devices = None,
    memory_gb: Annotated[
        float | None,
        typer.Option(min=0.001, show_default=False, help="Most memory of a device, in 10^9 bytes."),
    ] = None,
    source_length: SourceLength = None,
    target_length: TargetLength = None,
    costs: CostsOption = None,
    link_latency_us: LinkLatency = None,
    link_gb_per_s: LinkRate = None,
    device_tflops: DeviceRate = None,
    top: Annotated[int, typer.Option(min=1, max=100, help="Rows of the table.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Find the fastest layout for a number of devices, and say why it is.

    Placements, policies and cuts are tried in the simulator; nothing is trained, and no device is
    needed. The paper's layout and data parallelism are always among the answers.

    Example:  baton plan configs/paper.yaml --devices 8 --memory-gb 16
    """
    config = load_config(config_file, overrides)
    options = CostOptions(
        costs, source_length, target_length, link_latency_us, link_gb_per_s, device_tflops
    )
    from pipeline.planning.planner import best_of
    from pipeline.planning.planner import plan as find_layouts

    with reserved_stdout() as stdout:
        num_devices = devices or config.num_ranks
        sizes = config.corpus.source_vocabulary.size, config.corpus.target_vocabulary.size
        model = config.model_config_for(*sizes)
        known = costs_of(options, config, model)
        memory_bytes = None if memory_gb is None else int(memory_gb * 1e9)
        found = find_layouts(model, num_devices, known, memory_bytes=memory_bytes)
        best = best_of(found)
    path = None if options.costs == "arithmetic" else options.costs
    settings = _settings(best, path)
    shown = _shown(found, best, top)
    print_result(
        stdout,
        as_json=as_json,
        result={
            "devices": num_devices,
            "costs": costs_line(known, options),
            "memory_bytes": memory_bytes,
            "best": _fields(best),
            "overrides": settings,
            "candidates": [_fields(candidate) for candidate in shown],
        },
        lines=[
            f"{config.name}: layouts for {num_devices} "
            f"{'device' if num_devices == 1 else 'devices'}, fastest first",
            costs_line(known, options),
            "",
            *_table(shown),
            *_notes(shown, memory_gb, known),
            "",
            *_wrapped(_WORDS),
            "",
            *_reasons(shown),
            "",
            *_advice(best, known, settings),
        ],
    )


def _shown(found: Sequence["Candidate"], best: "Candidate", top: int) -> list["Candidate"]:
    """Return the first ones, and those that are always shown, in their order."""
    return [
        candidate
        for place, candidate in enumerate(found)
        if place < top or candidate is best or candidate.name in ALWAYS_SHOWN
    ]


def _fields(candidate: "Candidate") -> dict[str, Any]:
    return {
        "placement": candidate.name,
        "policy": candidate.policy,
        "microbatches": candidate.num_microbatches,
        "time_chunks": candidate.num_chunks,
        "devices": candidate.num_devices,
        "replicas": candidate.num_replicas,
        "speedup": candidate.speedup,
        "hidden_speedup": candidate.hidden_speedup,
        "efficiency": candidate.speedup / candidate.num_devices,
        "busy_fraction": candidate.busy_fraction,
        "step_seconds": candidate.step_s,
        "peak_memory_bytes": candidate.peak_memory_bytes,
        "bytes_sent": candidate.bytes_sent,
        "fits_memory": candidate.fits,
        "can_be_run": candidate.runs,
        "why": candidate.why,
    }


def _settings(best: "Candidate", costs_path: str | None) -> list[str]:
    """Return the overrides with which `baton train` uses a layout."""
    if best.name == "single":
        return ["pipeline.placement=single", "pipeline.microbatches=1", "pipeline.time_chunks=1"]
    settings = [
        f"pipeline.placement={best.name}",
        f"pipeline.ranks={best.num_devices}",
        "pipeline.layer_ranks=null",
        f"pipeline.policy={best.policy}",
        f"pipeline.microbatches={best.num_microbatches}",
        f"pipeline.time_chunks={best.num_chunks}",
    ]
    return settings if costs_path is None else [*settings, f"pipeline.costs={costs_path}"]


def _table(shown: Sequence["Candidate"]) -> list[str]:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("placement")
    table.add_column("devices", justify="right")
    table.add_column("policy")
    for name in ("M", "K", "speedup", "busy", "memory"):
        table.add_column(name, justify="right")
    for number, candidate in enumerate(shown, start=1):
        table.add_row(
            str(number),
            candidate.name + ("" if candidate.runs else " *"),
            str(candidate.num_devices),
            "-" if candidate.num_devices == 1 or candidate.num_replicas > 1 else candidate.policy,
            str(candidate.num_microbatches),
            str(candidate.num_chunks),
            f"{candidate.speedup:.2f}x",
            f"{candidate.busy_fraction:.0%}",
            f"{candidate.peak_memory_bytes / 1e9:.2f} GB" + ("" if candidate.fits else " !"),
        )
    stream = io.StringIO()
    Console(file=stream, width=_width(), color_system=None).print(table)
    return [line.rstrip() for line in stream.getvalue().splitlines() if line.strip()]


def _notes(shown: Sequence["Candidate"], memory_gb: float | None, costs: "Costs") -> list[str]:
    lines = []
    if any(not candidate.runs for candidate in shown):
        lines.append("* simulated for comparison; cannot be trained yet")
    if any(not candidate.fits for candidate in shown):
        lines.append(f"! more than the {memory_gb:g} GB that a device may hold")
    if costs.link.latency_s == 0.0 and costs.link.bytes_per_s == float("inf"):
        lines += _wrapped(
            "Messages are free here, which flatters layouts that send much: give --device-tflops "
            "with --link-gb-per-s and --link-latency-us, or measured costs."
        )
    return lines


def _reasons(shown: Sequence["Candidate"]) -> list[str]:
    lines: list[str] = []
    for number, candidate in enumerate(shown, start=1):
        text = f"{number}. {candidate.name}: {candidate.why}"
        lines += _wrapped(text, indent="   ")
    return lines


def _advice(best: "Candidate", costs: "Costs", settings: Sequence[str]) -> list[str]:
    from pipeline.planning.reasons import POLICY_IDEAS, describe_losses, describe_rank

    if best.num_devices == 1:
        text = (
            "Best that can be trained: one device. Whatever can be cut off from it costs more in "
            "messages and waits than it saves."
        )
        return [*_wrapped(text), "", *_use(settings)]
    text = (
        f"Best that can be trained: {best.name}, {best.speedup:.2f} times as fast as one device, "
        f"of {best.num_devices} at most. {best.why} The order of work ({best.policy}): "
        f"{POLICY_IDEAS[best.policy]}. {describe_losses(best, costs)}"
    )
    listed = [
        line
        for rank in range(min(best.placement.num_ranks, _MOST_RANKS_LISTED))
        for line in _wrapped(
            f"  device {rank:>2}: {describe_rank(best.placement, rank)}", indent=" " * 13
        )
    ]
    if best.placement.num_ranks > _MOST_RANKS_LISTED:
        listed.append(f"  and so on, to device {best.placement.num_ranks - 1}")
    return [*_wrapped(text), "", "Who owns what:", *listed, "", *_use(settings)]


def _use(settings: Sequence[str]) -> list[str]:
    title = "Train with it by adding to the command, or to the configuration:"
    return [title, *(f"  {setting}" for setting in settings)]


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, _width(), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _width() -> int:
    return min(100, shutil.get_terminal_size((100, 24)).columns)
