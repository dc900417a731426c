"""Whole objects to files.

The first GET asks for everything and streams from the start; of a large object, other threads take
parts from the end until they meet. No HEAD is needed, and a small object costs one request.

    | stream -> | -> | -> |   nobody's yet   | <- part | <-   part   | <-    part    |

Rule 1: every answer's range, total and ETag are checked; some servers ignore Range or If-Match.
Rule 2: a body that breaks off is resumed at the byte reached; where the server ignores Range, or
        does not tell the length, the same version is read from its start, up to that byte in vain.
Rule 3: a file gets its name only when it is complete and its checksum was compared.
Rule 4: an object that changes under way, or arrives damaged, is fetched once more from the start.
"""

from __future__ import annotations

import os
import re
import threading
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress

from shim.http.connection import Response
from shim.http.errors import TransportError
from shim.http.wire import HEAD_LIMIT_BYTES
from shim.s3.buffers import borrow_buffer
from shim.s3.checksums import Checksum, combine_crc32, encode_crc32
from shim.s3.crew import MOST_HELPERS, Crew, Work
from shim.s3.errors import IntegrityError, ObjectChanged, S3ClientError, ServiceError
from shim.s3.operations import Operation, Session
from shim.s3.pace import Pace

SMALLEST_PART_BYTES = 8 << 20
LARGEST_PART_BYTES = 64 << 20
MOST_PARTS = 32  # that what is left would be divided into: a request each, and a short end
FILE_MODE = 0o644
FIRST_HELPERS = max(1, min(7, len(os.sched_getaffinity(0)) - 1))
UNKNOWN_BYTES = 1 << 62  # the size of an object whose end only its body tells
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class Version:
    """The object as the first answer described it; later ones must agree.

    size: None until an answer tells it, or the end of one that does not.
    """

    def __init__(self, bucket: str, key: str) -> None:
        self.bucket, self.key, self.uri = bucket, key, f"s3://{bucket}/{key}"
        self.is_known, self.has_ranges = False, True
        self.size: int | None = None
        self.etag = ""
        self.headers: Mapping[str, str] = {}
        self.has_crc32 = False

    def operation(self, start: int, stop: int) -> Operation:
        """Ask for everything, or when the size is known for [start, stop)."""
        headers = {} if self.is_known else {"x-amz-checksum-mode": "ENABLED"}
        if self.size is not None and self.has_ranges:
            headers["range"] = f"bytes={start}-{stop - 1}"
        if self.etag and not self.etag.startswith("W/"):
            headers["if-match"] = self.etag
        return Operation(
            name="GetObject", method="GET", bucket=self.bucket, key=self.key, headers=headers
        )

    def check(self, response: Response, start: int, stop: int) -> int:
        """Check an answer to prepare(); return where it begins: at start, or at 0."""
        content_range = response.headers.get("content-range", "")
        is_whole = response.status == 200 and not content_range
        if not response.has_known_end:
            raise TransportError("The answer does not tell the object's length")
        if not self.is_known and not is_whole:
            raise TransportError("The answer is a part of the object, and all of it was asked for")
        if is_whole:
            self._check_whole(response)
            return 0
        match = _CONTENT_RANGE.fullmatch(content_range)
        if not match:
            raise TransportError("The answer does not tell which bytes it holds")
        first, last, size = map(int, match.groups())
        self._check_version(response, size)
        if (first, last, response.remaining) != (start, stop - 1, stop - start):
            raise TransportError(f"The answer holds bytes {first}-{last}, not {start}-{stop - 1}")
        return start

    def _check_whole(self, response: Response) -> None:
        if self.is_known:
            self.has_ranges = False
            self._check_version(response, response.remaining)
            return
        self.is_known = True
        self.size, self.headers = response.remaining, response.headers
        self.etag = response.headers.get("etag", "")
        self.has_crc32 = Checksum(self.headers).algorithm == "crc32"

    def _check_version(self, response: Response, size: int | None) -> None:
        etags = {_opaque(self.etag), _opaque(response.headers.get("etag", ""))} - {""}
        if len({size, self.size} - {None}) > 1 or len(etags) > 1:
            raise self.changed()

    def skip(self, receive: Callable[[int], memoryview], count: int) -> None:
        """Receive bytes that are there already."""
        while count:
            piece = receive(count)
            if not piece:
                raise self.changed()
            count -= len(piece)

    def end(self, position: int) -> int:
        """Note that an answer ended at this byte; return the size."""
        if self.size not in (None, position):
            raise TransportError("The answer ended before the object did")
        self.size = position
        return position

    def changed(self) -> ObjectChanged:
        """Say that another version took its place."""
        return ObjectChanged(f"{self.uri} was replaced during the download")


def _opaque(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


class _RangesIgnored(S3ClientError):
    """A part was asked for, and the whole object came."""


class _Range:
    """Bytes of an object on their way to their place in a file."""

    takes_whole = False  # and leaves aside what comes before position

    def __init__(
        self, version: Version, fd: int, start: int, stop: int, call_for_help: Callable[[], None]
    ) -> None:
        self.version, self._fd, self._call_for_help = version, fd, call_for_help
        self.start = self.position = start
        self.stop, self.crc = stop, 0

    def prepare(self) -> Operation:
        return self.version.operation(self.position, self.stop)

    def consume(self, response: Response) -> None:
        first = self.version.check(response, self.position, self.stop)
        if first < self.position and not self.takes_whole:
            raise _RangesIgnored
        with borrow_buffer() as buffer:
            receive = Pace(response, buffer, self._call_for_help).receive
            self.version.skip(receive, self.position - first)
            self.write(receive)

    def write(self, receive: Callable[[int], memoryview]) -> None:
        """Take what is missing up to stop from an answer that begins at position."""
        while self.position < self.stop:
            piece = receive(self.stop - self.position)
            if not piece:
                self.stop = self.version.end(self.position)
            if self.version.has_crc32:
                self.crc = zlib.crc32(piece, self.crc)
            while piece:
                written = os.pwrite(self._fd, piece, self.position)
                self.position += written
                piece = piece[written:]


class _Whole(_Range):
    """The range that begins at 0 and ends where the other threads have begun.

    The bytes from _first to _end are nobody's yet. The stream that has been there from the start
    takes the next piece from the front; who comes to help takes the next part from the back: nobody
    waits, and whoever is faster does more. When they meet, the stream is cut off and all is here.
    A server that ignores ranges sends the helper the whole object: its part is returned, and the
    stream goes on through it when it gets there (_take_first), or fetches it at the end.
    """

    takes_whole = True

    def __init__(self, session: Session, version: Version, fd: int, crew: Crew) -> None:
        super().__init__(version, fd, 0, 0, self._widen)
        self._session, self._crew = session, crew
        self._first = self._end = 0  # of the bytes that nobody has taken
        self._parts: list[_Range] = []
        self._returned: list[_Range] = []
        self._lock = threading.Lock()
        self._work: Work | None = None

    def fetch(self) -> None:
        """Fetch and verify the object."""
        try:
            self._session.perform(self, check=self._crew.check)
            if self._work:
                self._crew.finish(self._work)
        finally:
            if self._work:
                self._crew.abandon(self._work)
        if self._returned:
            self._fetch_returned()
        self._verify()

    def prepare(self) -> Operation:
        return self.version.operation(self.position, self.version.size or 0)

    def consume(self, response: Response) -> None:
        is_first = not self.version.is_known
        first = self.version.check(response, self.position, self.version.size or 0)
        size = UNKNOWN_BYTES if self.version.size is None else self.version.size
        if is_first and (size <= 2 * SMALLEST_PART_BYTES or size == UNKNOWN_BYTES):
            self.stop = size
        elif is_first:
            self._end = size
            self._work = self._crew.offer(self._fetch_last, most=FIRST_HELPERS)
        if size - first <= 2 * HEAD_LIMIT_BYTES:
            self.version.skip(response.receive, self.position - first)
            self.write(response.receive)
            return
        with borrow_buffer() as buffer:
            receive = Pace(response, buffer, self._call_for_help).receive
            self.version.skip(receive, self.position - first)
            self.write(receive)
            while self._take_first():
                self.write(receive)

    def _widen(self) -> None:
        if self._work:
            self._crew.widen(self._work, most=MOST_HELPERS)

    def _take_first(self) -> bool:
        with self._lock:
            for part in sorted(self._returned, key=lambda part: part.start):
                if part.start == self._end:
                    self._end = part.stop
                    self._returned.remove(part)
            if self._first == self._end:
                return False
            self.stop = self._first = min(self._first + SMALLEST_PART_BYTES, self._end)
            return True

    def _fetch_last(self) -> bool:
        with self._lock:
            if self._first == self._end or not self.version.has_ranges:
                return False
            left, stop = self._end - self._first, self._end
            length = min(max(SMALLEST_PART_BYTES, left // MOST_PARTS), LARGEST_PART_BYTES)
            self._end = max(stop - length, self._first)
            part = _Range(self.version, self._fd, self._end, stop, self._widen)
            self._parts.append(part)
        try:
            self._session.perform(part, check=self._crew.check)
        except _RangesIgnored:
            with self._lock:
                self._parts.remove(part)
                self._returned.append(part)
        return True

    def _fetch_returned(self) -> None:
        """Fetch what no other thread could, and what came too late for the one that has all."""
        start = min(part.start for part in self._returned)
        stop = max(part.stop for part in self._returned)
        rest = _Range(self.version, self._fd, start, stop, self._widen)
        rest.takes_whole = True
        self._parts = [part for part in self._parts if not start <= part.start < stop] + [rest]
        self._session.perform(rest, check=self._crew.check)

    def _verify(self) -> None:
        checksum = self._session.checksum(self.version.headers)
        if checksum.algorithm == "crc32":
            parts = sorted(self._parts, key=lambda part: part.start)
            crc = combine_crc32((part.crc, part.stop - part.start) for part in (self, *parts))
            checksum.verify(self.version.uri, encode_crc32(crc))
        elif checksum.algorithm:
            position = 0
            with borrow_buffer() as buffer:
                while read := os.preadv(self._fd, [buffer], position):
                    self._crew.check()
                    checksum.update(buffer[:read])
                    position += read
            checksum.verify(self.version.uri)


def download(
    session: Session, bucket: str, key: str, directory: int, name: str, crew: Crew
) -> None:
    """Make the name in an open directory hold the object; on failure it is as it was."""
    try:
        _download_once(session, bucket, key, directory, name, crew)
    except (ObjectChanged, IntegrityError):
        _download_once(session, bucket, key, directory, name, crew)


def _download_once(
    session: Session, bucket: str, key: str, directory: int, name: str, crew: Crew
) -> None:
    temporary = f".{os.urandom(12).hex()}.part"
    version = Version(bucket, key)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(temporary, flags, FILE_MODE, dir_fd=directory)
    try:
        os.fchmod(fd, FILE_MODE)  # whatever the umask
        _Whole(session, version, fd, crew).fetch()
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
