from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator

import pytest

from shim.contract.errors import TaskStopped
from shim.process.stopping import Stop


@pytest.fixture
def stop() -> Iterator[Stop]:
    stop = Stop()
    yield stop
    os.close(stop.fileno())


def is_readable(stop: Stop) -> bool:
    return bool(select.select([stop], [], [], 0)[0])


def test_nothing_is_requested_at_first(stop: Stop) -> None:
    stop.check()
    assert (False, None, 0, False) == (stop.requested, stop.signum, stop.count, is_readable(stop))


def test_the_first_signal_decides_and_all_are_counted(stop: Stop) -> None:
    stop.request(signal.SIGINT)
    stop.request(signal.SIGTERM)
    assert (True, signal.SIGINT, 2) == (stop.requested, stop.signum, stop.count)


def test_a_request_is_readable_by_everybody_and_for_ever(stop: Stop) -> None:
    stop.request(signal.SIGTERM)
    assert [True, True] == [is_readable(stop), is_readable(stop)]


def test_check_raises_after_a_request(stop: Stop) -> None:
    stop.request(signal.SIGTERM)
    with pytest.raises(TaskStopped) as caught:
        stop.check()
    assert "The task was stopped before it finished" == str(caught.value)


def test_a_signal_handler_ends_a_poll(stop: Stop) -> None:
    previous = signal.signal(signal.SIGUSR1, lambda signum, frame: stop.request(signum))
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert ([stop], [], []) == select.select([stop], [], [], 10)
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_the_descriptor_is_not_inherited(stop: Stop) -> None:
    assert not os.get_inheritable(stop.fileno())
