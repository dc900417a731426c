"""Our TLS against the standard library's, over real sockets with little room."""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from shim.http.tls import TlsStream
from tests.s3_servers import make_certificate

DATA = os.urandom(3 << 20)
Serve = Callable[[Callable[[ssl.SSLSocket], Any]], tuple[socket.socket, "Future[Any]"]]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def trusting(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificate[0])


@pytest.fixture(params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def serve(request: pytest.FixtureRequest, certificate: tuple[Path, Path]) -> Iterator[Serve]:
    """A function that starts a server for one connection; returns our end and its outcome."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.minimum_version = context.maximum_version = request.param
    with ExitStack() as stack:

        def start(act: Callable[[ssl.SSLSocket], Any]) -> tuple[socket.socket, Future[Any]]:
            ours, theirs = socket.socketpair()
            for end in (ours, theirs):
                stack.callback(end.close)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            outcome: Future[Any] = Future()

            def run() -> None:
                try:
                    with context.wrap_socket(theirs, server_side=True) as connection:
                        outcome.set_result(act(connection))
                except Exception as error:
                    outcome.set_exception(error)

            thread = threading.Thread(target=run)
            thread.start()
            stack.callback(thread.join)
            stack.callback(ours.close)
            return ours, outcome

        yield start


def shake_hands(ours: socket.socket, context: ssl.SSLContext) -> TlsStream:
    stream = TlsStream(ours, context, "127.0.0.1")  # type: ignore[arg-type]
    stream.shake_hands()
    return stream


def receive_all(stream: TlsStream, size: int = 1 << 16) -> bytes:
    buffer, parts = memoryview(bytearray(size)), []
    while received := stream.recv_into(buffer):
        parts.append(bytes(buffer[:received]))
    return b"".join(parts)


@pytest.mark.parametrize("size", [1, 100, 20_000, 1 << 20])
def test_receives_all_whatever_the_room(serve: Serve, trusting: ssl.SSLContext, size: int) -> None:
    sent = DATA[: 20_000 if size == 1 else len(DATA)]
    ours, _ = serve(lambda connection: connection.sendall(sent))
    assert sent == receive_all(shake_hands(ours, trusting), size)


def test_sends_all_through_time_outs(serve: Serve, trusting: ssl.SSLContext) -> None:
    """The time-outs come while the server has read nothing yet."""
    timed_out = threading.Event()

    def read_late(connection: ssl.SSLSocket) -> bytes:
        assert timed_out.wait(10)
        received = b""
        while len(received) < len(DATA):
            received += connection.recv(1 << 16)
        connection.sendall(b"thanks")
        return received

    ours, outcome = serve(read_late)
    stream = shake_hands(ours, trusting)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 10_000))
    view = memoryview(DATA)
    while view:
        try:
            view = view[stream.send(view) :]
        except BlockingIOError:
            timed_out.set()
    assert timed_out.is_set()
    assert DATA == outcome.result(10)
    assert b"thanks" == receive_all(stream)


def test_who_stops_listening_is_heard(serve: Serve, trusting: ssl.SSLContext) -> None:
    """As of a bucket that refuses a body before it has all of it."""
    ours, outcome = serve(lambda connection: connection.sendall(b"refused"))
    stream = shake_hands(ours, trusting)
    outcome.result(10)
    with pytest.raises(OSError):  # noqa: B017 - whichever the kernel names
        while True:
            stream.send(memoryview(DATA))
    assert b"refused" == receive_all(stream)


def test_a_time_out_while_receiving_loses_nothing(serve: Serve, trusting: ssl.SSLContext) -> None:
    timed_out = threading.Event()

    def pause(connection: ssl.SSLSocket) -> None:
        connection.sendall(b"first")
        assert timed_out.wait(10)
        connection.sendall(b"second")

    ours, _ = serve(pause)
    stream = shake_hands(ours, trusting)
    buffer = memoryview(bytearray(100))
    assert b"first" == bytes(buffer[: stream.recv_into(buffer)])
    ours.settimeout(0.01)
    with pytest.raises(TimeoutError):
        stream.recv_into(buffer)
    timed_out.set()
    ours.settimeout(10)
    assert b"second" == receive_all(stream)


def test_what_is_received_and_not_taken_is_told(serve: Serve, trusting: ssl.SSLContext) -> None:
    ours, _ = serve(lambda connection: connection.sendall(b"two parts"))
    stream = shake_hands(ours, trusting)
    buffer = memoryview(bytearray(4))
    assert 4 == stream.recv_into(buffer)
    assert stream.holds_data()
    assert b"parts" == receive_all(stream)
    assert not stream.holds_data()


@pytest.mark.parametrize("is_announced", [True, False])
def test_an_end_is_an_end(serve: Serve, trusting: ssl.SSLContext, is_announced: bool) -> None:
    def leave(connection: ssl.SSLSocket) -> None:
        connection.sendall(b"last words")
        with suppress(OSError):
            if is_announced:
                connection.settimeout(0.2)
                connection.unwrap()

    ours, outcome = serve(leave)
    stream = shake_hands(ours, trusting)
    assert b"last words" == receive_all(stream)
    assert 0 == stream.recv_into(memoryview(bytearray(9)))
    outcome.result(10)


def test_a_server_that_is_not_trusted_is_told_so(serve: Serve) -> None:
    ours, outcome = serve(lambda connection: connection.recv(1))
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(ours, ssl.create_default_context())
    with pytest.raises(ssl.SSLError, match="unknown ca"):
        outcome.result(10)


def test_a_server_that_leaves_at_once_is_an_error(trusting: ssl.SSLContext) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(ssl.SSLEOFError, match="closed the connection"):
            shake_hands(ours, trusting)
        assert select.select([theirs], [], [], 0)[0]  # the greeting
        theirs.close()
