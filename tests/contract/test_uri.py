from __future__ import annotations

import pytest
from botocore.handlers import VALID_BUCKET, VALID_S3_ARN
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shim.contract.uri import S3Location, is_bucket_name, parse_s3_uri

ACCESS_POINT = "arn:aws:s3:eu-west-1:123456789012:accesspoint/reader"
OUTPOST = "arn:aws:s3-outposts:eu-west-1:123456789012:outpost/op-1/accesspoint/reader"


@pytest.mark.parametrize(
    ("text", "bucket", "key"),
    [
        ("s3://bucket/key", "bucket", "key"),
        ("https://bucket/key", "bucket", "key"),
        ("s3://bucket//invocations/1.json", "bucket", "/invocations/1.json"),
        ("s3://bucket///x", "bucket", "//x"),
        ("s3://bucket/a/../b//c d+e%2F?q#f", "bucket", "a/../b//c d+e%2F?q#f"),
        ("s3://bucket/line\nbreak", "bucket", "line\nbreak"),
        ("s3://bucket/prefix/", "bucket", "prefix/"),
        ("s3://bucket/", "bucket", ""),
        ("s3://bucket", "bucket", ""),
        ("s3://Bucket_1.x/é", "Bucket_1.x", "é"),
        (f"s3://{ACCESS_POINT}/a/b", ACCESS_POINT, "a/b"),
        (f"s3://{OUTPOST}/a", OUTPOST, "a"),
    ],
)
def test_parses_bucket_and_key(text: str, bucket: str, key: str) -> None:
    assert S3Location(bucket=bucket, key=key) == parse_s3_uri(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bucket/key",
        "s3:/bucket/key",
        "s3:///key",
        "http://b/k",
        "S3://b/k",
        "s3://b:1/k",
        " s3://b/k",
    ],
)
def test_refuses_what_is_not_an_s3_uri(text: str) -> None:
    with pytest.raises(ValueError, match="expected s3://bucket/key or https://bucket/key"):
        parse_s3_uri(text)


@settings(max_examples=300)
@given(
    st.text(alphabet="aZ0.-_:/ \né", max_size=12)
    | st.from_regex(VALID_BUCKET, fullmatch=True)
    | st.from_regex(
        r"(arn:aws[\-a-z]*:s3[a-z\-]*:[a-z0-9\-]*:[0-9]{12}:[a-z/:]{0,40})", fullmatch=True
    )
)
@example(ACCESS_POINT)
@example(OUTPOST)
@example("arn:aws-cn:s3-object-lambda:cn-north-1:123456789012:accesspoint:x")
@example("arn:aws:s3::123456789012:accesspoint/m.mrap")
@example("arn:aws:s3:eu-west-1:12345678901:accesspoint/short-account")
def test_accepts_the_bucket_names_that_botocore_accepts(text: str) -> None:
    botocore_accepts = VALID_BUCKET.search(text) or VALID_S3_ARN.search(text)
    # `$` in botocore's expressions also matches before a final line break.
    assert bool(botocore_accepts and not text.endswith("\n")) == is_bucket_name(text)
