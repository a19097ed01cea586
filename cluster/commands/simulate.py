"""The command simulate: how long a step takes with one layout, and where its time goes."""

from collections.abc import Mapping
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
    device_overrides,
    is_relative,
    lengths_override,
)
from cluster.commands.options import AsJson, ConfigFile, Overrides, load_config
from cluster.commands.output import print_result, reserved_stdout
from model.errors import UserError

if TYPE_CHECKING:
    from cluster.config import Config
    from pipeline.costs.operation_costs import Costs
    from pipeline.plan import Plan
    from pipeline.simulation.simulator import Simulation


def simulate(
    config_file: ConfigFile,
    overrides: Overrides = None,
    devices: Devices = None,
    placement: Annotated[
        str | None,
        typer.Option(
            show_default=False, help="Which device owns what. Default: pipeline.placement."
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            show_default=False,
            help="Complete models that share the devices and the sentences of a batch. Default: "
            "pipeline.replicas, or 1 with --devices.",
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(show_default=False, help="How orders are chosen. Default: pipeline.policy."),
    ] = None,
    microbatches: Annotated[
        int | None,
        typer.Option(show_default=False, help="Parts of the batch's sentences. Default: pipeline."),
    ] = None,
    time_chunks: Annotated[
        int | None,
        typer.Option(show_default=False, help="Parts of the positions. Default: pipeline."),
    ] = None,
    source_length: SourceLength = None,
    target_length: TargetLength = None,
    costs: CostsOption = None,
    link_latency_us: LinkLatency = None,
    link_gb_per_s: LinkRate = None,
    device_tflops: DeviceRate = None,
    memory_gb: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            show_default=False,
            help="Refuse a layout that needs more memory of a device, in 10^9 bytes.",
        ),
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Also draw the step, time from left to right.")
    ] = False,
    draw: Annotated[
        Path | None,
        typer.Option(
            "--draw", metavar="FILE.svg", show_default=False, help="Draw it as a picture."
        ),
    ] = None,
    fused: Annotated[
        bool,
        typer.Option(
            "--fused",
            help="Devices that hand on an input gradient only after the weight gradient, which "
            "is what a backward pass in one piece does.",
        ),
    ] = False,
    save_schedule: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", show_default=False, help="Keep the schedule, for training.schedule."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict a training step: its time, speedup over one device, and what each device does.

    Nothing is trained, and no device is needed. What is not given comes from the configuration.

    Example:  baton simulate configs/paper.yaml --placement split --policy deferred_weights --grid
    """
    options = CostOptions(
        costs, source_length, target_length, link_latency_us, link_gb_per_s, device_tflops
    )
    settings = {
        "placement": placement,
        "policy": policy,
        "microbatches": microbatches,
        "time_chunks": time_chunks,
    }
    given = [f"pipeline.{key}={value}" for key, value in settings.items() if value is not None]
    device = device_overrides(overrides, devices, replicas)
    config = load_config(config_file, [*device, *lengths_override(options), *given])
    _check_not_ignored(config, {**settings, "devices": devices, "replicas": replicas})
    from cluster.layout import plan_of
    from pipeline.schedules.file import SavedSchedule
    from pipeline.schedules.file import save_schedule as write_schedule
    from pipeline.schedules.grid import draw_letters
    from pipeline.simulation.simulator import simulate as run_simulation
    from pipeline.timeline.drawing import draw_simulation, write_picture

    with reserved_stdout() as stdout:
        sizes = config.corpus.source_vocabulary.size, config.corpus.target_vocabulary.size
        model = config.model_config_for(*sizes)
        known = costs_of(options, config, model)
        known = known.fused() if fused else known
        plan = plan_of(config, model, costs=known)
        _check_devices(plan, devices)
        planned = plan.training
        simulation = run_simulation(
            planned.schedule,
            planned.graph,
            plan.placement,
            known,
            num_replicas=plan.num_replicas,
        )
        if memory_gb is not None:
            _check_memory(plan, simulation, known, memory_gb)
        if draw is not None:
            picture = draw_simulation(plan, simulation, relative=is_relative(known))
            write_picture(draw, picture)
        if save_schedule is not None:
            cuts = plan.num_microbatches, plan.num_chunks
            saved = SavedSchedule(planned.schedule, plan.placement, *cuts, plan.policy)
            write_schedule(save_schedule, saved)
    result = _result(plan, simulation)
    result["time_unit"] = "step of one device" if is_relative(known) else "second"
    result["costs"] = costs_line(known)
    lines = [*_lines(plan, simulation, str(result["time_unit"])), str(result["costs"])]
    if grid:
        result["grid"] = draw_letters(simulation)
        lines += [
            "",
            draw_letters(simulation),
            "F forward, I and W gradients of inputs and weights",
        ]
    if draw is not None:
        result["picture"] = str(draw)
        lines.append(f"picture: {draw}")
    if save_schedule is not None:
        result["schedule_file"] = str(save_schedule)
        lines.append(f"train with it: training.schedule={save_schedule}")
    print_result(stdout, as_json=as_json, result=result, lines=lines)


def _check_not_ignored(config: "Config", settings: Mapping[str, Any]) -> None:
    """Raise UserError if an option was given that a saved schedule or the planner would replace."""
    decided: tuple[str, ...] = ()
    if config.training.schedule is not None:
        decided = ("placement", "policy", "microbatches", "time_chunks", "devices")
        by = f"training.schedule={config.training.schedule} has its own"
    elif config.pipeline.placement == "auto":
        decided, by = ("policy", "microbatches", "time_chunks", "replicas"), "with placement auto "
        by += "the planner chooses it"
    for key in decided:
        if settings[key] is not None:
            raise UserError(
                f"--{key.replace('_', '-')}={settings[key]} would be ignored, since {by}; leave "
                "out one of them"
            )


def _check_devices(plan: "Plan", devices: int | None) -> None:
    """Raise UserError if a placement whose ranks are fixed has others than were asked for."""
    if devices is None or plan.num_workers == devices:
        return
    from pipeline.placements.description import counted

    ranks = plan.num_ranks
    fits = devices % ranks == 0
    raise UserError(
        f"placement {plan.placement.name} has {counted(ranks, 'rank', 'ranks')}"
        f"{'' if plan.num_replicas == 1 else f' in each of {plan.num_replicas} replicas'}, where "
        f"--devices={devices} were asked for; "
        f"{f'add --replicas {devices // ranks} or ' if fits else ''}choose another"
    )


def _check_memory(plan: "Plan", simulation: "Simulation", costs: "Costs", limit_gb: float) -> None:
    from pipeline.simulation.memory import check_memory

    limit_bytes = int(limit_gb * 1e9)
    peaks, graph = simulation.peak_memory_bytes, plan.training.graph
    check_memory(peaks, graph, plan.placement, costs, limit_bytes)


def _result(plan: "Plan", simulation: "Simulation") -> dict[str, Any]:
    from pipeline.placements.description import describe_rank

    step_s = simulation.step_seconds
    return {
        "placement": plan.placement.name,
        "policy": plan.policy,
        "microbatches": plan.num_microbatches,
        "time_chunks": plan.num_chunks,
        "recompute_logits": any(spec.recomputes for spec in plan.blocks),
        "devices": simulation.num_devices,
        "replicas": simulation.num_replicas,
        "speedup": simulation.speedup,
        "efficiency": simulation.efficiency,
        "bubble_fraction": simulation.bubble_fraction,
        "step_seconds": step_s,
        "exposed_exchange_seconds": simulation.exchange_s,
        "one_device_seconds": simulation.one_device_s,
        "peak_memory_bytes": max(simulation.peak_memory_bytes),
        "bytes_sent": simulation.all_bytes_sent,
        "ranks": [
            {
                "rank": rank,
                "owns": describe_rank(plan.placement, rank),
                "busy_seconds": simulation.busy_s[rank],
                "idle_seconds": simulation.idle_s[rank],
                "busy_fraction": simulation.busy_s[rank] / step_s if step_s else 0.0,
                "peak_memory_bytes": simulation.peak_memory_bytes[rank],
                "bytes_sent": simulation.bytes_sent[rank],
                "num_operations": len(simulation.timeline[rank]),
            }
            for rank in range(simulation.num_ranks)
        ],
    }


def _lines(plan: "Plan", simulation: "Simulation", unit: str) -> list[str]:
    from cluster.layout import layout_words
    from pipeline.placements.description import describe_rank

    step_s = simulation.step_seconds
    time = f"{step_s:.4g} steps of one device" if unit != "second" else f"{step_s:.4g} s"
    lines = [
        layout_words(plan),
        f"speedup {simulation.speedup:.3f} over one device, efficiency "
        f"{simulation.efficiency:.1%}, bubble {simulation.bubble_fraction:.1%}, step {time}",
        *_replica_lines(simulation),
        "",
        f"{'rank':>4}  {'busy':>6}  {'idle':>6}  {'memory':>9}  {'sends':>9}  owns",
    ]
    for rank in range(simulation.num_ranks):
        busy = simulation.busy_s[rank] / step_s if step_s else 0.0
        lines.append(
            f"{rank:>4}  {busy:>6.1%}  {1 - busy:>6.1%}  "
            f"{simulation.peak_memory_bytes[rank] / 1e9:>6.2f} GB  "
            f"{simulation.bytes_sent[rank] / 1e9:>6.3f} GB  {describe_rank(plan.placement, rank)}"
        )
    return [*lines, ""]


def _replica_lines(simulation: "Simulation") -> list[str]:
    """Say what replicas cost; the ranks of the table are those of one."""
    if simulation.num_replicas == 1:
        return []
    share = simulation.exchange_s / simulation.step_seconds if simulation.step_seconds else 0.0
    return [
        f"{simulation.num_replicas} replicas on {simulation.num_devices} devices; {share:.1%} of "
        "the step is left for the sums of their gradients when the work is done; one replica:"
    ]
