"""Each row of the table of retries, played against the strict double."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from shim.aws.sigv4 import Credentials
from shim.http.attempts import delay_seconds
from shim.http.errors import CertificateError, RemoteError, StaleConnection, TransportError
from shim.http.stream import unchecked
from shim.s3 import retries
from shim.s3.checksums import ChecksumPolicy
from shim.s3.errors import ObjectChanged, ServiceError
from shim.s3.retries import Kind
from shim.s3.throttle import Throttle
from shim.s3.transfer import Transfers
from tests.fakes.s3_double import (
    Exchange,
    Fault,
    Object,
    S3Double,
    drop,
    refuse,
    truncate,
    work,
)
from tests.s3_clients import OneIdentity, build_harness, download_to, running_double
from tests.s3_servers import ACCESS_KEY, SECRET_KEY
from tests.support import free_port

HTML = "<html><body>Bad Gateway</body></html>"


@pytest.fixture
def double() -> Iterator[S3Double]:
    with running_double() as double:
        double.buckets["bucket"]["key"] = Object(body=b"content")
        yield double


def html(status: int) -> Fault:
    return lambda exchange: exchange.send(status, HTML.encode(), {"Content-Type": "text/html"})


def garbage(exchange: Exchange) -> None:
    exchange.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
    exchange.drop()


REPEATED = {
    "503 SlowDown": (refuse(503, "SlowDown"), 1.0),
    "503 ServiceUnavailable": (refuse(503, "ServiceUnavailable"), 1.0),
    "429": (refuse(429), 1.0),
    "400 Throttling": (refuse(400, "Throttling"), 1.0),
    "400 ThrottlingException": (refuse(400, "ThrottlingException"), 1.0),
    "503 RequestLimitExceeded": (refuse(503, "RequestLimitExceeded"), 1.0),
    "509 BandwidthLimitExceeded": (refuse(509, "BandwidthLimitExceeded"), 1.0),
    "509": (refuse(509), 1.0),
    "500 InternalError": (refuse(500, "InternalError"), 0.05),
    "500 without a body": (refuse(500), 0.05),
    "502 HTML": (html(502), 0.05),
    "503 HTML": (html(503), 0.05),
    "504": (refuse(504), 0.05),
    "409 OperationAborted": (refuse(409, "OperationAborted"), 0.05),
    "409 ConditionalRequestConflict": (refuse(409, "ConditionalRequestConflict"), 0.05),
    "400 RequestTimeout": (refuse(400, "RequestTimeout"), 0.05),
    "end without an answer": (drop(), 0.1),
    "reset": (drop(reset=True), 0.1),
    "not HTTP": (garbage, 0.1),
    "truncated body": (truncate(3), 0.1),
}


@pytest.mark.parametrize(("fault", "base"), REPEATED.values(), ids=REPEATED)
def test_temporary_failures_are_repeated_with_growing_delays(
    double: S3Double, fault: Fault, base: float
) -> None:
    harness = build_harness(double.url)
    double.faults = [fault] * 3
    assert b"content" == harness.client.get("bucket", "key", max_bytes=100)
    assert ["GetObject"] * 4 == double.operations()
    assert 0 < sum(harness.sleeps) <= base * (1 + 2 + 4)


@pytest.mark.parametrize(("fault", "base"), REPEATED.values(), ids=REPEATED)
def test_temporary_failures_end_with_the_attempts(
    double: S3Double, fault: Fault, base: float
) -> None:
    harness = build_harness(double.url, attempts=3)
    double.faults = [fault] * 9
    with pytest.raises((ServiceError, TransportError)) as caught:
        harness.client.get("bucket", "key", max_bytes=100)
    assert (3, 2) == (len(double.seen), caught.value.retries)


FINAL = {
    "403 AccessDenied": refuse(403, "AccessDenied"),
    "403 HTML of a proxy": html(403),
    "404 NoSuchKey": refuse(404, "NoSuchKey"),
    "404 NoSuchBucket": refuse(404, "NoSuchBucket"),
    "405": refuse(405, "MethodNotAllowed"),
    "409": refuse(409, "BucketAlreadyExists"),
    "400 KeyTooLongError": refuse(400, "KeyTooLongError"),
}


@pytest.mark.parametrize("fault", FINAL.values(), ids=FINAL)
def test_final_answers_are_not_repeated(double: S3Double, fault: Fault) -> None:
    harness = build_harness(double.url)
    double.faults = [fault]
    with pytest.raises(ServiceError):
        harness.client.get("bucket", "key", max_bytes=100)
    assert (1, []) == (len(double.seen), harness.sleeps)


@pytest.mark.parametrize("code", ["BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch"])
def test_a_damaged_body_is_sent_once_more(double: S3Double, code: str) -> None:
    harness = build_harness(double.url)
    double.faults = [refuse(400, code)]
    harness.client.put("bucket", "new", b"body")
    assert b"body" == double.buckets["bucket"]["new"].body
    double.faults = [refuse(400, code)] * 2
    with pytest.raises(ServiceError, match=code):
        harness.client.put("bucket", "new", b"body")
    assert 2 + 2 == len(double.seen)


def test_a_kept_connection_that_ended_costs_no_attempt(double: S3Double) -> None:
    harness = build_harness(double.url, attempts=1)
    for _ in range(3):
        assert b"content" == harness.client.get("bucket", "key", max_bytes=100)
        double.faults = [drop()]
    assert ["GetObject"] * 5 == double.operations()
    assert [1, 1, 2, 2, 3] == [seen.connection for seen in double.seen]
    assert [] == harness.sleeps


def test_nobody_listening_is_repeated_and_names_the_url() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    harness = build_harness(url, attempts=3)
    with pytest.raises(TransportError) as caught:
        harness.client.get("bucket", "key", max_bytes=100)
    expected = f"Could not connect to the endpoint URL: {url}/bucket/key (Connection refused)"
    assert expected == str(caught.value)
    assert 2 == caught.value.retries


def test_a_name_without_address_is_repeated() -> None:
    harness = build_harness("http://nowhere.invalid:9", attempts=2)
    with pytest.raises(TransportError, match="Could not connect to the endpoint URL"):
        harness.client.get("bucket", "key", max_bytes=100)
    assert 1 == len(harness.sleeps)


@pytest.mark.parametrize("skew_seconds", [3600, -3600, 90 * 86400], ids=str)
def test_the_clock_is_corrected_once_and_for_all(skew_seconds: float) -> None:
    with running_double(skew_seconds=skew_seconds) as double:
        double.buckets["bucket"]["key"] = Object(body=b"content")
        harness = build_harness(double.url, attempts=1)
        for _ in range(2):
            assert b"content" == harness.client.get("bucket", "key", max_bytes=100)
        assert ["GetObject"] * 3 == double.operations()


def test_a_clock_that_is_off_is_seen_behind_another_code() -> None:
    with running_double(skew_seconds=3600) as double:
        double.buckets["bucket"]["key"] = Object(body=b"content")
        harness = build_harness(double.url)
        double.faults = [refuse(400, "AccessDenied")]
        assert b"content" == harness.client.get("bucket", "key", max_bytes=100)
        assert 2 == len(double.seen)


OFF = {"date": "Thu, 26 Nov 2026 13:00:00 GMT"}
NOON = datetime(2026, 11, 26, 12, tzinfo=UTC)
ELSE = {"x-amz-bucket-region": "us-east-2"}
KINDS = [
    *((status, "AccessDenied", OFF, Kind.CLOCK) for status in (400, 403)),
    *((status, "Odd", OFF, Kind.FINAL) for status in (401, 404, 405, 409, 412, 416)),
    (500, "Odd", OFF, Kind.TRANSIENT),
    (403, "AccessDenied", {"date": "Thu, 26 Nov 2026 12:03:59 GMT"}, Kind.FINAL),
    (403, "AccessDenied", {"date": "Thu, 26 Nov 2026 11:55:59 GMT"}, Kind.CLOCK),
    (403, "AccessDenied", {"date": "yesterday"}, Kind.FINAL),
    *((status, "Odd", {}, Kind.REGION) for status in (301, 302, 307)),
    (304, "Odd", ELSE, Kind.FINAL),
    (400, "AuthorizationHeaderMalformed", ELSE, Kind.REGION),
    *((status, "AccessDenied", ELSE, Kind.FINAL) for status in (401, 403, 404, 409)),
    (501, "NotImplemented", {}, Kind.CHECKSUMS),
    (403, "NotImplemented", {}, Kind.FINAL),
]


@pytest.mark.parametrize(("status", "code", "headers", "kind"), KINDS)
def test_what_a_failure_calls_for_is_said_by_the_table_alone(
    status: int, code: str, headers: dict[str, str], kind: Kind
) -> None:
    error = ServiceError(
        operation="GetObject",
        bucket="b",
        key="k",
        status=status,
        code=code,
        message="",
        headers=headers,
        region=headers.get("x-amz-bucket-region", ""),
    )
    assert kind is retries.kind_of(error, now=NOON)


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidToken", "TokenRefreshRequired"])
def test_expired_credentials_are_refreshed_once(code: str) -> None:
    old = Credentials(access_key="OLD", secret_key="OLD", token="OLD")
    new = Credentials(access_key=ACCESS_KEY, secret_key=SECRET_KEY)
    with running_double() as double:
        double.buckets["bucket"]["key"] = Object(body=b"content")
        harness = build_harness(double.url, attempts=1, credentials=OneIdentity(old, new))
        double.faults = [refuse(400, code)]
        assert b"content" == harness.client.get("bucket", "key", max_bytes=100)
        assert 2 == len(double.seen)


def test_expired_credentials_without_others_are_final(double: S3Double) -> None:
    harness = build_harness(double.url)
    double.faults = [refuse(400, "ExpiredToken", message="The provided token has expired.")]
    with pytest.raises(ServiceError, match=r"\(ExpiredToken\).*The provided token has expired\."):
        harness.client.get("bucket", "key", max_bytes=100)
    assert 1 == len(double.seen)


REDIRECTS = {
    "301 and header": refuse(
        301, "PermanentRedirect", headers={"x-amz-bucket-region": "us-east-2"}
    ),
    "307 and region": refuse(307, "TemporaryRedirect", extra="<Region>us-east-2</Region>"),
    "302 and header": refuse(302, headers={"x-amz-bucket-region": "us-east-2"}),
    "400 and region": refuse(
        400, "AuthorizationHeaderMalformed", extra="<Region>us-east-2</Region>"
    ),
    "400 and header": refuse(
        400, "IllegalLocationConstraintException", headers={"x-amz-bucket-region": "us-east-2"}
    ),
}


@pytest.mark.parametrize("fault", REDIRECTS.values(), ids=REDIRECTS)
def test_a_bucket_of_another_region_is_asked_for_there(fault: Fault) -> None:
    with running_double(region="us-east-2") as double:
        double.buckets["bucket"]["key"] = Object(body=b"content")
        harness = build_harness(double.url, attempts=1)
        double.faults = [fault]
        for _ in range(2):
            assert b"content" == harness.client.get("bucket", "key", max_bytes=100)
        assert ["eu-central-1", "us-east-2", "us-east-2"] == [s.region for s in double.seen]


def test_threads_that_learn_a_region_together_all_go_on(tmp_path: Path) -> None:
    with running_double(region="us-east-2") as double:
        for n in range(20):
            double.buckets["bucket"][str(n)] = Object(body=b"content")
        harness = build_harness(double.url, attempts=1)
        barrier = threading.Barrier(4)

        def redirect_together(exchange: Exchange) -> None:
            barrier.wait(10)
            exchange.answer()

        double.faults = [redirect_together] * 4
        transfers = Transfers(harness.client, concurrency=4, check=unchecked)
        transfers.download_all(download_to(tmp_path / str(n), key=str(n)) for n in range(20))
        assert 20 == len(list(tmp_path.iterdir()))
        assert 4 + 20 == len(double.seen)


def test_a_head_request_learns_the_region_from_the_header() -> None:
    with running_double(region="us-east-2") as double:
        double.buckets["bucket"]["key"] = Object(body=b"content")
        harness = build_harness(double.url)
        double.faults = [refuse(400, headers={"x-amz-bucket-region": "us-east-2"})]
        assert 7 == harness.client.head("bucket", "key").size


def test_a_redirect_is_never_followed(double: S3Double) -> None:
    with running_double() as other:
        harness = build_harness(double.url)
        double.faults = [refuse(307, headers={"Location": f"{other.url}/bucket/key"})]
        with pytest.raises(ServiceError, match="307"):
            harness.client.get("bucket", "key", max_bytes=100)
        assert (["GetObject", "HeadBucket"], []) == (double.operations(), other.operations())


ELSEWHERE = refuse(301, "PermanentRedirect", extra="<Endpoint>bucket.s3.example</Endpoint>")


@pytest.mark.parametrize(
    "answer",
    [work, refuse(301, headers={"x-amz-bucket-region": "us-east-2"})],
    ids=["answered", "redirected"],
)
def test_a_redirect_that_names_only_an_endpoint_has_the_bucket_asked_for_its_region(
    answer: Fault,
) -> None:
    with running_double(region="us-east-2") as double:
        double.buckets["bucket"]["key"] = Object(body=b"content")
        harness = build_harness(double.url, attempts=1)
        refused = refuse(403, "", headers={"x-amz-bucket-region": "us-east-2"})
        double.faults = [ELSEWHERE, refused if answer is work else answer]
        for _ in range(2):
            assert b"content" == harness.client.get("bucket", "key", max_bytes=100)
        asked = [seen.operation for seen in double.seen if seen.operation == "HeadBucket"]
        assert (1 if answer is work else 2) == len(asked)


def test_a_bucket_that_does_not_tell_its_region_is_asked_once(double: S3Double) -> None:
    harness = build_harness(double.url)
    double.faults = [ELSEWHERE, refuse(301)]
    with pytest.raises(ServiceError, match="PermanentRedirect"):
        harness.client.get("bucket", "key", max_bytes=100)
    assert ["GetObject", "HeadBucket"] == double.operations()


def test_redirects_in_circles_end(double: S3Double) -> None:
    harness = build_harness(double.url)
    regions = itertools.cycle(["us-east-1", "us-east-2"])

    def redirect(exchange: Exchange) -> None:
        exchange.refuse(301, "PermanentRedirect", extra=f"<Region>{next(regions)}</Region>")

    double.faults = [redirect] * 9
    with pytest.raises(ServiceError, match="PermanentRedirect"):
        harness.client.get("bucket", "key", max_bytes=100)
    assert 2 == len(double.seen)


@pytest.mark.parametrize(("header", "least"), [("Retry-After", 3.0), ("x-amz-retry-after", 0.003)])
def test_the_server_may_ask_for_patience(double: S3Double, header: str, least: float) -> None:
    harness = build_harness(double.url)
    double.faults = [refuse(500, headers={header: "3"})]
    harness.client.get("bucket", "key", max_bytes=100)
    assert least <= sum(harness.sleeps) < least + 0.25


def test_patience_has_a_limit() -> None:
    asked = {"retry-after": "86400"}
    assert 20.0 == delay_seconds(
        retries.POLICIES[Kind.TRANSIENT], retry=1, headers=asked, random=0.5
    )


DELAYS = [
    (Kind.THROTTLED, 1, 1.0),
    (Kind.THROTTLED, 3, 4.0),
    (Kind.THROTTLED, 99, 20.0),
    (Kind.TRANSIENT, 1, 0.05),
    (Kind.TRANSPORT, 2, 0.2),
    (Kind.STALE, 1, 0.0),
    (Kind.CLOCK, 1, 0.0),
]


@pytest.mark.parametrize(("kind", "retry", "longest"), DELAYS)
def test_delays_double_up_to_twenty_seconds(kind: Kind, retry: int, longest: float) -> None:
    halves = delay_seconds(retries.POLICIES[kind], retry=retry, headers={}, random=0.5)
    assert longest / 2 == pytest.approx(halves)


@pytest.mark.parametrize(
    ("environ", "profile", "expected"),
    [
        ({}, {}, 5),
        ({"AWS_RETRY_MODE": "standard"}, {}, 3),
        ({"AWS_RETRY_MODE": "adaptive"}, {}, 3),
        ({"AWS_MAX_ATTEMPTS": "7", "AWS_RETRY_MODE": "standard"}, {}, 7),
        ({"AWS_MAX_ATTEMPTS": ""}, {"max_attempts": "2"}, 2),
        ({}, {"retry_mode": "standard"}, 3),
    ],
)
def test_attempts_are_configured_as_for_botocore(
    environ: dict[str, str], profile: dict[str, str], expected: int
) -> None:
    assert expected == retries.configured_attempts(environ, profile)


@pytest.mark.parametrize(
    "environ",
    [
        {"AWS_MAX_ATTEMPTS": "0"},
        {"AWS_MAX_ATTEMPTS": "many"},
        {"AWS_RETRY_MODE": "fast"},
        {"AWS_MAX_ATTEMPTS": "9" * 5000},
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_named(environ: dict[str, str]) -> None:
    ((name, _),) = environ.items()
    with pytest.raises(RemoteError, match=name):
        retries.configured_attempts(environ, {})


KINDS = [
    (StaleConnection(), Kind.STALE),
    (TransportError(), Kind.TRANSPORT),
    (CertificateError(), Kind.FINAL),
    (ObjectChanged(), Kind.FINAL),
]


@pytest.mark.parametrize(("error", "kind"), KINDS)
def test_kinds_of_failures_without_an_answer(error: RemoteError, kind: Kind) -> None:
    assert kind is retries.kind_of(error, now=datetime.now(UTC))


@pytest.mark.parametrize("date", ["", "yesterday", "Sun, 99 Nov 2026 00:00:00 GMT"])
def test_a_date_that_cannot_be_read_says_nothing_about_the_clock(date: str) -> None:
    assert timedelta(0) == retries.skew_of({"date": date}, now=datetime.now(UTC))


def test_throttling_halves_what_is_under_way_and_successes_bring_it_back() -> None:
    pace = Throttle(concurrency=8, monotonic=lambda: 0.0)
    assert [True] * 8 + [False] == [pace.try_enter() for _ in range(9)]
    pace.slow_down(0)
    for _ in range(8):
        pace.leave(is_success=False)
    assert [True] * 4 + [False] == [pace.try_enter() for _ in range(5)]
    for _ in range(4):
        pace.leave(is_success=True)
    assert [True] * 5 + [False] == [pace.try_enter() for _ in range(6)]


# --- warnings ---


def warnings_of(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("WARNING ")]


@pytest.mark.parametrize(("fault", "base"), REPEATED.values(), ids=REPEATED)
def test_attempts_from_the_third_on_are_warned_of(
    double: S3Double, fault: Fault, base: float
) -> None:
    harness = build_harness(double.url)
    double.faults = [fault] * 4
    assert b"content" == harness.client.get("bucket", "key", max_bytes=100)
    expected = r"WARNING GetObject of s3://bucket/key: attempt %d of 5 failed; the next attempt "
    expected += r"follows in \d+\.\d s: \S.*"
    found = warnings_of(harness.lines)
    assert 2 == len(found)
    for number, line in zip((3, 4), found, strict=True):
        assert re.fullmatch(expected % number, line)


def test_a_refused_connection_is_warned_of() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    harness = build_harness(url)
    with pytest.raises(TransportError):
        harness.client.put("bucket", "key", b"result", persistent=True)
    found = warnings_of(harness.lines)
    assert [f"attempt {n} of 12" for n in range(3, 12)] == [
        re.findall("attempt .* of 12", line)[0] for line in found
    ]
    assert all(f"{url}/bucket/key (Connection refused)" in line for line in found)


def test_bodies_that_break_off_again_and_again_are_warned_of(
    double: S3Double, tmp_path: Path
) -> None:
    double.buckets["bucket"]["key"] = Object(body=bytes(400_000))
    for read in ("download", "stream"):
        harness = build_harness(double.url)
        double.faults = [truncate(80_000)] * 4
        if read == "download":
            harness.download(tmp_path / "file")
        else:
            harness.client.open("bucket", "key").read()
        found = warnings_of(harness.lines)
        assert 2 == len(found)
        for number, line in zip((3, 4), found, strict=True):
            assert "s3://bucket/key" in line and f"broke off, {number} of 20 times" in line
            assert "; the next attempt follows in " in line


def test_a_single_failure_that_took_long_is_warned_of(double: S3Double) -> None:
    harness = build_harness(double.url)

    def take_long(exchange: Exchange) -> None:
        harness.sleeps.append(30.0)
        exchange.refuse(500)

    double.faults = [take_long]
    harness.client.get("bucket", "key", max_bytes=100)
    assert 1 == len(warnings_of(harness.lines))


def test_what_is_put_right_at_once_is_not_warned_of(double: S3Double) -> None:
    harness = build_harness(double.url)
    for _ in range(5):
        harness.client.get("bucket", "key", max_bytes=100)
        double.faults = [drop()]
    double.faults = [refuse(500)] * 2
    harness.client.get("bucket", "key", max_bytes=100)
    assert [] == warnings_of(harness.lines)


# --- stores that refuse checksums ---

UNKNOWN_HEADERS = {
    "501": refuse(501, "NotImplemented", message="A header implies what is not implemented"),
    "501 without a body": refuse(501),
    "400 InvalidArgument": refuse(
        400, "InvalidArgument", message="Unsupported header 'x-amz-checksum'"
    ),
    "400 InvalidRequest": refuse(400, "InvalidRequest"),
    "400 without a body": refuse(400),
}


def has_checksums(headers: Mapping[str, str]) -> bool:
    return any(name.startswith("x-amz-checksum-") for name in headers)


@pytest.fixture(params=UNKNOWN_HEADERS.values(), ids=list(UNKNOWN_HEADERS))
def plain_store(double: S3Double, request: pytest.FixtureRequest) -> S3Double:
    """A store that refuses each request with a header field about checksums."""

    def answer(exchange: Exchange) -> None:
        request.param(exchange) if has_checksums(exchange.fields) else exchange.answer()

    double.always = answer
    return double


def test_a_store_that_refuses_checksums_is_asked_once_without_and_remembered(
    plain_store: S3Double, tmp_path: Path
) -> None:
    harness = build_harness(plain_store.url, attempts=1)
    client = harness.client
    for _ in range(2):
        assert b"content" == client.get("bucket", "key", max_bytes=10)
        assert b"content" == harness.download(tmp_path / "file")
        with client.open("bucket", "key") as stream:
            assert b"content" == stream.read()
    assert [True] + [False] * 6 == [has_checksums(seen.headers) for seen in plain_store.seen]
    (warning,) = warnings_of(harness.lines)
    assert "AWS_RESPONSE_CHECKSUM_VALIDATION=when_required" in warning
    plain_store.seen.clear()
    for size in (10, 1 << 20, 33 << 20):
        (tmp_path / "source").write_bytes(bytes(size))
        harness.upload(tmp_path / "source", f"new/{size}")
        assert size == len(plain_store.buckets["bucket"][f"new/{size}"].body)
    client.put("bucket", "result", b"result", persistent=True)
    assert [True] + [False] * 8 == [has_checksums(seen.headers) for seen in plain_store.seen]
    assert "content-md5" in plain_store.seen[-1].headers
    (_, warning) = warnings_of(harness.lines)
    assert "AWS_REQUEST_CHECKSUM_CALCULATION=when_required" in warning


def test_a_large_file_goes_to_a_store_that_refuses_checksums(
    plain_store: S3Double, tmp_path: Path
) -> None:
    harness = build_harness(plain_store.url, attempts=1)
    (tmp_path / "source").write_bytes(bytes(33 << 20))
    harness.upload(tmp_path / "source")
    assert 33 << 20 == len(plain_store.buckets["bucket"]["key"].body)
    assert ["CreateMultipartUpload"] * 2 == plain_store.operations()[:2]


@pytest.mark.parametrize("fault", UNKNOWN_HEADERS.values(), ids=list(UNKNOWN_HEADERS))
def test_a_refusal_for_another_reason_teaches_nothing(double: S3Double, fault: Fault) -> None:
    harness = build_harness(double.url)
    double.faults = [fault] * 2
    with pytest.raises(ServiceError):
        harness.client.get("bucket", "key", max_bytes=10)
    assert b"content" == harness.client.get("bucket", "key", max_bytes=10)
    double.faults = [fault]
    with pytest.raises(ServiceError):
        harness.client.head("bucket", "key")  # there is nothing to leave out
    assert [True, False, True, False] == [has_checksums(s.headers) for s in double.seen]
    assert [] == warnings_of(harness.lines)


def test_no_checksum_is_sent_or_asked_for_where_none_is_required(
    double: S3Double, tmp_path: Path
) -> None:
    off = ChecksumPolicy(request_checksum=False, response_checksum=False)
    harness = build_harness(double.url, checksums=off)

    def lie(exchange: Exchange) -> None:
        exchange._describe = lambda _: {  # type: ignore[method-assign, assignment]
            "x-amz-checksum-crc32": "AAAAAQ=="
        }
        exchange.answer()

    double.always = lie
    assert b"content" == harness.client.get("bucket", "key", max_bytes=10)
    assert b"content" == harness.download(tmp_path / "file")
    assert b"content" == harness.client.open("bucket", "key").read()
    (tmp_path / "source").write_bytes(bytes(33 << 20))
    harness.upload(tmp_path / "source", "large")
    harness.client.put("bucket", "result", b"result")
    assert [] == [seen for seen in double.seen if has_checksums(seen.headers)]
    assert (33 << 20, b"result") == (
        len(double.buckets["bucket"]["large"].body),
        double.buckets["bucket"]["result"].body,
    )
