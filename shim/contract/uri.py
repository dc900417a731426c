"""Names of buckets and objects, as text."""

from __future__ import annotations

import re
from dataclasses import dataclass

# botocore handlers.py: VALID_BUCKET, _ACCESSPOINT_ARN (also Object Lambda), _OUTPOST_ARN.
_PLAIN = r"[a-zA-Z0-9.\-_]{1,255}"
_ACCESS_POINT_ARN = (
    r"arn:aws[^/\n]*:(?:s3|s3-object-lambda):[a-z\-0-9]*:[0-9]{12}:"
    r"accesspoint[/:][a-zA-Z0-9\-.]{1,63}"
)
_OUTPOST_ARN = (
    r"arn:aws[^/\n]*:s3-outposts:[a-z\-0-9]+:[0-9]{12}:outpost[/:][a-zA-Z0-9\-]{1,63}"
    r"[/:]accesspoint[/:][a-zA-Z0-9\-]{1,63}"
)
_BUCKET = re.compile(f"{_PLAIN}|{_ACCESS_POINT_ARN}|{_OUTPOST_ARN}")
_URI = re.compile(rf"(?:s3|https)://(?P<bucket>{_BUCKET.pattern})(?:/(?P<key>.*))?", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Location:
    """An object, or with a key that is empty or ends in "/" everything below that prefix."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


def is_bucket_name(text: str) -> bool:
    """Tell whether text is a bucket's name or an access point's, Object Lambda's, Outposts' ARN."""
    return _BUCKET.fullmatch(text) is not None


def parse_s3_uri(text: str) -> S3Location:
    """Parse `s3://bucket/key` or `https://bucket/key`; one slash after the bucket is eaten."""
    match = _URI.fullmatch(text)
    if match is None:
        raise ValueError(f"Not an S3 URI, expected s3://bucket/key or https://bucket/key: {text!r}")
    return S3Location(bucket=match["bucket"], key=match["key"] or "")
