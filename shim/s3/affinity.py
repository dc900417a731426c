"""Keep the threads that move small objects on one processor.

The interpreter runs one thread at a time. Passing it to a thread on another processor, at every
system call of a small transfer, costs more than the transfer itself: on one processor twice as many
objects move in half the computing time. Large bodies are received, summed and encrypted without the
interpreter; a thread that has one may go wherever there is room.

Rule 1: only threads that a crew has started are kept; no other thread is ever touched.
Rule 2: what such a thread starts inherits where it may run: before a program, it is spread.
Rule 3: a system that does not allow it costs speed and nothing else.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress


class Processors:
    """Where the thread that made this may run, and the one of these where it ran."""

    def __init__(self) -> None:
        self._all: set[int] = set()
        with suppress(OSError):
            self._all = os.sched_getaffinity(0)
        self._one = _current_processor()

    def keep(self) -> None:
        """Run this thread on the one, from now until it is spread."""
        if _kept.at is None and self._one in self._all:
            _kept.at = self
            _run_on({self._one})

    def spread(self) -> None:
        """Run this thread on any of them."""
        _kept.at = None
        _run_on(self._all)


class _Kept(threading.local):
    at: Processors | None = None


_kept = _Kept()


def spread() -> None:
    """Let this thread, if it was kept, run wherever it may."""
    if _kept.at:
        _kept.at.spread()


def _run_on(processors: set[int]) -> None:
    with suppress(OSError):
        os.sched_setaffinity(0, processors)


def _current_processor() -> int:
    """Return the processor that this thread runs on, -1 where that cannot be told."""
    try:
        with open("/proc/thread-self/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[36])  # proc(5): field 39
    except (OSError, ValueError, IndexError):
        return -1
