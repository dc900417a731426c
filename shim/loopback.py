"""One HTTP/1.1 exchange with the user's own server: a status, and nothing else of its answer.

The server is hostile: it may send garbage, one byte a minute, or nothing at all. So the exchange
waits for it and for what should end the wait in one place, and reads no more than the head.
It is always with 127.0.0.1 and never by way of a proxy.
"""

from __future__ import annotations

import re
import select
import socket
import time
from collections.abc import Callable

from shim.errors import ShimError

HOST = "127.0.0.1"
CONNECT_SECONDS = 5.0
MAX_HEAD_BYTES = 65_536
# How soon it is seen that nobody waits for the answer any more.
SLICE_SECONDS = 0.05

_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])(?: [^\r\n]*)?\r?\n")
_HEAD_END = re.compile(rb"\r?\n\r?\n")


class CannotConnect(ShimError):
    """Nobody listens on the port."""


class BrokenAnswer(ShimError):
    """What came back, if anything did, is not HTTP."""


class Abandoned(ShimError):
    """The wait was given up before an answer came."""


def exchange(
    method: str,
    path: str,
    *,
    port: int,
    timeout_seconds: float | None,
    is_abandoned: Callable[[], bool],
) -> int:
    """Send a request without a body and return the status of the answer.

    Raises TimeoutError, CannotConnect, BrokenAnswer, and Abandoned when is_abandoned() says so.
    """
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    try:
        connection = socket.create_connection((HOST, port), timeout=CONNECT_SECONDS)
    except OSError as error:
        raise CannotConnect(f"{HOST}:{port}: {error}") from error
    with connection:
        request = (
            f"{method} {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Length: 0\r\n"
            "Accept: */*\r\nConnection: close\r\n\r\n"
        )
        try:
            connection.sendall(request.encode("ascii"))
            return _read_status(connection, deadline, is_abandoned)
        except TimeoutError:
            raise
        except OSError as error:
            raise BrokenAnswer(f"the connection was lost: {error}") from error


def _read_status(
    connection: socket.socket, deadline: float | None, is_abandoned: Callable[[], bool]
) -> int:
    """Read heads up to one that is final: informational ones (1xx) may come before it."""
    received = b""
    while True:
        while not (end := _HEAD_END.search(received)):
            _await_bytes(connection, deadline, is_abandoned)
            data = connection.recv(MAX_HEAD_BYTES)
            if not data:
                raise BrokenAnswer("the connection was closed before an answer came")
            received += data
            if len(received) > MAX_HEAD_BYTES and not _HEAD_END.search(received):
                raise BrokenAnswer("the head of the answer is too long")
        status = _STATUS.match(received)
        if not status:
            raise BrokenAnswer(f"the answer is not HTTP: {received[:40]!r}")
        if status[1] >= b"200":
            return int(status[1])
        received = received[end.end() :]


def _await_bytes(
    connection: socket.socket, deadline: float | None, is_abandoned: Callable[[], bool]
) -> None:
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    while True:
        if is_abandoned() and not poller.poll(0):  # what has come already counts
            raise Abandoned
        if deadline is not None and time.monotonic() >= deadline:
            raise TimeoutError
        if poller.poll(SLICE_SECONDS * 1000):
            return
