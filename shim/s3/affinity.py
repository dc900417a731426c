"""Keep threads that move small objects on one processor.

The interpreter runs one thread at a time. Passing it to a thread on another processor, at every
system call of a small transfer, costs more than the transfer itself: on one processor twice as many
objects move in less than half the computing time. Large bodies are received, summed and encrypted
without the interpreter; a thread that has one may go wherever there is room.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress


class _Here(threading.local):
    is_kept = False


_here = _Here()


def current_processor() -> int:
    """Return the processor that this thread runs on, -1 where that cannot be told."""
    try:
        with open("/proc/thread-self/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[36])  # proc(5): field 39
    except (OSError, ValueError, IndexError):
        return -1


def keep_to(processor: int) -> None:
    """Run this thread there from now on, if the system allows it."""
    if not _here.is_kept and processor >= 0:
        with suppress(OSError):
            os.sched_setaffinity(0, {processor})
            _here.is_kept = True


def spread() -> None:
    """Let this thread run wherever the process may."""
    if _here.is_kept:
        with suppress(OSError):
            os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))
            _here.is_kept = False
