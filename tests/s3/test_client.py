"""Single objects and listings, on real servers, with boto3 as the judge."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from shim.http.errors import RemoteError, TransportError
from shim.http.stream import unchecked
from shim.s3.client import connect
from shim.s3.errors import IntegrityError, ServiceError
from shim.s3.store import ObjectSummary
from shim.s3.transfer import Transfers, Upload
from tests.fakes.s3_double import (
    Exchange,
    Object,
    S3Double,
    answer_with,
    drop,
    encode_crc32,
    refuse,
    truncate,
)
from tests.s3_clients import Stopped, build_harness, download_to, running_double, stopping
from tests.s3_servers import SECRET_KEY, S3Server

if TYPE_CHECKING:
    from shim.s3.store import Store

ODD_KEYS = [
    "plain.txt",
    "/leading",
    "//two",
    "a//b",
    "a/../b",
    "./a",
    "..",
    "a b",
    "a+b",
    "a%2Fb",
    "a%b",
    "é/ü/漢字/🦊",
    "q?x=1&y=2#z",
    "semi;colon,comma=at@",
    "quote'\"back\\slash`",
    "<tag>&amp;",
    "tab\there",
    "line\nbreak",
    "~tilde*(star)!",
    "x" * 255,
    "slash/at/end/",
]
# What the servers refuse from anybody, boto3 included.
REFUSED_BY_RCLONE = ["/leading", "//two", "a//b", "a/../b", "./a", ".."]
REFUSED_BY_MOTO = ["line\nbreak"]
SERVERS = ["rclone", "rclone_tls", "moto"]


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> S3Server:
    found: S3Server = request.getfixturevalue(request.param)
    return found


def client_of(server: S3Server, lines: list[str] | None = None) -> Store:
    def log(level: str, message: str) -> None:
        if lines is not None:
            lines.append(f"{level} {message}")

    return connect(
        server.environ,
        concurrency=4,
        max_connections=4,
        log=log,
        run_helper=lambda argv, seconds: b"",
    )


@pytest.fixture
def double() -> Iterator[S3Double]:
    with running_double() as double:
        yield double


@pytest.mark.parametrize("key", ODD_KEYS, ids=ascii)
def test_boto3_reads_what_we_write_and_we_what_it_writes(
    server: S3Server, key: str, new_bucket: Callable[[S3Server], str]
) -> None:
    if key in (REFUSED_BY_RCLONE if server.root else REFUSED_BY_MOTO):
        pytest.skip("this server refuses the key from boto3 too")
    client, boto3, bucket = client_of(server), server.boto3(), new_bucket(server)
    # With a checksum of its own, boto3 tells the length beforehand, which rclone needs over TLS.
    boto3.put_object(Bucket=bucket, Key=key, Body=b"theirs", ChecksumCRC32=encode_crc32(b"theirs"))
    assert b"theirs" == client.get(bucket, key, max_bytes=10)
    client.put(bucket, key, b"ours")
    assert b"ours" == boto3.get_object(Bucket=bucket, Key=key)["Body"].read()
    if not key.endswith("/"):
        assert [ObjectSummary(key=key, size=4)] == list(client.list(bucket, ""))


@pytest.mark.parametrize("key", ODD_KEYS, ids=ascii)
def test_the_strict_double_takes_every_key(double: S3Double, key: str) -> None:
    client = build_harness(double.url).client
    client.put("bucket", key, b"body")
    assert b"body" == client.get("bucket", key, max_bytes=10)
    assert [key] == [summary.key for summary in client.list("bucket", key)]
    assert [key] == list(double.buckets["bucket"])


def test_large_files_are_the_same_for_boto3(
    server: S3Server, new_bucket: Callable[[S3Server], str], tmp_path: Path
) -> None:
    client, boto3, bucket = client_of(server), server.boto3(), new_bucket(server)
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(os.urandom(1 << 20) * 40 + b"the end")
    transfers = Transfers(client, concurrency=4, check=unchecked)
    upload = Upload(bucket=bucket, key="large", open=lambda: os.open(source, os.O_RDONLY))
    transfers.upload_all([upload])
    assert source.read_bytes() == boto3.get_object(Bucket=bucket, Key="large")["Body"].read()
    transfers.download_all([download_to(copy, key="large", bucket=bucket)])
    assert source.read_bytes() == copy.read_bytes()
    with client.open(bucket, "large") as stream:
        assert source.read_bytes() == stream.read()


def test_a_large_object_with_one_checksum_is_read_where_boto3_fails(
    rclone: S3Server, bucket: str, tmp_path: Path
) -> None:
    # rclone sends the checksum of the whole with each range, and status 200.
    body = os.urandom(1 << 20) * 30
    rclone.boto3().put_object(Bucket=bucket, Key="key", Body=body, ChecksumCRC32=encode_crc32(body))
    transfers = Transfers(client_of(rclone), concurrency=4, check=unchecked)
    transfers.download_all([download_to(tmp_path / "copy", key="key", bucket=bucket)])
    assert body == (tmp_path / "copy").read_bytes()


def test_a_bucket_is_looked_at_and_written_to_without_a_trace(
    server: S3Server, new_bucket: Callable[[S3Server], str]
) -> None:
    bucket, client = new_bucket(server), client_of(server)
    client.head_bucket(bucket)
    client.put(bucket, "kept", b"")
    client.probe(bucket, "a prefix/")
    assert ["kept"] == [summary.key for summary in client.list(bucket, "")]
    for refused in (client.head_bucket, lambda name: client.probe(name, "x/")):
        with pytest.raises(ServiceError) as caught:
            refused(f"{bucket}-none")
        assert 404 == caught.value.status


def test_metadata_come_back_under_their_names(
    server: S3Server, new_bucket: Callable[[S3Server], str]
) -> None:
    client, bucket = client_of(server), new_bucket(server)
    client.put(bucket, "key", b"{}", metadata={"signature_hmac_sha256": "00ff"})
    head = client.head(bucket, "key")
    assert (2, {"signature_hmac_sha256": "00ff"}) == (head.size, head.metadata)
    stored = server.boto3().head_object(Bucket=bucket, Key="key")["Metadata"]
    assert {"signature_hmac_sha256": "00ff"} == {k.lower(): v for k, v in stored.items()}


@pytest.mark.parametrize("value", ["a\r\nx-amz-acl: public-read", "a\nb", "é\u2026"], ids=ascii)
def test_metadata_cannot_add_header_fields(double: S3Double, value: str) -> None:
    client = build_harness(double.url).client
    with pytest.raises(ValueError):
        client.put("bucket", "key", b"", metadata={"name": value})
    assert [] == double.seen


@pytest.mark.parametrize("number", [0, 1, 1000, 1001, 2500])
def test_listings_go_on_over_all_pages(double: S3Double, number: int) -> None:
    keys = sorted(f"p/{n} +é" for n in range(number))
    double.buckets["bucket"] = {key: Object(body=b"x") for key in [*keys, "other"]}
    client = build_harness(double.url).client
    assert keys == [summary.key for summary in client.list("bucket", "p/")]
    assert max(1, -(-number // 1000)) == len(double.seen)


def test_a_listing_that_repeats_itself_is_refused(double: S3Double) -> None:
    double.buckets["bucket"] = {str(n): Object(body=b"x") for n in range(5)}
    double.page_size = 2

    def forget(exchange: Exchange) -> None:
        exchange.query.pop("continuation-token", None)
        exchange.answer()

    double.faults = [forget] * 5
    with pytest.raises(RemoteError, match="circles"):
        list(build_harness(double.url).client.list("bucket", ""))
    assert 2 == len(double.seen)


def test_an_object_that_is_too_long_is_refused_unread(double: S3Double) -> None:
    double.buckets["bucket"]["key"] = Object(body=b"x" * 11)
    client = build_harness(double.url).client
    with pytest.raises(RemoteError, match="s3://bucket/key is longer than 10 bytes"):
        client.get("bucket", "key", max_bytes=10)
    assert b"x" * 11 == client.get("bucket", "key", max_bytes=11)


MISSING_KEY = (
    "An error occurred (404) when calling the HeadObject operation: Not Found "
    "(NoSuchKey: The specified key does not exist.; s3://bucket/no; request id REQUEST1; "
    "host id HOST1)"
)


def test_a_missing_object_is_told_in_the_words_that_users_know(
    double: S3Double, tmp_path: Path
) -> None:
    harness = build_harness(double.url)
    for read in (
        lambda: harness.client.get("bucket", "no", max_bytes=1),
        lambda: harness.client.open("bucket", "no"),
        lambda: harness.download(tmp_path / "no", "no"),
    ):
        with pytest.raises(ServiceError) as caught:
            read()
        assert MISSING_KEY == str(caught.value)
    assert [] == list(tmp_path.iterdir())


ERRORS = {
    "head": (
        lambda client: client.head("bucket", "no"),
        "An error occurred (404) when calling the HeadObject operation: Not Found (s3://bucket/no)",
    ),
    "bucket": (
        lambda client: client.get("nobucket", "k", max_bytes=1),
        "An error occurred (404) when calling the HeadObject operation: Not Found (NoSuchBucket: "
        "The specified bucket does not exist; s3://nobucket/k; request id REQUEST1; host id HOST1)",
    ),
    "list": (
        lambda client: list(client.list("nobucket", "")),
        "An error occurred (NoSuchBucket) when calling the ListObjectsV2 operation: "
        "The specified bucket does not exist (s3://nobucket/; request id REQUEST1; host id HOST1)",
    ),
    "put": (
        lambda client: client.put("nobucket", "k", b""),
        "An error occurred (NoSuchBucket) when calling the PutObject operation: "
        "The specified bucket does not exist (s3://nobucket/k; request id REQUEST1; host id HOST1)",
    ),
}


@pytest.mark.parametrize(("call", "expected"), ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line_that_names_the_request(
    double: S3Double, call: Callable[[object], object], expected: str
) -> None:
    with pytest.raises(ServiceError) as caught:
        call(build_harness(double.url).client)
    assert expected == str(caught.value)


def test_errors_tell_how_often_was_tried_and_stay_on_one_line(double: S3Double) -> None:
    double.faults = [refuse(503, "SlowDown", message="Please\n  wait.")] * 5
    with pytest.raises(ServiceError) as caught:
        build_harness(double.url).client.put("bucket", "key", b"")
    assert (
        "An error occurred (SlowDown) when calling the PutObject operation (reached max retries: "
        "4): Please wait. (s3://bucket/key; request id REQUEST1; host id HOST1)"
    ) == str(caught.value)


def test_a_result_is_retried_harder_than_anything_else(double: S3Double) -> None:
    client = build_harness(double.url, attempts=1).client
    double.faults = [refuse(500)] * 11
    client.put("bucket", "key", b"result", persistent=True)
    assert b"result" == double.buckets["bucket"]["key"].body


def test_a_result_is_stored_even_after_the_request_to_stop(double: S3Double) -> None:
    client = build_harness(double.url, check=stopping(lambda: True)).client
    double.faults = [refuse(500)] * 2
    client.put("bucket", "key", b"result", persistent=True)
    assert b"result" == double.buckets["bucket"]["key"].body
    with pytest.raises(Stopped):
        client.put("bucket", "key", b"other")


def flip(status: int, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    return status, body[:-1] + bytes([body[-1] ^ 1])


def test_a_damaged_object_is_fetched_once_more_then_refused(double: S3Double) -> None:
    double.buckets["bucket"]["key"] = Object(body=b"content")
    client = build_harness(double.url).client
    double.faults = [answer_with(flip)]
    assert b"content" == client.get("bucket", "key", max_bytes=10)
    double.faults = [answer_with(flip)] * 2
    with pytest.raises(IntegrityError, match="s3://bucket/key"):
        client.get("bucket", "key", max_bytes=10)
    assert 4 == len(double.seen)


def test_a_stream_resumes_at_the_byte_reached(double: S3Double) -> None:
    body = os.urandom(500_000)
    double.buckets["bucket"]["key"] = Object(body=body)
    harness = build_harness(double.url)
    double.faults = [truncate(100_000), truncate(0), drop(), refuse(503, "SlowDown")]
    with harness.client.open("bucket", "key") as stream:
        assert body == stream.read()
    starts = [seen.headers.get("range", "") for seen in double.seen]
    assert ["", *["bytes=100000-499999"] * 4] == starts
    assert {double.buckets["bucket"]["key"].etag} == {
        s.headers["if-match"] for s in double.seen[1:]
    }


def test_a_stream_is_verified_as_its_last_byte_is_read(double: S3Double) -> None:
    double.buckets["bucket"]["key"] = Object(body=b"content" * 100_000)
    double.faults = [answer_with(flip)]
    with build_harness(double.url).client.open("bucket", "key") as stream:
        assert 500_000 == len(stream.read(500_000))
        with pytest.raises(IntegrityError):
            stream.read()


def test_a_stream_of_an_object_that_changed_is_not_mixed(double: S3Double) -> None:
    double.buckets["bucket"]["key"] = Object(body=b"a" * 500_000)
    double.faults = [truncate(100_000)]
    with build_harness(double.url).client.open("bucket", "key") as stream:
        double.buckets["bucket"]["key"] = Object(body=b"b" * 500_000)
        with pytest.raises(ServiceError, match="PreconditionFailed"):
            stream.read()


def test_a_stream_that_is_left_early_does_not_poison_its_connection(double: S3Double) -> None:
    double.buckets["bucket"]["key"] = Object(body=os.urandom(3_000_000))
    client = build_harness(double.url).client
    with client.open("bucket", "key") as stream:
        stream.read(10)
    assert 3_000_000 == len(client.get("bucket", "key", max_bytes=3_000_000))


def test_an_empty_stream_ends_at_once(double: S3Double) -> None:
    double.buckets["bucket"]["key"] = Object(body=b"")
    with build_harness(double.url).client.open("bucket", "key") as stream:
        assert b"" == stream.read()


def test_no_secret_is_logged_or_told(
    server: S3Server, new_bucket: Callable[[S3Server], str]
) -> None:
    bucket, lines = new_bucket(server), list[str]()
    client = client_of(server, lines)
    client.put(bucket, "key", b"body", metadata={"name": "value"})
    client.get(bucket, "key", max_bytes=10)
    list(client.list(bucket, ""))
    with pytest.raises(ServiceError) as caught:
        client.get(bucket, "no", max_bytes=1)
    text = "\n".join([*lines, str(caught.value), repr(caught.value), repr(vars(client))])
    assert [] == [word for word in (SECRET_KEY, "Signature=", "AWS4-HMAC") if word in text]


def test_no_secret_is_logged_when_everything_fails(double: S3Double) -> None:
    host = urlsplit(double.url).netloc
    proxied = {"http_proxy": "http://user:PROXYSECRET@127.0.0.1:9", "no_proxy": "x"}
    for environ in ({}, proxied):
        url = double.url if not environ else f"http://not.near:{host.rpartition(':')[2]}"
        harness = build_harness(url, environ=environ)
        double.faults = [refuse(403, "SignatureDoesNotMatch"), *[drop(), refuse(500)] * 3]
        for _ in range(2):
            with pytest.raises((ServiceError, TransportError)) as caught:
                harness.client.put("bucket", "key", b"body")
            text = "\n".join([*harness.lines, str(caught.value), repr(caught.value)])
            words = (SECRET_KEY, "PROXYSECRET", "Signature=", "AWS4")
            assert [] == [word for word in words if word in text]
        assert {"DEBUG", "WARNING"} == {line.partition(" ")[0] for line in harness.lines}
