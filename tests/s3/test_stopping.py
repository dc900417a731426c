"""A stop is heard at once, whatever a server does or leaves undone: over real sockets."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from shim.http.errors import TransportError
from shim.s3 import download, upload
from tests.fakes.s3_double import Exchange, Object
from tests.s3_clients import Harness, Stopped, build_harness, running_double, stopping
from tests.s3_servers import make_certificate

STOP_AFTER_SECONDS = 0.3
HEARD_SECONDS = 3.0
OK = b"HTTP/1.1 200 OK\r\n"
Act = Callable[[socket.socket], None]


def trickle(begin: bytes, again: bytes) -> Act:
    """Answer a request, and never come to an end."""

    def act(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(begin)
        while True:
            connection.sendall(again)
            time.sleep(0.02)

    return act


def take_slowly(connection: socket.socket) -> None:
    while connection.recv(100):
        time.sleep(0.02)


def say_nothing(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


@contextmanager
def running_server(act: Act, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Let a function act in each connection until the client leaves; yield the URL."""

    def serve(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            act(tls.wrap_socket(connection, server_side=True) if tls else connection)

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=accept)
        thread.start()
        yield f"{'https' if tls else 'http'}://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def get(harness: Harness, path: Path) -> None:
    harness.client.get("bucket", "key", max_bytes=1 << 50)


def read(harness: Harness, path: Path) -> None:
    harness.client.open("bucket", "key").read()


def fetch(harness: Harness, path: Path) -> None:
    harness.download(path / "file")


def list_all(harness: Harness, path: Path) -> None:
    list(harness.client.list("bucket", ""))


def store(harness: Harness, path: Path) -> None:
    (path / "source").write_bytes(bytes(15 << 20))
    harness.upload(path / "source")


def put(harness: Harness, path: Path) -> None:
    harness.client.put("bucket", "key", bytes(200_000))


@pytest.fixture(params=["http", "tls"])
def tls(request: pytest.FixtureRequest, tmp_path: Path) -> ssl.SSLContext | None:
    certificate, key = make_certificate(tmp_path)
    if request.param == "http":
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def assert_stop_is_heard(url: str, call: Callable[[Harness, Path], None], path: Path) -> None:
    stop = threading.Event()
    environ = {"AWS_CA_BUNDLE": str(path / "certificate.pem")}
    harness = build_harness(url, environ=environ, check=stopping(stop.is_set))
    timer = threading.Timer(STOP_AFTER_SECONDS, stop.set)
    timer.start()
    started = time.monotonic()
    with pytest.raises(Stopped):
        call(harness, path)
    assert time.monotonic() - started < STOP_AFTER_SECONDS + HEARD_SECONDS
    timer.join()
    assert not (path / "file").exists()


LARGE = OK + b"Content-Length: 1000000000000\r\n\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "status": (trickle(b"HTTP/1.1 200 ", b"O"), get),
    "header fields": (trickle(OK, b"A: b\r\n"), get),
    "interim answers": (trickle(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), get),
    "body": (trickle(LARGE, b"some"), get),
    "body of a file": (trickle(LARGE, b"some" * 30_000), fetch),
    "body of a stream": (trickle(LARGE, b"some" * 30_000), read),
    "chunks": (trickle(CHUNKED, b"1\r\nx\r\n"), read),
    "length of a chunk": (trickle(CHUNKED + b"1;", b"x"), fetch),
    "trailer": (trickle(CHUNKED + b"1\r\nx\r\n0\r\n", b"A: b\r\n"), fetch),
    "listing": (trickle(LARGE, b" "), list_all),
    "silence": (say_nothing, get),
    "upload that is taken slowly": (take_slowly, store),
    "upload without an answer": (say_nothing, store),
    "small upload that is taken slowly": (take_slowly, put),
}


@pytest.mark.parametrize(("act", "call"), ENDLESS.values(), ids=ENDLESS)
def test_a_stop_is_heard_in_the_middle_of(
    act: Act, call: Callable[[Harness, Path], None], tls: ssl.SSLContext | None, tmp_path: Path
) -> None:
    with running_server(act, tls) as url:
        assert_stop_is_heard(url, call, tmp_path)


def shake_hands_slowly(connection: socket.socket) -> None:
    connection.recv(1 << 16)
    connection.sendall(b"\x16\x03\x03\x10\x00")  # a record that never becomes complete
    while True:
        connection.sendall(b"\x02")
        time.sleep(0.02)


@pytest.mark.parametrize("act", [say_nothing, shake_hands_slowly])
def test_a_stop_is_heard_during_a_handshake(act: Act, tmp_path: Path) -> None:
    make_certificate(tmp_path)
    with running_server(act) as url:
        assert_stop_is_heard(url.replace("http:", "https:"), get, tmp_path)


@contextmanager
def full_listener() -> Iterator[str]:
    """Listen, and let nobody in: connecting to it neither succeeds nor fails."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(address)
        yield f"http://127.0.0.1:{address[1]}"
        for sock in waiting:
            sock.close()


def test_a_stop_is_heard_while_connecting(tmp_path: Path) -> None:
    with full_listener() as url:
        assert_stop_is_heard(url, get, tmp_path)


def test_a_stop_is_heard_while_a_name_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(20) and [])
    assert_stop_is_heard("http://s3.example.test", get, tmp_path)
    answered.set()


SLOW = {
    "status": (trickle(b"HTTP/1.1 200 ", b"O"), "The head of the answer took over 1 s"),
    "header fields": (trickle(OK, b"A: b\r\n"), "The head of the answer took over 1 s"),
    "interim answers": (
        trickle(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        "The head of the answer took over 1 s",
    ),
    "length of a chunk": (trickle(CHUNKED + b"1;", b"x"), "The end of a chunk took over 1 s"),
    "trailer": (trickle(CHUNKED + b"0\r\n", b"A: b\r\n"), "The end of a chunk took over 1 s"),
}


@pytest.mark.parametrize(("act", "message"), SLOW.values(), ids=SLOW)
def test_what_is_around_a_body_has_a_time_limit(
    act: Act, message: str, tls: ssl.SSLContext | None, tmp_path: Path
) -> None:
    with running_server(act, tls) as url:
        environ = {"AWS_CA_BUNDLE": str(tmp_path / "certificate.pem")}
        transport = build_harness(url, environ=environ).session._transport
        with pytest.raises(TransportError, match=message):
            transport.fetch("GET", f"{url}/", {}, None, 1.0, False)


def test_a_handshake_has_a_time_limit(tmp_path: Path) -> None:
    make_certificate(tmp_path)
    with running_server(shake_hands_slowly) as url:
        environ = {"AWS_CA_BUNDLE": str(tmp_path / "certificate.pem")}
        transport = build_harness(url, environ=environ).session._transport
        with pytest.raises(TransportError, match="TLS with 127.0.0.1 took over 1 s"):
            transport.fetch("GET", url.replace("http", "https"), {}, None, 1.0, False)


def test_connecting_has_a_time_limit() -> None:
    with full_listener() as url:
        transport = build_harness(url).session._transport
        with pytest.raises(TransportError, match=r"Could not connect .* \(timed out\)"):
            transport.fetch("GET", url, {}, None, 1.0, False)


@pytest.mark.parametrize("step", ["preadv", "send"])
def test_a_stop_is_heard_before_a_file_is_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """As of a part of 500 MB: neither summed nor sent to its end."""
    reads: list[int] = []
    preadv = os.preadv

    def count(fd: int, buffers: Any, offset: int) -> int:
        reads.append(offset)
        return preadv(fd, buffers, offset)

    path = tmp_path / "source"
    path.write_bytes(bytes(8 << 20))
    monkeypatch.setattr(os, "preadv", count)
    fd = os.open(path, os.O_RDONLY)
    enough = 2 if step == "preadv" else 10
    file = upload.File(fd, 8 << 20, "key", stopping(lambda: len(reads) >= enough))
    body = upload.FileBody(file, start=0, size=8 << 20)

    def sum_and_send() -> None:
        body.sum(with_sha256=True)
        list(body.blocks())

    with pytest.raises(Stopped):
        sum_and_send()
    os.close(fd)
    assert enough == len(reads)


def test_a_stop_is_heard_while_a_download_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    preadv = os.preadv

    def count(fd: int, buffers: Any, offset: int) -> int:
        reads.append(offset)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", count)
    monkeypatch.setattr(download, "SMALLEST_PART_BYTES", 1 << 30)
    with running_double() as double:
        double.buckets["bucket"]["key"] = Object(body=bytes(8 << 20))

        def announce(exchange: Exchange) -> None:
            headers = {"x-amz-checksum-sha256": "x"}
            exchange.body()
            exchange.send(200, bytes(8 << 20), headers)

        double.faults = [announce]
        harness = build_harness(double.url)
        harness.check = stopping(lambda: len(reads) >= 2)
        with pytest.raises(Stopped):
            harness.download(tmp_path / "file")
    assert (2, []) == (len(reads), os.listdir(tmp_path))


def test_parts_are_taken_back_after_a_stop_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "ABORT_SECONDS", 1.0)
    source, stop = tmp_path / "source", threading.Event()
    source.write_bytes(bytes(33 << 20))
    with running_double() as double:
        silent = threading.Event()

        def stop_in_the_middle(exchange: Exchange) -> None:
            if exchange.operation == "UploadPart":
                stop.set()
            if exchange.operation == "AbortMultipartUpload":
                silent.wait(20)
            exchange.answer()

        double.always = stop_in_the_middle
        harness = build_harness(double.url, check=stopping(stop.is_set))
        started = time.monotonic()
        with pytest.raises(Stopped):
            harness.upload(source)
        assert time.monotonic() - started < 1 + HEARD_SECONDS
        assert "AbortMultipartUpload" == double.operations()[-1]
        silent.set()


def test_a_result_has_its_patience_with_a_slow_server(tmp_path: Path) -> None:
    """Bytes that trickle must not take it away, nor make it endless."""
    with running_double() as double:

        def answer_slowly(exchange: Exchange) -> None:
            send = exchange.wfile.write

            def write(data: bytes) -> None:
                for start in range(0, len(data), 20):
                    send(data[start : start + 20])
                    time.sleep(0.05)

            exchange.wfile.write = write  # type: ignore[method-assign, assignment]
            exchange.answer()

        double.always = answer_slowly
        client = build_harness(double.url, check=stopping(lambda: True)).client
        client.put("bucket", "key", b"result", persistent=True)
        assert b"result" == double.buckets["bucket"]["key"].body


def test_the_patience_for_a_result_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shim.s3.client.PATIENCE_SECONDS", 1.0)
    with running_server(trickle(OK, b"A: b\r\n")) as url:
        client = build_harness(url, check=stopping(lambda: True)).client
        started = time.monotonic()
        with pytest.raises(Stopped):
            client.put("bucket", "key", b"result", persistent=True)
        assert time.monotonic() - started < 1 + HEARD_SECONDS
