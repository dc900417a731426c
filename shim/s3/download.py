"""Whole objects to files and to a reader.

The first GET asks for everything and streams from the start; of a large object, other threads take
parts from the end until they meet. No HEAD is needed, and a small object costs one request.

    | stream -> | -> | -> |   nobody's yet   | <- part | <-   part   | <-    part    |

Rule 1: every answer's range, total and ETag are checked; some servers ignore Range or If-Match.
Rule 2: a body that breaks off is resumed at the byte reached.
Rule 3: a file gets its name only when it is complete and its checksum was compared.
Rule 4: an object that changes under way, or arrives damaged, is fetched once more from the start.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import threading
import zlib
from binascii import b2a_base64
from contextlib import suppress

from shim.s3.buffers import borrow_buffer
from shim.s3.checksums import Checksum, combine_crc32, encode_crc32
from shim.s3.crew import MOST_HELPERS, Crew, Work
from shim.s3.errors import (
    IntegrityError,
    ObjectChanged,
    S3ClientError,
    ServiceError,
    TransportError,
)
from shim.s3.http1 import HEAD_LIMIT_BYTES, Response
from shim.s3.operations import Operation, Service
from shim.s3.pace import Pace
from shim.s3.retries import RESUMES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

SMALLEST_PART_BYTES = 8 << 20
LARGEST_PART_BYTES = 64 << 20
MOST_PARTS = 32  # that what is left would be divided into: a request each, and a short end
FILE_MODE = 0o644
FIRST_HELPERS = max(1, min(7, len(os.sched_getaffinity(0)) - 1))
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class _Version:
    """The object as the first answer described it; later ones must agree."""

    def __init__(self, bucket: str, key: str) -> None:
        self.bucket, self.key, self.uri = bucket, key, f"s3://{bucket}/{key}"
        self.size: int | None = None
        self.etag = ""
        self.headers: Mapping[str, str] = {}
        self.has_crc32 = False

    def operation(self, start: int, stop: int) -> Operation:
        """Ask for everything, or when the size is known for [start, stop)."""
        if self.size is None:
            headers = {"x-amz-checksum-mode": "ENABLED"}
        else:
            headers = {"range": f"bytes={start}-{stop - 1}"}
            if self.etag and not self.etag.startswith("W/"):
                headers["if-match"] = self.etag
        return Operation(
            name="GetObject", method="GET", bucket=self.bucket, key=self.key, headers=headers
        )

    def check(self, response: Response, start: int, stop: int) -> int:
        """Check an answer to operation(); return the object's size."""
        if self.size is None:
            if response.status != 200 or "content-range" in response.headers:
                raise TransportError(
                    "The answer is a part of the object, and all of it was asked for"
                )
            if response.remaining is None:
                raise TransportError("The answer does not tell the object's length")
            self.size, self.headers = response.remaining, response.headers
            self.etag = response.headers.get("etag", "")
            self.has_crc32 = Checksum(self.headers).algorithm == "crc32"
            return self.size
        match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
        if not match:
            raise S3ClientError(f"The server ignores ranges ({self.uri})")
        first, last, size = map(int, match.groups())
        etags = {_opaque(self.etag), _opaque(response.headers.get("etag", ""))} - {""}
        if size != self.size or len(etags) > 1:
            raise self.changed()
        if (first, last, response.remaining) != (start, stop - 1, stop - start):
            raise TransportError(f"The answer holds bytes {first}-{last}, not {start}-{stop - 1}")
        return size

    def changed(self) -> ObjectChanged:
        """Say that another version took its place."""
        return ObjectChanged(f"{self.uri} was replaced during the download")


def _opaque(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


class _Range:
    """Bytes of an object on their way to their place in a file."""

    def __init__(
        self, version: _Version, fd: int, start: int, stop: int, call_for_help: Callable[[], None]
    ) -> None:
        self.version, self._fd, self._call_for_help = version, fd, call_for_help
        self.start = self.position = start
        self.stop, self.crc = stop, 0

    def operation(self) -> Operation:
        return self.version.operation(self.position, self.stop)

    def consume(self, response: Response) -> None:
        self.version.check(response, self.position, self.stop)
        with borrow_buffer() as buffer:
            self.write(Pace(response, buffer, self._call_for_help).receive)

    def write(self, receive: Callable[[int], memoryview]) -> None:
        """Take what is missing up to stop from an answer that begins at position."""
        while self.position < self.stop:
            piece = receive(self.stop - self.position)
            if self.version.has_crc32:
                self.crc = zlib.crc32(piece, self.crc)
            while piece:
                written = os.pwrite(self._fd, piece, self.position)
                self.position += written
                piece = piece[written:]


class _Whole(_Range):
    """The range that begins at 0 and ends where the other threads have begun."""

    def __init__(self, service: Service, version: _Version, fd: int, crew: Crew) -> None:
        super().__init__(version, fd, 0, 0, self._widen)
        self._service, self._crew = service, crew
        self._first = self._end = 0  # of the bytes that nobody has taken
        self._parts: list[_Range] = []
        self._lock = threading.Lock()
        self._work: Work | None = None

    def fetch(self) -> None:
        """Fetch and verify the object."""
        try:
            self._service.perform(self, cancelled=self._crew.cancelled)
            if self._work:
                self._crew.finish(self._work)
        finally:
            if self._work:
                self._crew.abandon(self._work)
        self._verify()

    def operation(self) -> Operation:
        return self.version.operation(self.position, self.version.size or 0)

    def consume(self, response: Response) -> None:
        is_first = self.version.size is None
        size = self.version.check(response, self.position, self.version.size or 0)
        if is_first and size <= 2 * SMALLEST_PART_BYTES:
            self.stop = size
        elif is_first:
            self._end = size
            self._work = self._crew.offer(self._fetch_last, most=FIRST_HELPERS)
        if size - self.position <= 2 * HEAD_LIMIT_BYTES:
            self.write(response.receive)
            return
        with borrow_buffer() as buffer:
            receive = Pace(response, buffer, self._call_for_help).receive
            self.write(receive)
            while self._take_first():
                self.write(receive)

    def _widen(self) -> None:
        if self._work:
            self._crew.widen(self._work, most=MOST_HELPERS)

    def _take_first(self) -> bool:
        with self._lock:
            if self._first == self._end:
                return False
            self.stop = self._first = min(self._first + SMALLEST_PART_BYTES, self._end)
            return True

    def _fetch_last(self) -> bool:
        with self._lock:
            if self._first == self._end:
                return False
            left, stop = self._end - self._first, self._end
            length = min(max(SMALLEST_PART_BYTES, left // MOST_PARTS), LARGEST_PART_BYTES)
            self._end = max(stop - length, self._first)
            part = _Range(self.version, self._fd, self._end, stop, self._widen)
            self._parts.append(part)
        self._service.perform(part, cancelled=self._crew.cancelled)
        return True

    def _verify(self) -> None:
        checksum = Checksum(self.version.headers)
        if checksum.algorithm == "crc32":
            parts = sorted(self._parts, key=lambda part: part.start)
            crc = combine_crc32((part.crc, part.stop - part.start) for part in (self, *parts))
            checksum.verify(self.version.uri, encode_crc32(crc))
        elif checksum.algorithm:
            with open(self._fd, "rb", closefd=False) as file:
                digest = hashlib.file_digest(file, checksum.algorithm).digest()
            checksum.verify(self.version.uri, b2a_base64(digest, newline=False).decode())


def download(
    service: Service, bucket: str, key: str, directory: int, name: str, crew: Crew
) -> None:
    """Make the name in an open directory hold the object; on failure it is as it was."""
    try:
        _download_once(service, bucket, key, directory, name, crew)
    except (ObjectChanged, IntegrityError):
        _download_once(service, bucket, key, directory, name, crew)


def _download_once(
    service: Service, bucket: str, key: str, directory: int, name: str, crew: Crew
) -> None:
    temporary = f".{os.urandom(12).hex()}.part"
    version = _Version(bucket, key)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(temporary, flags, FILE_MODE, dir_fd=directory)
    try:
        os.fchmod(fd, FILE_MODE)  # whatever the umask
        _Whole(service, version, fd, crew).fetch()
        os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException as error:
        with suppress(OSError):  # somebody else may write into the directory too
            os.unlink(temporary, dir_fd=directory)
        if isinstance(error, ServiceError) and version.size is not None:
            if error.status in (412, 416):
                raise version.changed() from error
        raise
    finally:
        os.close(fd)


class ObjectReader(io.RawIOBase):
    """An object read in order, resumed where it breaks off.

    The checksum is compared with the last byte: IntegrityError instead of it.
    """

    def __init__(self, service: Service, bucket: str, key: str) -> None:
        super().__init__()
        self._service, self._version = service, _Version(bucket, key)
        self.position = self._breaks = 0
        self._response: Response | None = None  # close() is called also when there is no answer
        self._response = service.perform(self)
        self._checksum = Checksum(self._version.headers)

    def operation(self) -> Operation:
        """Ask for what is still to be read."""
        return self._version.operation(self.position, self._version.size or 0)

    def consume(self, response: Response) -> Response:
        """Keep the answer, to read from it later."""
        self._version.check(response, self.position, self._version.size or 0)
        return response

    def readable(self) -> bool:
        """Say yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read at least a byte, 0 at the end."""
        view = memoryview(buffer).cast("B")
        if self.position == self._version.size or not view:
            return 0
        piece = self._receive(view)
        if piece.obj is not view.obj:
            view[: len(piece)] = piece
        self.position += len(piece)
        self._checksum.update(piece)
        if self.position == self._version.size:
            self._checksum.verify(self._version.uri)
        return len(piece)

    def _receive(self, view: memoryview) -> memoryview:
        while True:
            assert self._response is not None
            try:
                return self._response.receive(len(view), view)
            except TransportError as error:
                self._breaks += 1
                if self._breaks > RESUMES:
                    raise
                self._service.finish(self._response)
                self._service.wait(error, self._breaks)
                self._response = self._service.perform(self)

    def close(self) -> None:
        """Give the connection back, or up where there is more to read."""
        if not self.closed and self._response is not None:
            self._service.finish(self._response)
        super().close()
