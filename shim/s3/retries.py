"""Which failures are worth another attempt, and after how long: tables and pure functions, no loop.

    failure -> kind_of -> Kind -> POLICIES -> Policy

Sources: botocore's legacy and standard modes (data/_retry.json, retries/standard.py), and what the
documentation of S3 calls temporary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import Enum

from shim.http.attempts import Policy
from shim.http.errors import (
    CertificateError,
    RemoteError,
    SettingInvalid,
    StaleConnection,
    TransportError,
)
from shim.s3.errors import IntegrityError, ServiceError

LARGEST_SKEW = timedelta(minutes=4)
ATTEMPTS = {"legacy": 5, "standard": 3, "adaptive": 3}
_ATTEMPTS_FORM = re.compile(r"0*[1-9][0-9]{0,5}")
PERSISTENT_ATTEMPTS = 12
RESUMES = 20  # of a body that made progress before it broke off


class Kind(Enum):
    """What a failure calls for."""

    THROTTLED = "wait, and do less at once"
    TRANSIENT = "wait"
    DAMAGED = "transfer the body once more"
    TRANSPORT = "wait, then connect to the next address"
    STALE = "connect anew, at once"
    CLOCK = "take the server's time, once"
    CREDENTIALS = "refresh them, once"
    REGION = "ask in the bucket's region, once"
    CHECKSUMS = "ask without checksums, once, where there were any"
    FINAL = "give up"


POLICIES = {
    Kind.THROTTLED: Policy(base_seconds=1.0),
    Kind.TRANSIENT: Policy(base_seconds=0.05),
    Kind.DAMAGED: Policy(limit=1),
    Kind.TRANSPORT: Policy(base_seconds=0.1),
    Kind.STALE: Policy(limit=1000),
    Kind.CLOCK: Policy(limit=1),
    Kind.CREDENTIALS: Policy(limit=1),
    Kind.REGION: Policy(limit=1),
    Kind.CHECKSUMS: Policy(limit=1),
    Kind.FINAL: Policy(limit=0),
}

CODES = {
    code: kind
    for kind, codes in {
        Kind.THROTTLED: "SlowDown ServiceUnavailable Throttling ThrottlingException "
        "ThrottledException RequestThrottled RequestThrottledException TooManyRequestsException "
        "RequestLimitExceeded BandwidthLimitExceeded",
        Kind.TRANSIENT: "InternalError RequestTimeout RequestTimeoutException "
        "PriorRequestNotComplete OperationAborted ConditionalRequestConflict",
        Kind.DAMAGED: "BadDigest InvalidDigest XAmzContentSHA256Mismatch",
        Kind.CLOCK: "RequestTimeTooSkewed",
        Kind.CREDENTIALS: "ExpiredToken InvalidToken TokenRefreshRequired",
        Kind.REGION: "PermanentRedirect IllegalLocationConstraintException",
    }.items()
    for code in codes.split()
}

# How stores refuse a header field that they do not know; "400" where they do not say why.
HEADER_CODES = "400 BadRequest InvalidArgument InvalidRequest NotImplemented".split()

STATUSES = {
    **dict.fromkeys((301, 302, 307), Kind.REGION),
    **dict.fromkeys((500, 502, 503, 504), Kind.TRANSIENT),
    **dict.fromkeys((429, 509), Kind.THROTTLED),
}


def kind_of(error: RemoteError, *, now: datetime) -> Kind:
    """Classify a failure; now: the time that the request was signed with."""
    if isinstance(error, ServiceError):
        return _kind_of_answer(error, now)
    if isinstance(error, StaleConnection):
        return Kind.STALE
    if isinstance(error, IntegrityError):
        return Kind.DAMAGED
    if isinstance(error, TransportError) and not isinstance(error, CertificateError):
        return Kind.TRANSPORT
    return Kind.FINAL


def _kind_of_answer(error: ServiceError, now: datetime) -> Kind:
    kind = CODES.get(error.code) or STATUSES.get(error.status, Kind.FINAL)
    if kind is Kind.FINAL and error.status == 400 and error.region:
        return Kind.REGION
    if kind is Kind.FINAL and error.status in (400, 403):
        is_off = abs(skew_of(error.headers, now=now)) > LARGEST_SKEW
        kind = Kind.CLOCK if is_off else Kind.FINAL
    if kind is Kind.FINAL and error.status in (400, 501):
        return Kind.CHECKSUMS if error.code in (*HEADER_CODES, "501") else Kind.FINAL
    return kind


def skew_of(headers: Mapping[str, str], *, now: datetime) -> timedelta:
    """Return how far the server's clock is ahead, by the Date of its answer; 0 without one."""
    try:
        return parsedate_to_datetime(headers["date"]) - now
    except (KeyError, ValueError, TypeError):
        return timedelta(0)


def configured_attempts(environ: Mapping[str, str], profile: Mapping[str, str]) -> int:
    """Return how often a request is made at most, the first time included."""
    mode = environ.get("AWS_RETRY_MODE") or profile.get("retry_mode") or "legacy"
    text = environ.get("AWS_MAX_ATTEMPTS") or profile.get("max_attempts") or ""
    if mode not in ATTEMPTS:
        expected = f"one of {', '.join(ATTEMPTS)}"
        raise SettingInvalid("AWS_RETRY_MODE, or retry_mode", expected=expected, found=mode)
    if not text:
        return ATTEMPTS[mode]
    if not _ATTEMPTS_FORM.fullmatch(text):
        expected = "a whole number from 1 to 999999"
        raise SettingInvalid("AWS_MAX_ATTEMPTS, or max_attempts", expected=expected, found=text)
    return int(text)
