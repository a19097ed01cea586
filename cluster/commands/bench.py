"""The command bench: how fast the pipeline is on devices that this machine does not have."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.commands.options import AsJson, load_config
from cluster.commands.output import print_result, reserved_stdout

if TYPE_CHECKING:
    from cluster.pipeline_bench import BenchSettings, Measurement

app = typer.Typer(no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure the parts of a training that do not need its data."""


@app.command()
def pipeline(
    devices: Annotated[int, typer.Option(min=1, max=512, help="Ranks, one a device.")] = 8,
    quick: Annotated[bool, typer.Option("--quick", help="The three best placements only.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(help="Configuration with the model and batch size; by default the paper's."),
    ] = None,
    time_scale: Annotated[
        float,
        typer.Option(
            min=0.01, max=100.0, help="Emulate devices this much faster than the paper's."
        ),
    ] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="Steps measured for each placement.")] = 5,
    link_latency_us: Annotated[
        float, typer.Option(min=0.0, help="Latency that the schedules count with, microseconds.")
    ] = 0.0,
    link_gb_per_s: Annotated[
        float | None,
        typer.Option(min=0.001, help="Rate that the schedules count with; by default no limit."),
    ] = None,
    shared_memory: Annotated[
        bool,
        typer.Option(
            "--shared-memory/--no-shared-memory",
            help="Hand tensors over in shared memory, or over the loopback network.",
        ),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Run every named placement on emulated devices, and compare with the simulation.

    Real processes, schedules and messages of the true sizes; only the arithmetic is replaced by
    waiting as long as it would take at the paper's rate, 4.4 seconds a step on one device. The
    simulated figures have free links.

    Example:  baton bench pipeline --devices 8 --quick
    """
    from cluster.pipeline_bench import BenchSettings, data_parallel, machine_note
    from pipeline.costs.operation_costs import Link

    rate = float("inf") if link_gb_per_s is None else link_gb_per_s * 1e9
    settings = BenchSettings(
        num_devices=devices,
        time_scale=time_scale,
        link=Link(link_latency_us * 1e-6, rate),
        num_steps=steps,
        shared_memory=shared_memory,
    )
    if config is not None:
        settings = _with_config(settings, config)
    with reserved_stdout() as stdout:
        machine = machine_note()
        measured = _measure(settings, quick=quick)
        if not quick:
            measured.append(data_parallel(settings))
    print_result(
        stdout,
        as_json=as_json,
        result=_result(settings, machine, measured),
        lines=_lines(settings, machine, measured),
    )


def _with_config(settings: "BenchSettings", path: Path) -> "BenchSettings":
    found = load_config(path, None)
    sizes = found.corpus.source_vocabulary.size, found.corpus.target_vocabulary.size
    return replace(
        settings,
        model=found.model_config_for(*sizes),
        batch=replace(settings.batch, num_sentences=found.training.batch_size),
    )


def _measure(settings: "BenchSettings", *, quick: bool) -> list["Measurement"]:
    import sys

    from cluster.pipeline_bench import CASES, NUM_QUICK, best, measure, predict

    predictions = [predict(case, settings) for case in CASES]
    if quick:
        predictions = best(predictions, NUM_QUICK)
    return list(measure(predictions, settings, lambda line: print(line, file=sys.stderr)))


def _result(
    settings: "BenchSettings", machine: str, measured: list["Measurement"]
) -> dict[str, Any]:
    from cluster.pipeline_bench import PAPER_SPEEDUP

    return {
        "devices": settings.num_devices,
        "emulated": True,
        "one_device_step_s": settings.one_device_step_s,
        "time_scale": settings.time_scale,
        "shared_memory": settings.shared_memory,
        "paper_speedup": PAPER_SPEEDUP,
        "machine": machine,
        "placements": [
            {
                "name": found.case.name,
                "policy": found.case.policy,
                "microbatches": found.case.microbatches,
                "time_chunks": found.case.time_chunks,
                "fused_backward": found.case.fused,
                "measured_speedup": found.measured_speedup,
                "simulated_speedup": found.simulated_speedup,
                "step_s": found.step_s,
                "busy_s": found.busy_s,
                "wait_s": found.wait_s,
                "orchestration_s": found.orchestration_s,
                "bytes_sent": found.bytes_sent,
                "note": found.case.note,
            }
            for found in measured
        ],
    }


def _lines(settings: "BenchSettings", machine: str, measured: list["Measurement"]) -> list[str]:
    from cluster.pipeline_bench import PAPER_SPEEDUP

    scale = settings.time_scale
    rate = f"{settings.one_device_step_s / scale:.3g} s a step on one device"
    if scale != 1.0:
        rate += f" (the paper's {settings.one_device_step_s:g} s scaled down {scale:g} times)"
    ways = "in shared memory" if settings.shared_memory else "over the loopback network"
    header = (
        f"{'placement':<14} {'policy':<17} {'M':>3} {'K':>3} {'backward':<8} "
        f"{'measured':>8} {'simulated':>9} {'ratio':>6} {'MB sent':>8}"
    )
    return [
        f"{settings.num_devices} emulated devices: real processes, schedules and messages, and",
        f"waits in the place of arithmetic; {rate}",
        f"({machine}; messages {ways}; simulated with free links)",
        "",
        header,
        *(_row(found) for found in measured),
        "",
        f"The paper measured {PAPER_SPEEDUP} on 8 devices.",
    ]


def _row(found: "Measurement") -> str:
    case, ratio = found.case, found.ratio
    measured = "-" if found.measured_speedup is None else f"{found.measured_speedup:.2f}"
    return (
        f"{case.name:<14} {case.policy:<17} {case.microbatches:>3} {case.time_chunks:>3} "
        f"{'fused' if case.fused else 'split':<8} {measured:>8} {found.simulated_speedup:>9.2f} "
        f"{'-' if ratio is None else f'{ratio:.1%}':>6} {found.bytes_sent / 1e6:>8.0f}"
        f"{'  ' + case.note if case.note else ''}"
    ).rstrip()
