"""Turns are taken in the order of their numbers, whatever the order in which threads come."""

import threading

import pytest

from cluster.turns import Turns


@pytest.mark.parametrize("arrivals", [[0, 1, 2], [2, 1, 0], [1, 2, 0]], ids=str)
def test_turns_are_taken_in_order_and_one_at_a_time(arrivals: list[int]) -> None:
    turns, events = Turns(), list[tuple[str, int]]()

    def call(number: int) -> None:
        with turns.take(number):
            events.append(("begin", number))
            events.append(("end", number))

    threads = [threading.Thread(target=call, args=(number,)) for number in arrivals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert events == [(event, number) for number in range(3) for event in ("begin", "end")]


def test_a_turn_that_fails_lets_the_next_one_begin() -> None:
    turns = Turns()
    with pytest.raises(ValueError, match="lost"), turns.take(0):
        raise ValueError("lost")
    with turns.take(1):
        pass
