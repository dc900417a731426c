from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta, timezone

import botocore.auth
import botocore.credentials
import pytest
from botocore.awsrequest import AWSRequest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shim.aws.sigv4 import (
    EMPTY_PAYLOAD_HASH,
    UNSIGNED_PAYLOAD,
    Credentials,
    SignedRequest,
    canonical_query_string,
    canonical_request,
    credential_scope,
    encode_key,
    sign,
    signing_key,
    string_to_sign,
)

# https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html, the four examples.
EXAMPLE_TIME = datetime(2013, 5, 24, tzinfo=UTC)
EXAMPLE_CREDENTIALS = Credentials(
    access_key="AKIAIOSFODNN7EXAMPLE", secret_key="wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
)
EXAMPLE_HOST = "examplebucket.s3.amazonaws.com"
EXAMPLES = [
    pytest.param(
        ("GET", "/test.txt", [], {"Range": "bytes=0-9"}, EMPTY_PAYLOAD_HASH),
        "GET\n/test.txt\n\nhost:examplebucket.s3.amazonaws.com\nrange:bytes=0-9\n"
        "x-amz-content-sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\n"
        "x-amz-date:20130524T000000Z\n\nhost;range;x-amz-content-sha256;x-amz-date\n"
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "7344ae5b7ee6c3e7e6b0fe0640412a37625d1fbfff95c48bbb2dc43964946972",
        "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
        id="GetObject",
    ),
    pytest.param(
        (
            "PUT",
            "/test%24file.text",
            [],
            {
                "Date": "Fri, 24 May 2013 00:00:00 GMT",
                "x-amz-storage-class": "REDUCED_REDUNDANCY",
            },
            hashlib.sha256(b"Welcome to Amazon S3.").hexdigest(),
        ),
        "PUT\n/test%24file.text\n\ndate:Fri, 24 May 2013 00:00:00 GMT\n"
        "host:examplebucket.s3.amazonaws.com\n"
        "x-amz-content-sha256:44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072\n"
        "x-amz-date:20130524T000000Z\nx-amz-storage-class:REDUCED_REDUNDANCY\n\n"
        "date;host;x-amz-content-sha256;x-amz-date;x-amz-storage-class\n"
        "44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072",
        "9e0e90d9c76de8fa5b200d8c849cd5b8dc7a3be3951ddb7f6a76b4158342019d",
        "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
        id="PutObject",
    ),
    pytest.param(
        ("GET", "/", [("lifecycle", "")], {}, EMPTY_PAYLOAD_HASH),
        "GET\n/\nlifecycle=\nhost:examplebucket.s3.amazonaws.com\n"
        "x-amz-content-sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\n"
        "x-amz-date:20130524T000000Z\n\nhost;x-amz-content-sha256;x-amz-date\n"
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "9766c798316ff2757b517bc739a67f6213b4ab36dd5da2f94eaebf79c77395ca",
        "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
        id="GetBucketLifecycle",
    ),
    pytest.param(
        ("GET", "/", [("prefix", "J"), ("max-keys", "2")], {}, EMPTY_PAYLOAD_HASH),
        "GET\n/\nmax-keys=2&prefix=J\nhost:examplebucket.s3.amazonaws.com\n"
        "x-amz-content-sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\n"
        "x-amz-date:20130524T000000Z\n\nhost;x-amz-content-sha256;x-amz-date\n"
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "df57d21db20da04d7fa30298dd4488ba3a2b47ca3a489c74750e0f1e7df1b9b7",
        "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
        id="ListObjects",
    ),
]


@pytest.mark.parametrize(("request_", "canonical", "canonical_digest", "signature"), EXAMPLES)
def test_signs_the_examples_of_aws(
    request_: tuple[str, str, list[tuple[str, str]], dict[str, str], str],
    canonical: str,
    canonical_digest: str,
    signature: str,
) -> None:
    method, path, query, headers, payload_hash = request_
    signed_by_name = {name.lower(): value for name, value in headers.items()} | {
        "host": EXAMPLE_HOST,
        "x-amz-content-sha256": payload_hash,
        "x-amz-date": "20130524T000000Z",
    }
    assert canonical == canonical_request(
        method=method,
        path=path,
        query_string=canonical_query_string(query),
        headers=signed_by_name,
        payload_hash=payload_hash,
    )
    scope = credential_scope(date="20130524", region="us-east-1", service="s3")
    assert (
        "AWS4-HMAC-SHA256\n20130524T000000Z\n20130524/us-east-1/s3/aws4_request\n"
        f"{canonical_digest}"
    ) == string_to_sign(amz_date="20130524T000000Z", scope=scope, canonical_request=canonical)
    signed = sign(
        method=method,
        host=EXAMPLE_HOST,
        path=path,
        query=query,
        headers=headers,
        payload_hash=payload_hash,
        credentials=EXAMPLE_CREDENTIALS,
        region="us-east-1",
        timestamp=EXAMPLE_TIME,
    )
    assert signed.headers["authorization"].endswith(f"Signature={signature}")
    assert signed.headers["authorization"].startswith(
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, "
    )


class FrozenTime(botocore.auth.S3SigV4Auth):
    """botocore's S3 signer at a given second, with a given payload hash."""

    def __init__(
        self, credentials: Credentials, region: str, service: str, payload_hash: str
    ) -> None:
        keys = botocore.credentials.Credentials(
            credentials.access_key, credentials.secret_key, credentials.token
        )
        super().__init__(keys, service, region)
        self.payload_hash = payload_hash

    def payload(self, request: AWSRequest) -> str:
        return self.payload_hash


def sign_with_botocore(
    *, url: str, timestamp: datetime, signer: FrozenTime, method: str, headers: dict[str, str]
) -> str:
    request = AWSRequest(method=method, url=url, headers=headers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.auth, "get_current_datetime", lambda: timestamp)
        signer.add_auth(request)
    return str(request.headers["Authorization"])


ODD_KEYS = [
    "/leading", "//two", "a//b", "a/../b", "./a", "..", ".", "/", "trailing/", "a b", "a+b", "100%",
    "%2F", "a%2Fb", "~tilde", "é", "e\u0301", "日本/語", "😀", "a\nb", "\x01\x7f", "a\tb", "a?b#c",
    "a&b=c", "a;b,c:d", "'\"<>\\^`{|}", "*!()@$", "a" * 1024,
]  # fmt: skip
OPERATIONS = [
    ("GET", []),
    ("PUT", []),
    ("POST", [("uploads", "")]),
    ("PUT", [("partNumber", "12"), ("uploadId", "a+b/c=~ é")]),
    ("GET", [("list-type", "2"), ("prefix", "/a b+%é"), ("continuation-token", "x/y=")]),
]
ENDPOINTS = [
    ("https", "bucket.s3.eu-central-1.amazonaws.com", ""),
    ("http", "127.0.0.1:9000", "/bucket"),
    ("http", "[::1]:9000", "/base/bucket"),
]
keys = st.one_of(
    st.sampled_from(ODD_KEYS),
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
)
queries = st.one_of(
    st.sampled_from([query for _, query in OPERATIONS]),
    st.lists(st.tuples(st.text(st.characters(codec="utf-8"), max_size=4), keys), max_size=3),
)
header_values = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=15)
header_names = st.sampled_from(
    ["Range", "If-Match", "Content-MD5", "Content-Type", "x-amz-checksum-crc32", "X-Amz-Meta-A_b",
     "x-amz-checksum-mode"]
)  # fmt: skip
tokens = st.one_of(st.none(), st.just("FwoGZXIvYXdzE+/=="), header_values.filter(str.strip))


def assert_same_signature(
    *,
    key: str,
    operation: tuple[str, list[tuple[str, str]]],
    endpoint: tuple[str, str, str],
    headers: dict[str, str],
    credentials: Credentials,
    region: str = "eu-central-1",
    service: str = "s3",
    payload_hash: str = EMPTY_PAYLOAD_HASH,
    timestamp: datetime = EXAMPLE_TIME,
) -> None:
    method, query = operation
    scheme, host, base_path = endpoint
    ours = sign(
        method=method,
        host=host,
        path=f"{base_path}/{encode_key(key)}",
        query=query,
        headers=headers,
        payload_hash=payload_hash,
        credentials=credentials,
        region=region,
        service=service,
        timestamp=timestamp,
    )
    theirs = sign_with_botocore(
        url=f"{scheme}://{host}{ours.target}",
        timestamp=timestamp,
        signer=FrozenTime(credentials, region, service, payload_hash),
        method=method,
        headers=headers,
    )
    assert theirs == ours.headers["authorization"]


@pytest.mark.parametrize("token", [None, "FwoGZXIvYXdzE+/=="], ids=["keys", "token"])
@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=["virtual-host", "path-style", "ipv6"])
def test_signs_odd_keys_as_botocore_does(endpoint: tuple[str, str, str], token: str | None) -> None:
    credentials = Credentials(access_key="AK", secret_key="s/e+c=", token=token)
    for key in ODD_KEYS:
        for operation in OPERATIONS:
            assert_same_signature(
                key=key,
                operation=operation,
                endpoint=endpoint,
                headers={},
                credentials=credentials,
            )


@settings(max_examples=400, deadline=None)
@given(
    key=keys,
    operation=st.tuples(st.sampled_from(["GET", "PUT", "POST", "HEAD", "DELETE"]), queries),
    endpoint=st.sampled_from(ENDPOINTS),
    headers=st.dictionaries(header_names, header_values, max_size=4),
    credentials=st.builds(
        Credentials,
        access_key=st.just("AKIA"),
        secret_key=st.text(min_size=1, max_size=8).filter(lambda text: text.isprintable()),
        token=tokens,
    ),
    region=st.sampled_from(["us-east-1", "cn-north-1"]),
    service=st.sampled_from(["s3", "s3-object-lambda", "s3-outposts"]),
    payload_hash=st.sampled_from([EMPTY_PAYLOAD_HASH, UNSIGNED_PAYLOAD]),
    timestamp=st.datetimes(min_value=datetime(2020, 1, 1), timezones=st.just(UTC)),
)
@example(
    key="x",
    operation=("GET", []),
    endpoint=ENDPOINTS[0],
    headers={"X-Amz-Meta-A": "  two   spaces\tand a tab "},
    credentials=EXAMPLE_CREDENTIALS,
    region="us-east-1",
    service="s3",
    payload_hash=UNSIGNED_PAYLOAD,
    timestamp=datetime(2024, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
)
def test_signs_generated_requests_as_botocore_does(**request_: object) -> None:
    assert_same_signature(**request_)  # type: ignore[arg-type]


def test_keeps_slashes_and_dots_of_a_key() -> None:
    assert "/io//a/../b%2Bc%20~%C3%A9%252F" == encode_key("/io//a/../b+c ~é%2F")


def signed_example() -> SignedRequest:
    return sign(
        method="GET",
        host="127.0.0.1:9000",
        path="/bucket",
        query=[("prefix", "a+b c"), ("list-type", "2")],
        headers={"X-Amz-Meta-A": "two  spaces"},
        payload_hash=UNSIGNED_PAYLOAD,
        credentials=Credentials(access_key="AK", secret_key="hidden-key", token="hidden-token"),
        region="us-east-1",
        timestamp=EXAMPLE_TIME,
    )


def test_puts_the_signed_query_on_the_wire() -> None:
    assert "/bucket?list-type=2&prefix=a%2Bb%20c" == signed_example().target


def test_returns_every_header_unchanged_and_in_lower_case() -> None:
    headers = signed_example().headers
    assert {
        "x-amz-meta-a": "two  spaces",
        "host": "127.0.0.1:9000",
        "x-amz-date": "20130524T000000Z",
        "x-amz-content-sha256": "UNSIGNED-PAYLOAD",
        "x-amz-security-token": "hidden-token",
    } == {name: value for name, value in headers.items() if name != "authorization"}


def test_signs_the_time_of_greenwich() -> None:
    def signed(timestamp: datetime) -> str:
        return sign(
            method="GET",
            host=EXAMPLE_HOST,
            path="/",
            query=[],
            headers={},
            payload_hash=UNSIGNED_PAYLOAD,
            credentials=EXAMPLE_CREDENTIALS,
            region="us-east-1",
            timestamp=timestamp,
        ).headers["authorization"]

    east = timezone(timedelta(hours=9))
    assert signed(EXAMPLE_TIME) == signed(EXAMPLE_TIME.astimezone(east))


def test_shows_no_secret() -> None:
    credentials = Credentials(access_key="AK", secret_key="hidden-key", token="hidden-token")
    assert "hidden" not in f"{credentials!r} {signed_example()!r}"


def test_derives_a_key_once_per_scope() -> None:
    signing_key.cache_clear()
    for _ in range(3):
        signed_example()
    assert (1, 2) == (signing_key.cache_info().misses, signing_key.cache_info().hits)
