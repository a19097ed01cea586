"""The command plan: which layout to train with."""

from collections.abc import Sequence
from pathlib import Path
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
from cluster.commands.plan_report import PlanReport

if TYPE_CHECKING:
    from pipeline.planning.candidate import Candidate


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
    save_costs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Keep the costs that the plan counts with, link and lengths among them, for "
            "pipeline.costs.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=100, help="Rows of the table.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Find the fastest layout for a number of devices, and say why it is.

    Placements, replicas, policies and cuts are tried in the simulator; nothing is trained, and no
    device is needed. The paper's layout, data parallelism and one device are always in the table.

    Example:  baton plan configs/paper.yaml --devices 8 --memory-gb 16
    """
    config = load_config(config_file, overrides)
    options = CostOptions(
        costs, source_length, target_length, link_latency_us, link_gb_per_s, device_tflops
    )
    from pipeline.costs.file import save_costs as write_costs
    from pipeline.planning.planner import best_of
    from pipeline.planning.planner import plan as find_layouts

    with reserved_stdout() as stdout:
        num_devices = devices or config.num_workers
        sizes = config.corpus.source_vocabulary.size, config.corpus.target_vocabulary.size
        model = config.model_config_for(*sizes)
        known = costs_of(options, config, model)
        if save_costs is not None:
            write_costs(save_costs, known)
        memory_bytes = None if memory_gb is None else int(memory_gb * 1e9)
        found = find_layouts(
            model,
            num_devices,
            known,
            memory_bytes=memory_bytes,
            num_candidates=top,
            recomputes_logits=config.pipeline.recompute_logits,
        )
        best = best_of(found)
    path = options.path(config) if save_costs is None else str(save_costs)
    shown = _shown(found, best, top)
    report = PlanReport(
        shown,
        best,
        known,
        memory_gb,
        settings_of(best, path),
        is_complete=save_costs is not None or not options.changes_costs,
    )
    print_result(
        stdout,
        as_json=as_json,
        result={
            "devices": num_devices,
            "costs": costs_line(known),
            "memory_bytes": memory_bytes,
            "best": _fields(best, path),
            "overrides": settings_of(best, path),
            "candidates": [_fields(candidate, path) for candidate in shown],
        },
        lines=[
            f"{config.name}: how to train on {num_devices} "
            f"{'device' if num_devices == 1 else 'devices'}, the fastest first",
            costs_line(known),
            "",
            *report.lines(),
        ],
    )


def settings_of(candidate: "Candidate", costs_path: str | None) -> list[str]:
    """Return the overrides with which `baton train` uses a layout."""
    placement = candidate.placement
    settings = [f"pipeline.placement={placement.name}"]
    if placement.num_ranks > 1:
        settings += [f"pipeline.ranks={placement.num_ranks}", "pipeline.layer_ranks=null"]
    settings += [
        f"pipeline.replicas={candidate.num_replicas}",
        f"pipeline.policy={candidate.policy}",
        f"pipeline.microbatches={candidate.num_microbatches}",
        f"pipeline.time_chunks={candidate.num_chunks}",
    ]
    if placement.recomputes_logits:
        settings.append("pipeline.recompute_logits=true")
    return settings if costs_path is None else [*settings, f"pipeline.costs={costs_path}"]


def _shown(found: Sequence["Candidate"], best: "Candidate", top: int) -> list["Candidate"]:
    """Return the first ones, and those that are always shown, in their order."""
    most = max(candidate.num_devices for candidate in found)
    always = {best.name: best}
    for candidate in found:
        whole = candidate.num_devices in (1, most)
        if whole and (candidate.num_replicas == 1 or candidate.placement.num_ranks == 1):
            always.setdefault(candidate.name, candidate)
    kept = [always[name] for name in ("paper", "data_parallel", "single") if name in always]
    return [
        candidate
        for place, candidate in enumerate(found)
        if place < top or candidate is best or any(candidate is other for other in kept)
    ]


def _fields(candidate: "Candidate", costs_path: str | None) -> dict[str, Any]:
    return {
        "placement": candidate.name,
        "policy": candidate.policy,
        "microbatches": candidate.num_microbatches,
        "time_chunks": candidate.num_chunks,
        "devices": candidate.num_devices,
        "replicas": candidate.num_replicas,
        "ranks": candidate.placement.num_ranks,
        "speedup": candidate.speedup,
        "efficiency": candidate.speedup / candidate.num_devices,
        "busy_fraction": candidate.busy_fraction,
        "step_seconds": candidate.step_s,
        "exposed_exchange_seconds": candidate.simulation.exchange_s,
        "peak_memory_bytes": candidate.peak_memory_bytes,
        "bytes_sent": candidate.bytes_sent,
        "fits_memory": candidate.fits,
        "overrides": settings_of(candidate, costs_path),
        "why": candidate.why,
    }
