"""The commands that use a trained network: translate and evaluate."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, TextIO

import typer

from cluster.commands.options import (
    AsJson,
    BeamSize,
    Checkpoint,
    ConfiguredBeamSize,
    ConfiguredLengthPenalty,
    ConfiguredMaxLength,
    Device,
    LengthPenalty,
    MaxLength,
)
from cluster.commands.output import print_result, reserved_stdout, sample_lines, table
from cluster.translation.lines import InputError, decoded_line, output_lines

if TYPE_CHECKING:
    from cluster.commands.progress import ProgressDisplay
    from cluster.translation.part_translator import SearchSettings
    from model.translator import Translation

SENTENCES_AT_ONCE = 256


def evaluate(
    checkpoint: Checkpoint,
    split: Annotated[
        Literal["valid", "test"], typer.Option(help="Held-out part of the corpus to score.")
    ] = "test",
    corpus: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="Prepared corpus to take the text from. Default: that of the training.",
        ),
    ] = None,
    beam_size: ConfiguredBeamSize = None,
    length_penalty: ConfiguredLengthPenalty = None,
    max_length: ConfiguredMaxLength = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, show_default=False, help="Score the first sentences only."),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, help="Translations to show beside their references.")
    ] = 10,
    untrained_baseline: Annotated[
        bool,
        typer.Option(
            "--untrained-baseline", help="Score the same network before any training as well."
        ),
    ] = False,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Score a checkpoint on held-out text: BLEU and chrF by sacreBLEU, and perplexity.

    Beam size, length penalty and greatest length are as configured at the training, unless given.

    Example:  baton evaluate runs/quickstart/checkpoints --limit 100
    """
    from cluster.commands.progress import progress_display
    from cluster.evaluation_run import evaluate_checkpoint

    with reserved_stdout() as stdout, progress_display("sentences") as display:
        result = evaluate_checkpoint(
            checkpoint,
            split=split,
            corpus=corpus,
            beam_size=beam_size,
            length_penalty=length_penalty,
            max_length=max_length,
            limit=limit,
            num_samples=samples,
            untrained_baseline=untrained_baseline,
            device=device,
            progress=lambda done, total: display("translate", done, total),
        )
    fields = {
        "checkpoint": str(checkpoint),
        "split": split,
        "metrics": result.metrics,
        "signatures": result.signatures,
        "baseline_metrics": result.baseline_metrics,
        "samples": result.samples,
    }
    lines = [*sample_lines(result.samples), f"{split}, trained:", *table([*result.metrics.items()])]
    if result.baseline_metrics is not None:
        lines += [f"{split}, untrained:", *table([*result.baseline_metrics.items()])]
    lines += [f"{name} signature: {text}" for name, text in result.signatures.items()]
    print_result(stdout, as_json=as_json, result=fields, lines=lines)


def translate(
    checkpoint: Checkpoint,
    input_file: Annotated[
        str, typer.Option("--input", metavar="FILE", help="Text, one sentence a line; - is stdin.")
    ] = "-",
    output_file: Annotated[
        str, typer.Option("--output", metavar="FILE", help="Translations in order; - is stdout.")
    ] = "-",
    beam_size: BeamSize = 12,
    n_best: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            show_default=False,
            help="Give this many translations of each sentence with their scores, as lines "
            "`number ||| text ||| score`.",
        ),
    ] = None,
    length_penalty: LengthPenalty = 0.0,
    max_length: MaxLength = 100,
    workers: Annotated[
        int, typer.Option(min=1, max=10_000, help="Ray workers that share the file's sentences.")
    ] = 1,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Forget what an interrupted run into this file finished."),
    ] = False,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Translate text, one sentence a line, from stdin to stdout or from a file into another.

    From file to file, what is finished is kept in OUTPUT.parts: repeat an interrupted command, and
    it goes on from there.

    Example:  echo 'And God said' | baton translate runs/quickstart/checkpoints
    """
    from cluster.commands.progress import progress_display
    from cluster.translation.part_translator import SearchSettings
    from model.process_memory import keep_freed_memory

    keep_freed_memory()
    settings = SearchSettings(beam_size, n_best, length_penalty, max_length)
    start_s = time.monotonic()
    with reserved_stdout() as stdout, progress_display("sentences") as display:
        if _is_file(input_file) and _is_file(output_file):
            fields = _translate_file(
                checkpoint, input_file, output_file, settings, device, workers, restart, display
            )
        elif workers > 1 or restart:
            raise InputError(
                f"--input {input_file}, --output {output_file}: several workers and --restart need "
                "a file for both; name two files, or leave --workers and --restart out"
            )
        else:
            collect = as_json and output_file == "-"
            fields = _translate_stream(
                checkpoint, input_file, output_file, settings, device, display, stdout, collect
            )
    if as_json:
        fields = {"seconds": round(time.monotonic() - start_s, 3), **fields}
        print_result(stdout, as_json=True, result=fields, lines=())


def _is_file(name: str) -> bool:
    """Whether a name is that of a file, or of none yet: not of a stream, a pipe or a device."""
    return name != "-" and (Path(name).is_file() or not Path(name).exists())


def _translate_file(
    checkpoint: Path,
    input_file: str,
    output_file: str,
    settings: "SearchSettings",
    device: str,
    workers: int,
    restart: bool,
    display: "ProgressDisplay",
) -> dict[str, Any]:
    from cluster.translation.file_translation import translate_file

    done = translate_file(
        checkpoint,
        Path(input_file),
        Path(output_file),
        settings,
        device=device,
        num_workers=workers,
        restart=restart,
        progress=lambda done, total: display("translate", done, total),
        message=display.message,
    )
    return {"num_sentences": done.num_sentences, "num_resumed": done.num_resumed}


def _translate_stream(
    checkpoint: Path,
    input_file: str,
    output_file: str,
    settings: "SearchSettings",
    device: str,
    display: "ProgressDisplay",
    stdout: TextIO,
    collect: bool,
) -> dict[str, Any]:
    """Translate lines as they come; with `collect`, they are returned and not written."""
    from model.translator import Translator

    collected: list[dict[str, Any]] = []
    num_sentences = 0
    with ExitStack() as stack:
        source = _open_input(stack, input_file)
        translator = Translator.from_checkpoint(checkpoint, device=device)
        target = stdout if output_file == "-" else _open_output(stack, output_file)
        for sentences in _groups(source, input_file):
            results = translator.translate(
                sentences,
                beam_size=settings.beam_size,
                length_penalty=settings.length_penalty,
                max_length=settings.max_length,
                n_best=settings.n_best or 1,
                numbers=range(num_sentences + 1, num_sentences + 1 + len(sentences)),
            )
            if collect:
                collected += _as_json(sentences, results)
            else:
                _write(target, results, num_sentences, with_scores=settings.n_best is not None)
            num_sentences += len(sentences)
            if len(sentences) == SENTENCES_AT_ONCE and not target.isatty():
                display("translate", num_sentences, None)
    fields: dict[str, Any] = {"num_sentences": num_sentences}
    return fields | {"translations": collected} if collect else fields


def _open_input(stack: ExitStack, name: str) -> BinaryIO:
    if name == "-":
        if sys.stdin.isatty():
            print("type one sentence a line; Ctrl-D ends", file=sys.stderr)
        return sys.stdin.buffer
    try:
        return stack.enter_context(Path(name).open("rb"))
    except OSError as error:
        raise InputError(f"--input {name}: {error.strerror}; give a text file or -") from None


def _open_output(stack: ExitStack, name: str) -> TextIO:
    try:
        return stack.enter_context(Path(name).open("w", encoding="utf-8", newline="\n"))
    except OSError as error:
        raise InputError(
            f"--output {name}: {error.strerror}; give a file that can be written, or -"
        ) from None


def _groups(stream: BinaryIO, name: str) -> Iterator[list[str]]:
    """Read sentences in groups that are decoded together; at a terminal, each on its own.

    Only the line feed ends a line, so that the output has as many lines as the input.
    """
    at_once = 1 if stream.isatty() else SENTENCES_AT_ONCE
    sentences = _sentences(stream, name)
    while group := list(islice(sentences, at_once)):
        yield group


def _sentences(stream: BinaryIO, name: str) -> Iterator[str]:
    name = "stdin" if name == "-" else name
    for number, line in enumerate(stream, start=1):
        yield decoded_line(line, number, name)


def _write(
    stream: TextIO,
    results: Sequence[Sequence["Translation"]],
    first_number: int,
    *,
    with_scores: bool,
) -> None:
    for number, translations in enumerate(results, start=first_number):
        stream.write(output_lines(number, translations, with_scores=with_scores))
    stream.flush()


def _as_json(
    sentences: Sequence[str], results: Sequence[Sequence["Translation"]]
) -> list[dict[str, Any]]:
    return [
        {
            "source": sentence,
            "translations": [{"text": t.text, "score": t.score} for t in translations],
        }
        for sentence, translations in zip(sentences, results, strict=True)
    ]
