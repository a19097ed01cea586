"""Reading ahead in a thread keeps order, bounds and errors."""

import threading
from collections.abc import Iterator

import pytest

from cluster.ingest.prefetch import Prefetch


def test_items_come_in_order_and_end() -> None:
    assert list(Prefetch(iter(range(50)), depth=3)) == list(range(50))


def test_an_error_of_the_source_comes_after_the_items_before_it() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise ValueError("broken shard")

    prefetch = Prefetch(source(), depth=3)
    assert next(prefetch) == 1
    with pytest.raises(ValueError, match="broken shard"):
        next(prefetch)
    assert list(prefetch) == []


def test_no_more_than_its_depth_is_read_ahead_and_close_ends_it() -> None:
    made: list[int] = []
    ahead = threading.Event()

    def source() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            if number == 2:
                ahead.set()
            yield number

    prefetch = Prefetch(source(), depth=2)
    assert ahead.wait(10)
    prefetch.close()
    assert prefetch.join(10)
    assert len(made) == 3
    assert list(prefetch) == []
