"""One exchange with a server that may do anything."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from shim.loopback import Abandoned, BrokenAnswer, CannotConnect, exchange
from tests.support import free_port


@contextmanager
def serving(behave: Callable[[socket.socket], None]) -> Iterator[tuple[int, list[bytes]]]:
    """Accept one connection, read a request's head, then behave; yield the port and what came."""
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                received.append(connection.recv(65536))
                try:
                    behave(connection)
                except OSError:
                    pass  # the client has gone

        thread = threading.Thread(target=answer)
        thread.start()
        yield server.getsockname()[1], received
        thread.join()


def ask(port: int, **options: object) -> int:
    options = {"timeout_seconds": 5.0, "is_abandoned": lambda: False} | options
    return exchange("POST", "/invoke", port=port, **options)  # type: ignore[arg-type]


def send(*parts: bytes) -> Callable[[socket.socket], None]:
    def behave(connection: socket.socket) -> None:
        for part in parts:
            connection.sendall(part)

    return behave


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ([b"HTTP/1.1 201 Created\r\n\r\n"], 201),
        ([b"HTTP/1.0 200\r\nA: b\r\n\r\nbody"], 200),
        ([b"HTTP/1.1 500 Oh\n\n"], 500),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 201 Created\r\n\r\n"], 201),
        ([b"HTTP/1.1 103 Hints\r\nA: b\r\n\r\nHTTP/1.1 204 No\r\n\r\n"], 204),
        ([bytes([byte]) for byte in b"HTTP/1.1 302 Found\r\n\r\n"], 302),
    ],
    ids=["created", "with a body", "bare newlines", "continue", "hints", "byte by byte"],
)
def test_the_status_is_returned(answer: list[bytes], status: int) -> None:
    with serving(send(*answer)) as (port, _):
        assert status == ask(port)


def test_the_request_has_no_body() -> None:
    with serving(send(b"HTTP/1.1 201 Created\r\n\r\n")) as (port, received):
        ask(port)
    assert received[0].startswith(b"POST /invoke HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nContent-Length: 0\r\n" in received[0]


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 20", b"\x00\r\n\r\n", b"HTTP/2 200\r\n\r\n", b"A: " + b"x" * 100_000],
    ids=["nothing", "cut", "garbage", "version", "endless"],
)
def test_what_is_no_answer_is_told(answer: bytes) -> None:
    with serving(send(answer)) as (port, _), pytest.raises(BrokenAnswer):
        ask(port)


def test_nobody_there_is_told() -> None:
    with pytest.raises(CannotConnect):
        ask(free_port())


def test_a_server_that_drips_does_not_prolong_the_time_limit() -> None:
    def drip(connection: socket.socket) -> None:
        for _ in range(600):
            connection.sendall(b"x")
            time.sleep(0.02)

    began = time.monotonic()
    with serving(drip) as (port, _), pytest.raises(TimeoutError):
        ask(port, timeout_seconds=0.3)
    assert time.monotonic() - began < 5


def test_the_wait_is_given_up_when_nobody_needs_the_answer() -> None:
    release = threading.Event()
    with serving(lambda _: release.wait(10) and None) as (port, _):
        with pytest.raises(Abandoned):
            ask(port, timeout_seconds=None, is_abandoned=lambda: True)
        release.set()
