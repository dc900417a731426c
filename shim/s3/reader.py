"""An object read in order, over as many connections as its server is slow.

    whoever reads  <-  | part | part | part | part |   in memory, a bounded number
                           ^      ^      ^      ^
                        stream   a thread for each

The first answer asked for everything; a thread reads it into parts ahead of whoever reads. While it
waits for the server, further threads take the next parts with ranges of their own. A stream that
meets a part of somebody else's is given up.

Rule 1: answers are checked as those of downloads are, and resumed at the byte reached.
Rule 2: no more than WINDOW_PARTS are in memory, whatever the size.
Rule 3: where the server ignores ranges, the one thread that has the stream reads on alone.
"""

from __future__ import annotations

import io
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from shim.http.connection import Response
from shim.http.errors import TransportError
from shim.http.stream import SLICE_SECONDS
from shim.s3.buffers import borrow_buffer
from shim.s3.crew import Abandoned, start_thread
from shim.s3.download import Version
from shim.s3.errors import ServiceError
from shim.s3.operations import Operation, Session
from shim.s3.pace import Pace
from shim.s3.retries import RESUMES

PART_BYTES = 4 << 20
WINDOW_PARTS = 11  # two readers, model and ground truth, stay below 100 MiB together


class _Part:
    """Bytes of an object on their way into memory."""

    def __init__(self, version: Version, start: int, stop: int, buffer: memoryview) -> None:
        self.version, self.start, self.position, self.stop = version, start, start, stop
        self.buffer = buffer
        self.on_progress: Callable[[], None]
        self.on_wait: Callable[[], None]

    def prepare(self) -> Operation:
        """Ask for what is missing."""
        return self.version.operation(self.position, self.stop)

    def consume(self, response: Response) -> Response | None:
        """Take it from an answer; return one that goes on behind it."""
        first = self.version.check(response, self.position, self.stop)
        if first < self.position:
            with borrow_buffer() as buffer:
                self.version.skip(
                    lambda limit: response.receive(limit, buffer), self.position - first
                )
        return self.take(response)

    def take(self, response: Response) -> Response | None:
        """Take what is missing from an answer that begins there."""
        pace = Pace(response, None, self.on_wait)
        while self.position < self.stop:
            view = self.buffer[self.position - self.start : self.stop - self.start]
            piece = pace.receive(len(view), view)
            if not piece:
                self.version.end(self.position)
            if piece.obj is not view.obj:
                view[: len(piece)] = piece
            self.position += len(piece)
            self.on_progress()
        return response if response.remaining else None


class _Window:
    """The parts of an object from where it is read on, and the threads that fetch them."""

    def __init__(self, session: Session, version: Version, response: Response) -> None:
        assert version.size is not None
        self._session, self._version, self._size = session, version, version.size
        self._stream: Response | None = response
        self._stream_at = self._end = self._taken = self._breaks = 0
        self._parts: deque[_Part] = deque()
        self._free: list[memoryview] = []
        self._threads = 0
        self._error: BaseException | None = None
        self._is_closed = self._is_awaited = False
        lock = threading.Lock()
        self._came, self._room = threading.Condition(lock), threading.Condition(lock)

    def start(self) -> bool:
        """Start the first thread; False where the system gives none."""
        with self._room:
            return self._add_thread()

    def read(self, limit: int) -> memoryview:
        """Return at least a byte, at most limit, valid until the next call."""
        with self._came:
            if self._parts and self._taken == self._parts[0].stop:
                self._free.append(self._parts.popleft().buffer)
                self._room.notify()
            while not self._parts or self._parts[0].position == self._taken:
                if self._error:
                    raise self._error
                self._is_awaited = True
                self._came.wait(SLICE_SECONDS)
                self._session.check()
            self._is_awaited = False
            part = self._parts[0]
        start = self._taken - part.start
        stop = min(start + limit, part.position - part.start)
        self._taken = part.start + stop
        return part.buffer[start:stop]

    def close(self) -> None:
        """End the threads, and give the connection of the stream back, or up."""
        with self._room:
            self._is_closed = True
            self._room.notify_all()
            self._room.wait_for(lambda: not self._threads)
        if self._stream:
            self._session.finish(self._stream)

    def check(self) -> None:
        """Raise what ends the threads."""
        if self._is_closed:
            raise Abandoned
        self._session.check()

    def _add_thread(self) -> bool:
        with suppress(RuntimeError):
            start_thread(self._work)
            self._threads += 1
            return True
        return False

    def _widen(self) -> None:
        """Let one more thread fetch parts, while there is room for them."""
        with self._room:
            is_wanted = len(self._parts) < WINDOW_PARTS and self._end < self._size
            if is_wanted and self._version.has_ranges and not self._is_closed:
                self._add_thread()

    def _tell(self) -> None:
        if self._is_awaited:
            with self._came:
                self._came.notify()

    def _work(self) -> None:
        try:
            while part := self._next():
                self._fetch(part)
        except BaseException as error:  # noqa: B036 - read() raises it
            is_other = isinstance(error, ServiceError) and error.status in (412, 416)
            with self._came:
                self._error = self._error or (self._version.changed() if is_other else error)
                self._is_closed = True
        finally:
            with self._came:
                self._threads -= 1
                self._came.notify()
                self._room.notify_all()

    def _next(self) -> _Part | None:
        with self._room:
            while len(self._parts) == WINDOW_PARTS and not self._is_closed:
                self._room.wait()
            may_go_on = self._version.has_ranges or self._threads == 1
            if self._is_closed or self._end == self._size or not may_go_on:
                return None
            buffer = self._free.pop() if self._free else memoryview(bytearray(PART_BYTES))
            start, self._end = self._end, min(self._end + PART_BYTES, self._size)
            part = _Part(self._version, start, self._end, buffer)
            part.on_progress, part.on_wait = self._tell, self._widen
            self._parts.append(part)
            return part

    def _fetch(self, part: _Part) -> None:
        with self._room:
            stream = self._stream if self._stream_at == part.start else None
            if stream:
                self._stream = None
        rest: Response | None = None
        if stream:
            try:
                rest = part.take(stream)
            except TransportError as error:
                self._session.finish(stream)
                self._breaks += 1
                if self._breaks > RESUMES:
                    raise
                name = f"The stream of {self._version.uri}"
                self._session.wait(error, self._breaks, name)
                stream = None
        if stream is None:
            rest = self._session.perform(part, check=self.check)
        elif rest is None:
            self._session.finish(stream)
        if rest:
            self._keep(rest, part.stop)

    def _keep(self, stream: Response, position: int) -> None:
        """Let whoever takes the part that begins here read on, if nobody has taken it."""
        with self._room:
            if self._end == position and self._stream is None:
                self._stream, self._stream_at = stream, position
                return
        self._session.finish(stream)


class ObjectReader(io.RawIOBase):
    """An object read in order, resumed where it breaks off.

    The checksum is compared with the last byte: IntegrityError instead of it.
    """

    def __init__(self, session: Session, bucket: str, key: str) -> None:
        super().__init__()
        self._session, self._version = session, Version(bucket, key)
        self.position = self._breaks = 0
        self._response: Response | None = None
        self._window: _Window | None = None

    def ask(self) -> ObjectReader:
        """Send the request, so that an object which is missing is known at once; return self."""
        self._response = self._session.perform(self)
        self._checksum = self._session.checksum(self._version.headers)
        if (self._version.size or 0) > 2 * PART_BYTES:
            window = _Window(self._session, self._version, self._response)
            if window.start():
                self._response, self._window = None, window
        return self

    def prepare(self) -> Operation:
        """Ask for what is still to be read."""
        return self._version.operation(self.position, self._version.size or 0)

    def consume(self, response: Response) -> Response:
        """Keep the answer, to read from it later."""
        first = self._version.check(response, self.position, self._version.size or 0)
        if first < self.position:
            with borrow_buffer() as buffer:
                self._version.skip(
                    lambda limit: response.receive(limit, buffer), self.position - first
                )
        return response

    def readable(self) -> bool:
        """Say yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read at least a byte, 0 at the end."""
        self._session.check()
        view = memoryview(buffer).cast("B")
        if self.position == self._version.size or not view:
            return 0
        piece = self._window.read(len(view)) if self._window else self._receive(view)
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
                piece = self._response.receive(len(view), view)
                if not piece:
                    self._version.end(self.position)
                return piece
            except TransportError as error:
                self._breaks += 1
                if self._breaks > RESUMES:
                    raise
                self._session.finish(self._response)
                self._session.wait(error, self._breaks, f"The stream of {self._version.uri}")
                self._response = self._session.perform(self)

    def close(self) -> None:
        """Give the connection back, or up where there is more to read."""
        if not self.closed and self._window:
            self._window.close()
        elif not self.closed and self._response is not None:
            self._session.finish(self._response)
        super().close()
