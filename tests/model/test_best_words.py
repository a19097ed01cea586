"""The best words against a full table of log-probabilities, ties and odd sizes included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.best_words import CHUNK_WORDS, best_places, best_words
from model.vocabulary import EOS_ID


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([-1.0, -2.0, -3.0, -4.0]), min_size=6, max_size=6),
        min_size=1,
        max_size=4,
    ),
    repeats=st.sampled_from([1, 8, 800]),
    count=st.integers(1, 8),
)
def test_of_equal_values_the_first_ones_are_taken(
    rows: list[list[float]], repeats: int, count: int
) -> None:
    values = [row * repeats for row in rows]
    for row, places in zip(values, best_places(torch.tensor(values), count).tolist(), strict=True):
        expected = sorted(range(len(row)), key=lambda place: (-row[place], place))[:count]
        assert places == sorted(expected)


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("num_words", [5, 40, 320, CHUNK_WORDS + 7, 2 * CHUNK_WORDS + 960])
def test_best_words_are_those_of_the_whole_table(name: str, num_words: int) -> None:
    generator = torch.Generator().manual_seed(num_words)
    compute = getattr(torch, name)
    state = torch.float32 if name == "bfloat16" else compute
    outputs, weight = (
        torch.randn(size, 8, generator=generator).to(compute) for size in (20, num_words)
    )
    bias = torch.randn(num_words, generator=generator).to(compute)
    # The products are rounded to their format, where many are equal in bfloat16.
    logits = torch.addmm(bias, outputs, weight.t()).to(state)
    expected = torch.log_softmax(logits.double(), dim=1)
    for count in (1, 3, 12, 50):
        found = best_words(outputs, weight, bias, count, state)
        table = expected.sort(dim=1, descending=True, stable=True)
        assert torch.equal(found.words, table.indices[:, :count])
        torch.testing.assert_close(found.values, table.values[:, :count], rtol=0, atol=1e-5)
        torch.testing.assert_close(found.ends, expected[:, EOS_ID], rtol=0, atol=1e-5)


def test_a_logit_that_is_no_number_spoils_its_row_alone() -> None:
    outputs, weight = torch.ones(2, 1), torch.zeros(CHUNK_WORDS + 3, 1)
    outputs[1] = torch.nan
    found = best_words(outputs, weight, torch.zeros(len(weight)), 4, torch.float32)
    assert not found.values[0].isnan().any()
    assert found.values[1].isnan().all()
    assert found.ends.isnan().tolist() == [False, True]


@settings(max_examples=40, deadline=None)
@given(
    chunk_values=st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=4),
    peaks=st.dictionaries(st.integers(0, 3 * CHUNK_WORDS), st.sampled_from([1.0, 2.0, 3.0])),
    count=st.integers(1, 6),
)
def test_ties_over_several_chunks_go_to_the_first_words(
    chunk_values: list[float], peaks: dict[int, float], count: int
) -> None:
    """Whole chunks of equal logits, of which few or none can be among the best."""
    bias = torch.tensor(chunk_values).repeat_interleave(CHUNK_WORDS)
    for word, value in peaks.items():
        bias[word % len(bias)] = value
    found = best_words(torch.zeros(1, 1), torch.zeros(len(bias), 1), bias, count, torch.float32)
    expected = bias.sort(descending=True, stable=True).indices[:count]
    assert torch.equal(found.words[0], expected)
