"""From text to text: a model with its vocabularies, and the batches in which sentences go through.

Shapes: B sentences of a batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from model.batching import Pair, make_batch
from model.beam_search import Hypothesis, beam_search, check_search
from model.checkpoint import Checkpoint
from model.errors import UserError
from model.loss import LossSum
from model.precision import Precision
from model.processor import translation_precision
from model.seq2seq import Seq2Seq
from model.vocabulary import Vocabulary

MAX_SENTENCE_WORDS = 10_000

# Longer sentences go in smaller batches, so that a batch's memory does not grow with its longest.
_MAX_BATCH_POSITIONS = 16_384
# What a batch of the search may hold: rows of states, and how many make its products large enough.
_MAX_BATCH_ROWS = 1 << 14
_FULL_BATCH_ROWS = 768

Progress = Callable[[int, int], None]


class TranslationError(UserError):
    """A sentence is beyond the stated limits, or model and vocabularies do not belong together."""


@dataclass(frozen=True)
class Translation:
    """A translation as text, with its hypothesis's score.

    The score is the log-probability in nats, divided by the length penalty where there is one.
    """

    text: str
    score: float


def load_model(
    checkpoint: Checkpoint, device: str = "cpu", precision: str | None = None
) -> Seq2Seq:
    """Build a checkpoint's model on a device; UserError when the device is not there.

    Without `precision` it is that of the training, or float32 where that is faster here.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device} is not there: torch finds no CUDA device; use cpu")
    info = checkpoint.info
    chosen = Precision(precision or translation_precision(info.precision, device))
    model = Seq2Seq(info.model, chosen, device, info.seed)
    for parameter in model.parameters().values():
        # One at a time, so that no second copy of the model is ever held.
        parameter.load(checkpoint.read_rows(parameter.rows))
    return model


class Translator:
    """Translates sentences with a model, and says how probable translations are."""

    def __init__(
        self,
        model: Seq2Seq,
        source_vocabulary: Vocabulary,
        target_vocabulary: Vocabulary,
        reverse_source: bool = True,
    ) -> None:
        sizes = (model.config.source_vocabulary_size, model.config.target_vocabulary_size)
        if sizes != (len(source_vocabulary), len(target_vocabulary)):
            raise TranslationError(
                f"the model has {sizes[0]} source and {sizes[1]} target words, the vocabularies "
                f"{len(source_vocabulary)} and {len(target_vocabulary)}; use those of its training"
            )
        self.model = model
        self.source_vocabulary = source_vocabulary
        self.target_vocabulary = target_vocabulary
        self.reverse_source = reverse_source

    @classmethod
    def from_checkpoint(
        cls, path: Path, device: str = "cpu", precision: str | None = None
    ) -> "Translator":
        """Load a checkpoint, or the newest of a folder; CheckpointError if it is damaged."""
        checkpoint = Checkpoint.open(path)
        return cls(
            load_model(checkpoint, device, precision),
            checkpoint.vocabulary("source"),
            checkpoint.vocabulary("target"),
            checkpoint.info.reverse_source,
        )

    def translate(
        self,
        sentences: Sequence[str],
        *,
        beam_size: int = 12,
        length_penalty: float = 0.0,
        max_length: int = 100,
        n_best: int = 1,
        batch_size: int | None = None,
        progress: Progress | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Translation]]:
        """Return, for each sentence, its `n_best` translations at most, best first.

        `max_length` counts target words; `batch_size` counts sentences and is by default what fills
        the search's products. `progress` gets the numbers of finished and of all sentences after
        each batch. A sentence of white space has the empty translation, with score 0. Raises
        UserError for settings out of range and for a sentence of more than MAX_SENTENCE_WORDS
        words, by its number: from 1 on, unless `numbers` are given.
        """
        check_search(
            beam_size=beam_size, max_length=max_length, length_penalty=length_penalty, n_best=n_best
        )
        numbered = zip(sentences, numbers or range(1, len(sentences) + 1), strict=True)
        sources = [self._encode_source(sentence, number) for sentence, number in numbered]
        translations = [[Translation("", 0.0)] for _ in sentences]
        order = _longest_first([len(words) for words in sources])
        waiting = [index for index in order if sources[index]]
        num_done = len(sentences) - len(waiting)
        batch_size = _FULL_BATCH_ROWS // beam_size or 1 if batch_size is None else batch_size
        batch_size = min(batch_size, _MAX_BATCH_ROWS // beam_size)
        for rows in _batches(waiting, [len(words) + 1 for words in sources], batch_size):
            batch = make_batch(
                [(sources[row], ()) for row in rows], reverse_source=self.reverse_source
            )
            found = beam_search(
                self.model,
                batch.source,
                batch.source_lengths,
                beam_size=beam_size,
                max_length=max_length,
                length_penalty=length_penalty,
                n_best=n_best,
            )
            for row, hypotheses in zip(rows, found, strict=True):
                translations[row] = [self._translation(hypothesis) for hypothesis in hypotheses]
            num_done += len(rows)
            if progress is not None:
                progress(num_done, len(sentences))
        return translations

    def log_probability(self, pairs: Sequence[tuple[str, str]], *, batch_size: int = 64) -> LossSum:
        """Return the negative log-probability of target sentences given their source sentences.

        Summed over the target words with their end symbols. Raises UserError for a sentence of more
        than MAX_SENTENCE_WORDS words.
        """
        encoded: list[Pair] = [
            (
                self._encode_source(source, number, keep_blank=True),
                self._encode_target(target, number),
            )
            for number, (source, target) in enumerate(pairs, start=1)
        ]
        loss = LossSum()
        positions = [max(len(source), len(target)) + 1 for source, target in encoded]
        for rows in _batches(_longest_first(positions), positions, batch_size):
            batch = make_batch([encoded[row] for row in rows], reverse_source=self.reverse_source)
            loss += self.model.loss(batch)
        return loss

    def _encode_source(self, text: str, number: int, keep_blank: bool = False) -> list[int]:
        if not keep_blank and not text.strip():
            return []
        return _within_limit(self.source_vocabulary.encode(text), "source", number)

    def _encode_target(self, text: str, number: int) -> list[int]:
        return _within_limit(self.target_vocabulary.encode(text), "target", number)

    def _translation(self, hypothesis: Hypothesis) -> Translation:
        return Translation(self.target_vocabulary.decode(hypothesis.tokens), hypothesis.score)


def _within_limit(words: list[int], side: str, number: int) -> list[int]:
    if len(words) > MAX_SENTENCE_WORDS:
        raise TranslationError(
            f"{side} sentence {number} has {len(words)} words; the limit is {MAX_SENTENCE_WORDS}: "
            "split it into sentences"
        )
    return words


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def _batches(
    order: Sequence[int], positions: Sequence[int], batch_size: int
) -> Iterator[list[int]]:
    """Cut rows, longest first, into batches of at most so many sentences and padded positions.

    A sentence that is longer by itself has a batch of its own.
    """
    if batch_size < 1:
        raise TranslationError(f"batch_size is {batch_size}; it must be at least 1")
    start = 0
    while start < len(order):
        fitting = max(1, _MAX_BATCH_POSITIONS // positions[order[start]])
        stop = start + min(batch_size, fitting)
        yield list(order[start:stop])
        start = stop
