"""Beam search against enumeration of all sequences, an argmax loop, and a plain reference."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.batching import make_batch
from model.beam_search import (
    BeamSearchError,
    Hypothesis,
    beam_search,
    length_divisor,
)
from model.decoder import Decoder
from model.precision import Precision
from model.seq2seq import DecoderState, ModelConfig, Seq2Seq
from model.vocabulary import EOS_ID
from tests.model.decoder_oracle import decode_step

SOURCES = [[3, 4, 2, 5], [5, 5, 2], [4, 0], [2], []]


def tiny_model(seed: int, num_words: int = 5, scale: float = 2.0) -> Seq2Seq:
    config = ModelConfig(
        6, num_words, num_layers=2, hidden_size=4, embedding_size=3, init_scale=scale
    )
    return Seq2Seq(config, Precision("float64"), seed=seed)


def search(
    model: Seq2Seq,
    sources: list[list[int]],
    beam_size: int,
    max_length: int,
    length_penalty: float = 0.0,
    n_best: int = 1,
) -> list[list[Hypothesis]]:
    batch = make_batch([(source, ()) for source in sources])
    return beam_search(
        model,
        batch.source,
        batch.source_lengths,
        beam_size=beam_size,
        max_length=max_length,
        length_penalty=length_penalty,
        n_best=n_best,
    )


def start(model: Seq2Seq, source: list[int]) -> DecoderState:
    batch = make_batch([(source, ())])
    return model.encode(batch.source, batch.source_lengths)


def next_words(model: Seq2Seq, word: int, state: DecoderState) -> tuple[list[float], DecoderState]:
    log_probabilities, state = decode_step(model, torch.tensor([word]), state)
    return log_probabilities[0].tolist(), state


def sequence_log_probability(model: Seq2Seq, source: list[int], words: tuple[int, ...]) -> float:
    return -model.loss(make_batch([(source, words)])).total


def all_sequences(
    model: Seq2Seq, state: DecoderState, max_length: int, prefix: tuple[int, ...] = ()
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Yield every sequence behind a prefix, with the log-probability of the words behind it."""
    values, state = next_words(model, (prefix or (EOS_ID,))[-1], state)
    yield prefix, values[EOS_ID]
    for word, value in enumerate(values):
        if word != EOS_ID and len(prefix) < max_length:
            for words, rest in all_sequences(model, state, max_length, (*prefix, word)):
                yield words, value + rest


def reference_beam_search(
    model: Seq2Seq, source: list[int], beam_size: int, max_length: int, length_penalty: float
) -> list[Hypothesis]:
    """Search as the paper describes it, one hypothesis after the other, without early stopping."""
    beam: list[tuple[tuple[int, ...], float, DecoderState]] = [((), 0.0, start(model, source))]
    complete: list[Hypothesis] = []
    while beam:
        candidates = []
        for words, score, state in beam:
            values, new_state = next_words(model, (words or (EOS_ID,))[-1], state)
            for word, value in enumerate(values):
                if len(words) < max_length or word == EOS_ID:
                    candidates.append((words, word, score + value, new_state))
        candidates.sort(key=lambda candidate: -candidate[2])
        beam = []
        for words, word, score, new_state in candidates[: beam_size - len(complete)]:
            if word == EOS_ID:
                divisor = ((5 + len(words) + 1) / 6) ** length_penalty
                complete.append(Hypothesis(words, score / divisor))
            else:
                beam.append(((*words, word), score, new_state))
        beam = beam[: beam_size - len(complete)]
    return sorted(complete, key=lambda hypothesis: -hypothesis.score)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_wide_beam_finds_the_best_of_all_sequences(seed: int, length_penalty: float) -> None:
    model = tiny_model(seed)
    source = SOURCES[seed]
    scored = [
        (total / length_divisor(len(words) + 1, length_penalty), words)
        for words, total in all_sequences(model, start(model, source), 4)
    ]
    assert len(scored) == 1 + 4 + 16 + 64 + 256
    expected = sorted(scored, reverse=True)[:20]
    [found] = search(model, [source], 1000, 4, length_penalty, n_best=20)
    assert [hypothesis.tokens for hypothesis in found] == [words for _, words in expected]
    assert [h.score for h in found] == pytest.approx([score for score, _ in expected], abs=1e-10)


@pytest.mark.parametrize("seed", range(1, 7))
def test_greedy_search_is_an_argmax_at_every_step(seed: int) -> None:
    model = tiny_model(seed, num_words=9)
    for source, [found] in zip(SOURCES, search(model, SOURCES, 1, 12), strict=True):
        words: list[int] = []
        state, total = start(model, source), 0.0
        while True:
            values, state = next_words(model, words[-1] if words else EOS_ID, state)
            best = EOS_ID if len(words) == 12 else values.index(max(values))
            total += values[best]
            if best == EOS_ID:
                break
            words.append(best)
        assert found.tokens == tuple(words)
        assert found.score == pytest.approx(total, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(1, 10_000),
    beam_size=st.integers(1, 7),
    max_length=st.integers(1, 6),
    length_penalty=st.sampled_from([0.0, 0.6, 1.0, 3.0]),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
)
def test_every_beam_equals_the_plain_reference(
    seed: int, beam_size: int, max_length: int, length_penalty: float, scale: float
) -> None:
    model = tiny_model(seed, scale=scale)
    for n_best in {1, beam_size}:
        found = search(model, SOURCES[:3], beam_size, max_length, length_penalty, n_best)
        for source, hypotheses in zip(SOURCES[:3], found, strict=True):
            expected = reference_beam_search(model, source, beam_size, max_length, length_penalty)
            expected = expected[:n_best]
            assert [h.tokens for h in hypotheses] == [h.tokens for h in expected]
            scores = [h.score for h in expected]
            assert [h.score for h in hypotheses] == pytest.approx(scores, abs=1e-10)


@pytest.mark.parametrize("beam_size", [1, 3, 12])
def test_a_sentence_has_the_same_translations_alone_and_among_others(beam_size: int) -> None:
    model = tiny_model(11, num_words=30, scale=1.0)
    together = search(model, SOURCES, beam_size, 9, n_best=beam_size)
    for source, found in zip(SOURCES, together, strict=True):
        [alone] = search(model, [source], beam_size, 9, n_best=beam_size)
        assert [h.tokens for h in found] == [h.tokens for h in alone]
        assert [h.score for h in found] == pytest.approx([h.score for h in alone], abs=1e-12)


def test_scores_are_the_models_probabilities_of_whole_sequences() -> None:
    model = tiny_model(5, num_words=20, scale=0.8)
    for source, found in zip(SOURCES, search(model, SOURCES, 4, 3, n_best=4), strict=True):
        for hypothesis in found:
            expected = sequence_log_probability(model, source, hypothesis.tokens)
            assert hypothesis.score == pytest.approx(expected, abs=1e-10)
            assert EOS_ID not in hypothesis.tokens
            assert len(hypothesis.tokens) <= 3


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(1, 10_000), beam_size=st.integers(1, 12))
def test_the_n_best_are_sorted_and_distinct(seed: int, beam_size: int) -> None:
    for found in search(tiny_model(seed), SOURCES, beam_size, 5, n_best=beam_size):
        scores = [hypothesis.score for hypothesis in found]
        assert scores == sorted(scores, reverse=True)
        assert len({hypothesis.tokens for hypothesis in found}) == len(found) >= 1


def test_equal_scores_go_to_the_smaller_word_and_the_earlier_end() -> None:
    model = tiny_model(1, num_words=40, scale=0.0)
    [found] = search(model, [[3]], 4, 2, n_best=4)
    # All words have probability 1/40, so the end symbol is among the first four at once.
    assert found[0].tokens == ()
    assert [h.tokens for h in found[1:]] == [(0,), (0, 0), (0, 2)]


def test_finished_hypotheses_and_sentences_take_no_more_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Seq2Seq(
        ModelConfig(6, 30, num_layers=1, hidden_size=4, embedding_size=3, init_scale=2.0),
        Precision("float64"),
        seed=3,
    )
    # Likely enough that hypotheses end one after the other.
    model.parameters()["softmax.bias"].value[EOS_ID] = 1.0
    rows: list[int] = []
    step = Decoder.step

    def counting_step(decoder: Decoder, words: Tensor) -> Tensor:
        rows.append(len(words))
        return step(decoder, words)

    monkeypatch.setattr(Decoder, "step", counting_step)
    search(model, SOURCES, 6, 50, n_best=6)
    assert rows[0] == len(SOURCES)
    assert max(rows) <= 6 * len(SOURCES)
    assert rows[1:] == sorted(rows[1:], reverse=True)
    assert rows[-1] < rows[1]
    num_rows_for_all = sum(rows)
    rows.clear()
    search(model, SOURCES, 6, 50, n_best=1)
    assert sum(rows) < num_rows_for_all


def test_nothing_to_translate_gives_nothing() -> None:
    assert search(tiny_model(1), [], 4, 5) == []


def test_bfloat16_ties_are_decided_alike_alone_and_among_others() -> None:
    config = ModelConfig(6, 300, num_layers=1, hidden_size=8, embedding_size=8)
    model = Seq2Seq(config, Precision("bfloat16"), seed=2)
    alone = [search(model, [source], 5, 6, n_best=5)[0] for source in SOURCES]
    together = search(model, SOURCES, 5, 6, n_best=5)
    assert [[h.tokens for h in found] for found in together] == [
        [h.tokens for h in found] for found in alone
    ]
    assert all(len(found) == 5 for found in together)


@pytest.mark.parametrize(
    "options",
    [
        {"beam_size": 0},
        {"beam_size": 10_000_000},
        {"max_length": 0},
        {"max_length": 10**9},
        {"n_best": 3},
        {"n_best": 0},
        {"length_penalty": -1.0},
        {"length_penalty": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, float]) -> None:
    batch = make_batch([([2], ())])
    given_options = {"beam_size": 2, "max_length": 5, **options}
    with pytest.raises(BeamSearchError, match=next(iter(options))):
        beam_search(tiny_model(1), batch.source, batch.source_lengths, **given_options)  # type: ignore[arg-type]


@pytest.mark.parametrize("max_length", [1, 5])
def test_a_diverged_model_is_reported(max_length: int) -> None:
    model = tiny_model(1)
    model.parameters()["softmax.bias"].value.fill_(float("nan"))
    with pytest.raises(BeamSearchError, match="diverged"):
        search(model, SOURCES, 2, max_length)
