"""Objects read in order, over one connection or many."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from shim.http.errors import TransportError
from shim.s3 import pace, reader
from shim.s3.errors import IntegrityError, ObjectChanged, ServiceError
from tests.fakes.s3_double import (
    Exchange,
    Fault,
    Object,
    S3Double,
    answer_with,
    drop,
    ignore,
    refuse,
    truncate,
)
from tests.s3_clients import Harness, Stopped, build_harness, running_double, stopping
from tests.support import limit_rate, poll

PART = 100_000


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Double]:
    """A double, and parts small enough to have many of them."""
    monkeypatch.setattr(reader, "PART_BYTES", PART)
    with running_double() as double:
        yield double


@pytest.fixture
def harness(double: S3Double) -> Harness:
    return build_harness(double.url, concurrency=20)


@pytest.fixture
def slow(double: S3Double, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the double send ten parts a second on each connection."""

    def answer_slowly(exchange: Exchange) -> None:
        limit_rate(exchange.connection, 10 * PART)
        exchange.answer()

    monkeypatch.setattr(pace, "WINDOW_BYTES", PART // 10)
    double.always = answer_slowly


def store(double: S3Double, size: int) -> bytes:
    body = os.urandom(size)
    double.buckets["bucket"]["key"] = Object(body=body)
    return body


def read(harness: Harness) -> bytes:
    with harness.client.open("bucket", "key") as stream:
        return stream.read()


def count_threads() -> int:
    return sum(thread.name == "s3-transfer" for thread in threading.enumerate())


@pytest.mark.parametrize("size", [0, 1, 2 * PART, 2 * PART + 1, 3 * PART, 40 * PART - 1])
def test_objects_of_any_size_come_over_one_request(
    double: S3Double, harness: Harness, size: int
) -> None:
    body = store(double, size)
    assert body == read(harness)
    assert ["GetObject"] == double.operations()
    assert 0 == count_threads()
    harness.client.head("bucket", "key")
    assert {1} == {seen.connection for seen in double.seen}  # it was given back


@pytest.mark.usefixtures("slow")
def test_a_slow_server_has_as_many_connections_as_fit_into_the_window(
    double: S3Double, harness: Harness
) -> None:
    body = store(double, 60 * PART)
    assert body == read(harness)
    assert reader.WINDOW_PARTS - 2 <= double.most_active <= reader.WINDOW_PARTS
    assert 0 == count_threads()
    etags = {seen.headers["if-match"] for seen in double.seen[1:]}
    assert {double.buckets["bucket"]["key"].etag} == etags


@pytest.mark.usefixtures("slow")
def test_who_does_not_read_holds_no_more_than_the_window(
    double: S3Double, harness: Harness
) -> None:
    body = store(double, 60 * PART)
    with harness.client.open("bucket", "key") as stream:
        poll(lambda: double.most_active > 1 and not double.active)
        ranges = [seen.headers.get("range", "bytes=0-").split("=")[1] for seen in double.seen]
        assert max(int(text.split("-")[0]) for text in ranges) < reader.WINDOW_PARTS * PART
        assert body == stream.read()


@pytest.mark.usefixtures("slow")
def test_parts_that_break_off_are_taken_up_again(double: S3Double, harness: Harness) -> None:
    body = store(double, 30 * PART)
    slowly = double.always
    assert slowly
    breaks = [slowly, truncate(PART // 2), slowly, truncate(10), drop(), drop(reset=True)]
    double.faults = breaks * 3
    assert body == read(harness)


def test_the_stream_that_breaks_off_is_taken_up_again(double: S3Double, harness: Harness) -> None:
    body = store(double, 30 * PART)
    double.faults = [truncate(PART + 1), truncate(PART // 2)]
    assert body == read(harness)


def test_what_breaks_off_too_often_is_given_up(double: S3Double, harness: Harness) -> None:
    store(double, 3 * PART)
    double.always = truncate(0)
    with pytest.raises(TransportError):
        read(harness)
    assert 0 == count_threads()


@pytest.mark.parametrize("breaks", [0, 3])
@pytest.mark.usefixtures("slow")
def test_a_server_that_ignores_ranges_is_read_over_one_connection(
    double: S3Double, harness: Harness, breaks: int
) -> None:
    body = store(double, 15 * PART)

    def answer(exchange: Exchange) -> None:
        limit_rate(exchange.connection, 10 * PART)
        ignore("range")(exchange)

    double.always = answer
    double.faults = [truncate(5 * PART)] * breaks
    assert body == read(harness)
    # Those that had begun parts before the first of them knew, and not one for each part.
    assert len(double.seen) <= 1 + breaks + reader.WINDOW_PARTS


@pytest.mark.parametrize("fault", [lambda exchange: exchange.answer(), ignore("if-match")])
def test_another_version_is_noticed(
    double: S3Double, harness: Harness, slow: None, fault: Fault
) -> None:
    """Also where the server takes no notice of If-Match."""
    store(double, 30 * PART)
    with harness.client.open("bucket", "key") as stream:
        stream.read(10)
        store(double, 30 * PART)
        double.always = fault
        with pytest.raises(ObjectChanged, match="s3://bucket/key was replaced"):
            stream.read()


def test_an_object_that_is_replaced_while_it_breaks_off_is_refused(
    double: S3Double, harness: Harness
) -> None:
    store(double, 30 * PART)
    double.faults = [truncate(2 * PART)]
    with harness.client.open("bucket", "key") as stream:
        stream.read(10)
        store(double, 30 * PART)
        with pytest.raises(ObjectChanged, match="s3://bucket/key was replaced"):
            stream.read()


def test_an_error_of_a_part_is_raised_in_its_turn(double: S3Double, harness: Harness) -> None:
    body = store(double, 10 * PART)
    double.faults = [truncate(4 * PART), refuse(403, "AccessDenied")]
    with harness.client.open("bucket", "key") as stream:
        assert body[: 3 * PART] == stream.read(3 * PART)
        with pytest.raises(ServiceError, match="AccessDenied"):
            stream.read()


def test_damage_is_an_error_in_place_of_the_last_byte(double: S3Double, harness: Harness) -> None:
    body = store(double, 10 * PART)
    damaged = bytes(1) + body[1:] if body[0] else b"x" + body[1:]
    double.faults = [answer_with(lambda status, _, headers: (status, damaged))]
    with harness.client.open("bucket", "key") as stream:
        stream.read(9 * PART)
        with pytest.raises(IntegrityError):
            stream.read()


@pytest.mark.usefixtures("slow")
def test_who_closes_early_leaves_nothing_behind(double: S3Double, harness: Harness) -> None:
    store(double, 60 * PART)
    with harness.client.open("bucket", "key") as stream:
        stream.read(5 * PART)
        assert count_threads()
    assert 0 == count_threads()


@pytest.mark.usefixtures("slow")
def test_a_stop_ends_it(double: S3Double) -> None:
    store(double, 60 * PART)
    stopped = threading.Event()
    harness = build_harness(double.url, check=stopping(stopped.is_set))
    with pytest.raises(Stopped):
        with harness.client.open("bucket", "key") as stream:
            stream.read(5 * PART)
            stopped.set()
            stream.read()
    assert 0 == count_threads()


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.usefixtures("slow")
def test_it_needs_no_threads(
    double: S3Double, harness: Harness, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Where the system gives no more of them, fewer do."""
    start, left = reader.start_thread, [None] * threads

    def start_few(target: object) -> None:
        if not left:
            raise RuntimeError("can't start new thread")
        left.pop()
        start(target)  # type: ignore[arg-type]

    monkeypatch.setattr(reader, "start_thread", start_few)
    body = store(double, 15 * PART)
    assert body == read(harness)
    assert double.most_active <= max(1, threads)
