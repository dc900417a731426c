"""AWS Signature Version 4 for S3: pure functions named after the steps of the AWS document.

    method, path, query, headers, payload hash
      -> canonical_request -> string_to_sign -(signing_key)-> signature -> Authorization header

https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html. S3 differs from other
services in two ways: a key is percent-encoded once, and its path is never normalised.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from urllib.parse import quote

ALGORITHM = "AWS4-HMAC-SHA256"
EMPTY_PAYLOAD_HASH = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
UNSIGNED_PAYLOAD = "UNSIGNED-PAYLOAD"


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """Keys of an AWS identity; temporary ones have a token, and mostly an expiration."""

    access_key: str
    secret_key: str = field(repr=False)
    token: str | None = field(default=None, repr=False)
    expiration: datetime | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SignedRequest:
    """What goes on the wire: all headers, names in lower case, and the request target."""

    headers: dict[str, str] = field(repr=False)
    target: str


def encode_key(key: str) -> str:
    """Percent-encode a key once, as S3 expects it in the path."""
    return quote(key, safe="/")


def canonical_query_string(query: Iterable[tuple[str, str]]) -> str:
    """Encode the query's pairs, and sort them as encoded."""
    pairs = sorted((quote(name, safe=""), quote(value, safe="")) for name, value in query)
    return "&".join(f"{name}={value}" for name, value in pairs)


def signed_headers(headers: Mapping[str, str]) -> str:
    """Name the headers that the signature covers; their names are in lower case already."""
    return ";".join(sorted(headers))


def canonical_request(
    *, method: str, path: str, query_string: str, headers: Mapping[str, str], payload_hash: str
) -> str:
    """Write the request down in the one form that client and server agree upon."""
    names = signed_headers(headers)
    lines = [f"{name}:{' '.join(headers[name].split())}" for name in names.split(";")]
    return "\n".join([method, path, query_string, *lines, "", names, payload_hash])


def credential_scope(*, date: str, region: str, service: str) -> str:
    """Join what a signing key is good for: one day (YYYYMMDD), one region, one service."""
    return f"{date}/{region}/{service}/aws4_request"


def string_to_sign(*, amz_date: str, scope: str, canonical_request: str) -> str:
    """Combine the time (`x-amz-date`), the scope and the digest of the canonical request."""
    digest = hashlib.sha256(canonical_request.encode()).hexdigest()
    return "\n".join([ALGORITHM, amz_date, scope, digest])


@lru_cache(maxsize=64)
def signing_key(secret_key: str, scope: str) -> bytes:
    """Derive the key of a scope; the same one signs every request of that day."""
    key = f"AWS4{secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


def sign(
    *,
    method: str,
    host: str,
    path: str,
    query: Iterable[tuple[str, str]],
    headers: Mapping[str, str],
    payload_hash: str,
    credentials: Credentials,
    region: str,
    service: str = "s3",
    timestamp: datetime,
) -> SignedRequest:
    """Sign a request.

    host: as in the Host header, with the port unless it is the scheme's default.
    path: exactly as on the wire, that is, already percent-encoded (encode_key).
    payload_hash: SHA-256 of the body in hex, or UNSIGNED_PAYLOAD.
    timestamp: an aware datetime; servers refuse one that is more than 15 minutes off.
    """
    amz_date = timestamp.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
    headers = {name.lower(): value for name, value in headers.items()}
    headers |= {"host": host, "x-amz-date": amz_date, "x-amz-content-sha256": payload_hash}
    if credentials.token:
        headers["x-amz-security-token"] = credentials.token
    query_string = canonical_query_string(query)
    request = canonical_request(
        method=method,
        path=path,
        query_string=query_string,
        headers=headers,
        payload_hash=payload_hash,
    )
    scope = credential_scope(date=amz_date[:8], region=region, service=service)
    to_sign = string_to_sign(amz_date=amz_date, scope=scope, canonical_request=request)
    key = signing_key(credentials.secret_key, scope)
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    headers["authorization"] = (
        f"{ALGORITHM} Credential={credentials.access_key}/{scope}, "
        f"SignedHeaders={signed_headers(headers)}, Signature={signature}"
    )
    target = f"{path}?{query_string}" if query_string else path
    return SignedRequest(headers=headers, target=target)
