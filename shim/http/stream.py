"""A connected socket that is never waited for longer than a stop or a time limit allows."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable

from shim.http.errors import Cancelled, TransportError

TICK_SECONDS = 1


class Wire:
    """The methods of a socket that a connection needs; before each the caller may cancel.

    No call blocks for more than a second: it raises BlockingIOError, and may be made again.
    """

    def __init__(self, sock: socket.socket, cancelled: Callable[[], bool]) -> None:
        self._sock, self.cancelled = sock, cancelled
        self.fileno, self.close, self.settimeout = sock.fileno, sock.close, sock.settimeout
        self._deadline = self._seconds = 0.0
        self._limited = ""
        self.set_tick()

    def set_tick(self) -> None:
        """Let the kernel keep the time: it saves a poll() a call, and allows MSG_WAITALL."""
        self._sock.settimeout(None)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", TICK_SECONDS, 0))

    def limit(self, seconds: float, name: str) -> None:
        """Allow what begins now so much time; name: of that, for messages."""
        self._deadline, self._seconds, self._limited = time.monotonic() + seconds, seconds, name

    def stop_limiting(self) -> None:
        """Allow any time again."""
        self._limited = ""

    def check(self) -> None:
        """Raise Cancelled after a stop, TransportError after the time limit."""
        if self.cancelled():
            raise Cancelled
        if self._limited and time.monotonic() > self._deadline:
            raise TransportError(f"{self._limited} took over {self._seconds:g} s")

    def recv_into(self, view: memoryview, nbytes: int = 0, flags: int = 0) -> int:
        """Receive as a socket does."""
        if self._limited or self.cancelled():
            self.check()
        return self._sock.recv_into(view, nbytes, flags)

    def send(self, view: memoryview) -> int:
        """Send as a socket does."""
        if self._limited or self.cancelled():
            self.check()
        return self._sock.send(view)
