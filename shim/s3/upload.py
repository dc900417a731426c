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
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from shim.aws.xml import Element, parse
from shim.http.connection import Response
from shim.s3.buffers import borrow_buffer
from shim.s3.checksums import encode_crc32
from shim.s3.crew import MOST_HELPERS, Abandoned, Crew
from shim.s3.documents import build_complete
from shim.s3.errors import FileChanged, S3ClientError, ServiceError
from shim.s3.operations import ERROR_LIMIT_BYTES, Operation, Session, error_of, read_headers

MIB = 1 << 20
IN_MEMORY_BYTES = 256 << 10
SINGLE_BYTES = 16 * MIB
SMALLEST_PART_BYTES = 16 * MIB  # the service takes 5 MiB to 5 GiB, the last part may be smaller
LARGEST_PART_BYTES = 5 << 30
MOST_PARTS = 10_000
COMPLETE_SECONDS = 300.0  # S3 may take minutes to join the parts
ABORT_SECONDS = 5.0


def part_bytes(size: int) -> int:
    """Return the length of the parts of an object: whole MiB, no more than 10,000 parts."""
    smallest = -(-size // MOST_PARTS)
    length = max(SMALLEST_PART_BYTES, -(-smallest // MIB) * MIB)
    if length > LARGEST_PART_BYTES:
        raise S3ClientError(f"An object of {size} bytes is larger than S3 can hold")
    return length


class File:
    """An open file that must not change any more."""

    def __init__(self, fd: int, size: int, key: str, check: Callable[[], None]) -> None:
        """key: of the object that it becomes, for messages; check(): called before each read."""
        self.fd, self.size, self.key, self.check = fd, size, key, check
        self._modified = os.fstat(fd).st_mtime_ns

    def verify(self) -> None:
        """Raise FileChanged if it did."""
        status = os.fstat(self.fd)
        if (status.st_size, status.st_mtime_ns) != (self.size, self._modified):
            raise FileChanged(self.key)


class FileBody:
    """A range of a file as the body of a request."""

    def __init__(self, file: File, *, start: int, size: int) -> None:
        self._file, self._start, self.size = file, start, size

    def sum(self, *, with_sha256: bool) -> tuple[str, str]:
        """Read it all; return its CRC32 as S3 writes it, and its SHA-256 in hex or ""."""
        digest = hashlib.sha256() if with_sha256 else None
        crc = 0
        for block in self._read():
            crc = zlib.crc32(block, crc)
            if digest:
                digest.update(block)
        return encode_crc32(crc), digest.hexdigest() if digest else ""

    def blocks(self) -> Iterator[memoryview]:
        """Yield the bytes; the last ones only if the file is as it was."""
        left = self.size
        for block in self._read():
            left -= len(block)
            if not left:
                self._file.verify()
            yield block

    def _read(self) -> Iterator[memoryview]:
        position, end = self._start, self._start + self.size
        with borrow_buffer() as buffer:
            while position < end:
                self._file.check()
                read = os.preadv(self._file.fd, [buffer[: end - position]], position)
                if not read:
                    raise FileChanged(self._file.key)
                position += read
                yield buffer[:read]


class _Put:
    """An exchange that sends a range of a file, read anew for each attempt."""

    position = 0

    def __init__(
        self,
        operation: Callable[..., Operation],
        *,
        file: File,
        start: int,
        size: int,
        with_sha256: bool,
    ) -> None:
        self._operation, self._with_sha256 = operation, with_sha256
        self._file, self._start, self._size = file, start, size
        self.crc32 = ""

    def prepare(self) -> Operation:
        start, size, sha256 = self._start, self._size, ""
        body: bytes | FileBody
        if size > IN_MEMORY_BYTES:
            body = FileBody(self._file, start=start, size=size)
            self.crc32, sha256 = body.sum(with_sha256=self._with_sha256)
        else:
            body = os.pread(self._file.fd, size, start)
            self.crc32 = encode_crc32(zlib.crc32(body))
            self._file.verify()
        headers = {"x-amz-checksum-crc32": self.crc32}
        return self._operation(method="PUT", headers=headers, body=body, sha256=sha256)

    def consume(self, response: Response) -> dict[str, str]:
        return read_headers(response)


def upload(session: Session, bucket: str, key: str, fd: int, size: int, crew: Crew) -> None:
    """Store a file of that size."""
    operation = partial(Operation, bucket=bucket, key=key)
    file = File(fd, size, key, crew.check)
    put = partial(_Put, file=file, with_sha256=session.is_plain(bucket))
    if size > SINGLE_BYTES:
        _Multipart(session, operation, put, size, crew).store()
    else:
        exchange = put(partial(operation, name="PutObject"), start=0, size=size)
        session.perform(exchange, check=crew.check)


class _Multipart:
    """An upload in parts."""

    def __init__(
        self,
        session: Session,
        operation: Callable[..., Operation],
        put: Callable[..., _Put],
        size: int,
        crew: Crew,
    ) -> None:
        self._session, self._operation, self._put = session, operation, put
        self._size, self._crew = size, crew
        self._part_bytes = part_bytes(size)
        self._count = -(-size // self._part_bytes)
        self._begun = 0
        self._parts: list[tuple[int, str, str]] = []
        self._lock = threading.Lock()
        self._upload_id = ""

    def store(self) -> None:
        """Upload the parts and join them."""
        created = self._call(
            name="CreateMultipartUpload",
            query=(("uploads", ""),),
            headers={"x-amz-checksum-algorithm": "CRC32"},
        )
        self._upload_id = created.find("UploadId")
        if not self._upload_id:
            raise S3ClientError("The answer to CreateMultipartUpload names no upload")
        try:
            self._crew.finish(self._crew.offer(self._upload_next, most=MOST_HELPERS))
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
        query = (("partNumber", str(number)), ("uploadId", self._upload_id))
        operation = partial(self._operation, name="UploadPart", query=query)
        put = self._put(operation, start=start, size=size)
        headers = self._session.perform(put, check=self._crew.check)
        returned = headers.get("x-amz-checksum-crc32") == put.crc32
        with self._lock:
            part = (number, headers.get("etag", ""), put.crc32 if returned else "")
            self._parts.append(part)
        return True

    def _complete(self) -> None:
        try:
            self._call(
                name="CompleteMultipartUpload",
                query=(("uploadId", self._upload_id),),
                headers={"x-amz-mp-object-size": str(self._size)},
                body=build_complete(sorted(self._parts)),
                read_seconds=COMPLETE_SECONDS,
            )
        except ServiceError as error:
            # The answer to an earlier attempt may have been lost on its way.
            if error.code != "NoSuchUpload" or not self._is_complete():
                raise

    def _call(self, **fields: Any) -> Element:
        """Call an operation that is answered by a document; that may be an error despite 200."""
        operation = self._operation(method="POST", **fields)

        def consume(response: Response) -> Element:
            body = response.read(ERROR_LIMIT_BYTES)
            root = parse(body)
            if root.name == "Error":
                raise error_of(operation, response, body)
            return root

        return self._session.call(operation, consume, check=self._crew.check)

    def _is_complete(self) -> bool:
        operation = self._operation(name="HeadObject", method="HEAD")
        try:
            headers = self._session.call(operation, read_headers, check=self._crew.check)
        except ServiceError:
            return False
        etag = headers.get("etag", "").strip('"')
        return headers.get("content-length") == str(self._size) and etag.endswith(f"-{self._count}")

    def _abort(self) -> None:
        operation = self._operation(
            name="AbortMultipartUpload",
            method="DELETE",
            query=(("uploadId", self._upload_id),),
        )
        end = time.monotonic() + ABORT_SECONDS

        def check() -> None:
            if time.monotonic() > end:
                raise Abandoned

        with suppress(S3ClientError):  # the error that led here is the one to report
            self._session.call(operation, read_headers, check=check, attempts=2)
