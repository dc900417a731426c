"""Our client before the strict double, with what it slept and logged."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shim.aws.sigv4 import Credentials
from shim.http.proxies import Proxies
from shim.http.stream import unchecked
from shim.http.transport import Transport
from shim.http.trust import Trust
from shim.s3.checksums import ChecksumPolicy
from shim.s3.client import S3Client
from shim.s3.endpoints import EndpointConfiguration
from shim.s3.operations import Session
from shim.s3.transfer import Download, Transfers, Upload
from tests.fakes.s3_double import S3Double
from tests.s3_servers import ACCESS_KEY, SECRET_KEY

KEYS = {ACCESS_KEY: SECRET_KEY}
REGION = "eu-central-1"


class OneIdentity:
    """A credential provider that hands out one pair of keys after the other, when asked to."""

    def __init__(self, *keys: Credentials) -> None:
        self._keys = list(keys)

    def get(self) -> Credentials:
        return self._keys[0]

    def refresh(self, rejected: Credentials) -> Credentials:
        if len(self._keys) > 1 and rejected == self._keys[0]:
            del self._keys[0]
        return self._keys[0]


def download_to(path: Path, *, key: str, bucket: str = "bucket") -> Download:
    """Describe a download into a directory that exists when it begins."""
    return Download(
        bucket=bucket, key=key, open=lambda: os.open(path.parent, os.O_PATH), name=path.name
    )


class Stopped(Exception):
    """The caller's own way to end what is under way."""


def stopping(is_stopped: Callable[[], object]) -> Callable[[], None]:
    """Return a check that ends waits as soon as that is so."""

    def check() -> None:
        if is_stopped():
            raise Stopped

    return check


@dataclass(kw_only=True)
class Harness:
    """A client with its surroundings."""

    client: S3Client
    session: Session
    sleeps: list[float] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    check: Callable[[], None] = unchecked

    def download(self, path: Path, key: str = "key", *, concurrency: int = 4) -> bytes:
        transfers = Transfers(self.client, concurrency=concurrency, check=self.check)
        transfers.download_all([download_to(path, key=key)])
        return path.read_bytes()

    def upload(self, path: Path, key: str = "key", *, concurrency: int = 4) -> None:
        transfers = Transfers(self.client, concurrency=concurrency, check=self.check)
        upload = Upload(bucket="bucket", key=key, open=lambda: os.open(path, os.O_RDONLY))
        transfers.upload_all([upload])


def build_harness(
    url: str,
    *,
    attempts: int = 5,
    region: str = REGION,
    concurrency: int = 8,
    credentials: Any = None,
    environ: Mapping[str, str] | None = None,
    check: Callable[[], None] = unchecked,
    checksums: ChecksumPolicy = ChecksumPolicy(),  # noqa: B008 - is frozen
) -> Harness:
    """Build a client that never really sleeps."""
    sleeps: list[float] = []
    lines: list[str] = []
    environ = environ or {}
    transport = Transport(proxies=Proxies(environ), trust=Trust(environ), max_connections=8)
    session = Session(
        configuration=EndpointConfiguration(region=region, endpoint_url=url),
        credentials=credentials
        or OneIdentity(Credentials(access_key=ACCESS_KEY, secret_key=SECRET_KEY)),
        transport=transport,
        attempts=attempts,
        concurrency=concurrency,
        log=lambda level, message: lines.append(f"{level} {message}"),
        check=check,
        checksums=checksums,
        sleep=sleeps.append,
        monotonic=lambda: sum(sleeps),
    )
    return Harness(
        client=S3Client(session), session=session, sleeps=sleeps, lines=lines, check=check
    )


@contextmanager
def running_double(**options: Any) -> Iterator[S3Double]:
    """Run a double with one empty bucket named "bucket"."""
    with S3Double(credentials=KEYS, **options) as double:
        double.buckets["bucket"] = {}
        yield double
