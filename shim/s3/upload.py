"""Files to objects: in one request up to SINGLE_BYTES, in parts when larger.

    | part 1 | part 2 | ... | part n <= 10,000 |    equal but for the last, growing with the file

Rule 1: every body carries its CRC32, over a connection that does not protect it also its SHA-256.
Rule 2: the file is read twice, to sum and to send; one that changes in between is not stored.
Rule 3: part checksums are named when the upload is created, sent with each part, and listed at the
        end if the server returned them: S3 refuses one without the others.
Rule 4: the parts of an upload that failed are taken back.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping

from shim.s3.buffers import borrow_buffer
from shim.s3.checksums import encode_crc32
from shim.s3.crew import Crew
from shim.s3.errors import ObjectChanged, S3ClientError, ServiceError, TransportError
from shim.s3.http1 import READ_SECONDS, Response, never
from shim.s3.operations import ERROR_LIMIT_BYTES, Operation, Service, error_of
from shim.s3.xml import Element, build_complete, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    from shim.s3.operations import Exchange

    T = TypeVar("T")

MIB = 1 << 20
IN_MEMORY_BYTES = 256 << 10
SINGLE_BYTES = 16 * MIB
SMALLEST_PART_BYTES = 16 * MIB  # the service takes 5 MiB to 5 GiB, the last part may be smaller
LARGEST_PART_BYTES = 5 << 30
MOST_PARTS = 10_000
MOST_HELPERS = 15
COMPLETE_SECONDS = 300.0  # S3 may take minutes to join the parts
ABORT_SECONDS = 5.0


def part_bytes(size: int) -> int:
    """Return the length of the parts of an object: whole MiB, no more than 10,000 parts."""
    smallest = -(-size // MOST_PARTS)
    length = max(SMALLEST_PART_BYTES, -(-smallest // MIB) * MIB)
    if length > LARGEST_PART_BYTES:
        raise S3ClientError(f"An object of {size} bytes is larger than S3 can hold")
    return length


class FileBody:
    """A range of a file as the body of a request."""

    def __init__(self, fd: int, *, start: int, size: int, with_sha256: bool) -> None:
        self._fd, self._start, self.size = fd, start, size
        self._stamp = self._stat()
        digest = hashlib.sha256() if with_sha256 else None
        crc = 0
        for block in self._read():
            crc = zlib.crc32(block, crc)
            if digest:
                digest.update(block)
        self.crc32 = encode_crc32(crc)
        self.sha256 = digest.hexdigest() if digest else ""

    def blocks(self) -> Iterator[memoryview]:
        """Yield the bytes; the last ones only if the file is as it was."""
        sent = 0
        for block in self._read():
            sent += len(block)
            if sent == self.size and self._stat() != self._stamp:
                raise ObjectChanged("A file changed while it was uploaded")
            yield block

    def _read(self) -> Iterator[memoryview]:
        position, end = self._start, self._start + self.size
        with borrow_buffer() as buffer:
            while position < end:
                read = os.preadv(self._fd, [buffer[: end - position]], position)
                if not read:
                    raise ObjectChanged("A file became shorter while it was uploaded")
                position += read
                yield buffer[:read]

    def _stat(self) -> tuple[int, int]:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns


class Simple:
    """An exchange whose answer has no body that matters."""

    position = 0

    def __init__(self, operation: Callable[[], Operation]) -> None:
        self.operation = operation

    def consume(self, response: Response) -> dict[str, str]:
        """Return the header fields."""
        response.read(ERROR_LIMIT_BYTES)
        return response.headers


class _Document(Simple):
    """An exchange whose answer is a small XML document, or an error despite its status."""

    def consume(self, response: Response) -> Element:  # type: ignore[override]
        body = response.read(ERROR_LIMIT_BYTES)
        root = parse(body)
        if root.name == "Error":
            raise error_of(self.operation(), response, body)
        return root


def upload(service: Service, bucket: str, key: str, fd: int, size: int, crew: Crew) -> None:
    """Store the first size bytes of a file."""
    if size > SINGLE_BYTES:
        _Multipart(service, bucket, key, fd, size, crew).store()
        return

    def put() -> Operation:
        body, crc32, sha256 = _body(service, bucket, fd, 0, size)
        return Operation(
            name="PutObject",
            method="PUT",
            bucket=bucket,
            key=key,
            headers={"x-amz-checksum-crc32": crc32},
            body=body,
            sha256=sha256,
        )

    service.perform(Simple(put), cancelled=crew.cancelled)
    if os.fstat(fd).st_size != size:
        raise ObjectChanged(f"A file changed while it was uploaded to s3://{bucket}/{key}")


def _body(
    service: Service, bucket: str, fd: int, start: int, size: int
) -> tuple[bytes | FileBody, str, str]:
    """Return a body with its CRC32 and, where that is to be signed, its SHA-256."""
    if size > IN_MEMORY_BYTES:
        body = FileBody(fd, start=start, size=size, with_sha256=service.is_plain(bucket))
        return body, body.crc32, body.sha256
    data = os.pread(fd, size, start)
    if len(data) < size:
        raise ObjectChanged("A file became shorter while it was uploaded")
    return data, encode_crc32(zlib.crc32(data)), ""


class _Multipart:
    """An upload in parts."""

    def __init__(
        self, service: Service, bucket: str, key: str, fd: int, size: int, crew: Crew
    ) -> None:
        self._service, self._bucket, self._key = service, bucket, key
        self._fd, self._size, self._crew = fd, size, crew
        self._part_bytes = part_bytes(size)
        self._count = -(-size // self._part_bytes)
        self._begun = 0
        self._parts: list[tuple[int, str, str]] = []
        self._lock = threading.Lock()
        self._upload_id = ""

    def store(self) -> None:
        """Upload the parts and join them."""
        created = self._perform(
            _Document(
                lambda: self._operation(
                    "CreateMultipartUpload",
                    "POST",
                    ("uploads", ""),
                    headers={"x-amz-checksum-algorithm": "CRC32"},
                )
            )
        )
        self._upload_id = created.find("UploadId")
        if not self._upload_id:
            raise S3ClientError(f"The server began no upload of s3://{self._bucket}/{self._key}")
        try:
            work = self._crew.offer(self._upload_next, most=MOST_HELPERS)
            self._crew.finish(work)
            if os.fstat(self._fd).st_size != self._size:
                raise ObjectChanged("A file changed while it was uploaded")
            self._complete()
        except BaseException:
            self._abort()
            raise

    def _upload_next(self) -> bool:
        with self._lock:
            if self._begun == self._count:
                return False
            number = self._begun = self._begun + 1
        start = (number - 1) * self._part_bytes
        size = min(self._part_bytes, self._size - start)
        sent = ""

        def put() -> Operation:
            nonlocal sent
            body, sent, sha256 = _body(self._service, self._bucket, self._fd, start, size)
            return self._operation(
                "UploadPart",
                "PUT",
                ("partNumber", str(number)),
                ("uploadId", self._upload_id),
                headers={"x-amz-checksum-crc32": sent},
                body=body,
                sha256=sha256,
            )

        headers = self._perform(Simple(put))
        is_known = headers.get("x-amz-checksum-crc32") == sent
        part = (number, headers.get("etag", ""), sent if is_known else "")
        with self._lock:
            self._parts.append(part)
        return True

    def _complete(self) -> None:
        document = build_complete(sorted(self._parts))
        exchange = _Document(
            lambda: self._operation(
                "CompleteMultipartUpload",
                "POST",
                ("uploadId", self._upload_id),
                headers={"x-amz-mp-object-size": str(self._size)},
                body=document,
                read_seconds=COMPLETE_SECONDS,
            )
        )
        try:
            self._perform(exchange)
        except ServiceError as error:
            # The answer to an earlier attempt may have been lost on its way.
            if error.code != "NoSuchUpload" or not self._is_complete():
                raise

    def _is_complete(self) -> bool:
        head = Simple(
            lambda: Operation(name="HeadObject", method="HEAD", bucket=self._bucket, key=self._key)
        )
        try:
            headers = self._perform(head)
        except ServiceError:
            return False
        etag = headers.get("etag", "").strip('"')
        return headers.get("content-length") == str(self._size) and etag.endswith(f"-{self._count}")

    def _abort(self) -> None:
        exchange = Simple(
            lambda: self._operation(
                "AbortMultipartUpload",
                "DELETE",
                ("uploadId", self._upload_id),
                read_seconds=ABORT_SECONDS,
            )
        )
        try:
            self._service.perform(exchange, cancelled=never, attempts=2)
        except (ServiceError, TransportError):
            pass  # the error that led here is the one to report

    def _perform(self, exchange: Exchange[T]) -> T:
        return self._service.perform(exchange, cancelled=self._crew.cancelled)

    def _operation(
        self,
        name: str,
        method: str,
        *query: tuple[str, str],
        headers: Mapping[str, str] = {},  # noqa: B006
        body: bytes | FileBody | None = None,
        sha256: str = "",
        read_seconds: float = READ_SECONDS,
    ) -> Operation:
        return Operation(
            name=name,
            method=method,
            bucket=self._bucket,
            key=self._key,
            query=query,
            headers=headers,
            body=body,
            sha256=sha256,
            read_seconds=read_seconds,
        )
