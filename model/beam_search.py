"""Beam search over many sentences at a time, as in Sutskever et al. (2014), section 3.2.

A sentence's beam holds a number of partial translations; each is extended by every word, and the
most probable extensions stay. One that gets the end symbol leaves the beam and is complete, so the
beam narrows; when it is empty, the sentence is done. A translation that has reached the length
limit can only end, so that every score is the probability of a whole sequence.

Sentences share the network's steps and nothing else: a beam looks at its own rows only. Equal
scores go to the hypothesis further up in the beam, then to the smaller word id.

All beams of a batch are at the same position and are extended together, by arithmetic over arrays:
a step costs the same calls for one sentence as for hundreds. The candidates come from the device in
one transfer a step.

Shapes: B sentences that are not done, S source positions, R rows (live hypotheses of all sentences,
sentence by sentence, best first), K the longest beam, C words kept of a row, W the widest beam.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.best_words import BestWords
from model.decoder import Decoder
from model.errors import UserError
from model.seq2seq import Seq2Seq
from model.vocabulary import EOS_ID

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

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
    beams = _Beams(len(source), beam_size, max_length, length_penalty, n_best)
    if not len(source):
        return []
    decoder = Decoder(model, len(source) * beam_size)
    decoder.start(model.encode(source, source_lengths))
    while beams.num_rows:
        outputs = decoder.step(torch.from_numpy(beams.last_words).to(model.device))
        candidates = _Candidates.of(decoder.best_words(outputs, beams.widest))
        parents = beams.extend(candidates)
        if len(parents) and not _is_identity(parents, decoder.num_rows):
            decoder.select(torch.from_numpy(parents).to(model.device))
    return beams.best()


@dataclass(frozen=True)
class _Candidates:
    """The best words (R, C) of each row, their log-probabilities, and the end symbol's (R,)."""

    values: Floats
    words: Ints
    ends: Floats

    @classmethod
    def of(cls, best: BestWords) -> "_Candidates":
        # One transfer: each waits for the device. Word ids are whole numbers in a float64 too.
        packed = torch.cat([best.values, best.words.double(), best.ends[:, None]], dim=1)
        numbers: Floats = packed.cpu().numpy()
        if np.isnan(numbers).any():
            raise BeamSearchError(
                "the model's probabilities are not numbers (NaN), so its training has diverged; "
                "use an earlier checkpoint, or train with a lower training.learning_rate"
            )
        count = best.words.shape[1]
        return cls(numbers[:, :count], numbers[:, count:-1].astype(np.int64), numbers[:, -1])


class _Beams:
    """The beams of all sentences: partial hypotheses as rows, complete ones as a table.

    A row's words are the last words of its ancestors, one a step; the steps are all that is kept.
    """

    def __init__(
        self, num_sentences: int, size: int, max_length: int, length_penalty: float, n_best: int
    ) -> None:
        self._size, self._max_length, self._n_best = size, max_length, n_best
        self._length_penalty = length_penalty
        # Sentences that are not done (B,), and how many live rows each has.
        self._alive: Ints = np.arange(num_sentences)
        self._num_live: Ints = np.ones(num_sentences, dtype=np.int64)
        self._totals: Floats = np.zeros(num_sentences)
        self.last_words: Ints = np.full(num_sentences, EOS_ID)
        self._steps: list[tuple[Ints, Ints]] = []
        self._num_complete: Ints = np.zeros(num_sentences, dtype=np.int64)
        self._scores: Floats = np.full((num_sentences, size), -np.inf)
        # Of every complete hypothesis, the step and the row that it ended in.
        self._ended: Ints = np.zeros((num_sentences, size, 2), dtype=np.int64)

    @property
    def num_rows(self) -> int:
        """Live hypotheses of all sentences."""
        return len(self._totals)

    @property
    def widest(self) -> int:
        """How many candidates the widest beam takes; no row can give more."""
        return self._size - int(self._num_complete[self._alive].min())

    def extend(self, candidates: _Candidates) -> Ints:
        """Extend or end every hypothesis; return the row (R,) that each live one came from."""
        if len(self._steps) == self._max_length:
            return self._end(candidates.ends)
        sentences = np.repeat(np.arange(len(self._alive)), self._num_live)
        firsts = np.cumsum(self._num_live) - self._num_live
        slots = np.arange(self.num_rows) - firsts[sentences]
        totals = self._totals[:, None] + candidates.values
        table = np.full((len(self._alive), int(self._num_live.max()), totals.shape[1]), -np.inf)
        table[sentences, slots] = totals
        order, taken = self._ranked(table.reshape(len(table), -1))
        slot, place = np.divmod(order, totals.shape[1])
        parents = np.minimum(firsts[:, None] + slot, self.num_rows - 1)
        words, scores = candidates.words[parents, place], totals[parents, place]
        ends = words == EOS_ID
        self._complete(taken & ends, parents, scores)
        return self._keep(taken & ~ends, parents, words, scores)

    def _ranked(self, totals: Floats) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Return each sentence's best candidates (B, W), and which of them its beam takes.

        A stable sort gives equal ones to the hypothesis further up, then to the smaller word id,
        since a row's words come in that order. Places that no hypothesis fills come last.
        """
        widths = self._size - self._num_complete[self._alive]
        per_row = totals.shape[1] // int(self._num_live.max())
        order = np.argsort(-totals, axis=1, kind="stable")[:, : int(widths.max())]
        limits = np.minimum(widths, self._num_live * per_row)
        return order, np.arange(order.shape[1]) < limits[:, None]

    def _complete(self, ending: npt.NDArray[np.bool_], rows: Ints, totals: Floats) -> None:
        """Note the candidates (B, W) that end, best first."""
        if not ending.any():
            return
        sentences = self._alive[:, None]
        places = (self._num_complete[sentences] + ending.cumsum(axis=1) - 1)[ending]
        index = (np.broadcast_to(sentences, ending.shape)[ending], places)
        divisor = length_divisor(len(self._steps) + 1, self._length_penalty)
        self._scores[index] = totals[ending] / divisor
        self._ended[index] = np.stack(
            [np.full(len(places), len(self._steps)), rows[ending]], axis=1
        )
        self._num_complete[self._alive] += ending.sum(axis=1)

    def _keep(
        self, going_on: npt.NDArray[np.bool_], rows: Ints, words: Ints, totals: Floats
    ) -> Ints:
        """Make rows of the candidates (B, W) that go on, but of sentences that are done."""
        best = totals[np.arange(len(totals)), going_on.argmax(axis=1)]
        going_on[self._cannot_improve(best)] = False
        num_live = going_on.sum(axis=1)
        parents = rows[going_on]
        self.last_words, self._totals = words[going_on], totals[going_on]
        self._steps.append((parents, self.last_words))
        self._alive, self._num_live = self._alive[num_live > 0], num_live[num_live > 0]
        return parents

    def _cannot_improve(self, best: Floats) -> npt.NDArray[np.bool_]:
        """Whether no partial hypothesis of a sentence (B,) can come to be among its n best.

        `best` is the greatest log-probability of one. They only fall, and the divisor is at most
        that of the greatest length.
        """
        scores = self._scores[self._alive]
        last = np.partition(scores, self._size - self._n_best, axis=1)[:, self._size - self._n_best]
        bounds: Floats = best / length_divisor(self._max_length + 1, self._length_penalty)
        return (self._num_complete[self._alive] >= self._n_best) & (bounds <= last)

    def _end(self, ends: Floats) -> Ints:
        """End every hypothesis, given the end symbol's log-probabilities (R,)."""
        sentences = np.repeat(np.arange(len(self._alive)), self._num_live)
        slots = np.arange(self.num_rows) - (np.cumsum(self._num_live) - self._num_live)[sentences]
        shape = (len(self._alive), int(self._num_live.max()))
        ending, rows, totals = np.zeros(shape, dtype=bool), np.zeros(shape, int), np.zeros(shape)
        ending[sentences, slots] = True
        rows[sentences, slots] = np.arange(self.num_rows)
        totals[sentences, slots] = self._totals + ends
        self._complete(ending, rows, totals)
        return self._keep(np.zeros(shape, dtype=bool), rows, rows, totals)

    def best(self) -> list[list[Hypothesis]]:
        """Return each sentence's best hypotheses, best first; of equal ones, what ended first."""
        order = np.argsort(-self._scores, axis=1, kind="stable")[:, : self._n_best]
        return [
            [self._hypothesis(sentence, place) for place in places[: self._num_complete[sentence]]]
            for sentence, places in enumerate(order)
        ]

    def _hypothesis(self, sentence: int, place: int) -> Hypothesis:
        step, row = self._ended[sentence, place]
        words = []
        for parents, last_words in reversed(self._steps[:step]):
            words.append(int(last_words[row]))
            row = parents[row]
        return Hypothesis(tuple(reversed(words)), float(self._scores[sentence, place]))


def _is_identity(rows: Ints, num_rows: int) -> bool:
    return len(rows) == num_rows and bool((rows == np.arange(num_rows)).all())
