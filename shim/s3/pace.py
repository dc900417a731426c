"""As many threads for a large object as its server is slow.

S3 gives a connection some 80 MB/s: there, as many threads as are allowed share an object. Where
bytes wait for the threads, and not the other way round, these share the processors, the interpreter
and the file, and each further one makes all of them slower.
"""

from __future__ import annotations

from collections.abc import Callable

from shim.http.connection import Response

WINDOW_BYTES = 2 << 20
QUEUE_BYTES = 64 << 10  # of less than this it is said that we waited for it


class Pace:
    """Receives a large body, and calls for help while the server is the slower one."""

    def __init__(
        self, response: Response, buffer: memoryview | None, call_for_help: Callable[[], None]
    ) -> None:
        self._response, self._buffer, self._call_for_help = response, buffer, call_for_help
        self._all = self._awaited = 0

    def receive(self, limit: int, into: memoryview | None = None) -> memoryview:
        """Return at most limit of the next bytes, valid until the next call; into: as above."""
        is_early = self._response.connection.unread_bytes() < QUEUE_BYTES
        piece = self._response.receive(limit, into or self._buffer)
        self._all += len(piece)
        self._awaited += len(piece) if is_early else 0
        if self._all >= WINDOW_BYTES:
            if self._awaited > self._all * 3 // 4:
                self._call_for_help()
            self._all = self._awaited = 0
        return piece
