"""HTTP/1.1 as S3 needs it, spoken over one connected socket.

Rule 1: before every receive and every send, and once a second, the caller may cancel; silence has
        a limit, and so have the time and the length of what comes before and behind a body.
Rule 2: a body's bytes are counted; one that ends early is an error, never a short result.
Rule 3: an answer that comes before the request's body was sent is read and reported.
Rule 4: what is doubtful is refused: contradicting lengths, folded fields, unknown codings.

http.client is left aside for its cost: header fields parsed by the email package take longer than
all the rest of a small transfer.
"""

from __future__ import annotations

import fcntl
import select
import socket
import sys
import termios
from collections.abc import Callable, Iterator, Mapping

from shim.http.errors import StaleConnection, TransportError
from shim.http.stream import TICK_SECONDS, Wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from shim.http.tls import TlsStream

    class Body(Protocol):
        """The body of a request that is not held in memory."""

        @property
        def size(self) -> int: ...

        def blocks(self) -> Iterator[memoryview]: ...


CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
HEAD_LIMIT_BYTES = 64 << 10
ONE_PACKET_BYTES = 256 << 10


def never() -> bool:
    """Do not cancel."""
    return False


class Request:
    """A request as OpenerDirector.open takes it (type, full_url, data, headers, get_method)."""

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
        cancelled: Callable[[], bool] = never,
        proxied: bool = True,
    ) -> None:
        """headers: names in lower case, with host and without content-length."""
        self.method, self.type, self.host, self.port = method, scheme, host, port
        self.target, self.headers, self.data = target, headers, body
        self.connect_seconds, self.read_seconds = connect_seconds, read_seconds
        self.cancelled, self.proxied = cancelled, proxied
        self.route = (scheme, host, port, proxied)
        self.timeout: object = None  # set by OpenerDirector

    @property
    def full_url(self) -> str:
        """The URL as it may stand in messages: without its query."""
        return f"{self.type}://{self.headers['host']}{self.target.partition('?')[0]}"

    def get_method(self) -> str:
        """Return the method."""
        return self.method

    def head(self) -> bytes:
        """Write the request line and the header fields."""
        lines = [f"{self.method} {self.target} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if self.data is not None:
            size = len(self.data) if isinstance(self.data, bytes) else self.data.size
            lines.append(f"content-length: {size}")
        text = "\r\n".join(lines)
        if not text.count("\r") == text.count("\n") == len(lines) - 1:
            raise ValueError("A header field holds a line break")
        return f"{text}\r\n\r\n".encode("latin-1")


def parse_head(data: bytes) -> tuple[int, str, dict[str, str], bool]:
    """Return status, reason, header fields (names in lower case), and if this is HTTP/1.1."""
    status_line, *lines = data.decode("latin-1").split("\r\n")
    version, _, rest = status_line.partition(" ")
    status, _, reason = rest.partition(" ")
    if not version.startswith("HTTP/1.") or len(status) != 3 or not status.isdecimal():
        raise TransportError(f"Not an HTTP/1.1 answer: {status_line[:100]!r}")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if not colon or name != name.strip() or not name or "\n" in line or "\r" in line:
            raise TransportError(f"The answer has a malformed header field: {line[:100]!r}")
        if headers.get(name, value) != value:
            if name in ("content-length", "content-range"):
                raise TransportError(f"The answer contradicts itself about its {name}")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return int(status), reason, headers, version == "HTTP/1.1"


class Connection:
    """A wire, with what was received and not yet consumed."""

    def __init__(
        self, sock: socket.socket | Wire, route: object, tls: TlsStream | None = None
    ) -> None:
        """route: what another request must have in common to be sent here; tls: over the wire."""
        self._wire = Wire(sock, never) if isinstance(sock, socket.socket) else sock
        self._tls, self.route = tls, route
        self._stream = tls or self._wire
        self._buffer = bytearray(HEAD_LIMIT_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._poll = select.poll()
        self._poll.register(self._wire, select.POLLIN)
        self.is_used = False
        self.read_seconds = READ_SECONDS

    def close(self) -> None:
        """Give up the socket."""
        self._wire.close()

    def is_idle(self) -> bool:
        """Tell whether nothing came since the last exchange, not even the end of the stream."""
        return self._start == self._end and not self._is_readable()

    def _is_readable(self) -> bool:
        return bool(self._poll.poll(0)) or (self._tls is not None and self._tls.holds_data())

    def unread_bytes(self) -> int:
        """Return how much has arrived and waits in the kernel, as it came over the wire."""
        count = fcntl.ioctl(self._wire.fileno(), termios.FIONREAD, bytes(4))
        return int.from_bytes(count, sys.byteorder)

    def exchange(self, request: Request, head: bytes) -> Response:
        """Send a request and read the head of its answer."""
        self._wire.cancelled, self.read_seconds = request.cancelled, request.read_seconds
        is_sent = self._send_request(head, request.data)
        self._wire.limit(self.read_seconds, "The head of the answer")
        while (answer := self._read_head()).startswith(b"HTTP/1.1 1"):
            pass  # interim
        self._wire.stop_limiting()
        self.is_used = True
        response = Response(self, method=request.method, head=answer, is_sent=is_sent)
        if not is_sent and response.status < 300:
            raise TransportError("The server answered before it had the whole body")
        return response

    def _send_request(self, head: bytes, body: bytes | Body | None) -> bool:
        """Send all of it; false when the server answered, or went away, before."""
        if body is None:
            return self._send(head)
        if isinstance(body, bytes):
            if len(body) <= ONE_PACKET_BYTES:
                return self._send(head + body)
            return self._send(head) and self._send(body)
        is_sent = self._send(head)
        for block in body.blocks():
            is_sent = is_sent and not self._has_answer() and self._send(block)
            if not is_sent:
                break
        return is_sent

    def _send(self, data: bytes | memoryview) -> bool:
        view, silent_seconds = memoryview(data), 0.0
        while view:
            try:
                sent = self._stream.send(view)
            except BlockingIOError:
                if self._has_answer():
                    return False
                silent_seconds = self._tick(silent_seconds)
            except OSError:
                return False  # what the server said before it closed is still to be read
            else:
                view, silent_seconds = view[sent:], 0.0
        return True

    def _has_answer(self) -> bool:
        if not self._is_readable():
            return False
        if self._tls is None:
            return True
        self._wire.settimeout(0)
        try:  # it may be a session ticket only, and no data
            self._end += self._tls.recv_into(self._view[self._end :])
        except OSError:
            return False
        finally:
            self._wire.set_tick()
        return True

    def _tick(self, silent_seconds: float) -> float:
        if silent_seconds + TICK_SECONDS >= self.read_seconds:
            raise TransportError(f"The server was silent for {self.read_seconds:g} s")
        return silent_seconds + TICK_SECONDS

    def _recv_into(self, view: memoryview, *, flags: int = 0) -> int:
        silent_seconds = 0.0
        while True:
            try:
                return self._stream.recv_into(view, 0, flags)
            except BlockingIOError:
                silent_seconds = self._tick(silent_seconds)
            except OSError:
                return 0

    def _gather(self, view: memoryview) -> int:
        """Receive at least a byte, and much at once where the view is large; 0 at the end."""
        is_plain = self._tls is None
        is_large = len(view) > HEAD_LIMIT_BYTES
        return self._recv_into(view, flags=socket.MSG_WAITALL if is_plain and is_large else 0)

    def _read_head(self) -> bytes:
        """Read up to the empty line; StaleConnection when a kept connection ends before a byte."""
        if self._start == self._end:
            self._start = self._end = 0
        while (stop := self._buffer.find(b"\r\n\r\n", self._start, self._end)) < 0:
            if self._end == HEAD_LIMIT_BYTES:
                raise TransportError("The answer's header fields are too long")
            received = self._recv_into(self._view[self._end :])
            if not received and self.is_used and self._start == self._end:
                raise StaleConnection("The server had closed the kept connection")
            if not received:
                raise TransportError("Connection was closed before a valid answer was received")
            self._end += received
        head = bytes(self._view[self._start : stop])
        self._start = stop + 4
        return head

    def take(self, limit: int, into: memoryview | None = None) -> memoryview:
        """Return at most limit of the next bytes, valid until the next call; empty at the end."""
        if self._start < self._end:
            start, self._start = self._start, min(self._end, self._start + limit)
            return self._view[start : self._start]
        view = self._view if into is None else into
        return view[: self._gather(view[:limit])]

    def readline(self) -> bytes:
        """Read a line of the chunked coding."""
        line = b""
        while not line.endswith(b"\r\n"):
            if len(line) > 4096 or not (piece := self.take(1)):
                raise TransportError("The answer's chunked coding is malformed or broke off")
            line += piece
        return line[:-2]

    def read_chunk_length(self) -> int:
        """Read the length of the next chunk, and behind the last one the trailer fields."""
        self._wire.limit(self.read_seconds, "The end of a chunk")
        size = self.readline().partition(b";")[0].strip()
        try:
            length = int(size.decode("ascii"), 16)
        except ValueError as error:
            raise TransportError("The answer's chunked coding is malformed") from error
        room = HEAD_LIMIT_BYTES
        while length == 0 and (line := self.readline()):
            room -= len(line)
            if room < 0:
                raise TransportError("The answer's trailer fields are too long")
        self._wire.stop_limiting()
        return length


class Response:
    """An answer; its body is read from the connection."""

    def __init__(self, connection: Connection, *, method: str, head: bytes, is_sent: bool) -> None:
        self.connection = connection
        self.status, self.reason, self.headers, is_current = parse_head(head)
        self._may_keep = (
            is_sent
            and is_current
            and "close" not in self.headers.get("connection", "").lower()
            # Some servers lose step after refusing a body (s3.md section 9): see can_keep.
            and (self.status < 300 or method in ("GET", "HEAD"))
        )
        self.is_chunked = False
        self._remaining: int | None = None  # of the body, or of the chunk; None: until closed
        coding, length = self.headers.get("transfer-encoding"), self.headers.get("content-length")
        if method == "HEAD" or self.status in (204, 304):
            self._remaining = 0
        elif coding is not None:
            if coding.lower() != "chunked" or length is not None:
                raise TransportError("The answer has an unknown or doubtful transfer coding")
            self.is_chunked, self._remaining = True, connection.read_chunk_length()
        elif length is not None:
            if not (length.isascii() and length.isdecimal()):
                raise TransportError(f"The answer has a malformed length: {length[:40]!r}")
            self._remaining = int(length)

    @property
    def remaining(self) -> int | None:
        """How many bytes of the body are still to come; None where the server did not say."""
        return None if self.is_chunked else self._remaining

    @property
    def tells_its_end(self) -> bool:
        """Whether a body that broke off can be told from one that is complete."""
        return self.is_chunked or self._remaining is not None

    @property
    def can_keep(self) -> bool:
        """Whether the connection may serve another exchange."""
        return self._may_keep and self._remaining == 0

    def receive(self, limit: int = 1 << 62, into: memoryview | None = None) -> memoryview:
        """Return at most limit of the next bytes, valid until the next call; empty at the end.

        into: where bytes may be put; without it, and for the first ones, a small buffer is used.
        """
        if self._remaining == 0:
            return memoryview(b"")
        if self._remaining is None:
            return self.connection.take(limit, into)
        piece = self.connection.take(min(limit, self._remaining), into)
        if not piece:
            raise TransportError("The answer ended before its announced length")
        self._remaining -= len(piece)
        if self.is_chunked and not self._remaining:
            piece = memoryview(bytes(piece))  # the next line is read into the same buffer
            if self.connection.readline():
                raise TransportError("The answer's chunked coding is malformed")
            self._remaining = self.connection.read_chunk_length()
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
