"""The command batch: what a step trained on, to look at a loss that jumped or at the order."""

from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.options import AsJson, ConfigFile, Overrides, load_config
from cluster.commands.output import print_result, reserved_stdout

if TYPE_CHECKING:
    from torch import Tensor

    from model.vocabulary import Vocabulary


def batch(
    config_file: ConfigFile,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(min=1, help="Number of the step, counted from 1.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Show the sentence pairs of one step's batch, in the order of its rows.

    The order of the data follows from the corpus, the seed and the batch size alone, so any step
    of any run can be looked at, before or after it was made.

    Example:  baton batch configs/quickstart.yaml --step 100
    """
    config = load_config(config_file, overrides)
    from cluster.corpus.prepared import PreparedCorpus
    from cluster.ingest.corpus_batches import CorpusBatches

    with reserved_stdout() as stdout:
        corpus = PreparedCorpus.open(config.corpus.directory)
        batches = CorpusBatches(corpus, config)
        found = batches.training_batch(step)
        cursor = batches.cursor(step - 1)
        # The encoder reads backwards: the words are turned round again for the reader.
        source = _texts(
            found.source,
            found.source_lengths,
            corpus.vocabulary("source"),
            is_reversed=config.model.reverse_source,
        )
        target = _texts(found.target, found.target_lengths, corpus.vocabulary("target"))
    pairs = list(zip(source, target, strict=True))
    padding = 1 - found.num_words / found.num_positions
    print_result(
        stdout,
        as_json=as_json,
        result={
            "step": step,
            "epoch": cursor.epoch,
            "batch": cursor.batch,
            "num_words": found.num_words,
            "padding_fraction": padding,
            "pairs": [{"source": left, "target": right} for left, right in pairs],
        },
        lines=[
            f"step {step}: epoch {cursor.epoch}, batch {cursor.batch} of "
            f"{batches.steps_per_epoch}, {found.num_words} words, {padding:.1%} padding",
            *(f"{left}\t{right}" for left, right in pairs),
        ],
    )


def _texts(
    tokens: "Tensor", lengths: "Tensor", vocabulary: "Vocabulary", *, is_reversed: bool = False
) -> list[str]:
    rows = [
        row[: length - 1] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)
    ]
    return [vocabulary.decode(row[::-1] if is_reversed else row) for row in rows]
