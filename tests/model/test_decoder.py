"""The decoder's steps against those of the whole model."""

import pytest
import torch

from model.batching import make_batch
from model.decoder import Decoder
from model.precision import Precision
from model.seq2seq import DecoderState, ModelConfig, Seq2Seq
from tests.model.decoder_oracle import decode_step


def model_of(precision: str, peepholes: bool = False) -> Seq2Seq:
    config = ModelConfig(
        9, 20, num_layers=3, hidden_size=6, embedding_size=4, peepholes=peepholes, init_scale=0.8
    )
    return Seq2Seq(config, Precision(precision), seed=4)


@pytest.mark.parametrize("peepholes", [False, True])
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 0.1)]
)
def test_steps_and_moves_of_rows_are_those_of_the_model(
    precision: str, tolerance: float, peepholes: bool
) -> None:
    model = model_of(precision, peepholes)
    batch = make_batch([([3, 4, 2, 5], ()), ([5, 2], ())])
    state = model.encode(batch.source, batch.source_lengths)
    decoder = Decoder(model, max_rows=5)
    decoder.start(state)
    moves = [[0, 1, 1, 0, 0], [4, 0, 2], [0, 1, 2]]
    for words, move in zip([[1, 1], [7, 2, 9, 9, 3], [5, 5, 6]], moves, strict=True):
        expected, state = decode_step(model, torch.tensor(words), state)
        best = decoder.best_words(decoder.step(torch.tensor(words)), 20)
        found = torch.empty_like(best.values).scatter_(1, best.words, best.values)
        torch.testing.assert_close(found, expected.double(), rtol=0, atol=tolerance)
        for ours, theirs in (
            (decoder.state.hidden, state.hidden),
            (decoder.state.cell, state.cell),
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
        state = DecoderState(state.hidden[:, move], state.cell[:, move])
        decoder.select(torch.tensor(move))
        assert decoder.num_rows == len(move)
