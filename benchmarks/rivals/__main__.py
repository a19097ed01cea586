"""The command `python -m benchmarks.rivals`, from the root of the repository.

Small enough to try in a minute or two: `python -m benchmarks.rivals --quick --output /tmp/r.md`.
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Contestants' processes import this module again; light, it leaves their memory theirs.
if TYPE_CHECKING:
    from benchmarks.rivals.task import Task

_QUICK: Mapping[str, Any] = {
    "layers": 2,
    "hidden": 32,
    "vocabulary": "300",
    "batch_size": 16,
    "rounds": 1,
}
_PAPER: Mapping[str, Any] = {
    "vocabulary": "160000,80000",
    "rounds": 1,
    "contestants": "ours 2 ranks",
    "shares": False,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Hold the contest and write the report; 1 where the contestants do not train the same."""
    from benchmarks.rivals.processes import ProcessError
    from model.errors import UserError

    # So that what was started ends too: without this, SIGTERM leaves it running.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _hold(_parsed(given), shlex.join(["python", "-m", "benchmarks.rivals", *given]))
    except (UserError, ProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _hold(options: argparse.Namespace, command: str) -> int:
    from benchmarks.rivals.agreement import agreements
    from benchmarks.rivals.batches import draw_batches
    from benchmarks.rivals.contest import Contest, hold_contest
    from benchmarks.rivals.contestants import DEFAULT, all_contestants, chosen
    from benchmarks.rivals.machine import description
    from benchmarks.rivals.plot import plot
    from benchmarks.rivals.report import report

    task = _task(options)
    everybody = all_contestants(
        options.layout,
        options.schedule,
        _pipeline(options),
        rivals_keep_memory=options.rivals_keep_memory,
    )
    names = options.contestants.split(",") if options.contestants else DEFAULT
    contestants = chosen([name.strip() for name in names], everybody)
    machine = description()
    picture = options.output.with_suffix(".svg")

    def write(contest: Contest) -> None:
        page = report(contest, command, machine, options.note, picture.name)
        options.output.write_text(page, encoding="utf-8")
        if contest.finished():
            picture.write_text(plot(contest), encoding="utf-8")

    contest = hold_contest(
        task,
        draw_batches(task),
        contestants,
        _formats(options),
        options.rounds,
        lambda line: print(line, file=sys.stderr, flush=True),
        with_shares=options.shares,
        after_turn=write,
    )
    print(options.output.read_text(encoding="utf-8"))
    return 0 if contest.finished() and all(each.holds for each in agreements(contest)) else 1


def _task(options: argparse.Namespace) -> "Task":
    from benchmarks.rivals.task import Task
    from model.errors import UserError
    from model.network import ModelConfig

    sizes = options.vocabulary.split(",")
    if len(sizes) > 2 or not all(size.isdigit() and int(size) >= 10 for size in sizes):
        raise UserError(
            f"--vocabulary={options.vocabulary} is not one number of words, 10 or more, or two "
            "with a comma between them; use for example --vocabulary 32000"
        )
    for name, least in (("layers", 1), ("hidden", 1), ("rounds", 1), ("steps", 2)):
        if getattr(options, name) < least:
            raise UserError(f"--{name}={getattr(options, name)} is too few; use {least} or more")
    if options.batch_size < 4 or options.batch_size % 4:
        raise UserError(
            f"--batch-size={options.batch_size} cannot be cut into four microbatches; use a "
            "multiple of 4"
        )
    model = ModelConfig(
        int(sizes[0]), int(sizes[-1]), options.layers, options.hidden, options.hidden
    )
    return Task(model, options.batch_size, options.steps, seed=options.seed)


def _formats(options: argparse.Namespace) -> list[str]:
    from model.precision import Precision
    from model.processor import has_fast_bfloat16

    if not options.formats:
        return ["float32", "bfloat16"] if has_fast_bfloat16() else ["float32"]
    formats: list[str] = options.formats.split(",")
    for precision in formats:
        Precision(precision)
    return formats


def _pipeline(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "placement": options.placement,
        "policy": options.policy,
        "microbatches": options.microbatches,
        "time_chunks": options.time_chunks,
    }


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rivals",
        description="Train the same model on the same batches with nn.LSTM in one process, with "
        "DistributedDataParallel, with torch.distributed.pipelining and with this project, on two "
        "cores, in turns; write a report and a plot.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="turns of everybody")
    add("--steps", type=int, default=2, help="timed steps of a turn, 2 or more, after one more")
    add("--layers", type=int, default=4, help="layers of each side")
    add("--hidden", type=int, default=1000, help="cells of a layer, and numbers of an embedding")
    add("--vocabulary", default="32000", help="words of both sides, or SOURCE,TARGET")
    add("--batch-size", type=int, default=128, help="sentence pairs of a step")
    add("--seed", type=int, default=1, help="decides initial values and batches")
    add("--formats", default="", help="of float32,bfloat16 (default: those that are fast here)")
    add("--contestants", default="", help="names with commas (default: all but ours 2 replicas)")
    switch = argparse.BooleanOptionalAction
    add("--shares", action=switch, default=True, help="also time the operations of our step")
    add("--output", type=Path, default=Path("benchmarks/rivals.md"), help="page; plot beside it")
    add("--note", default="", help="a sentence for the report, on what else the machine did")
    rivals = parser.add_argument_group("how rivals are set up")
    ways = ["packed", "padded"]
    rivals.add_argument("--layout", choices=ways, default="padded", help="for ddp and pipelining")
    rivals.add_argument("--schedule", choices=["1f1b", "gpipe"], default="1f1b")
    rivals.add_argument(
        "--rivals-keep-memory", action="store_true", help="start them with our memory settings too"
    )
    ours = parser.add_argument_group("how ours 2 ranks is set up")
    ours.add_argument("--placement", default="uneven")
    ours.add_argument("--policy", default="deferred_weights")
    ours.add_argument("--microbatches", type=int, default=1)
    ours.add_argument("--time-chunks", type=int, default=4)
    presets = parser.add_argument_group("presets, whose values other options replace")
    preset = presets.add_mutually_exclusive_group()
    preset.add_argument("--quick", action="store_true", help=_worded(_QUICK))
    preset.add_argument("--paper", action="store_true", help=_worded(_PAPER))
    first = parser.parse_args(arguments)
    if first.quick or first.paper:
        parser.set_defaults(**(_QUICK if first.quick else _PAPER))
    return parser.parse_args(arguments)


def _worded(preset: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', '-')} {value}" for key, value in preset.items())


if __name__ == "__main__":
    sys.exit(main())
