"""More threads where the server is slow, no more where it is not, over real sockets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from shim.http.connection import Connection, Response
from shim.http.stream import SocketStream
from shim.s3 import pace
from shim.s3.pace import Pace
from tests.support import poll

WINDOW = 64 << 10
SIZE = 8 * WINDOW


class Calls:
    """Receives a body, and counts the calls for help."""

    def __init__(self, sock: socket.socket) -> None:
        self.connection = Connection(SocketStream(sock))
        response = Response(
            self.connection, status=200, reason="OK", headers={}, length=SIZE, may_keep=True
        )
        self.count = 0
        self.receive = Pace(response, memoryview(bytearray(WINDOW // 8)), self.call).receive

    def call(self) -> None:
        self.count += 1

    def receive_all(self) -> bytes:
        received = b""
        while len(received) < SIZE:
            received += self.receive(SIZE - len(received))
        return received


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Calls, socket.socket]]:
    """Our end of a connection and the server's, which holds the whole body."""
    monkeypatch.setattr(pace, "WINDOW_BYTES", WINDOW)
    monkeypatch.setattr(pace, "QUEUE_BYTES", WINDOW // 8)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * SIZE)
        server = socket.create_connection(listener.getsockname())
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * SIZE)
        ours, _ = listener.accept()
        with server, ours:
            yield Calls(ours), server


def test_a_server_that_is_waited_for_has_help_called(pair: tuple[Calls, socket.socket]) -> None:
    calls, server = pair
    body = bytes(SIZE)

    def send() -> None:
        for start in range(0, SIZE, WINDOW // 16):
            server.sendall(body[start : start + WINDOW // 16])
            poll(lambda: not calls.connection.unread_bytes())

    thread = threading.Thread(target=send)
    thread.start()
    assert body == calls.receive_all()
    thread.join()
    assert SIZE // WINDOW == calls.count


def test_a_server_that_waits_for_us_has_no_help_called(pair: tuple[Calls, socket.socket]) -> None:
    calls, server = pair
    server.sendall(bytes(SIZE))
    poll(lambda: SIZE == calls.connection.unread_bytes())
    assert bytes(SIZE) == calls.receive_all()
    assert 0 == calls.count


def test_a_single_pause_is_not_slowness(pair: tuple[Calls, socket.socket]) -> None:
    calls, server = pair
    server.sendall(bytes(SIZE // 2))
    poll(lambda: SIZE // 2 == calls.connection.unread_bytes())
    thread = threading.Thread(
        target=lambda: (
            poll(lambda: not calls.connection.unread_bytes()),
            server.sendall(bytes(SIZE // 2)),
        )
    )
    thread.start()
    assert bytes(SIZE) == calls.receive_all()
    thread.join()
    assert calls.count <= 1
