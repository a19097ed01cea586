"""The data order: every pair once an epoch, the same tail from any cursor, a fixed definition."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.data_order import BatchRows, Cursor, DataOrder, RowGroup

sizes = st.lists(st.integers(min_value=0, max_value=40), min_size=1, max_size=12)


def row_groups(group_sizes: list[int]) -> list[RowGroup]:
    return [RowGroup(at // 4, at % 4, size) for at, size in enumerate(group_sizes)]


def pair_of(batch: BatchRows, row: int) -> tuple[int, int, int]:
    for group in batch.row_groups:
        if row < group.num_rows:
            return group.file, group.index, row
        row -= group.num_rows
    raise AssertionError("a batch names a row behind its row groups")


def epoch_batches(order: DataOrder, epoch: int, first_batch: int = 0) -> list[BatchRows]:
    return [batch for window in order.windows(epoch, first_batch) for batch in window.batches]


@st.composite
def orders(draw: st.DrawFn) -> DataOrder:
    return DataOrder(
        row_groups(draw(sizes)),
        batch_size=draw(st.integers(min_value=1, max_value=50)),
        seed=draw(st.integers(min_value=0, max_value=2**40)),
        window=draw(st.integers(min_value=1, max_value=5)),
    )


@given(group_sizes=sizes, batch_size=st.integers(1, 50), epoch=st.integers(0, 9))
def test_every_pair_stands_in_one_batch_of_an_epoch(
    group_sizes: list[int], batch_size: int, epoch: int
) -> None:
    groups = row_groups(group_sizes)
    order = DataOrder(groups, batch_size=batch_size, seed=epoch, window=3)
    batches = epoch_batches(order, epoch)
    pairs = Counter(pair_of(batch, row) for batch in batches for row in batch.rows)
    assert pairs == Counter((g.file, g.index, row) for g in groups for row in range(g.num_rows))
    assert len(batches) == order.num_batches
    assert all(1 <= len(batch.rows) <= batch_size for batch in batches)
    assert [batch.cursor for batch in batches] == [Cursor(epoch, at) for at in range(len(batches))]


@given(order=orders(), epoch=st.integers(0, 9), where=st.floats(0, 1))
def test_a_resumed_epoch_is_the_tail_of_the_whole_one(
    order: DataOrder, epoch: int, where: float
) -> None:
    whole = epoch_batches(order, epoch)
    first = int(where * len(whole))
    assert epoch_batches(order, epoch, first) == whole[first:]


@given(order=orders(), epoch=st.integers(0, 9), where=st.floats(0, 1, exclude_max=True))
def test_any_batch_can_be_found_alone(order: DataOrder, epoch: int, where: float) -> None:
    whole = epoch_batches(order, epoch)
    if whole:
        expected = whole[int(where * len(whole))]
        assert order.batch(expected.cursor) == expected


def test_epochs_and_seeds_differ() -> None:
    groups = row_groups([64] * 10)
    first, other_seed = (DataOrder(groups, batch_size=8, seed=s, window=4) for s in (1, 2))
    rows = [[b.rows for b in epoch_batches(first, epoch)] for epoch in range(3)]
    rows.append([b.rows for b in epoch_batches(other_seed, 0)])
    assert len({str(order) for order in rows}) == 4


def test_full_row_groups_make_full_batches_of_neighbours_only() -> None:
    order = DataOrder(row_groups([64] * 10), batch_size=16, seed=3, window=4)
    batches = epoch_batches(order, 0)
    assert {len(batch.rows) for batch in batches} == {16}
    assert {len(batch.row_groups) for batch in batches} == {1}


def test_batches_larger_than_a_row_group_take_neighbours_together() -> None:
    groups = row_groups([64] * 10)
    batches = epoch_batches(DataOrder(groups, batch_size=128, seed=3, window=4), 0)
    assert {len(batch.rows) for batch in batches} == {128}
    at = {group: number for number, group in enumerate(groups)}
    assert all(at[b.row_groups[1]] == at[b.row_groups[0]] + 1 for b in batches)


def test_a_window_reads_no_more_row_groups_than_asked_and_mixes_their_batches() -> None:
    order = DataOrder(row_groups([64] * 12), batch_size=8, seed=3, window=4)
    windows = list(order.windows(0))
    assert [len(window.row_groups) for window in windows] == [4, 4, 4]
    groups = [batch.row_groups[0] for batch in windows[0].batches]
    assert groups != sorted(groups, key=groups.index)


def test_the_order_is_this_one_for_good() -> None:
    """Checkpoints rely on it: if this test fails, old cursors point at other pairs."""
    order = DataOrder(row_groups([4, 4, 3]), batch_size=2, seed=1, window=2)
    found = [(b.row_groups[0].index, b.rows) for b in epoch_batches(order, 0)]
    assert found == [(0, (3, 1)), (2, (1, 0)), (0, (0, 2)), (2, (2,)), (1, (2, 3)), (1, (1, 0))]


@pytest.mark.parametrize("first_batch", [6, 100])
def test_nothing_follows_the_last_batch(first_batch: int) -> None:
    order = DataOrder(row_groups([4, 4, 3]), batch_size=2, seed=1, window=2)
    assert list(order.windows(0, first_batch)) == []
