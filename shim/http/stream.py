"""A connected socket that is never waited for longer than a stop or a time limit allows."""

from __future__ import annotations

import math
import socket
import struct
import time
from collections.abc import Callable

from shim.http.errors import TransportError

TICK_SECONDS = 1.0
SLICE_SECONDS = 0.25  # of a wait in which nothing else would tell of a stop


def unchecked() -> None:
    """Let it go on."""


def pause(seconds: float, check: Callable[[], None], sleep: Callable[[float], None]) -> None:
    """Wait, unless the caller ends it before."""
    while seconds > 0:
        check()
        sleep(min(seconds, SLICE_SECONDS))
        seconds -= SLICE_SECONDS


class SocketStream:
    """The methods of a socket that a connection needs; before each the caller may end it.

    No call blocks for longer than a tick: it raises BlockingIOError, and may be made again.
    check(): raises what should end the wait; another may take its place.
    """

    def __init__(
        self,
        sock: socket.socket,
        check: Callable[[], None] = unchecked,
        *,
        tick_seconds: float = TICK_SECONDS,
    ) -> None:
        self._sock, self.check, self.tick_seconds = sock, check, tick_seconds
        self.fileno, self.close, self.settimeout = sock.fileno, sock.close, sock.settimeout
        self.stop_limiting()
        self.set_tick()

    def set_tick(self) -> None:
        """Let the kernel keep the time: it saves a poll() a call, and allows MSG_WAITALL."""
        self._sock.settimeout(None)
        seconds, rest = divmod(self.tick_seconds, 1)
        tick = struct.pack("ll", int(seconds), int(rest * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._sock.setsockopt(socket.SOL_SOCKET, option, tick)

    def limit(self, seconds: float, name: str) -> None:
        """Allow what begins now so much time; name: of that, for messages."""
        self._deadline = time.monotonic() + seconds
        self._too_late = f"{name} took over {seconds:g} s"

    def stop_limiting(self) -> None:
        """Allow any time again."""
        self._deadline = math.inf

    def recv_into(self, view: memoryview, nbytes: int = 0, flags: int = 0) -> int:
        """Receive as a socket does. TransportError after the time limit."""
        self._ask()
        return self._sock.recv_into(view, nbytes, flags)

    def send(self, view: memoryview) -> int:
        """Send as a socket does. TransportError after the time limit."""
        self._ask()
        return self._sock.send(view)

    def _ask(self) -> None:
        """Say whether it may go on, by raising what ends it."""
        self.check()
        if self._deadline < math.inf and time.monotonic() > self._deadline:
            raise TransportError(self._too_late)
