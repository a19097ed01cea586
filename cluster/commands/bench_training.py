"""The command bench training: words a second of real training on one rank and on several."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.commands.options import AsJson, Overrides, load_config
from cluster.commands.output import print_result, reserved_stdout
from model.errors import UserError

if TYPE_CHECKING:
    from cluster.config import Config
    from cluster.training_bench import TrainingBenchSettings
    from cluster.training_comparison import Comparison, LayoutResult
    from pipeline.costs.operation_costs import Costs
    from pipeline.plan import Plan

_MOST_RANKS = 64


def training(
    config_file: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG",
            show_default=False,
            help="Configuration with the network, batch size and optimiser. Default: 2 layers of "
            "512 cells, 16,000 words a side, batches of 128 pairs.",
        ),
    ] = None,
    overrides: Overrides = None,
    ranks: Annotated[
        str, typer.Option(metavar="N,N,...", help="Numbers of ranks to compare with one rank.")
    ] = "1,2",
    placement: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="Which rank owns what. Default: what the planner chooses from the measured costs, "
            "policy and cuts with it.",
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(show_default=False, help="Order of work, with --placement only."),
    ] = None,
    microbatches: Annotated[
        int | None,
        typer.Option(min=1, show_default=False, help="Microbatches, with --placement only."),
    ] = None,
    time_chunks: Annotated[
        int | None,
        typer.Option(min=1, show_default=False, help="Time chunks, with --placement only."),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=False,
            help="Copies of the pipeline among which the ranks are shared out, with --placement "
            "only.",
        ),
    ] = None,
    longest: Annotated[
        int, typer.Option(min=1, max=10_000, help="Positions of the longest sentences.")
    ] = 25,
    shortest: Annotated[
        int | None,
        typer.Option(
            min=1, show_default=False, help="Positions of the shortest ones. Default: all the same."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that every layout gets.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps in a turn.")] = 2,
    ceiling: Annotated[
        bool,
        typer.Option(
            help="Also time as many trainings of one rank at once as there are ranks, which takes "
            "as many times its memory."
        ),
    ] = True,
    counted: Annotated[
        bool,
        typer.Option(
            "--counted",
            help="Count the costs for planner and simulator by arithmetic, not measure them.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train for real on one rank and on several, in turns, and compare the words a second.

    The ranks are real processes with the configuration's threads each (auto: one, since a rank
    stands for a device); batches are random words. Beside each layout stands what the simulator
    promises with costs measured here, and at the end what as many trainings reach that do not wait
    for each other: no layout can beat that here. Every rank tells the most memory that it held.

    Example:  baton bench training --ranks 1,2
    """
    import sys

    from cluster.pipeline_bench import machine_note
    from cluster.training_bench import measure_training

    counts = _counts(ranks)
    layout = {
        "placement": placement,
        "policy": policy,
        "microbatches": microbatches,
        "time_chunks": time_chunks,
        "replicas": replicas,
    }
    given = {key: value for key, value in layout.items() if value is not None}
    if given and placement is None:
        raise UserError(
            f"--{next(iter(given)).replace('_', '-')} goes with a placement, since the planner "
            "otherwise chooses it; add --placement"
        )
    config = _config(config_file, overrides)
    settings = _settings(config, shortest or longest, longest, rounds, steps, ceiling)

    def tell(line: str) -> None:
        print(line, file=sys.stderr)

    with reserved_stdout() as stdout:
        machine = machine_note()
        costs = _costs(config, settings, tell, counted=counted)
        plans = _plans(config, counts, given, costs)
        found = measure_training(plans, costs, settings, tell)
    print_result(
        stdout,
        as_json=as_json,
        result=_result(settings, config, machine, found),
        lines=_lines(settings, config, machine, found),
    )


def _counts(ranks: str) -> list[int]:
    try:
        counts = sorted({1, *(int(part) for part in ranks.split(","))})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1 or counts[-1] > _MOST_RANKS:
        raise UserError(
            f"--ranks={ranks} is not a list of numbers from 1 to {_MOST_RANKS}; use for example "
            "--ranks 1,2"
        )
    return counts


def _config(path: Path | None, overrides: list[str] | None) -> "Config":
    from cluster.config import Config
    from cluster.precision_choice import with_precision
    from cluster.training_bench import DEFAULT_FIELDS

    given = Config.from_dict(DEFAULT_FIELDS) if path is None else load_config(path, overrides)
    fields = given.to_dict()
    fields["cluster"]["device"] = "cpu"
    if fields["cluster"]["threads_per_rank"] == "auto":
        fields["cluster"]["threads_per_rank"] = 1
    return with_precision(Config.from_dict(fields))


def _costs(
    config: "Config",
    settings: "TrainingBenchSettings",
    tell: Callable[[str], None],
    *,
    counted: bool,
) -> "Costs":
    import torch

    from pipeline.costs.arithmetic import arithmetic_costs
    from pipeline.costs.profiling import measure_costs, measure_link

    precision, shape = config.training.precision, settings.shape
    if counted:
        lengths = shape.source_positions, shape.target_positions
        return arithmetic_costs(settings.model, shape.num_sentences, *lengths, precision=precision)
    tell("measuring the costs of operations and messages")
    threads = config.cluster.threads_per_rank
    assert threads != "auto"
    torch.set_num_threads(threads)
    link = measure_link(shared_memory=config.cluster.shared_memory)
    return measure_costs(settings.model, shape, precision=precision, link=link)


def _settings(
    config: "Config", shortest: int, longest: int, rounds: int, steps: int, ceiling: bool
) -> "TrainingBenchSettings":
    from cluster.training_bench import TrainingBenchSettings

    sizes = config.corpus.source_vocabulary.size, config.corpus.target_vocabulary.size
    return TrainingBenchSettings(
        model=config.model_config_for(*sizes),
        num_sentences=config.training.batch_size,
        shortest=shortest,
        longest=longest,
        learning_rate=config.training.learning_rate,
        clip_norm=config.training.clip_norm,
        num_steps=steps,
        num_rounds=rounds,
        with_ceiling=ceiling,
        cluster=config.cluster,
    )


def _plans(
    config: "Config", counts: list[int], given: dict[str, Any], costs: "Costs"
) -> dict[str, "Plan"]:
    from cluster.training_bench import layout_plan

    return {
        "1 rank" if count == 1 else f"{count} ranks": layout_plan(config, count, given, costs)
        for count in counts
    }


def _result(
    settings: "TrainingBenchSettings", config: "Config", machine: str, found: "Comparison"
) -> dict[str, Any]:
    model = settings.model
    return {
        "machine": machine,
        "threads_per_rank": settings.cluster.threads_per_rank,
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "embedding_size": model.embedding_size,
        "source_vocabulary_size": model.source_vocabulary_size,
        "target_vocabulary_size": model.target_vocabulary_size,
        "precision": config.training.precision,
        "batch_size": settings.num_sentences,
        "shortest": settings.shortest,
        "longest": settings.longest,
        "rounds": settings.num_rounds,
        "steps": settings.num_steps,
        "loss_difference": found.loss_difference,
        "losses_agree": found.losses_agree,
        "layouts": [_fields(result) for result in found.layouts],
        "ceiling": None if found.ceiling is None else _fields(found.ceiling),
    }


def _fields(result: "LayoutResult") -> dict[str, Any]:
    plan = result.plans[0]
    return {
        "name": result.name,
        "trainings": len(result.plans),
        "ranks": plan.num_workers,
        "replicas": plan.num_replicas,
        "placement": plan.placement.name,
        "policy": plan.policy,
        "microbatches": plan.num_microbatches,
        "time_chunks": plan.num_chunks,
        "words_per_second": result.words_per_second,
        "words_per_cpu_second": result.words_per_cpu_s,
        "speedup": result.speedup,
        "speedups": list(result.speedups),
        "simulated_speedup": result.simulated_speedup,
        "rank_busy": list(result.rank_busy),
        "rank_wait": list(result.rank_wait),
        "bytes_sent": result.bytes_sent,
        "peak_memory_bytes": list(result.peak_memory_bytes),
        "simulated_memory_bytes": list(result.simulated_memory_bytes),
    }


def _lines(
    settings: "TrainingBenchSettings", config: "Config", machine: str, found: "Comparison"
) -> list[str]:
    model, threads = settings.model, settings.cluster.threads_per_rank
    lengths = f"{settings.longest}"
    if settings.shortest < settings.longest:
        lengths = f"{settings.shortest} to {settings.longest}"
    rows = [*found.layouts, *([] if found.ceiling is None else [found.ceiling])]
    return [
        f"{model.num_layers} layers of {model.hidden_size} cells, "
        f"{model.source_vocabulary_size:,} and {model.target_vocabulary_size:,} words, "
        f"{config.training.precision}; {settings.num_sentences} pairs of {lengths} positions",
        f"{threads} {'thread' if threads == 1 else 'threads'} a rank; medians of "
        f"{settings.num_rounds} turns of {settings.num_steps} steps ({machine})",
        "",
        f"{'':<14} {'words/s':>8} {'speedup':>7} {'(least to most)':>15} {'simulated':>9} "
        f"{'words/CPU s':>11} {'MB sent':>7}  busy of each rank",
        *(_row(result) for result in rows),
        "",
        "most memory of each rank's process, MB (and of its tensors by the simulator)",
        *(_memory_row(result) for result in rows),
        "",
        *(f"{result.name}: {_layout(result)}" for result in found.layouts[1:]),
        *_remarks(found),
    ]


def _row(result: "LayoutResult") -> str:
    span = f"({min(result.speedups):.2f} to {max(result.speedups):.2f})"
    cpu = "-" if result.words_per_cpu_s is None else f"{result.words_per_cpu_s:,.0f}"
    busy = " ".join(f"{part:.0%}" for part in result.rank_busy)
    return (
        f"{result.name:<14} {result.words_per_second:>8,.0f} {result.speedup:>7.2f} {span:>15} "
        f"{result.simulated_speedup:>9.2f} {cpu:>11} {result.bytes_sent / 1e6:>7.0f}  {busy}"
    )


def _memory_row(result: "LayoutResult") -> str:
    pairs = zip(result.peak_memory_bytes, result.simulated_memory_bytes, strict=True)
    each = "  ".join(f"{peak / 1e6:,.0f} ({told / 1e6:,.0f})" for peak, told in pairs)
    return f"{result.name:<14} {each}"


def _layout(result: "LayoutResult") -> str:
    from cluster.layout import layout_words

    return layout_words(result.plans[0])


def _remarks(found: "Comparison") -> list[str]:
    lines = []
    if found.ceiling is not None:
        lines.append(
            f"{found.ceiling.name}: {len(found.ceiling.plans)} trainings of one rank each at the "
            "same time, the most that this machine gives"
        )
    agree = "agree" if found.losses_agree else "DO NOT AGREE, which is a bug"
    lines.append(f"losses {agree}; largest relative difference {found.loss_difference:.1e}")
    return lines
