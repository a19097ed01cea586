"""How good a checkpoint is on held-out text of a prepared corpus, beside no training at all.

Runs in one process: it needs the checkpoint and the corpus, and no ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.config import Config
from cluster.corpus.prepared import PreparedCorpus
from model.checkpoint import Checkpoint
from model.errors import UserError
from model.evaluation import Scores, corpus_scores
from model.process_memory import keep_freed_memory
from model.seq2seq import Seq2Seq
from model.translator import Translator, load_model

Progress = Callable[[int, int], None]


class EvaluationError(UserError):
    """Checkpoint and held-out text do not go together, or there is no text."""


@dataclass(frozen=True)
class SearchSettings:
    """How translations are searched for: see `Translator.translate`."""

    beam_size: int
    length_penalty: float
    max_length: int
    batch_size: int


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of a split.

    `metrics` are `bleu`, `chrf` (0 to 100), `perplexity`, `num_sentences` and `num_target_tokens`
    (end symbols counted); `baseline_metrics` the same of the network before training, where asked
    for. `signatures` say how sacreBLEU came to `bleu` and `chrf`. Each of `samples` has the texts
    `source`, `hypothesis` and `reference`.
    """

    metrics: dict[str, float]
    signatures: dict[str, str]
    samples: list[dict[str, str]]
    baseline_metrics: dict[str, float] | None = None


def evaluate_checkpoint(
    checkpoint: Path,
    *,
    split: str = "test",
    corpus: Path | None = None,
    beam_size: int | None = None,
    length_penalty: float | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    num_samples: int = 10,
    untrained_baseline: bool = False,
    device: str = "cpu",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Score a checkpoint, or the newest of a folder of them, on a split of a prepared corpus.

    What is None is as configured in the checkpoint; `limit` takes the first sentences only. The
    baseline is the same network with the initial values of the same seed. `progress` gets the
    numbers of finished and of all translations. From now on the process keeps the memory that it
    frees. Raises UserError when something does not fit.
    """
    keep_freed_memory()
    opened = Checkpoint.open(checkpoint)
    config = Config.load(opened.path / "config.yaml")
    pairs = _held_out(opened, corpus or config.corpus.directory, split, limit)
    configured = config.evaluation
    settings = SearchSettings(
        configured.beam_size if beam_size is None else beam_size,
        configured.length_penalty if length_penalty is None else length_penalty,
        configured.max_length if max_length is None else max_length,
        configured.batch_size if batch_size is None else batch_size,
    )
    total = len(pairs) * (1 + untrained_baseline)
    trained = _translator(opened, load_model(opened, device))
    hypotheses = _translate(trained, pairs, settings, _part(progress, 0, total))
    metrics, scores = _metrics(trained, pairs, hypotheses)
    baseline = None
    if untrained_baseline:
        info = opened.info
        model = Seq2Seq(info.model, trained.model.precision, device, info.seed)
        untrained = _translator(opened, model)
        guesses = _translate(untrained, pairs, settings, _part(progress, len(pairs), total))
        baseline, _ = _metrics(untrained, pairs, guesses)
    return EvaluationResult(
        metrics,
        {"bleu": scores.bleu_signature, "chrf": scores.chrf_signature},
        _samples(pairs, hypotheses, num_samples),
        baseline,
    )


def _held_out(
    checkpoint: Checkpoint, directory: Path, split: str, limit: int | None
) -> list[tuple[str, str]]:
    prepared = PreparedCorpus.open(directory)
    sides: tuple[Literal["source", "target"], ...] = ("source", "target")
    for side in sides:
        if prepared.vocabulary_bytes(side) != checkpoint.file(f"{side}_vocabulary.json"):
            raise EvaluationError(
                f"the {side} vocabulary of the corpus in {directory} is not that of the checkpoint "
                f"{checkpoint.path}; give the prepared corpus of its training"
            )
    pairs = prepared.reference_texts(split, limit)
    if not pairs:
        raise EvaluationError(f"split {split!r} of the corpus in {directory} holds no sentences")
    return pairs


def _translator(checkpoint: Checkpoint, model: Seq2Seq) -> Translator:
    return Translator(
        model,
        checkpoint.vocabulary("source"),
        checkpoint.vocabulary("target"),
        checkpoint.info.reverse_source,
    )


def _translate(
    translator: Translator,
    pairs: Sequence[tuple[str, str]],
    settings: SearchSettings,
    progress: Progress | None,
) -> list[str]:
    translations = translator.translate(
        [source for source, _ in pairs],
        beam_size=settings.beam_size,
        length_penalty=settings.length_penalty,
        max_length=settings.max_length,
        batch_size=settings.batch_size,
        progress=progress,
    )
    return [best[0].text for best in translations]


def _metrics(
    translator: Translator, pairs: Sequence[tuple[str, str]], hypotheses: Sequence[str]
) -> tuple[dict[str, float], Scores]:
    scores = corpus_scores(hypotheses, [reference for _, reference in pairs])
    loss = translator.log_probability(pairs)
    metrics = {
        "bleu": scores.bleu,
        "chrf": scores.chrf,
        "perplexity": loss.perplexity,
        "num_sentences": len(pairs),
        "num_target_tokens": loss.num_tokens,
    }
    return metrics, scores


def _samples(
    pairs: Sequence[tuple[str, str]], hypotheses: Sequence[str], num_samples: int
) -> list[dict[str, str]]:
    """Choose sentences at equal distances over the split, the same ones every time."""
    count = min(num_samples, len(pairs))
    chosen = [(2 * number + 1) * len(pairs) // (2 * count) for number in range(count)]
    return [
        {"source": pairs[index][0], "hypothesis": hypotheses[index], "reference": pairs[index][1]}
        for index in chosen
    ]


def _part(progress: Progress | None, offset: int, total: int) -> Progress | None:
    if progress is None:
        return None
    report = progress
    return lambda done, _: report(offset + done, total)
