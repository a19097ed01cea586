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
from model.errors import UserError

if TYPE_CHECKING:
    from model.translator import Translation

SENTENCES_AT_ONCE = 256


class InputError(UserError):
    """The text to translate cannot be read, or the translations cannot be written."""


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
    from model.process_memory import keep_freed_memory

    keep_freed_memory()
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
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Translate text, one sentence a line, from stdin to stdout.

    Example:  echo 'And God said' | baton translate runs/quickstart/checkpoints
    """
    from cluster.commands.progress import progress_display
    from model.process_memory import keep_freed_memory
    from model.translator import Translator

    keep_freed_memory()
    collected: list[dict[str, Any]] | None = [] if as_json and output_file == "-" else None
    start_s = time.monotonic()
    with ExitStack() as stack:
        stdout = stack.enter_context(reserved_stdout())
        source = _open_input(stack, input_file)
        translator = Translator.from_checkpoint(checkpoint, device=device)
        target = stdout if output_file == "-" else _open_output(stack, output_file)
        display = stack.enter_context(progress_display("sentences"))
        num_sentences = 0
        for sentences in _groups(source, input_file):
            results = translator.translate(
                sentences,
                beam_size=beam_size,
                length_penalty=length_penalty,
                max_length=max_length,
                n_best=n_best or 1,
                first_number=num_sentences + 1,
            )
            if collected is None:
                _write(target, results, num_sentences, with_scores=n_best is not None)
            else:
                collected += _as_json(sentences, results)
            num_sentences += len(sentences)
            if len(sentences) == SENTENCES_AT_ONCE and not target.isatty():
                display("translate", num_sentences, None)
    if as_json:
        fields: dict[str, Any] = {
            "num_sentences": num_sentences,
            "seconds": round(time.monotonic() - start_s, 3),
        }
        if collected is not None:
            fields["translations"] = collected
        print_result(stdout, as_json=True, result=fields, lines=())


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
    for number, line in enumerate(stream, start=1):
        try:
            yield line.decode("utf-8").rstrip("\r\n").removeprefix("\ufeff" if number == 1 else "")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{'stdin' if name == '-' else name}, line {number}, byte {error.start + 1}: "
                "not UTF-8; convert the text, for example with iconv"
            ) from None


def _write(
    stream: TextIO,
    results: Sequence[Sequence["Translation"]],
    first_number: int,
    *,
    with_scores: bool,
) -> None:
    for number, translations in enumerate(results, start=first_number):
        if with_scores:
            for translation in translations:
                text = _one_line(translation.text)
                stream.write(f"{number} ||| {text} ||| {translation.score:.6f}\n")
        else:
            stream.write(_one_line(translations[0].text) + "\n")
    stream.flush()


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\r", " ")


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
