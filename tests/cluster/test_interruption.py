"""Signals become a flag."""

import os
import signal
import threading

import pytest

from cluster.interruption import Interrupted, watch_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noticed_at_the_next_check(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with watch_signals() as interruption:
        interruption.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match=number.name):
            interruption.check()
    assert signal.getsignal(number) is before


def test_a_second_signal_interrupts_at_once() -> None:
    with watch_signals() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGTERM"):
            interruption.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()


def test_other_threads_watch_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found: list[object] = []

    def run() -> None:
        with watch_signals() as interruption:
            interruption.check()
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]
