"""Whose turn it is to compute, while the other threads of a crew wait for servers.

Threads that all want the interpreter pass it on at every system call, which costs as much as the
whole rest of a small transfer. So a thread goes on alone until it has to wait. This is a courtesy
and no lock: who does not get the turn soon goes on without it, and nothing may rely on it.
"""

from __future__ import annotations

import threading

PATIENCE_SECONDS = 0.01

_turn = threading.Lock()


class _Mine(threading.local):
    is_member = False
    has_turn = False


_mine = _Mine()


def join() -> None:
    """Make this thread one that takes turns."""
    _mine.is_member = True


def take() -> None:
    """Wait for the turn, not for long."""
    if _mine.is_member and not _mine.has_turn:
        _mine.has_turn = _turn.acquire(timeout=PATIENCE_SECONDS)


def give() -> bool:
    """Let another thread compute while this one waits; tell whether it was our turn."""
    had_turn = _mine.has_turn
    if had_turn:
        _mine.has_turn = False
        _turn.release()
    return had_turn
