"""One HTTP/1.1 exchange after the other, as a client, over one connected socket.

    NEW -> exchange() -> BUSY -> the body is read to its end -> IDLE -> exchange() -> ...

Rule 1: before every receive and every send, and once a second, the caller may end the wait; silence
        has a limit, and so have the time and the length of what comes before and behind a body.
Rule 2: a body's bytes are counted; one that ends early is an error, never a short result.
Rule 3: an answer that comes before the request's body was sent is read and reported.
Rule 4: only a connection that is IDLE may serve another exchange.

http.client is left aside for its cost: header fields parsed by the email package take longer than
all the rest of a small transfer.
"""

from __future__ import annotations

import fcntl
import select
import socket
import sys
import termios
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Protocol

from shim.http.errors import StaleConnection, TransportError
from shim.http.stream import SocketStream, unchecked
from shim.http.tls import TlsStream
from shim.http.wire import (
    CHUNKED,
    HEAD_LIMIT_BYTES,
    body_length,
    find_head,
    parse_chunk_size,
    parse_head,
)


class Body(Protocol):
    """The body of a request that is not held in memory."""

    @property
    def size(self) -> int: ...

    def blocks(self) -> Iterator[memoryview]: ...


CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
ONE_PACKET_BYTES = 256 << 10


class State(Enum):
    """What a connection can be used for."""

    NEW = "nothing was sent"
    BUSY = "an answer is to come, or to be read to its end"
    IDLE = "kept after a whole answer"


class Request(urllib.request.Request):
    """urllib's request, and what a connection wants to know besides.

    target: as it stands in the request line; headers: as they are sent, with host and without
    content-length; check(): ends waits by raising.
    """

    def __init__(
        self,
        *,
        method: str,
        scheme: str,
        host: str,
        port: int,
        target: str,
        headers: Mapping[str, str],
        body: bytes | Body | None = None,
        connect_seconds: float = CONNECT_SECONDS,
        read_seconds: float = READ_SECONDS,
        check: Callable[[], None] = unchecked,
        proxied: bool = True,
    ) -> None:
        server = headers.get("host") or f"{host}:{port}"
        self.url = f"{scheme}://{server}{target.partition('?')[0]}"  # for messages
        super().__init__(self.url, method=method)
        self.body, self.headers = body, headers  # type: ignore[assignment]
        self.hostname, self.port, self.target = host, port, target
        self.connect_seconds, self.read_seconds = connect_seconds, read_seconds
        self.check, self.proxied = check, proxied
        self.route = (scheme, host, port, proxied)

    def head(self, *, prefix: str = "", authorization: str = "") -> bytes:
        """Write the request line and the header fields.

        prefix, authorization: what a proxy wants before the target, and of whom it wants it.
        """
        lines = [f"{self.method} {prefix}{self.target} HTTP/1.1"]
        lines += [f"proxy-authorization: {authorization}"] * bool(authorization)
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if self.body is not None:
            size = len(self.body) if isinstance(self.body, bytes) else self.body.size
            lines.append(f"content-length: {size}")
        text = "\r\n".join(lines)
        if not text.count("\r") == text.count("\n") == len(lines) - 1:
            raise ValueError("A header field holds a line break")
        return f"{text}\r\n\r\n".encode("latin-1")


class Connection:
    """A stream, with what was received from it and not yet consumed."""

    def __init__(
        self,
        sock: SocketStream,
        route: object = None,
        tls: TlsStream | None = None,
        *,
        is_lenient: bool = False,
    ) -> None:
        """route: what another request must have in common to be sent here; tls: over the socket.

        is_lenient: whether answers may be of the forms that only a hand-written server sends.
        """
        self._sock, self._tls, self.route = sock, tls, route
        self._stream = tls or sock
        self.state, self._is_lenient = State.NEW, is_lenient
        self._buffer = bytearray(HEAD_LIMIT_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._poll = select.poll()
        self._poll.register(self._sock, select.POLLIN)
        self.read_seconds = READ_SECONDS

    def close(self) -> None:
        """Give up the socket."""
        self._sock.close()

    def is_idle(self) -> bool:
        """Tell whether nothing came since the last exchange, not even the end of the stream."""
        return self._start == self._end and not self.is_readable()

    def is_readable(self) -> bool:
        """Tell whether the next receive() would not wait."""
        return bool(self._poll.poll(0)) or (self._tls is not None and self._tls.holds_data())

    def unread_bytes(self) -> int:
        """Return how much has arrived and waits in the kernel, as it came over the wire."""
        count = fcntl.ioctl(self._sock.fileno(), termios.FIONREAD, bytes(4))
        return int.from_bytes(count, sys.byteorder)

    def exchange(self, request: Request, head: bytes) -> Response:
        """Send a request and read the head of its answer."""
        is_kept, self.state = self.state is State.IDLE, State.BUSY
        self._sock.check = request.check
        self.read_seconds = request.read_seconds
        is_sent = self._send_request(head, request.body)
        self._sock.limit(self.read_seconds, "The head of the answer")
        status = 100
        while status < 200:  # interim
            answer = self._read_head(is_kept)
            status, reason, headers, is_current = parse_head(answer, is_lenient=self._is_lenient)
        self._sock.stop_limiting()
        if not is_sent and status < 300:
            raise TransportError("The server answered before it had the whole body")
        method = request.get_method()
        length = body_length(method, status, headers, is_lenient=self._is_lenient)
        may_keep = is_sent and is_current and "close" not in headers.get("connection", "").lower()
        # Some servers lose step after refusing a body (s3.md section 9).
        may_keep = may_keep and (status < 300 or method in ("GET", "HEAD"))
        return Response(
            self, status=status, reason=reason, headers=headers, length=length, may_keep=may_keep
        )

    def _send_request(self, head: bytes, body: bytes | Body | None) -> bool:
        """Send all of it; false when the server answered, or went away, before."""
        if body is None or isinstance(body, bytes):
            body = body or b""
            if len(body) <= ONE_PACKET_BYTES:
                return self._send(head + body)
            return self._send(head) and self._send(body)
        return self._send(head) and all(
            not self._has_answer() and self._send(block) for block in body.blocks()
        )

    def _send(self, data: bytes | memoryview) -> bool:
        view, silent_seconds = memoryview(data), 0.0
        while view:
            try:
                view, silent_seconds = view[self._stream.send(view) :], 0.0
            except BlockingIOError:
                if self._has_answer():
                    return False
                silent_seconds = self._tick(silent_seconds)
            except TransportError:
                raise
            except OSError:
                return False  # what the server said before it closed is still to be read
        return True

    def _has_answer(self) -> bool:
        if not self.is_readable():
            return False
        if self._tls is None:
            return True
        self._sock.settimeout(0)
        try:  # it may be a session ticket only, and no data
            self._end += self._tls.recv_into(self._view[self._end :])
        except OSError:
            return False
        finally:
            self._sock.set_tick()
        return True

    def _tick(self, silent_seconds: float) -> float:
        silent_seconds += self._sock.tick_seconds
        if silent_seconds >= self.read_seconds:
            raise TransportError(f"The server was silent for {self.read_seconds:g} s")
        return silent_seconds

    def _recv_into(self, view: memoryview, *, flags: int = 0) -> int:
        silent_seconds = 0.0
        while True:
            try:
                return self._stream.recv_into(view, 0, flags)
            except BlockingIOError:
                silent_seconds = self._tick(silent_seconds)
            except TransportError:
                raise
            except OSError as error:
                raise _Lost(f"The connection was lost: {error}") from error

    def _read_head(self, is_kept: bool) -> bytes:
        """Read up to the empty line; StaleConnection when a kept connection ends before a byte."""
        while not (
            found := find_head(self._buffer, self._start, self._end, is_lenient=self._is_lenient)
        ):
            try:
                is_over = not self._receive_more("The answer's header fields are too long")
            except _Lost:
                is_over = True
            if is_over and is_kept and self._start == self._end:
                raise StaleConnection("The server had closed the kept connection")
            if is_over:
                raise TransportError("Connection was closed before a valid answer was received")
        stop, after = found
        head = bytes(self._view[self._start : stop])
        self._start = after
        return head

    def _receive_more(self, too_long: str) -> int:
        """Receive into the buffer behind what is there; return how much, 0 at the end."""
        if self._start == self._end:
            self._start = self._end = 0
        if self._end == HEAD_LIMIT_BYTES and self._start:
            rest = bytes(self._view[self._start : self._end])
            self._view[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        if self._end == HEAD_LIMIT_BYTES:
            raise TransportError(too_long)
        received = self._recv_into(self._view[self._end :])
        self._end += received
        return received

    def take(self, limit: int, into: memoryview | None = None) -> memoryview:
        """Return at most limit of the next bytes, valid until the next call; empty at the end."""
        if self._start < self._end:
            start, self._start = self._start, min(self._end, self._start + limit)
            return self._view[start : self._start]
        view = (self._view if into is None else into)[:limit]
        is_whole = self._tls is None and len(view) > HEAD_LIMIT_BYTES  # much at once
        return view[: self._recv_into(view, flags=socket.MSG_WAITALL if is_whole else 0)]

    def read_chunk_size(self, *, is_first: bool) -> int:
        """Read what stands before a chunk; behind the last one, 0, read the trailer fields too."""
        self._sock.limit(self.read_seconds, "The end of a chunk")
        if not is_first and self._read_line().rstrip(b"\r\n"):
            raise TransportError("The answer's chunked coding is malformed")
        size = parse_chunk_size(self._read_line(), is_lenient=self._is_lenient)
        if size is None:
            raise TransportError("The answer's chunked coding is malformed")
        room = HEAD_LIMIT_BYTES
        while size == 0 and (line := self._read_line()).rstrip(b"\r\n"):
            room -= len(line)
            if room < 0:
                raise TransportError("The answer's trailer fields are too long")
        self._sock.stop_limiting()
        return size

    def _read_line(self) -> bytes:
        """Read a line of the chunked coding, with its end."""
        while (stop := self._buffer.find(b"\n", self._start, self._end)) < 0:
            if not self._receive_more("The answer's chunked coding is malformed"):
                raise TransportError("The answer's chunked coding broke off")
        line = bytes(self._view[self._start : stop + 1])
        self._start = stop + 1
        return line


class _Lost(TransportError):
    """The connection broke off: a reset, most often."""


class Response:
    """An answer; its body is read from the connection.

    remaining: how many bytes of the body are still to come; None where the server did not say.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        status: int,
        reason: str,
        headers: dict[str, str],
        length: int | None,
        may_keep: bool,
    ) -> None:
        self.connection, self._may_keep = connection, may_keep
        self.status, self.reason, self.headers = status, reason, headers
        self._is_chunked, self._is_over = length == CHUNKED, False
        self.remaining = None if self._is_chunked else length
        self._chunk: int | None = None  # of which so much is to come; None: none has begun
        if length == 0:
            self.end()

    @property
    def has_known_end(self) -> bool:
        """Whether a body that broke off can be told from one that is complete."""
        return self._is_chunked or self.remaining is not None

    def end(self) -> None:
        """Take note that the body has been read, or that there is none."""
        self._is_over = True
        if self._may_keep:
            self.connection.state = State.IDLE

    def receive(self, limit: int = 1 << 62, into: memoryview | None = None) -> memoryview:
        """Return at most limit of the next bytes, valid until the next call; empty at the end.

        into: where bytes may be put; without it, and for the first ones, a small buffer is used.
        """
        if self._is_chunked and not self._is_over and not self._chunk:
            self._chunk = self.connection.read_chunk_size(is_first=self._chunk is None)
            if self._chunk == 0:
                self.end()
        if self._is_over:
            return memoryview(b"")
        left = self._chunk if self._is_chunked else self.remaining
        if left is None:
            return self.connection.take(limit, into)
        piece = self.connection.take(min(limit, left), into)
        if not piece:
            raise TransportError("The answer ended before its announced length")
        if self._is_chunked:
            self._chunk = left - len(piece)
        else:
            self.remaining = left - len(piece)
            if self.remaining == 0:
                self.end()
        return piece

    def read(self, limit_bytes: int) -> bytes:
        """Read the whole body; TransportError when it is longer than that."""
        pieces: list[bytes] = []
        while piece := self.receive():
            limit_bytes -= len(piece)
            if limit_bytes < 0:
                raise TransportError("The answer is longer than expected")
            pieces.append(bytes(piece))
        return b"".join(pieces)
