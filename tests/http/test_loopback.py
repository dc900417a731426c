"""One exchange with a server that may do anything."""

from __future__ import annotations

import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from shim.http.errors import TransportError
from shim.http.loopback import Abandoned, CannotConnect, TimedOut, exchange
from tests.support import free_port


@contextmanager
def broken(match: str | None = None) -> Iterator[None]:
    """Expect that the answer itself is at fault."""
    with pytest.raises(TransportError, match=match) as caught:
        yield
    assert not isinstance(caught.value, (Abandoned, CannotConnect, TimedOut))


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


CREATED = b"HTTP/1.1 201 Created\r\n"
CHUNKED = CREATED + b"Transfer-Encoding: chunked\r\n\r\n"
SIZED = CREATED + b"Content-Length: 10\r\n\r\n"

# The head with the beginning of a body, and its rest. Together they are a whole answer, which may
# end with the connection or before it.
WHOLE = {
    "length": (SIZED + b"01234", b"56789"),
    "length of megabytes": (
        CREATED + b"content-length:  9000000\r\n\r\n{",
        b"x" * 8_999_998 + b"}",
    ),
    "same length twice": (SIZED[:-2] + b"Content-Length: 10\r\n\r\n0", b"123456789"),
    "chunks": (CHUNKED + b"1\r\n \r\n", b"A;x=y\r\n0123456789\r\n0\r\n\r\n"),
    "chunks with trailers": (CHUNKED, b"0\r\nA: b\r\nC: d\r\n\r\n"),
    "chunks, whatever the length": (SIZED[:-2] + CHUNKED[22:] + b"1", b"\r\na\r\n0\r\n\r\n"),
    "bare newlines": (CHUNKED.replace(b"\r", b"") + b"1\n", b"a\n0\n\n"),
    "an error with a text": (
        b"HTTP/1.1 500 Oh\r\nContent-Length: 9\r\n\r\nTrace",
        b"back",
    ),
    "after informational ones": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nA: b\r\n\r\n" + SIZED,
        b"0123456789",
    ),
}
TO_THE_CLOSE = {
    "until the close": (CREATED + b"\r\nhello", b" again"),
    "HTTP/1.0": (b"HTTP/1.0 201 Created\r\nContent-Type: text/plain\r\n\r\n", b"x" * 100_000),
    "another coding": (CREATED + b"Transfer-Encoding: gzip\r\n\r\n", b"\x1f\x8b"),
}


@pytest.mark.parametrize(
    "parts", [*WHOLE.values(), *TO_THE_CLOSE.values()], ids=[*WHOLE, *TO_THE_CLOSE]
)
def test_an_answer_ends_with_its_last_byte(parts: tuple[bytes, bytes]) -> None:
    worked: list[float] = []

    def work(connection: socket.socket) -> None:
        connection.sendall(parts[0])
        time.sleep(0.3)
        worked.append(time.monotonic())
        connection.sendall(parts[1])

    with serving(work) as (port, _):
        assert ask(port) == (500 if b" 500 " in parts[0] else 201)
        assert worked and worked[0] <= time.monotonic()


@pytest.mark.parametrize(
    "answer",
    [b"".join(parts) for parts in WHOLE.values()]
    + [b"HTTP/1.1 204 No\r\n\r\n", b"HTTP/1.1 304 Same\r\nContent-Length: 9\r\n\r\n"],
    ids=[*WHOLE, "204", "304"],
)  # fmt: skip
def test_a_connection_that_stays_open_is_not_waited_for(answer: bytes) -> None:
    release = threading.Event()

    def stay(connection: socket.socket) -> None:
        connection.sendall(answer)
        release.wait(10)

    with serving(stay) as (port, _):
        began = time.monotonic()
        assert ask(port, timeout_seconds=8) in (201, 204, 304, 500)
        assert time.monotonic() - began < 5
        release.set()


@pytest.mark.parametrize(
    "answer",
    [
        SIZED + b"012345678",
        SIZED,
        CHUNKED,
        CHUNKED + b"5\r\nabc",
        CHUNKED + b"3\r\nabc",
        CHUNKED + b"3\r\nabc\r\n",
        CHUNKED + b"3\r\nabc\r\n0\r\n",
        CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n",
        CHUNKED + b"x\r\n",
        CHUNKED + b"-1\r\n",
        CHUNKED + b"1" * 100_000,
        CHUNKED + b"0\r\n" + b"A: b\r\n" * 100_000,
        CREATED + b"Content-Length: x\r\n\r\n",
        CREATED + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 500 Oh\r\nContent-Length: 9\r\n\r\nTrace",
        b"HTTP/1.1 100 Continue\r\n\r\n",
    ],
)
def test_an_answer_that_breaks_off_is_broken(answer: bytes) -> None:
    with serving(send(answer)) as (port, _), broken():
        ask(port)


def test_a_reset_in_the_middle_is_a_broken_answer() -> None:
    def reset(connection: socket.socket) -> None:
        connection.sendall(CREATED + b"\r\nhello")
        time.sleep(0.2)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with serving(reset) as (port, _), broken(match="connection was lost"):
        ask(port)


ENDLESS = {
    "chunks": (CHUNKED, b"1\r\na\r\n"),
    "a length": (CREATED + b"Content-Length: 9999999999999999999\r\n\r\n", b"x" * 65_536),
    "until the close": (CREATED + b"\r\n", b"x"),
    "informational": (b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
}


def send_for_ever(head: bytes, part: bytes) -> Callable[[socket.socket], None]:
    def behave(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(part * (65_536 // len(part)))

    return behave


@pytest.mark.parametrize("parts", ENDLESS.values(), ids=ENDLESS)
def test_the_time_limit_covers_the_body_in_bounded_memory(parts: tuple[bytes, bytes]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    with serving(send_for_ever(*parts)) as (port, _), pytest.raises(TimedOut):
        ask(port, timeout_seconds=0.5)
    assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024


@pytest.mark.parametrize("parts", ENDLESS.values(), ids=ENDLESS)
def test_a_body_without_end_does_not_keep_who_gives_up(parts: tuple[bytes, bytes]) -> None:
    began = time.monotonic()
    with serving(send_for_ever(*parts)) as (port, _), pytest.raises(Abandoned):
        ask(port, timeout_seconds=None, is_abandoned=lambda: time.monotonic() > began + 0.3)
    assert time.monotonic() - began < 5


def test_what_has_come_counts_although_nobody_waits_any_more() -> None:
    sent = threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.sendall(SIZED + b"0123456789")
        sent.set()

    with serving(answer) as (port, _):
        asked = iter([False])  # the first time before the request
        assert 201 == ask(port, is_abandoned=lambda: next(asked, True) and sent.wait(5))


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
    with serving(send(answer)) as (port, _), broken():
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
    with serving(drip) as (port, _), pytest.raises(TimedOut):
        ask(port, timeout_seconds=0.3)
    assert time.monotonic() - began < 5


def test_the_wait_is_given_up_when_nobody_needs_the_answer() -> None:
    release = threading.Event()
    with serving(lambda _: release.wait(10) and None) as (port, _):
        with pytest.raises(Abandoned):
            ask(port, timeout_seconds=None, is_abandoned=lambda: True)
        release.set()
