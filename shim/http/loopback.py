"""One HTTP/1.1 exchange with the user's own server: a status, once its answer has ended.

The server is hostile: it may send garbage, one byte a minute, or nothing at all. So one check ends
every wait for it, and nothing of its answer is kept but the status. It is always with 127.0.0.1 and
never by way of a proxy.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable

from shim.http.connection import Connection, Request
from shim.http.errors import TransportError
from shim.http.stream import SocketStream

HOST = "127.0.0.1"
CONNECT_SECONDS = 5.0
# How soon it is seen that nobody waits for the answer any more.
SLICE_SECONDS = 0.05
# How long what has come already may then still be read.
REST_SECONDS = 1.0


class CannotConnect(TransportError):
    """Nobody listens on the port."""


class TimedOut(TransportError):
    """The time limit of the exchange is over."""


class Abandoned(TransportError):
    """The wait was given up before the answer had ended."""


def exchange(
    method: str,
    path: str,
    *,
    port: int,
    timeout_seconds: float | None,
    is_abandoned: Callable[[], bool],
) -> int:
    """Send a request without a body; return the status of the answer once its last byte has come.

    - is_abandoned: looked at again and again; what has come already still counts

    Raises CannotConnect, TimedOut, Abandoned when is_abandoned() says so, and TransportError where
    what came back, if anything did, is not HTTP, or not all of it.
    """
    deadline = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
    try:
        sock = socket.create_connection((HOST, port), timeout=CONNECT_SECONDS)
    except OSError as error:
        raise CannotConnect(f"{HOST}:{port}: {error}") from error
    with sock:
        connection = Connection(SocketStream(sock, tick_seconds=SLICE_SECONDS), is_lenient=True)
        rest_until = math.inf

        def check() -> None:
            nonlocal rest_until
            now = time.monotonic()
            if now >= deadline:
                raise TimedOut
            if is_abandoned():
                rest_until = min(rest_until, now + REST_SECONDS)
                if now >= rest_until or not connection.is_readable():
                    raise Abandoned

        server = f"{HOST}:{port}"
        request = Request(
            method=method,
            scheme="http",
            host=HOST,
            port=port,
            target=path,
            headers={"Host": server, "Content-Length": "0", "Accept": "*/*", "Connection": "close"},
            read_seconds=math.inf,
            check=check,
        )
        response = connection.exchange(request, request.head())
        while response.receive():
            pass
        return response.status
