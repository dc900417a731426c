"""SIGTERM while bytes move: out within seconds, and a signed result where it can be left."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.platform import Platform, finish
from tests.fakes.s3_double import Exchange, Object, S3Double, work
from tests.s3_clients import running_double
from tests.s3_servers import S3Server
from tests.support import limit_rate

STOPPED = "The task was stopped before it finished"
SECONDS = 15.0  # from the signal to the end, on a machine that is busy; platforms give 20


@pytest.fixture
def double() -> Iterator[S3Double]:
    with running_double() as double:
        yield double


@pytest.fixture
def platform(double: S3Double, tmp_path: Path) -> Platform:
    server = S3Server(url=double.url)
    return Platform(s3=server.boto3(), bucket="bucket", root=tmp_path, environ=dict(server.environ))


def slow_for(double: S3Double, key: str, fault: Callable[[Exchange], None]) -> threading.Event:
    """Let a fault meet every request for one object; return what is set when one has come."""
    came = threading.Event()

    def answer(exchange: Exchange) -> None:
        if exchange.key != key:
            exchange.answer()
            return
        came.set()
        with suppress(OSError):  # the client has gone
            fault(exchange)
        exchange.close_connection = True

    double.always = answer
    return came


def answer_at(bytes_a_second: int) -> Callable[[Exchange], None]:
    def fault(exchange: Exchange) -> None:
        exchange.body()
        limit_rate(exchange.connection, bytes_a_second)
        exchange.send(200, exchange._object().body)  # at once: no sum is made of it before

    return fault


def repeat(begin: str, again: bytes) -> Callable[[Exchange], None]:
    def fault(exchange: Exchange) -> None:
        exchange.body()
        exchange.wfile.write(f"HTTP/1.1 200 OK\r\n{begin}".encode())
        while True:
            exchange.wfile.write(again)
            time.sleep(0.01)

    return fault


def take_slowly(exchange: Exchange) -> None:
    while exchange.connection.recv(1000):
        time.sleep(0.05)


def say_nothing(exchange: Exchange) -> None:
    while exchange.connection.recv(1 << 16):
        pass


CHUNKS = "Transfer-Encoding: chunked\r\n\r\n"
READ = {
    "at 1 MB/s": answer_at(1_000_000),
    "at 10 MB/s": answer_at(10_000_000),
    "header fields": repeat("", b"A: b\r\n"),
    "chunks": repeat(CHUNKS, b"1\r\nx\r\n"),
    "trailer": repeat(f"{CHUNKS}1\r\nx\r\n0\r\n", b"A: b\r\n"),
    "silence": say_nothing,
}


def stop_when(platform: Platform, came: threading.Event, seconds: float = 1.0) -> None:
    """Send SIGTERM a while after the transfer began; check the exit."""
    process = platform.start("invoke", "-t", json.dumps([platform.task(inputs=[("in", "in")])]))
    assert came.wait(20)
    time.sleep(seconds)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    job = finish(process, seconds=30)
    assert 128 + signal.SIGTERM == job.code, job.stderr
    assert time.monotonic() - started < SECONDS
    assert "Traceback" not in job.stdout + job.stderr


@pytest.mark.parametrize("fault", READ.values(), ids=READ)
def test_a_stop_is_heard_while_a_model_streams(
    platform: Platform, double: S3Double, fault: Callable[[Exchange], None]
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("weights")
        member.size = 200 << 20
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    double.buckets["bucket"]["model.tar"] = Object(body=buffer.getvalue())
    platform.set(MODEL="s3://bucket/model.tar")
    platform.script("true")
    stop_when(platform, slow_for(double, "model.tar", fault))
    setup = platform.setup_result()
    assert (1, STOPPED) == (setup["return_code"], setup["user_safe_error_message"])


@pytest.mark.parametrize("fault", READ.values(), ids=READ)
def test_a_stop_is_heard_while_an_input_comes(
    platform: Platform, double: S3Double, fault: Callable[[Exchange], None]
) -> None:
    double.buckets["bucket"]["in"] = Object(body=bytes(200 << 20))
    platform.script("true")
    stop_when(platform, slow_for(double, "in", fault))
    result = platform.result()
    assert (1, STOPPED) == (result["return_code"], result["user_safe_error_message"])
    assert [] == os.listdir(platform.root / "opt/linked/t-input")


@pytest.mark.parametrize("fault", [take_slowly, say_nothing], ids=["slow", "no answer"])
@pytest.mark.parametrize("megabytes", [1, 15, 100])
def test_a_stop_is_heard_while_an_output_goes(
    platform: Platform, double: S3Double, fault: Callable[[Exchange], None], megabytes: int
) -> None:
    double.buckets["bucket"]["in"] = Object(body=b"")
    platform.script(f"truncate -s {megabytes}M $O/large")
    key = "out/t/large"
    came = slow_for(double, key, lambda exchange: (fault if is_body(exchange) else work)(exchange))
    stop_when(platform, came)
    result = platform.result()
    assert (1, STOPPED, []) == (
        result["return_code"],
        result["user_safe_error_message"],
        result["outputs"],
    )
    assert ({}, False) == (double.uploads, key in double.buckets["bucket"])


def is_body(exchange: Exchange) -> bool:
    return exchange.command == "PUT"


def test_a_stop_is_heard_while_nothing_can_be_reached(platform: Platform, tmp_path: Path) -> None:
    """There is no result then, for there is nowhere to leave it."""
    platform.environ["AWS_S3_ENDPOINT_URL"] = "http://127.0.0.1:9"
    platform.environ["AWS_MAX_ATTEMPTS"] = "12"
    process = platform.start("invoke", "-t", json.dumps([platform.task(inputs=[("in", "in")])]))
    time.sleep(2)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    job = finish(process, seconds=40)
    assert job.code != 0
    assert time.monotonic() - started < 25
