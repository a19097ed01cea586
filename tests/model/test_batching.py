"""Batches: order, reversal, padding, microbatches and time chunks."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.batching import ChunkSize, even_bounds, length_order, make_batch
from model.vocabulary import EOS_ID
from tests.batches import random_batch, random_pairs


def test_source_is_reversed_and_both_sides_end_in_the_end_symbol() -> None:
    batch = make_batch([([5, 6], [7]), ([2, 3, 4], [8, 9])])
    assert batch.source.tolist() == [[4, 3, 2, EOS_ID], [6, 5, EOS_ID, EOS_ID]]
    assert batch.target.tolist() == [[8, 9, EOS_ID], [7, EOS_ID, EOS_ID]]
    assert batch.source_lengths.tolist() == [4, 3]
    assert batch.target_lengths.tolist() == [3, 2]
    assert (batch.num_words, batch.num_target_tokens) == (12, 5)
    assert batch.num_positions == 14


def test_forward_source_keeps_the_words_order() -> None:
    assert make_batch([([2, 3, 4], [5])], reverse_source=False).source.tolist() == [
        [2, 3, 4, EOS_ID]
    ]


def test_decoder_reads_the_word_before_each_target() -> None:
    chunk = make_batch([([5], [7, 8])]).target_chunk(0, 3)
    assert chunk.tokens.tolist() == [EOS_ID, 7, 8]
    assert chunk.targets is not None
    assert chunk.targets.tolist() == [7, 8, EOS_ID]


def test_a_target_side_is_packed_longest_first_and_tells_its_order() -> None:
    batch = make_batch([([2, 3, 4], [5]), ([6, 7], [8, 9, 10]), ([6], [11])])
    whole = batch.target_chunk(0, batch.target_positions)
    assert whole.order is not None
    assert whole.order.tolist() == [1, 0, 2]
    assert whole.active == (3, 3, 1, 1)
    assert whole.tokens.tolist() == [EOS_ID, EOS_ID, EOS_ID, 8, 5, 11, 9, 10]
    assert whole.targets is not None
    assert whole.targets.tolist() == [8, 5, 11, 9, EOS_ID, EOS_ID, 10, EOS_ID]
    assert whole.size == ChunkSize(4, 3, 8)
    rest = batch.target_chunk(2, 4)
    assert rest.order is None
    assert rest.tokens.tolist() == whole.part(2, 4).tokens.tolist() == [9, 10]


@given(st.integers(0, 50), st.integers(1, 60))
def test_even_bounds_cover_everything_once(length: int, num_parts: int) -> None:
    bounds = even_bounds(length, num_parts)
    assert [index for start, stop in bounds for index in range(start, stop)] == list(range(length))
    sizes = [stop - start for start, stop in bounds]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_microbatches_and_chunks_put_together_are_the_batch(
    num_pairs: int, num_microbatches: int, num_chunks: int, seed: int
) -> None:
    batch = random_batch(num_pairs, seed=seed)
    parts = batch.split(num_microbatches)
    assert torch.equal(torch.cat([part.source for part in parts]), batch.source)
    for part in parts:
        chunks = [
            part.source_chunk(start, stop)
            for start, stop in even_bounds(batch.source_positions, num_chunks)
        ]
        whole = part.source_chunk(0, batch.source_positions)
        assert torch.equal(torch.cat([chunk.tokens for chunk in chunks]), whole.tokens)
        active = [count for chunk in chunks for count in chunk.active]
        assert sum(active) == int(part.source_lengths.sum())
        assert sorted(active, reverse=True) == active
        for row, length in enumerate(part.source_lengths.tolist()):
            packed = [sum(active[:position]) + row for position in range(length)]
            assert torch.equal(whole.tokens[packed], part.source[row, :length])


def test_length_order_names_the_pair_of_each_row() -> None:
    pairs = random_pairs(9, source_words=11, target_words=13)
    batch = make_batch(pairs, reverse_source=False)
    for row, index in enumerate(length_order(pairs)):
        length = int(batch.source_lengths[row]) - 1
        assert batch.source[row, :length].tolist() == pairs[index][0]


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 50))
def test_shares_hold_every_sentence_once_without_padding_of_others(
    num_pairs: int, num_replicas: int, seed: int
) -> None:
    batch = random_batch(num_pairs, seed=seed)
    shares = [batch.share(replica, num_replicas) for replica in range(num_replicas)]
    sizes = [share.num_sentences for share in shares]
    assert sizes == [stop - start for start, stop in even_bounds(num_pairs, num_replicas)]
    assert sum(share.num_words for share in shares) == batch.num_words
    for replica, share in enumerate(shares):
        rows = range(replica, num_pairs, num_replicas)
        for own, row in zip(range(share.num_sentences), rows, strict=True):
            length = int(batch.source_lengths[row])
            assert share.source_lengths[own] == length
            assert torch.equal(share.source[own, :length], batch.source[row, :length])
            length = int(batch.target_lengths[row])
            assert share.target_lengths[own] == length
            assert torch.equal(share.target[own, :length], batch.target[row, :length])
        assert share.source_lengths.tolist() == sorted(share.source_lengths.tolist(), reverse=True)
        assert share.source_positions == max(share.source_lengths.tolist(), default=0)
        assert share.target_positions == max(share.target_lengths.tolist(), default=0)
