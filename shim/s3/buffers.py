"""Buffers for large bodies: few, and used again, so that memory does not grow with the threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

LARGE_BYTES = 1 << 20
SMALL_BYTES = 64 << 10
LARGE_BUFFERS = 10

_large: list[memoryview] = []
_made = 0
_lock = threading.Lock()


@contextmanager
def borrow_buffer() -> Iterator[memoryview]:
    """Lend a large buffer; a small one of its own when all of those are lent."""
    global _made
    buffer = None
    with _lock:
        if _large:
            buffer = _large.pop()
        elif _made < LARGE_BUFFERS:
            _made += 1
            buffer = memoryview(bytearray(LARGE_BYTES))
    if buffer is None:
        yield memoryview(bytearray(SMALL_BYTES))
        return
    try:
        yield buffer
    finally:
        _large.append(buffer)
