"""The command bench: how fast the pipeline is on devices that this machine does not have."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.commands.options import AsJson, load_config
from cluster.commands.output import print_result, reserved_stdout
from model.errors import UserError

if TYPE_CHECKING:
    from cluster.pipeline_bench import BenchSettings, Measurement
    from pipeline.costs.operation_costs import Link

app = typer.Typer(no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure the parts of a training that do not need its data."""


@app.command()
def pipeline(
    devices: Annotated[int, typer.Option(min=2, max=512, help="Ranks, one a device.")] = 8,
    quick: Annotated[bool, typer.Option("--quick", help="The three best placements only.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(help="Configuration with the model and batch size; by default the paper's."),
    ] = None,
    placement: Annotated[
        list[str] | None,
        typer.Option(help="Only this one; may be given several times. data_parallel is one too."),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of each side, in the place of the model's.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sentence pairs of a step, over all replicas.")
    ] = None,
    time_scale: Annotated[
        float,
        typer.Option(
            min=0.01, max=100.0, help="Emulate devices this much faster than the paper's."
        ),
    ] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="Steps measured for each placement.")] = 5,
    link_latency_us: Annotated[
        float, typer.Option(min=0.0, help="Latency that schedules and simulations count with.")
    ] = 0.0,
    link_gb_per_s: Annotated[
        float | None,
        typer.Option(min=0.001, help="Rate that they count with; by default no limit."),
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
    waiting as long as it would take at the rate of the paper's GPUs, which need 4.4 seconds for a
    step of its model alone. Links are free in schedules, simulations and sums over replicas, unless
    they are given.

    Example:  baton bench pipeline --devices 8 --quick
    """
    from cluster.pipeline_bench import BenchSettings, machine_note
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
    if layers is not None:
        settings = replace(settings, model=replace(settings.model, num_layers=layers))
    if batch_size is not None:
        settings = replace(settings, batch=replace(settings.batch, num_sentences=batch_size))
    with reserved_stdout() as stdout:
        machine = machine_note()
        measured = _measure(settings, quick=quick, names=placement or ())
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


def _measure(
    settings: "BenchSettings", *, quick: bool, names: Sequence[str]
) -> list["Measurement"]:
    import sys

    from cluster.pipeline_bench import NUM_QUICK, best, cases, measure, predict

    all_cases = cases(settings.num_devices)
    known = sorted({case.name for case in all_cases})
    if unknown := sorted(set(names) - set(known)):
        raise UserError(f"--placement {unknown[0]!r} is unknown; use one of {', '.join(known)}")
    chosen = [case for case in all_cases if not names or case.name in names]
    predictions = [predict(case, settings) for case in chosen]
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
        "layers": settings.model.num_layers,
        "batch_size": settings.batch.num_sentences,
        "one_device_step_s": settings.costs().one_device_s(),
        "time_scale": settings.time_scale,
        "shared_memory": settings.shared_memory,
        "paper_speedup": PAPER_SPEEDUP,
        "machine": machine,
        "placements": [
            {
                "name": found.case.name,
                "replicas": found.case.replicas,
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

    rate = f"{settings.costs().one_device_s():.3g} s a step on one device"
    if settings.time_scale != 1.0:
        rate += f" (waits scaled down {settings.time_scale:g} times)"
    ways = "in shared memory" if settings.shared_memory else "over the loopback network"
    header = (
        f"{'placement':<14} {'R':>3} {'policy':<17} {'M':>3} {'K':>3} {'backward':<8} "
        f"{'measured':>8} {'simulated':>9} {'ratio':>6} {'MB sent':>8}"
    )
    return [
        f"{settings.num_devices} emulated devices: real processes, schedules and messages, and",
        f"waits in the place of arithmetic; {settings.model.num_layers} layers, batch "
        f"{settings.batch.num_sentences}, {rate}",
        f"({machine}; messages {ways}; simulated with {_words(settings.link)})",
        "",
        header,
        *(_row(found) for found in measured),
        "",
        "R replicas, M microbatches, K time chunks; fused: I and W of a block in one operation.",
        f"The paper measured {PAPER_SPEEDUP} on 8 devices.",
    ]


def _words(link: "Link") -> str:
    if link.is_free:
        return "free links"
    return f"links of {link.latency_s * 1e6:g} us and {link.bytes_per_s / 1e9:g} GB/s"


def _row(found: "Measurement") -> str:
    case = found.case
    return (
        f"{case.name:<14} {case.replicas:>3} {case.policy:<17} {case.microbatches:>3} "
        f"{case.time_chunks:>3} {'fused' if case.fused else 'split':<8} "
        f"{found.measured_speedup:>8.2f} {found.simulated_speedup:>9.2f} {found.ratio:>6.1%} "
        f"{found.bytes_sent / 1e6:>8.0f}{'  ' + case.note if case.note else ''}"
    ).rstrip()
