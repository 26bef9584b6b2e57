"""SIGINT and SIGTERM: at once, after a chunk, or after a few renames."""

import os
import signal
import threading

import pytest

from streamt1_jax.interrupts import SIGNALS, Interrupts, uninterrupted


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_at_once(number):
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            send(number)
        assert interrupts.requested
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_one_waits_for_the_chunk_and_the_second_does_not(number):
    with Interrupts() as interrupts:
        with interrupts.deferred():
            assert not interrupts.requested
            send(number)
            assert interrupts.requested
            with pytest.raises(KeyboardInterrupt):
                send(number)
        with pytest.raises(KeyboardInterrupt):
            send(number)


@pytest.mark.parametrize("number", SIGNALS)
def test_renames_are_not_interrupted(number):
    done = []

    def work():
        with uninterrupted():
            send(number)
            send(number)
            done.append("renamed")

    with Interrupts(), pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["renamed"]


def test_other_threads_are_left_alone():
    failed = []

    def work():
        try:
            with Interrupts(), uninterrupted():
                pass
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
