"""The client: S3, or a directory in its place."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import time
import zlib
from binascii import b2a_base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote

from shim.aws.credentials import credential_provider
from shim.aws.endpoints import EndpointUnresolved
from shim.aws.profiles import read_profile
from shim.files.exposure import find_exposure
from shim.http.connection import Response
from shim.http.errors import CertificateError, SettingInvalid, TransportError
from shim.http.proxies import Proxies
from shim.http.stream import unchecked
from shim.http.transport import Transport
from shim.http.trust import Trust
from shim.s3.checksums import checksum_policy, encode_crc32
from shim.s3.crew import Crew
from shim.s3.directory import DirectoryStore
from shim.s3.documents import Page, parse_page
from shim.s3.download import download
from shim.s3.endpoints import EndpointConfiguration
from shim.s3.errors import S3ClientError
from shim.s3.operations import Operation, Session, read_headers
from shim.s3.reader import ObjectReader
from shim.s3.retries import PERSISTENT_ATTEMPTS, configured_attempts
from shim.s3.store import ObjectHead, ObjectSummary, Report, Store
from shim.s3.upload import upload

PAGE_LIMIT_BYTES = 16 << 20
# By precedence, as for other endpoints: a profile cannot name a directory.
ENDPOINT_VARIABLES = ("AWS_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_FILE_URL = re.compile(r"file:(?://(?:localhost)?(?=/)|(?!//))(/.*)", re.DOTALL)
PATIENCE_SECONDS = 8.0


class S3Client:
    """Objects in S3."""

    def __init__(self, session: Session, *, warnings: Sequence[str] = ()) -> None:
        """warnings: about files that were ignored."""
        self._session, self.warnings = session, warnings

    def get(self, bucket: str, key: str, *, max_bytes: int) -> bytes:
        """Return a whole object, refuse one that is longer."""
        uri = f"s3://{bucket}/{key}"

        def consume(response: Response) -> bytes:
            if not response.has_known_end:
                raise TransportError("The answer does not tell the object's length")
            if (response.remaining or 0) > max_bytes:
                raise S3ClientError(f"{uri} is longer than {max_bytes} bytes")
            body = response.read(max_bytes)
            checksum = self._session.checksum(response.headers)
            checksum.update(body)
            checksum.verify(uri)
            return body

        headers = {"x-amz-checksum-mode": "ENABLED"}
        operation = Operation(
            name="GetObject", method="GET", bucket=bucket, key=key, headers=headers
        )
        return self._session.call(operation, consume)

    def put(
        self,
        bucket: str,
        key: str,
        body: bytes,
        *,
        metadata: Mapping[str, str] = {},  # noqa: B006
        persistent: bool = False,
    ) -> None:
        """Store a small object; persistent: retry hardest, also for a while after a stop."""
        # Content-MD5 is the one check of the body that every server makes.
        md5 = hashlib.md5(body, usedforsecurity=False).digest()
        headers = {
            "content-md5": b2a_base64(md5, newline=False).decode(),
            "x-amz-checksum-crc32": encode_crc32(zlib.crc32(body)),
        }
        headers |= {f"x-amz-meta-{name}": value for name, value in metadata.items()}
        operation = Operation(
            name="PutObject", method="PUT", bucket=bucket, key=key, headers=headers, body=body
        )
        self._session.call(
            operation,
            read_headers,
            check=_with_patience(self._session.check) if persistent else None,
            attempts=PERSISTENT_ATTEMPTS if persistent else 0,
        )

    def head(self, bucket: str, key: str) -> ObjectHead:
        """Describe an object."""
        operation = Operation(name="HeadObject", method="HEAD", bucket=bucket, key=key)
        headers = self._session.call(operation, read_headers)
        prefix = "x-amz-meta-"
        return ObjectHead(
            size=int(headers.get("content-length", 0)),
            metadata={
                name.removeprefix(prefix).replace("-", "_"): value
                for name, value in headers.items()
                if name.startswith(prefix)
            },
        )

    def head_bucket(self, bucket: str) -> None:
        """Ask whether there is such a bucket, and whether it may be listed."""
        self._session.call(Operation(name="HeadBucket", method="HEAD", bucket=bucket), read_headers)

    def delete(self, bucket: str, key: str) -> None:
        """Remove an object; one that is missing is removed."""
        operation = Operation(name="DeleteObject", method="DELETE", bucket=bucket, key=key)
        self._session.call(operation, read_headers)

    def probe(self, bucket: str, prefix: str) -> None:
        """Write a small object below a prefix, and remove it again."""
        key = f"{prefix}{os.urandom(12).hex()}.probe"
        self.put(bucket, key, b"probe")
        self.delete(bucket, key)

    def list(self, bucket: str, prefix: str) -> Iterator[ObjectSummary]:
        """Yield what lies below a prefix, in the order of keys."""
        token, seen = "", set()
        while True:
            query = {"list-type": "2", "prefix": prefix, "encoding-type": "url"}
            if token:
                query["continuation-token"] = token
            page = self._page(bucket, tuple(query.items()))
            for key, size in page.objects:
                yield ObjectSummary(key=key, size=size)
            if not page.token:
                return
            if page.token in seen:
                raise S3ClientError(f"The listing of s3://{bucket}/{prefix} goes round in circles")
            seen.add(page.token)
            token = page.token

    def _page(self, bucket: str, query: tuple[tuple[str, str], ...]) -> Page:
        operation = Operation(name="ListObjectsV2", method="GET", bucket=bucket, query=query)
        return self._session.call(
            operation, lambda response: parse_page(response.read(PAGE_LIMIT_BYTES))
        )

    def open(self, bucket: str, key: str) -> io.BufferedReader:
        """Open an object for reading in order; it is verified as its last byte is read."""
        return io.BufferedReader(ObjectReader(self._session, bucket, key).ask(), 1 << 18)

    def download(self, bucket: str, key: str, directory: int, name: str, *, crew: Crew) -> None:
        """Make the name in an open directory hold the object's bytes, or leave it as it was."""
        download(self._session, bucket, key, directory, name, crew)

    def upload(self, bucket: str, key: str, fd: int, *, size: int, crew: Crew) -> None:
        """Store a file, whose size must not change; its position is neither used nor moved."""
        upload(self._session, bucket, key, fd, size, crew)

    def find_credentials(self) -> str:
        """Find credentials, as the first request would; return where they come from."""
        return self._session.find_credentials()

    @property
    def trust(self) -> Trust:
        """Whom the connections trust."""
        return self._session.trust

    def close(self) -> None:
        """Close kept connections."""
        self._session.close()


def _with_patience(check: Callable[[], None]) -> Callable[[], None]:
    """Let an operation go on for a while after the request to stop."""
    end = math.inf

    def check_later() -> None:
        nonlocal end
        try:
            check()
        except Exception:
            end = min(end, time.monotonic() + PATIENCE_SECONDS)
            if time.monotonic() > end:
                raise

    return check_later


def connect(
    environ: Mapping[str, str],
    *,
    concurrency: int,
    max_connections: int,
    log: Report,
    run_helper: Callable[[list[str], float], bytes],
    check: Callable[[], None] = unchecked,
    carried_bundle: str = "",
    exposure: Callable[[str], str] = find_exposure,
) -> Store:
    """Return the store that the environment describes; nothing is contacted yet.

    The profile, the source of credentials and the authorities are those of this moment: nothing
    that is written afterwards changes them. Raises SettingInvalid, ProfileInvalid.

    concurrency: of requests, at most; max_connections: that are kept open, at most.
    run_helper(argv, timeout_seconds): runs a program that prints credentials.
    carried_bundle: certificates for images that have none.
    exposure(path): says why the image's command could have written a file, "" when it could not.
    """
    name = next(filter(environ.get, ENDPOINT_VARIABLES), "")
    if environ.get(name, "").startswith("file:"):
        return _open_directory(name, environ[name])
    profile = read_profile(environ, exposure)
    configuration = EndpointConfiguration.from_environ(environ, profile.settings)
    proxies = Proxies(environ)
    trust = Trust(
        environ,
        profile_bundle=profile.settings.get("ca_bundle", ""),
        carried_bundle=carried_bundle,
        exposure=exposure,
    )
    transport = Transport(proxies=proxies, trust=trust, max_connections=max_connections)
    credentials = credential_provider(
        environ,
        profile=profile,
        region=configuration.region,
        fetch=transport.fetch,
        run_helper=run_helper,
        now=lambda: datetime.now(UTC),
        log=log,
        exposure=exposure,
    )
    urls = (configuration.endpoint_url or "https:", credentials.url)
    if proxies.need_tls or any(url.lower().startswith("https:") for url in urls):
        with suppress(CertificateError):  # which the first connection raises again
            trust.context()
    warnings = (*profile.exposed, *trust.exposed)
    for warning in warnings:
        log("WARNING", warning)
    return S3Client(
        Session(
            configuration=configuration,
            credentials=credentials,
            transport=transport,
            attempts=configured_attempts(environ, profile.settings),
            checksums=checksum_policy(environ, profile.settings),
            concurrency=concurrency,
            log=log,
            check=check,
        ),
        warnings=warnings,
    )


def _open_directory(name: str, url: str) -> DirectoryStore:
    match = _FILE_URL.fullmatch(url)
    if match is None:
        raise SettingInvalid(name, expected="file:///directory", found=url)
    root = Path(unquote(match[1]))
    if not root.is_dir():
        raise EndpointUnresolved(f"The endpoint {url} is not a directory that exists")
    return DirectoryStore(root)
