"""Beam search over many sentences at a time, as in Sutskever et al. (2014), section 3.2.

A sentence's beam holds a number of partial translations; each is extended by every word, and the
most probable extensions stay. One that gets the end symbol leaves the beam and is complete, so the
beam narrows; when it is empty, the sentence is done. A translation that has reached the length
limit can only end, so that every score is the probability of a whole sequence.

Sentences share the network's steps and nothing else: a beam looks at its own rows only. Equal
scores go to the hypothesis further up in the beam, then to the smaller word id.

Shapes: B sentences, S source positions, R rows (live hypotheses of all sentences), V target words,
C candidates kept of a row.
"""

from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.errors import UserError
from model.seq2seq import DecoderState, Seq2Seq
from model.vocabulary import EOS_ID

Number = TypeVar("Number", np.float64, np.int64)

MAX_BEAM_SIZE = 1000
MAX_LENGTH = 10_000


class BeamSearchError(UserError):
    """A search was asked for that cannot be made, or the model's numbers are not finite."""


@dataclass(frozen=True)
class Hypothesis:
    """A complete translation: word ids without the end symbol, and its score.

    The score is the log-probability in nats, the end symbol counted, divided by the length penalty
    where there is one.
    """

    tokens: tuple[int, ...]
    score: float


def length_divisor(num_words: int, length_penalty: float) -> float:
    """Return what log-probabilities of so many words, the end symbol counted, are divided by.

    Wu et al. (2016), section 7: ((5 + length) / 6) to the power of the penalty; 1 for penalty 0.
    """
    return float(((5.0 + num_words) / 6.0) ** length_penalty)


def check_search(
    *, beam_size: int, max_length: int, length_penalty: float = 0.0, n_best: int = 1
) -> None:
    """Raise BeamSearchError when a setting of the search is outside its range."""
    ranges = [
        ("beam_size", beam_size, 1, MAX_BEAM_SIZE),
        ("max_length", max_length, 1, MAX_LENGTH),
        ("n_best", n_best, 1, beam_size),
        ("length_penalty", length_penalty, 0.0, 10.0),
    ]
    for name, value, low, high in ranges:
        if not low <= value <= high:
            raise BeamSearchError(f"{name} is {value}; it must be from {low} to {high}")


def beam_search(
    model: Seq2Seq,
    source: Tensor,
    source_lengths: Tensor,
    *,
    beam_size: int,
    max_length: int,
    length_penalty: float = 0.0,
    n_best: int = 1,
) -> list[list[Hypothesis]]:
    """Translate sentences (B, S), laid out and sorted as in a batch; lengths are (B,).

    Returns, for each row, at most `n_best` different hypotheses, best first; fewer only where there
    are no more sequences. `max_length` counts words without the end symbol; `beam_size` 1 is greedy
    search. Raises BeamSearchError.
    """
    check_search(
        beam_size=beam_size, max_length=max_length, length_penalty=length_penalty, n_best=n_best
    )
    beams = [_Beam(beam_size, max_length, length_penalty, n_best) for _ in range(len(source))]
    live = beams
    state = model.encode(source, source_lengths)
    while live:
        words = torch.tensor([word for beam in live for word in beam.last_words()])
        log_probabilities, state = model.decode_step(words.to(model.device), state)
        rows = _extend(live, log_probabilities, beam_size)
        state = _select(state, rows, model.device)
        live = [beam for beam in live if beam.partial]
    return [beam.best() for beam in beams]


@dataclass(frozen=True)
class _Partial:
    tokens: tuple[int, ...]
    log_probability: float


@dataclass
class _Beam:
    """One sentence's search: the partial hypotheses, best first, and the complete ones."""

    size: int
    max_length: int
    length_penalty: float
    n_best: int
    partial: list[_Partial] = field(default_factory=lambda: [_Partial((), 0.0)])
    complete: list[Hypothesis] = field(default_factory=list)

    def last_words(self) -> list[int]:
        """Return the word that the decoder reads next, for each partial hypothesis."""
        return [(hypothesis.tokens or (EOS_ID,))[-1] for hypothesis in self.partial]

    def extend(self, values: npt.NDArray[np.float64], words: npt.NDArray[np.int64]) -> list[int]:
        """Take the best words (live, C) of each partial hypothesis, with their log-probabilities.

        Returns, for each hypothesis that is partial now, the index of the one it came from.
        """
        before = np.array([hypothesis.log_probability for hypothesis in self.partial])
        totals = (before[:, None] + values).ravel()
        width = self.size - len(self.complete)
        extended, parents = [], []
        for index in np.argsort(-totals, kind="stable")[:width]:
            parent, place = divmod(int(index), words.shape[1])
            word, total = int(words[parent, place]), float(totals[index])
            tokens = self.partial[parent].tokens
            if word == EOS_ID:
                self._finish(tokens, total)
            else:
                extended.append(_Partial((*tokens, word), total))
                parents.append(parent)
        self.partial = extended
        if self._cannot_improve():
            self.partial = []
        return parents if self.partial else []

    def end(self, values: npt.NDArray[np.float64]) -> None:
        """End every partial hypothesis, given the end symbol's log-probabilities (live,)."""
        for hypothesis, value in zip(self.partial, values, strict=True):
            self._finish(hypothesis.tokens, hypothesis.log_probability + float(value))
        self.partial = []

    @property
    def is_full_length(self) -> bool:
        """Whether the partial hypotheses may get no further word."""
        return len(self.partial[0].tokens) == self.max_length

    def best(self) -> list[Hypothesis]:
        """Return the best complete hypotheses, best first, equal ones in the order they ended."""
        return sorted(self.complete, key=lambda hypothesis: -hypothesis.score)[: self.n_best]

    def _finish(self, tokens: tuple[int, ...], log_probability: float) -> None:
        divisor = length_divisor(len(tokens) + 1, self.length_penalty)
        self.complete.append(Hypothesis(tokens, log_probability / divisor))

    def _cannot_improve(self) -> bool:
        """Whether no partial hypothesis can come to be among the best, however it goes on.

        Log-probabilities only fall, and the divisor is at most that of the greatest length.
        """
        if not self.partial or len(self.complete) < self.n_best:
            return not self.partial
        divisor = length_divisor(self.max_length + 1, self.length_penalty)
        bound = self.partial[0].log_probability / divisor
        return bound <= self.best()[-1].score


def _extend(live: list[_Beam], log_probabilities: Tensor, beam_size: int) -> list[int]:
    """Extend or end every beam from (R, V); return the row that each partial hypothesis now has."""
    # All beams are at the same position, since they start together.
    if live[0].is_full_length:
        ends = log_probabilities[:, EOS_ID].double().cpu().numpy()
        for beam, values in zip(live, _by_beam(live, ends), strict=True):
            _check_finite(values)
            beam.end(values)
        return []
    best_values, best_words = _best_words(log_probabilities, beam_size)
    values, words = best_values.double().cpu().numpy(), best_words.cpu().numpy()
    _check_finite(values)
    value_parts, word_parts = _by_beam(live, values), _by_beam(live, words)
    rows: list[int] = []
    first = 0
    for beam, beam_values, beam_words in zip(live, value_parts, word_parts, strict=True):
        rows += [first + parent for parent in beam.extend(beam_values, beam_words)]
        first += len(beam_values)
    return rows


def _by_beam(live: list[_Beam], rows: npt.NDArray[Number]) -> list[npt.NDArray[Number]]:
    """Cut rows of all live hypotheses into those of each beam."""
    return np.split(rows, np.cumsum([len(beam.partial) for beam in live])[:-1])


def _check_finite(values: npt.NDArray[np.float64]) -> None:
    if np.isnan(values).any():
        raise BeamSearchError(
            "the model's probabilities are not numbers (NaN), so its training has diverged; "
            "use an earlier checkpoint, or train with a lower training.learning_rate"
        )


def _best_words(log_probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return values and ids (R, C) of the best words of each row, equal ones by ascending id."""
    num_words = log_probabilities.shape[1]
    count = min(count, num_words)
    # One more than wanted shows whether the last place is contested: topk may then take any word.
    values, words = log_probabilities.topk(min(count + 1, num_words), dim=1)
    if values.shape[1] > count:
        contested = values[:, count] == values[:, count - 1]
        values, words = values[:, :count], words[:, :count]
        if bool(contested.any()):
            ranked = log_probabilities[contested].sort(dim=1, descending=True, stable=True)
            values[contested] = ranked.values[:, :count]
            words[contested] = ranked.indices[:, :count]
    words, order = words.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, words.gather(1, order)


def _select(state: DecoderState, rows: list[int], device: str) -> DecoderState:
    return state.select(torch.tensor(rows, dtype=torch.int64, device=device))
