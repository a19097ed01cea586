"""The rival of the decoding benchmark searches as we do, and so does the enlarged network."""

import itertools

import pytest
import torch

from benchmarks.rivals.decoding_models import enlarged
from benchmarks.rivals.decoding_rival import LstmTranslator, Options
from model.batching import make_batch
from model.beam_search import beam_search
from model.network import ModelConfig
from model.seq2seq import Seq2Seq
from model.vocabulary import EOS_ID

SOURCES = [[5, 3, 7, 7, 2, 9], [4, 8, 6], [2, 2, 3], [9]]
BEAM_SIZE, MAX_LENGTH = 4, 12


def network() -> Seq2Seq:
    config = ModelConfig(11, 23, num_layers=2, hidden_size=8, embedding_size=8, init_scale=1.0)
    model = Seq2Seq(config, seed=4)
    bias = model.parameters()["softmax.bias"]
    value = bias.value.clone()
    value[EOS_ID] += 1.7  # or no translation would end by itself
    bias.load(value)
    return model


def found_by(model: Seq2Seq) -> list[tuple[list[int], float]]:
    batch = make_batch([(source, ()) for source in SOURCES])
    best = beam_search(
        model, batch.source, batch.source_lengths, beam_size=BEAM_SIZE, max_length=MAX_LENGTH
    )
    return [(list(each.tokens), each.score) for [each] in best]


@pytest.mark.parametrize("switches", list(itertools.product([False, True], repeat=2)), ids=str)
def test_the_rival_finds_the_same_translations(switches: tuple[bool, bool]) -> None:
    model = network()
    tensors = {name: parameter.value for name, parameter in model.parameters().items()}
    rival = LstmTranslator(tensors, model.config.num_layers)
    sources = [[*reversed(source), EOS_ID] for source in SOURCES]
    found = rival.translate(sources, BEAM_SIZE, MAX_LENGTH, Options(True, *switches))
    expected = found_by(model)
    assert min(len(words) for words, _ in expected) > 0
    assert len({len(words) for words, _ in expected}) > 1
    assert [words for words, _ in found] == [words for words, _ in expected]
    for (_, score), (_, wanted) in zip(found, expected, strict=True):
        assert score == pytest.approx(wanted, rel=1e-4)


def test_the_enlarged_network_translates_as_the_small_one() -> None:
    small = network()
    large = enlarged(small, num_layers=3, hidden_size=16, num_words=40)
    assert torch.equal(
        large.parameters()["softmax.bias"].value[:23], small.parameters()["softmax.bias"].value
    )
    assert [words for words, _ in found_by(large)] == [words for words, _ in found_by(small)]
