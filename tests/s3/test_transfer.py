"""Files up and down: parts, resumption, checksums, and many of them at once."""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shim.http.errors import RemoteError, TransportError
from shim.http.stream import unchecked
from shim.s3 import download, pace, upload
from shim.s3.checksums import combine_crc32
from shim.s3.crew import Crew
from shim.s3.errors import FileChanged, IntegrityError, ObjectChanged, ServiceError
from shim.s3.transfer import Download, Transfers, Upload
from tests.fakes.s3_double import (
    Exchange,
    Fault,
    Object,
    S3Double,
    answer_with,
    drop,
    ignore,
    lose_answer,
    refuse,
    send_chunked,
    truncate,
    work,
)
from tests.s3_clients import Harness, Stopped, build_harness, download_to, running_double, stopping
from tests.support import limit_rate, poll

PART = 100_000
ALONE = Crew(concurrency=0, check=unchecked)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Double]:
    """A double, and parts small enough to have many of them."""
    monkeypatch.setattr(download, "SMALLEST_PART_BYTES", PART)
    monkeypatch.setattr(upload, "SINGLE_BYTES", 4 * PART)
    monkeypatch.setattr(upload, "SMALLEST_PART_BYTES", PART)
    monkeypatch.setattr(upload, "MIB", PART)
    monkeypatch.setattr(upload, "IN_MEMORY_BYTES", PART // 2)
    with running_double(smallest_part=PART) as double:
        yield double


@pytest.fixture
def harness(double: S3Double) -> Harness:
    return build_harness(double.url)


def store(double: S3Double, size: int, *, key: str = "key", parts: int = 0) -> bytes:
    body = os.urandom(size)
    double.buckets["bucket"][key] = Object(body=body, parts=parts)
    return body


# --- downloads ---

SIZES = [0, 1, PART, 2 * PART, 2 * PART + 1, 3 * PART, 10 * PART - 1, 30 * PART + 7]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("concurrency", [1, 6])
def test_objects_of_any_size_arrive_whole(
    double: S3Double, harness: Harness, tmp_path: Path, size: int, concurrency: int
) -> None:
    body = store(double, size)
    assert body == harness.download(tmp_path / "file", concurrency=concurrency)
    assert ["file"] == os.listdir(tmp_path)
    assert "HeadObject" not in double.operations()


def test_a_small_object_costs_one_request(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    store(double, 2 * PART)
    harness.download(tmp_path / "file")
    assert ["GetObject"] == double.operations()


def download_from_the_end(double: S3Double, harness: Harness, path: Path) -> list[tuple[int, int]]:
    """Let the first answer wait for all the others; return their ranges, first to last."""
    body = store(double, 30 * PART)
    etag = double.buckets["bucket"]["key"].etag

    def ranges() -> list[str]:
        return [seen.headers["range"] for seen in double.seen[1:]]

    def wait_for_the_others(exchange: Exchange) -> None:
        head = f"HTTP/1.1 200 OK\r\nETag: {etag}\r\nContent-Length: {len(body)}\r\n\r\n"
        exchange.wfile.write(head.encode() + body[: PART + 1])  # so that the next part is begun
        poll(lambda: any(text.startswith(f"bytes={2 * PART}-") for text in ranges()))
        exchange.wfile.write(body[PART + 1 :])

    double.faults = [wait_for_the_others]
    assert body == harness.download(path)
    assert {etag} == {seen.headers["if-match"] for seen in double.seen[1:]}
    found = [text.removeprefix("bytes=").split("-") for text in ranges()]
    return sorted((int(first), int(last)) for first, last in found)


def test_others_take_parts_of_a_large_object_from_its_end(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    ranges = download_from_the_end(double, harness, tmp_path / "file")
    assert [(n * PART, (n + 1) * PART - 1) for n in range(2, 30)] == ranges
    first_seen = [seen.headers["range"] for seen in double.seen[1:5]]
    assert f"bytes={29 * PART}-{30 * PART - 1}" in first_seen
    assert 4 >= double.most_active


def test_parts_are_long_at_first_and_short_at_last(
    double: S3Double, harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MOST_PARTS", 4)
    monkeypatch.setattr(download, "LARGEST_PART_BYTES", 5 * PART)
    ranges = download_from_the_end(double, harness, tmp_path / "file")
    borders = [first for first, _ in ranges] + [30 * PART]
    assert [2 * PART, *(last + 1 for _, last in ranges)] == borders
    lengths = [last - first + 1 for first, last in ranges]
    assert 5 * PART == lengths[-1]
    assert lengths == sorted(lengths)
    assert PART == lengths[1] >= lengths[0]


def test_a_slow_server_has_more_threads(
    double: S3Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer_slowly(exchange: Exchange) -> None:
        limit_rate(exchange.connection, 10 * PART)
        exchange.answer()

    monkeypatch.setattr(pace, "WINDOW_BYTES", PART // 10)
    monkeypatch.setattr(download, "FIRST_HELPERS", 1)
    body = store(double, 60 * PART)
    double.faults = [answer_slowly] * 60
    harness = build_harness(double.url, concurrency=20)
    assert body == harness.download(tmp_path / "file", concurrency=20)
    assert 1 + download.MOST_HELPERS == double.most_active


@pytest.mark.parametrize("size", [1, 30 * PART], ids=["one request", "parts"])
def test_the_checksum_of_the_whole_is_verified(
    double: S3Double, harness: Harness, tmp_path: Path, size: int
) -> None:
    store(double, size)
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def lie(status: int, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        headers["x-amz-checksum-crc32"] = "AAAAAQ=="
        return status, body

    double.faults = [answer_with(lie)] * 999
    with pytest.raises(IntegrityError, match="s3://bucket/key does not have the crc32"):
        harness.download(path)
    assert (b"before", ["file"]) == (path.read_bytes(), os.listdir(tmp_path))


@pytest.mark.parametrize("algorithm", ["sha256", "sha1"])
@pytest.mark.parametrize("is_right", [True, False])
def test_other_checksums_are_verified_too(
    double: S3Double, harness: Harness, tmp_path: Path, algorithm: str, is_right: bool
) -> None:
    body = store(double, 5 * PART)
    digest = hashlib.new(algorithm, body if is_right else b"").digest()

    def announce(status: int, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        headers.pop("x-amz-checksum-crc32", None)
        headers[f"x-amz-checksum-{algorithm}"] = base64.b64encode(digest).decode()
        return status, body

    double.faults = [answer_with(announce)] * 999
    if is_right:
        assert body == harness.download(tmp_path / "file")
        return
    with pytest.raises(IntegrityError, match=algorithm):
        harness.download(tmp_path / "file")


def test_a_checksum_of_checksums_is_left_alone(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    body = store(double, 5 * PART, parts=3)
    assert double.buckets["bucket"]["key"].crc32.endswith("-3")
    assert body == harness.download(tmp_path / "file")
    double.always = with_headers(x_amz_checksum_type="COMPOSITE", x_amz_checksum_crc32="AAAAAQ==")
    assert body == harness.download(tmp_path / "file")
    assert body == harness.client.get("bucket", "key", max_bytes=5 * PART)


def test_bodies_that_break_off_resume_at_the_byte_reached(double: S3Double, tmp_path: Path) -> None:
    harness = build_harness(double.url, attempts=2)
    body = store(double, 2 * PART)
    double.faults = [truncate(70_000)] * 2 + [drop()] + [truncate(50_000)]
    assert body == harness.download(tmp_path / "file")
    starts = [seen.headers.get("range", "") for seen in double.seen]
    assert ["", "bytes=70000-199999", *["bytes=140000-199999"] * 2] == starts[:4]
    assert 1 == len(starts[4:])


def test_parts_that_break_off_resume_at_the_byte_reached(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    body = store(double, 30 * PART)
    double.faults = [work] + [truncate(PART // 3), truncate(0), refuse(500), work] * 5
    assert body == harness.download(tmp_path / "file")


def test_resuming_is_not_endless(double: S3Double, tmp_path: Path) -> None:
    harness = build_harness(double.url, attempts=2)
    store(double, 100)
    double.faults = [truncate(1)] * 999
    with pytest.raises(TransportError):
        harness.download(tmp_path / "file")
    assert 20 < len(double.seen) < 30


def change_after(double: S3Double, body: bytes) -> Fault:
    """Answer half of the old object when another is in its place already."""

    def fault(exchange: Exchange) -> None:
        old = double.buckets["bucket"]["key"]
        double.buckets["bucket"]["key"] = Object(body=body)
        exchange._object = lambda: old  # type: ignore[method-assign]
        truncate(60_000)(exchange)

    return fault


def test_an_object_that_changed_is_fetched_once_more_from_the_start(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    store(double, PART)
    double.faults = [change_after(double, b"b" * PART)]
    assert b"b" * PART == harness.download(tmp_path / "file")
    store(double, PART)
    double.faults = [change_after(double, b"b" * PART), work, change_after(double, b"c" * PART)]
    with pytest.raises(ObjectChanged, match="s3://bucket/key was replaced"):
        harness.download(tmp_path / "file2")
    assert ["file"] == os.listdir(tmp_path)


def test_a_change_is_noticed_where_the_server_ignores_if_match(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    store(double, PART)
    double.faults = [change_after(double, b"b" * PART), ignore("if-match")]
    assert b"b" * PART == harness.download(tmp_path / "file")


def test_an_object_that_became_shorter_is_fetched_once_more(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    store(double, PART)
    double.faults = [change_after(double, b"short"), ignore("if-match")]
    assert b"short" == harness.download(tmp_path / "file")


def as_etag(etag: str, fault: Fault) -> Fault:
    """Do as the fault does, with another ETag, or none."""

    def do(exchange: Exchange) -> None:
        describe = exchange._describe

        def describe_so(found: Object) -> dict[str, str]:
            headers = describe(found)
            del headers["ETag"]
            return headers | ({"ETag": etag} if etag else {})

        exchange._describe = describe_so  # type: ignore[method-assign]
        fault(exchange)

    return do


@pytest.mark.parametrize("size", [PART - 1, PART + 1])
def test_a_change_of_size_is_noticed_where_there_are_no_etags(
    double: S3Double, harness: Harness, tmp_path: Path, size: int
) -> None:
    store(double, PART)
    double.faults = [as_etag("", change_after(double, b"b" * size))]
    double.always = as_etag("", work)
    assert b"b" * size == harness.download(tmp_path / "file")
    assert 3 == len(double.seen)  # the second one was of another size


def test_weak_etags_are_compared_and_never_sent(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    body = store(double, PART)
    double.faults = [as_etag('W/"a"', truncate(50_000))]
    double.always = as_etag('W/"a"', work)
    assert body == harness.download(tmp_path / "file")
    assert ["", ""] == [seen.headers.get("if-match", "") for seen in double.seen]
    double.seen.clear()
    double.faults = [as_etag('W/"a"', truncate(50_000)), as_etag('W/"b"', work)]
    assert body == harness.download(tmp_path / "file")
    assert 3 == len(double.seen)


def test_a_range_beyond_the_end_means_that_the_object_changed(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    body = store(double, PART)
    double.faults = [truncate(50_000), refuse(416, "InvalidRange")]
    assert body == harness.download(tmp_path / "file")
    assert ["", "bytes=50000-99999", ""] == [s.headers.get("range", "") for s in double.seen]


@pytest.mark.parametrize("status", [412, 416])
def test_what_refuses_the_first_request_is_no_change(
    double: S3Double, harness: Harness, tmp_path: Path, status: int
) -> None:
    store(double, PART)
    double.faults = [refuse(status, "Odd")]
    with pytest.raises(ServiceError, match="Odd"):
        harness.download(tmp_path / "file")
    assert 1 == len(double.seen)


def test_an_object_that_arrives_damaged_is_fetched_once_more(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    body = store(double, PART)
    damaged = answer_with(lambda status, body, headers: (status, bytes(len(body))))
    double.faults = [damaged]
    assert body == harness.download(tmp_path / "file")
    assert 2 == len(double.seen)
    double.seen.clear()
    double.faults = [damaged] * 9
    with pytest.raises(IntegrityError):
        harness.download(tmp_path / "file")
    assert 2 == len(double.seen)


# --- reading in order ---


def test_a_reader_gives_up_when_its_object_breaks_off_too_often(
    double: S3Double, harness: Harness
) -> None:
    body = store(double, 100)
    double.faults = [truncate(1)] * 20
    with harness.client.open("bucket", "key") as stream:
        assert body == stream.read()
    assert 21 == len(double.seen)
    double.faults = [truncate(1)] * 99
    with pytest.raises(TransportError), harness.client.open("bucket", "key") as stream:
        stream.read()
    assert 21 + 21 == len(double.seen)


def test_a_connection_is_used_again_only_if_its_object_was_read_to_the_end(
    double: S3Double, harness: Harness
) -> None:
    store(double, 500 * PART)
    with harness.client.open("bucket", "key") as stream:
        stream.read()
    with harness.client.open("bucket", "key") as stream:
        stream.read(1)
    harness.client.head("bucket", "key")
    assert [1, 1, 2] == [seen.connection for seen in double.seen]


def test_the_connection_of_a_stream_that_broke_off_is_closed(
    double: S3Double, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished: list[object] = []
    finish = harness.session.finish
    monkeypatch.setattr(harness.session, "finish", lambda r: finished.append(r) or finish(r))
    store(double, PART)
    double.faults = [truncate(50_000)]
    with harness.client.open("bucket", "key") as stream:
        stream.read()
    assert 2 == len(finished) == len(set(map(id, finished)))


def with_headers(**changes: str) -> Fault:
    def change(status: int, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        headers.update({name.replace("_", "-"): value for name, value in changes.items()})
        return status, body

    return answer_with(change)


@pytest.mark.parametrize(
    "content_range",
    ["bytes 0-49999/100000", "bytes 50000-99998/100000", "bytes 50001-99999/100000", "items 1"],
)
def test_an_answer_with_another_range_is_never_written(
    double: S3Double, harness: Harness, tmp_path: Path, content_range: str
) -> None:
    body = store(double, PART)
    double.faults = [truncate(50_000), with_headers(Content_Range=content_range)]
    assert body == harness.download(tmp_path / "file")
    assert 3 == len(double.seen)


@pytest.mark.parametrize("size", [PART, 30 * PART])
@pytest.mark.parametrize("concurrency", [1, 6])
def test_a_server_that_ignores_ranges_is_read_once_more_after_a_break(
    double: S3Double, harness: Harness, tmp_path: Path, size: int, concurrency: int
) -> None:
    body = store(double, size)
    double.faults = [truncate(size // 2)]
    double.always = ignore("range")
    assert body == harness.download(tmp_path / "file", concurrency=concurrency)


def test_a_server_that_ignores_ranges_cannot_mix_an_object(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    store(double, PART)
    double.faults = [change_after(double, b"b" * PART)]
    double.always = ignore("range", "if-match")
    assert b"b" * PART == harness.download(tmp_path / "file")
    store(double, PART)
    double.faults = [change_after(double, b"short")]
    assert b"short" == harness.download(tmp_path / "file")


def test_a_server_that_ignores_ranges_has_its_one_stream_kept(
    double: S3Double, harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "FIRST_HELPERS", 1)
    body = store(double, 30 * PART)
    refused = threading.Event()

    def answer_when_the_others_were_refused(exchange: Exchange) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n"
        exchange.wfile.write(head.encode() + body[: PART + 1])
        refused.wait(10)
        exchange.wfile.write(body[PART + 1 :])

    fetch_last = download._Whole._fetch_last

    def fetch_last_and_tell(whole: download._Whole) -> bool:
        is_more = fetch_last(whole)
        refused.set()
        return is_more

    def ignore_range(exchange: Exchange) -> None:
        with suppress(OSError):  # who asked for a part hangs up
            ignore("range")(exchange)

    monkeypatch.setattr(download._Whole, "_fetch_last", fetch_last_and_tell)
    double.faults = [answer_when_the_others_were_refused]
    double.always = ignore_range
    assert body == harness.download(tmp_path / "file")
    assert "range" not in double.seen[0].headers
    assert ["range" in seen.headers for seen in double.seen] == [False, True]


def test_a_server_that_tells_too_late_that_it_ignores_ranges_is_read_once_more(
    double: S3Double, harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = store(double, 30 * PART)
    is_asked, is_through = threading.Event(), threading.Event()
    take_first = download._Whole._take_first

    def take_first_and_tell(whole: download._Whole) -> bool:
        is_more = take_first(whole)
        if not is_more:
            is_through.set()
        return is_more

    monkeypatch.setattr(download._Whole, "_take_first", take_first_and_tell)

    def answer_first(exchange: Exchange) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n"
        with suppress(OSError):  # the parts of others are not read
            exchange.wfile.write(head.encode() + body[: PART + 1])
            is_asked.wait(10)
            exchange.wfile.write(body[PART + 1 :])

    def answer_last(exchange: Exchange) -> None:
        if "range" in exchange.fields:
            is_asked.set()
            is_through.wait(10)
        with suppress(OSError):
            ignore("range")(exchange)

    double.faults = [answer_first]
    double.always = answer_last
    assert body == harness.download(tmp_path / "file")
    assert 2 == sum("range" not in request.headers for request in double.seen)


@pytest.mark.parametrize("size", [0, 1, PART, 30 * PART])
def test_an_object_whose_length_only_its_end_tells_arrives_whole(
    double: S3Double, harness: Harness, tmp_path: Path, size: int
) -> None:
    body = store(double, size)
    double.always = send_chunked()
    assert body == harness.download(tmp_path / "file")
    assert body == harness.client.get("bucket", "key", max_bytes=size)
    with harness.client.open("bucket", "key") as stream:
        assert body == stream.read()
    assert 3 == len(double.seen)


def test_an_object_without_a_length_that_breaks_off_is_read_once_more(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    body = store(double, 5 * PART)
    double.faults = [send_chunked(after=PART), send_chunked(after=PART // 2), send_chunked()]
    assert body == harness.download(tmp_path / "file")
    double.faults = [send_chunked(after=PART), send_chunked(after=PART // 2), send_chunked()]
    with harness.client.open("bucket", "key") as stream:
        assert body == stream.read()
    assert 6 == len(double.seen)


@pytest.mark.parametrize("damage", [lambda body: body[:-1], lambda body: b"x" + body[1:]])
def test_an_object_without_a_length_is_verified(
    double: S3Double, harness: Harness, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    store(double, PART)

    def answer(exchange: Exchange) -> None:
        found = double.buckets["bucket"]["key"]
        damaged = Object(body=damage(found.body))
        exchange._object = lambda: damaged  # type: ignore[method-assign]
        exchange._describe = lambda _: {  # type: ignore[method-assign, assignment]
            "x-amz-checksum-crc32": found.crc32
        }
        exchange.fields.pop("x-amz-checksum-mode")
        exchange._verify = lambda _: None  # type: ignore[method-assign, assignment]
        send_chunked()(exchange)

    double.always = answer
    with pytest.raises(IntegrityError):
        harness.download(tmp_path / "file")
    with pytest.raises(IntegrityError):
        harness.client.get("bucket", "key", max_bytes=PART)
    with pytest.raises(IntegrityError), harness.client.open("bucket", "key") as stream:
        stream.read()


def test_status_200_with_a_content_range_is_a_range(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    body = store(double, PART)
    double.faults = [truncate(50_000), answer_with(lambda status, body, headers: (200, body))]
    assert body == harness.download(tmp_path / "file")


def test_an_answer_that_ends_with_its_connection_is_refused(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    def send_until_closed(exchange: Exchange) -> None:
        exchange.wfile.write(b"HTTP/1.1 200 OK\r\n\r\nhalf of")
        exchange.drop()

    double.always = send_until_closed
    for read in (
        lambda: harness.download(tmp_path / "file"),
        lambda: harness.client.get("bucket", "key", max_bytes=100),
        lambda: harness.client.open("bucket", "key"),
    ):
        with pytest.raises(TransportError, match="does not tell the object's length"):
            read()


def test_a_failed_download_leaves_nothing_and_touches_nothing(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    double.faults = [refuse(403, "AccessDenied")]
    with pytest.raises(ServiceError, match="AccessDenied"):
        harness.download(path)
    assert (b"before", ["file"]) == (path.read_bytes(), os.listdir(tmp_path))


@pytest.mark.parametrize("size", [10, 30 * PART], ids=["small", "in parts"])
def test_a_download_can_be_read_by_everybody_whatever_the_umask(
    double: S3Double, harness: Harness, tmp_path: Path, size: int
) -> None:
    store(double, size)
    umask = os.umask(0o077)
    try:
        harness.download(tmp_path / "file")
    finally:
        os.umask(umask)
    assert oct(0o644) == oct((tmp_path / "file").stat().st_mode & 0o7777)


def test_a_download_stays_in_the_directory_that_was_opened(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    """Whatever takes the directory's name meanwhile, also a link to somewhere else."""
    body = store(double, 30 * PART)
    (tmp_path / "d").mkdir()
    (tmp_path / "elsewhere").mkdir()

    def exchange(exchange: Exchange) -> None:
        (tmp_path / "d").rename(tmp_path / "moved")
        (tmp_path / "d").symlink_to("elsewhere")
        exchange.answer()

    double.faults = [exchange]
    directory = os.open(tmp_path / "d", os.O_PATH)
    harness.client.download("bucket", "key", directory, "file", crew=ALONE)
    os.close(directory)
    assert body == (tmp_path / "moved/file").read_bytes()
    assert [] == os.listdir(tmp_path / "elsewhere")


def test_a_missing_directory_is_an_error_of_the_file_system(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    store(double, 1)
    with pytest.raises(FileNotFoundError):
        harness.download(tmp_path / "no" / "file")
    assert [] == double.seen


def test_an_error_of_the_file_system_is_raised_as_such(
    double: S3Double, harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    store(double, 30 * PART)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        harness.download(tmp_path / "file")
    assert [] == os.listdir(tmp_path)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=8))
def test_checksums_of_parts_combine_to_that_of_the_whole(parts: list[bytes]) -> None:
    whole = zlib.crc32(b"".join(parts))
    assert whole == combine_crc32((zlib.crc32(part), len(part)) for part in parts)


def test_checksums_of_zeros_combine_over_terabytes() -> None:
    part = zlib.crc32(bytes(1 << 20))
    doubled = combine_crc32([(part, 1 << 20)] * 2)
    assert zlib.crc32(bytes(2 << 20)) == doubled
    assert combine_crc32([(doubled, 2 << 20)] * 5000) == combine_crc32([(part, 1 << 20)] * 10_000)


# --- uploads ---


@pytest.mark.parametrize("size", [0, 1, PART, 4 * PART, 4 * PART + 1, 30 * PART + 7])
@pytest.mark.parametrize("concurrency", [1, 6])
def test_files_of_any_size_are_stored_whole(
    double: S3Double, harness: Harness, tmp_path: Path, size: int, concurrency: int
) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(size))
    harness.upload(source, "a b/é", concurrency=concurrency)
    assert source.read_bytes() == double.buckets["bucket"]["a b/é"].body
    assert {} == double.uploads
    sent = [s for s in double.seen if s.operation in ("PutObject", "UploadPart")]
    assert all("x-amz-checksum-crc32" in seen.headers for seen in sent)
    assert (1 if size <= 4 * PART else -(-size // PART)) == len(sent)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(os.urandom(6 * PART))
    return path


@pytest.mark.parametrize("size", [0, 1, PART, 4 * PART, 9 * PART])
def test_every_body_carries_its_crc32(
    double: S3Double, harness: Harness, tmp_path: Path, size: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    harness.upload(path)
    harness.client.put("bucket", "result", b"result")
    puts = [seen for seen in double.seen if seen.method == "PUT"]
    assert puts and all("x-amz-checksum-crc32" in seen.headers for seen in puts)


def test_parts_carry_no_checksum_at_the_end_that_the_server_did_not_return(
    double: S3Double, harness: Harness, source: Path
) -> None:
    def forget(exchange: Exchange) -> None:
        exchange.answer()
        for begun in double.uploads.values():
            begun.has_checksums = False

    def take(exchange: Exchange) -> None:
        exchange.fields.pop("x-amz-checksum-crc32")
        exchange.server.uploads[exchange.query["uploadId"]].parts[
            int(exchange.query["partNumber"])
        ] = (body := exchange.body())
        exchange.send(200, b"", {"ETag": Object(body=body).etag})

    double.faults = [forget, *[take] * 6]
    harness.upload(source)
    assert source.read_bytes() == double.buckets["bucket"]["key"].body


FAULTS = {
    "throttled": [refuse(503, "SlowDown")] * 3,
    "damaged": [work, refuse(400, "BadDigest"), work, work],
    "dropped": [work, drop(), drop(reset=True), drop()],
    "lost answers": [work, lose_answer, lose_answer, work],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_parts_are_repeated(
    double: S3Double, harness: Harness, source: Path, faults: list[Fault]
) -> None:
    double.faults = list(faults)
    harness.upload(source)
    assert source.read_bytes() == double.buckets["bucket"]["key"].body


def on_complete(fault: Fault) -> list[Fault]:
    return [*[work] * 7, fault]


def test_a_lost_answer_to_complete_is_found_out_by_asking(
    double: S3Double, harness: Harness, source: Path
) -> None:
    double.faults = on_complete(lose_answer)
    harness.upload(source)
    assert source.read_bytes() == double.buckets["bucket"]["key"].body
    expected = ["CompleteMultipartUpload", "CompleteMultipartUpload", "HeadObject"]
    assert expected == double.operations()[-3:]


def test_an_upload_that_vanished_is_an_error(
    double: S3Double, harness: Harness, source: Path
) -> None:
    def vanish(exchange: Exchange) -> None:
        double.uploads.clear()
        exchange.body()
        exchange.drop()

    store(double, 6 * PART)
    double.faults = on_complete(vanish)
    with pytest.raises(ServiceError, match="NoSuchUpload"):
        harness.upload(source)


def error_despite_200(exchange: Exchange) -> None:
    exchange.body()
    document = b"\n \n<?xml version='1.0'?><Error><Code>InternalError</Code></Error>"
    exchange.send(200, document)


def blanks(exchange: Exchange) -> None:
    exchange.body()
    exchange.send(200, b"  \n")


def silence(exchange: Exchange) -> None:
    exchange.body()
    exchange.send(200)


@pytest.mark.parametrize("fault", [error_despite_200, blanks, silence])
def test_a_200_that_is_none_is_repeated(
    double: S3Double, harness: Harness, source: Path, fault: Fault
) -> None:
    double.faults = on_complete(fault)
    harness.upload(source)
    assert source.read_bytes() == double.buckets["bucket"]["key"].body


def test_an_error_despite_200_is_told_by_its_code(
    double: S3Double, harness: Harness, source: Path
) -> None:
    double.faults = on_complete(error_despite_200) + [error_despite_200] * 4
    with pytest.raises(ServiceError, match=r"\(InternalError\).*CompleteMultipartUpload"):
        harness.upload(source)
    assert {} == double.uploads


@pytest.mark.parametrize("aborted_at_first", [True, False])
def test_parts_of_a_failed_upload_are_taken_back(
    double: S3Double, harness: Harness, source: Path, aborted_at_first: bool
) -> None:
    double.faults = [work, work, refuse(403, "AccessDenied"), work]
    double.faults += [] if aborted_at_first else [refuse(500)]
    with pytest.raises(ServiceError, match="AccessDenied"):
        harness.upload(source, concurrency=1)
    assert {} == double.uploads
    assert "AbortMultipartUpload" == double.operations()[-1]


def shrink(path: Path) -> None:
    os.truncate(path, 10)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [shrink, touch])
def test_a_file_that_changes_between_sum_and_sending_is_not_stored(
    double: S3Double, source: Path, change: Callable[[Path], None]
) -> None:
    fd = os.open(source, os.O_RDONLY)
    file = upload.File(fd, source.stat().st_size, "key", unchecked)
    body = upload.FileBody(file, start=0, size=PART)
    body.sum(with_sha256=False)
    assert source.read_bytes()[:PART] == b"".join(map(bytes, body.blocks()))
    change(source)
    with pytest.raises(FileChanged):
        list(body.blocks())
    os.close(fd)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("change", [shrink, touch, grow])
@pytest.mark.parametrize("size", [100, PART, 4 * PART + 1], ids=["in memory", "one", "parts"])
def test_a_file_that_is_not_what_was_promised_is_its_writers_doing(
    double: S3Double, harness: Harness, source: Path, size: int, change: Callable[[Path], None]
) -> None:
    os.truncate(source, size)
    fd = os.open(source, os.O_RDONLY)

    def change_once(exchange: Exchange) -> None:
        change(source)
        exchange.refuse(500)

    double.faults = [change_once]
    with pytest.raises(FileChanged, match="'out/key' changed while it was uploaded") as caught:
        harness.client.upload("bucket", "out/key", fd, size=size, crew=ALONE)
    os.close(fd)
    assert "out/key" == caught.value.key
    assert ({}, {}) == (double.buckets["bucket"], double.uploads)


def test_a_file_that_grows_while_parts_are_sent_is_not_stored(
    double: S3Double, harness: Harness, source: Path
) -> None:
    def grow_first(exchange: Exchange) -> None:
        grow(source)
        exchange.answer()

    double.faults = [work, grow_first]
    with pytest.raises(FileChanged):
        harness.upload(source)
    assert ({}, {}) == (double.buckets["bucket"], double.uploads)


TIB, GIB, MIB = 1 << 40, 1 << 30, 1 << 20
PLANS = [
    (17 * MIB, 16 * MIB),
    (160_000 * MIB, 16 * MIB),
    (160_000 * MIB + 1, 17 * MIB),
    (5 * TIB, 525 * MIB),
    (10_000 * 5 * GIB, 5 * GIB),
]


@pytest.mark.parametrize(("size", "expected"), PLANS)
def test_parts_grow_with_the_file(size: int, expected: int) -> None:
    assert expected == upload.part_bytes(size)


@given(st.integers(min_value=16 * MIB, max_value=10_000 * 5 * GIB))
def test_every_plan_is_one_that_s3_takes(size: int) -> None:
    length = upload.part_bytes(size)
    assert 5 * MIB <= length <= 5 * GIB
    assert -(-size // length) <= 10_000


def test_more_than_s3_can_hold_is_refused() -> None:
    with pytest.raises(RemoteError, match="larger than S3 can hold"):
        upload.part_bytes(10_000 * 5 * GIB + 1)


# --- many at once ---


def downloads(double: S3Double, directory: Path, number: int) -> Iterator[Download]:
    for n in range(number):
        store(double, 10, key=str(n))
        yield download_to(directory / str(n), key=str(n))


def transfers(harness: Harness, **options: object) -> Transfers:
    arguments = {"concurrency": 4, "check": unchecked, **options}
    return Transfers(harness.client, **arguments)  # type: ignore[arg-type]


def test_no_more_requests_are_under_way_than_allowed(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    threads = threading.active_count()
    for n in range(3):
        store(double, 30 * PART, key=f"large{n}")
    large = [download_to(tmp_path / f"l{n}", key=f"large{n}") for n in range(3)]
    small = list(downloads(double, tmp_path, 50))
    transfers(harness).download_all([*small, *large])
    assert 53 == len(os.listdir(tmp_path))
    assert 2 <= double.most_active <= 4
    poll(lambda: threads + double.connections >= threading.active_count())


def test_a_server_that_throttles_has_all_threads_slow_down_together(
    double: S3Double, tmp_path: Path
) -> None:
    together, active = threading.Barrier(8), list[int]()

    def throttle(exchange: Exchange) -> None:
        together.wait(10)
        exchange.refuse(503, "SlowDown")

    def note(exchange: Exchange) -> None:
        active.append(double.active)
        exchange.answer()

    double.faults = [throttle] * 8 + [note] * 4
    harness = build_harness(double.url, concurrency=8)
    items = downloads(double, tmp_path, 40)
    Transfers(harness.client, concurrency=8, check=unchecked).download_all(items)
    assert 8 == double.most_active
    assert max(active) <= 4
    assert sum(harness.sleeps) > 0
    assert 40 == len(os.listdir(tmp_path))


def test_lists_are_read_as_threads_become_free(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    ahead = []

    def watched() -> Iterator[Download]:
        for number, item in enumerate(downloads(double, tmp_path, 200)):
            ahead.append(number - len(double.seen))
            yield item

    transfers(harness).download_all(watched())
    assert 200 == len(os.listdir(tmp_path))
    assert max(ahead) <= 4


def test_the_first_error_stops_an_endless_list(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    def endless() -> Iterator[Download]:
        yield from downloads(double, tmp_path, 10)
        while True:
            yield download_to(tmp_path / "missing", key="missing")

    with pytest.raises(ServiceError, match="NoSuchKey"):
        transfers(harness).download_all(endless())
    assert len(double.seen) < 30


def test_an_error_of_the_list_itself_is_raised(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    def torn() -> Iterator[Download]:
        yield from downloads(double, tmp_path, 3)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        transfers(harness).download_all(torn())


def test_nothing_to_do_is_done(harness: Harness) -> None:
    transfers(harness).download_all([])
    transfers(harness).upload_all([])


def test_a_stop_ends_the_upload_of_a_vast_file(double: S3Double, harness: Harness) -> None:
    with TemporaryDirectory(dir="/dev/shm") as directory:
        path = Path(directory, "vast")
        path.touch()
        os.truncate(path, 1 << 40)
        harness.check = stopping(lambda: "UploadPart" in double.operations())
        with pytest.raises(Stopped):
            harness.upload(path)
    assert ({}, {}) == (double.buckets["bucket"], double.uploads)


def test_a_stop_ends_what_is_under_way(double: S3Double, harness: Harness, tmp_path: Path) -> None:
    stop = threading.Event()

    def stall(exchange: Exchange) -> None:
        stop.set()
        stalled.wait(10)
        exchange.answer()

    stalled = threading.Event()
    double.faults = [stall] * 4
    with pytest.raises(Stopped):
        transfers(harness, check=stopping(stop.is_set)).download_all(downloads(double, tmp_path, 9))
    stalled.set()
    assert [] == os.listdir(tmp_path)


def test_descriptors_are_closed_whatever_happens(
    double: S3Double, harness: Harness, source: Path
) -> None:
    opened: list[int] = []

    def open_source() -> int:
        opened.append(os.open(source, os.O_RDONLY))
        return opened[-1]

    uploads = [Upload(bucket=b, key="k", open=open_source) for b in ("bucket", "nobucket")]
    with pytest.raises(ServiceError, match="NoSuchBucket"):
        transfers(harness, concurrency=1).upload_all(uploads)
    for fd in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_system_without_threads_is_served_by_the_caller(
    double: S3Double, harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = list(downloads(double, tmp_path, 5))
    store(double, 30 * PART, key="4")

    def refuse_start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse_start)
        crew = Crew(concurrency=4, check=unchecked)
        steps = iter(items)
        done: list[Download] = []
        crew.run(lambda: bool((item := next(steps, None)) and not done.append(item)))
    assert items == done


def test_threads_have_small_stacks() -> None:
    number, barrier = 16, threading.Barrier(16)
    sizes = []

    def data_kib() -> int:
        return int(Path("/proc/self/status").read_text().partition("VmData:")[2].split()[0])

    def step() -> bool:
        barrier.wait(10)
        sizes.append(data_kib())
        return False

    before = data_kib()
    Crew(concurrency=number, check=unchecked).run(step)
    assert max(sizes) - before < number * 2048  # and not the default, 8 MiB


def test_the_stack_size_of_other_threads_is_left_alone(
    double: S3Double, harness: Harness, tmp_path: Path
) -> None:
    before = threading.stack_size()
    transfers(harness).download_all(downloads(double, tmp_path, 20))
    assert before == threading.stack_size()
