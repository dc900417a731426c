"""How many requests may be under way at once, by what the service says of it."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Throttle:
    """Lets in all requests, until the service throttles one of them.

    Then all wait, and half as many go on; each round of successes lets in one more.
    """

    def __init__(self, *, concurrency: int, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._most = self._limit = concurrency
        self._active = self._successes = 0
        self._resume_at = 0.0
        self._lock = threading.Lock()

    def try_enter(self) -> bool:
        """Begin a request, unless it is too early or others must end first."""
        with self._lock:
            if self._active >= self._limit or self._monotonic() < self._resume_at:
                return False
            self._active += 1
            return True

    def leave(self, *, is_success: bool) -> None:
        """End a request."""
        with self._lock:
            self._active -= 1
            if is_success and self._limit < self._most:
                self._successes += 1
                if self._successes >= self._limit:
                    self._limit, self._successes = self._limit + 1, 0

    def slow_down(self, seconds: float) -> None:
        """Let everything wait, then half as many go on."""
        with self._lock:
            now = self._monotonic()
            if now >= self._resume_at:  # the others of the same moment do not count again
                self._limit, self._successes = max(1, min(self._limit, self._active + 1) // 2), 0
            self._resume_at = max(self._resume_at, now + seconds)
