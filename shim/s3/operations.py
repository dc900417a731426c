"""One operation of S3: signed, sent, and repeated as the tables of `retries` say."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Protocol, TypeVar

from shim.aws.credentials import CredentialProvider
from shim.aws.endpoints import Endpoint
from shim.aws.sigv4 import EMPTY_PAYLOAD_HASH, UNSIGNED_PAYLOAD, Credentials, encode_key, sign
from shim.aws.xml import parse
from shim.http.attempts import LOUD_ATTEMPT, Attempts, delay_seconds
from shim.http.connection import READ_SECONDS, Body, Request, Response
from shim.http.errors import RemoteError, TransportError
from shim.http.stream import pause, unchecked
from shim.http.transport import Transport
from shim.http.trust import Trust
from shim.s3 import retries
from shim.s3.checksums import Checksum, ChecksumPolicy
from shim.s3.endpoints import EndpointConfiguration, resolve
from shim.s3.errors import IntegrityError, ServiceError
from shim.s3.retries import Kind
from shim.s3.store import Report
from shim.s3.throttle import Throttle

T = TypeVar("T", covariant=True)


class Exchange(Protocol[T]):
    """What is asked in one attempt after the other, and what becomes of the answer."""

    position: int  # grows while a body arrives

    def prepare(self) -> Operation:
        """Return what the next attempt asks for; this may read the file that it sends."""

    def consume(self, response: Response) -> T:
        """Read the answer, as far as it is needed."""


ERROR_LIMIT_BYTES = 64 << 10
USER_AGENT = "sagemaker-shim"
ALL_CHECKSUMS = ChecksumPolicy()
NO_CHECKSUMS = ChecksumPolicy(request_checksum=False, response_checksum=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """A request of the API, before it has an endpoint and a signature.

    sha256: of a body that is not bytes, in hex, where the connection does not protect it.
    """

    name: str
    method: str
    bucket: str
    key: str = ""
    query: tuple[tuple[str, str], ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Body | None = None
    sha256: str = ""
    read_seconds: float = READ_SECONDS


class _Call:
    """An exchange whose request is the same each time, and whose answer is consumed at once."""

    position = 0

    def __init__(self, operation: Operation, consume: Callable[[Response], object]) -> None:
        self._operation, self.consume = operation, consume

    def prepare(self) -> Operation:
        return self._operation


class Session:
    """S3 as one caller sees it: endpoints, credentials, clock, connections."""

    def __init__(
        self,
        *,
        configuration: EndpointConfiguration,
        credentials: CredentialProvider,
        transport: Transport,
        attempts: int,
        concurrency: int,
        log: Report,
        checksums: ChecksumPolicy = ALL_CHECKSUMS,
        check: Callable[[], None] = unchecked,
        sleep: Callable[[float], None] = time.sleep,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.check, self._checksums, self._monotonic = check, checksums, monotonic
        self._configuration, self._credentials = configuration, credentials
        self._transport, self._attempts, self._log, self._sleep = transport, attempts, log, sleep
        self._throttle = Throttle(concurrency=concurrency, monotonic=monotonic)
        self._endpoints: dict[str, tuple[Endpoint, str]] = {}
        self._redirected: set[str] = set()
        self._skew = timedelta(0)

    def close(self) -> None:
        """Close kept connections."""
        self._transport.close()

    def find_credentials(self) -> str:
        """Find credentials, as the first request would; return where they come from."""
        self._credentials.get()
        return self._credentials.description

    @property
    def trust(self) -> Trust:
        """Whom the connections trust."""
        return self._transport.trust

    def is_plain(self, bucket: str) -> bool:
        """Tell whether bodies travel unprotected, so that their SHA-256 must be signed."""
        return self._endpoint(bucket)[0].scheme == "http"

    def checksum(self, headers: Mapping[str, str]) -> Checksum:
        """Return what verifies the object of an answer, as far as that is wanted."""
        return Checksum(headers if self._checksums.response_checksum else {})

    def call(
        self,
        operation: Operation,
        consume: Callable[[Response], T],
        *,
        check: Callable[[], None] | None = None,
        attempts: int = 0,
    ) -> T:
        """Perform an operation; consume(response) is part of each attempt."""
        exchange: Exchange[T] = _Call(operation, consume)  # type: ignore[assignment]
        return self.perform(exchange, check=check, attempts=attempts)

    def perform(
        self,
        exchange: Exchange[T],
        *,
        check: Callable[[], None] | None = None,
        attempts: int = 0,
    ) -> T:
        """Make attempts until one succeeds; raise the error of the last one.

        attempts: instead of what is configured.
        """
        check = check or self.check
        failures = Attempts(
            retries.POLICIES,
            most=attempts or self._attempts,
            begun=self._monotonic(),
            resumes=retries.RESUMES,
        )
        while True:
            reached = exchange.position
            credentials = self._credentials.get()
            policy = NO_CHECKSUMS if Kind.CHECKSUMS in failures.kinds else self._checksums
            self._enter(check)
            is_success = False
            now = datetime.now(UTC) + self._skew
            try:
                operation = exchange.prepare()
                request = self._sign(operation, credentials, now, policy)
                request.check = check
                result = self._attempt(exchange, operation, request)
                is_success = True
                if policy is NO_CHECKSUMS:
                    self._drop_checksums(operation)
                return result
            except (ServiceError, TransportError, IntegrityError) as failure:
                error = failure
            finally:
                self._throttle.leave(is_success=is_success)
            kind = retries.kind_of(error, now=now)
            may_repeat = failures.add(kind, is_further=exchange.position > reached)
            if not (may_repeat and self._prepare_retry(kind, error, credentials, request)):
                error.retries = failures.retries
                raise error
            seconds = self._delay_seconds(kind, error, failures.failed)
            is_loud = seconds > 0 and failures.is_loud(self._monotonic())
            name = f"{operation.name} of s3://{operation.bucket}/{operation.key}"
            self._report(f"{name}: {failures.describe()}", seconds, error, is_loud=is_loud)
            pause(seconds, check, self._sleep)

    def wait(self, error: TransportError, retry: int, name: str) -> None:
        """Wait before a stream is resumed for the first, second, ... time; name: of it."""
        seconds = self._delay_seconds(Kind.TRANSPORT, error, retry)
        text = f"{name} broke off, {retry} of {retries.RESUMES} times"
        self._report(text, seconds, error, is_loud=retry >= LOUD_ATTEMPT)
        pause(seconds, self.check, self._sleep)

    def _report(self, text: str, seconds: float, error: RemoteError, *, is_loud: bool) -> None:
        level = "WARNING" if is_loud else "DEBUG"
        self._log(level, f"{text}; the next attempt follows in {seconds:.1f} s: {error}")

    def _attempt(self, exchange: Exchange[T], operation: Operation, request: Request) -> T:
        response = self._transport.open(request)
        result: object = None
        try:
            if response.status >= 300:
                raise _service_error(operation, response)
            result = kept = exchange.consume(response)
            return kept
        finally:
            if result is not response:  # an exchange that returns its answer reads on
                self.finish(response)

    def finish(self, response: Response) -> None:
        """Give back the connection of an answer."""
        self._transport.finish(response)

    def _sign(
        self,
        operation: Operation,
        credentials: Credentials,
        now: datetime,
        policy: ChecksumPolicy,
    ) -> Request:
        endpoint, hostname = self._endpoint(operation.bucket)
        body = operation.body
        if body is None:
            payload_hash = EMPTY_PAYLOAD_HASH
        elif isinstance(body, bytes) and (endpoint.scheme == "http" or operation.method == "POST"):
            payload_hash = hashlib.sha256(body).hexdigest()
        else:
            payload_hash = operation.sha256 or UNSIGNED_PAYLOAD
        headers = operation.headers
        if policy != ALL_CHECKSUMS:
            headers = {name: value for name, value in headers.items() if policy.allows(name)}
        path = endpoint.base_path
        if operation.key or not path:
            path = f"{path}/{encode_key(operation.key)}"
        signed = sign(
            method=operation.method,
            host=endpoint.host,
            path=path,
            query=operation.query,
            headers=headers,
            payload_hash=payload_hash,
            credentials=credentials,
            region=endpoint.region,
            service=endpoint.service,
            timestamp=now,
        )
        return Request(
            method=operation.method,
            scheme=endpoint.scheme,
            host=hostname,
            port=endpoint.port,
            target=signed.target,
            headers={**signed.headers, "user-agent": USER_AGENT, "accept-encoding": "identity"},
            body=body,
            read_seconds=operation.read_seconds,
        )

    def _endpoint(self, bucket: str) -> tuple[Endpoint, str]:
        if bucket not in self._endpoints:
            endpoint = resolve(self._configuration, bucket)
            self._endpoints[bucket] = endpoint, endpoint.hostname
        return self._endpoints[bucket]

    def _enter(self, check: Callable[[], None]) -> None:
        check()
        while not self._throttle.try_enter():
            pause(0.02, check, self._sleep)

    def _drop_checksums(self, operation: Operation) -> None:
        """Send a store no more of the checksums without which it has taken an operation."""
        if operation.method == "GET":
            spared = replace(self._checksums, response_checksum=False)
            variable = "AWS_RESPONSE_CHECKSUM_VALIDATION"
        else:
            spared = replace(self._checksums, request_checksum=False)
            variable = "AWS_REQUEST_CHECKSUM_CALCULATION"
        if spared != self._checksums:
            self._checksums = spared
            self._log(
                "WARNING",
                f"The store takes {operation.name} only without checksum headers, which are left "
                f"out from now on; {variable}=when_required leaves them out from the start",
            )

    def _prepare_retry(
        self,
        kind: Kind,
        error: RemoteError,
        credentials: Credentials,
        request: Request,
    ) -> bool:
        """Do what another attempt needs; false when it would end like this one."""
        if isinstance(error, ServiceError) and kind is Kind.CLOCK:
            self._skew = retries.skew_of(error.headers, now=datetime.now(UTC))
            self._log("WARNING", f"The clock is off: the server's differs by {self._skew}")
        elif isinstance(error, ServiceError) and kind is Kind.REGION:
            return self._learn_region(error, request.check)
        elif kind is Kind.CHECKSUMS:
            return not all(map(NO_CHECKSUMS.allows, request.headers))
        elif kind is Kind.CREDENTIALS:
            return self._credentials.refresh(credentials) != credentials
        return True

    def _learn_region(self, error: ServiceError, check: Callable[[], None]) -> bool:
        """Resolve the bucket anew in the region that an answer names; never by its Location."""
        bucket = error.bucket
        if bucket.startswith("arn:"):
            return False
        region = error.region or self._ask_region(error, check)
        if not region:
            return False
        if region == self._endpoint(bucket)[0].region:
            return bucket in self._redirected  # another thread may have learnt it meanwhile
        endpoint = resolve(self._configuration, bucket, region)
        self._endpoints[bucket] = endpoint, endpoint.hostname
        self._redirected.add(bucket)
        self._log("INFO", f"The bucket {bucket} is in {region}")
        return True

    def _ask_region(self, error: ServiceError, check: Callable[[], None]) -> str:
        """Ask for the region of a bucket where an answer names only another endpoint."""
        if error.operation == "HeadBucket":
            return ""
        operation = Operation(name="HeadBucket", method="HEAD", bucket=error.bucket)
        try:
            headers = self.call(operation, read_headers, check=check, attempts=1)
        except ServiceError as answer:
            headers = dict(answer.headers)
        except TransportError:
            return ""
        return headers.get("x-amz-bucket-region", "")

    def _delay_seconds(self, kind: Kind, error: RemoteError, retry: int) -> float:
        headers = error.headers if isinstance(error, ServiceError) else {}
        jitter = int.from_bytes(os.urandom(4), "big") / 2**32
        policy = retries.POLICIES[kind]
        seconds = delay_seconds(policy, retry=retry, headers=headers, random=jitter)
        if kind is Kind.THROTTLED:
            self._throttle.slow_down(seconds)
        return seconds


def read_headers(response: Response) -> dict[str, str]:
    """Consume an answer of which only the header fields matter."""
    response.read(ERROR_LIMIT_BYTES)
    return response.headers


def _service_error(operation: Operation, response: Response) -> ServiceError:
    try:
        body = response.read(ERROR_LIMIT_BYTES)
    except TransportError:
        body = b""
    return error_of(operation, response, body)


def error_of(operation: Operation, response: Response, body: bytes) -> ServiceError:
    """Read an error document; without one the status has to tell what happened."""
    try:
        root = parse(body)
    except TransportError:
        root = None
    told = root.find if root and root.name == "Error" else lambda _: ""
    status = response.status if response.status >= 300 else 500
    return ServiceError(
        operation=operation.name,
        bucket=operation.bucket,
        key=operation.key,
        status=status,
        code=told("Code") or str(status),
        message=told("Message") or response.reason,
        headers=response.headers,
        region=response.headers.get("x-amz-bucket-region") or told("Region"),
        request_id=told("RequestId"),
        host_id=told("HostId"),
    )
