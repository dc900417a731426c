"""Answer SageMaker's three routes over HTTP/1.1.

Rule 1: `/ping` waits for nobody: each connection has its thread, and where no thread is to be had
        the accepting thread answers by itself, in a hurry.
Rule 2: a client may take so many bytes and so many seconds, in total, for each part of a request;
        when all connections are taken, a new one gets the place of the one kept waiting longest.
Rule 3: a request is received whole before it is acted upon; the connection of one that is refused
        earlier is closed, since nobody knows where the next request would begin.
Rule 4: once begun, an invocation does not depend on its client.
Rule 5: the algorithm is not served: whose an invocation's client is, is asked before its body is
        received, and by the application once more before the task begins.
Rule 6: the standard streams belong to the log.
"""

from __future__ import annotations

import io
import json
import math
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn

from shim.contract.errors import InvalidTasks, NotText, Problem, ShimError, TaskStopped
from shim.http.wire import FIELD, LENGTH, TOKEN, parse_chunk_size
from shim.log.log import Log
from shim.process.sockets import Ends

TYPE_CHECKING = False  # typing: 3 ms
if TYPE_CHECKING:
    from typing import Any, NoReturn, Protocol
else:
    Protocol = object

EXECUTION_PARAMETERS = (
    b'{"MaxConcurrentTransforms":1,"BatchStrategy":"SINGLE_RECORD","MaxPayloadInMB":6}'
)
PING, PARAMETERS, INVOCATIONS = "/ping", "/execution-parameters", "/invocations"
METHODS = {PING: "GET", PARAMETERS: "GET", INVOCATIONS: "POST"}
# Of what was found where a task is not valid.
INPUT_LIMIT_CHARACTERS = 200
CHUNK_LINE_LIMIT_BYTES = 256
RETRY_AFTER_SECONDS = 5
STACK_BYTES = 512 * 1024
# A /ping takes about ten turns at the interpreter, each 5 ms by default if one computes.
SWITCH_SECONDS = 0.001

# RFC 9112, 2 to 5, without what receivers may refuse: bare CR, line folding, HTTP/0.9.
_HEAD = re.compile(TOKEN + rb" [!-~]+ HTTP/[1-9]\.[0-9]\r?\n(?:" + FIELD + rb")*\r?\n")
_TRAILER = re.compile(FIELD)
_ORIGIN = re.compile(r"^https?://[^/?]*", re.IGNORECASE)


class Busy(ShimError):
    """Another task is running."""


class Unhealthy(ShimError):
    """No task can be run, now or later."""


class Forbidden(ShimError):
    """This client may not ask for tasks; str() says why."""


class Application(Protocol):
    """What is served. Its methods are called from many threads at once."""

    def is_healthy(self) -> bool:
        """Say what `/ping` answers; must not block."""

    def check_client(self, connection: Ends) -> None:
        """Raise Forbidden for a client that may not ask for tasks."""

    def invoke(self, body: bytes, connection: Ends) -> bytes:
        """Do the task of a request body; return its result as JSON.

        May raise any of ANSWERS' errors.
        """

    def leave_if_unhealthy(self) -> None:
        """Take note that invoke()'s outcome was written to the client, or that it could not be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What clients may take. Seconds are totals, however the bytes are dealt out."""

    connections: int = 256
    head_bytes: int = 64 * 1024
    body_bytes: int = 6 * 1024 * 1024
    # After an answer to a request that was not read to its end.
    linger_bytes: int = 32 * 1024 * 1024
    idle_seconds: float = 75
    head_seconds: float = 10
    body_seconds: float = 60
    answer_seconds: float = 10
    linger_seconds: float = 2
    # The most for any part while the accepting thread is kept; a /ping has 100 ms in all.
    hurry_seconds: float = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A status with a JSON body or none."""

    status: int
    body: bytes = b""
    fields: tuple[tuple[str, str], ...] = ()


class _Refused(Exception):
    """The request is not acted upon."""

    def __init__(self, status: int, detail: str = "", *fields: tuple[str, str]) -> None:
        super().__init__(status, detail, *fields)
        self.answer = _detail(status, detail or HTTPStatus(status).phrase, *fields)


def _detail(status: int, detail: object, *fields: tuple[str, str]) -> Answer:
    text = json.dumps({"detail": detail}, ensure_ascii=False, separators=(",", ":"))
    # What UTF-8 cannot hold, a lone surrogate, is replaced by JSON's own escape for it.
    return Answer(status=status, body=text.encode(errors="backslashreplace"), fields=fields)


def _describe(problem: Problem) -> dict[str, object]:
    """Build an item of FastAPI's answer to a body that is not valid."""
    return {
        "type": problem.type,
        "loc": ["body", *problem.loc],
        "msg": problem.message,
        "input": _shorten(problem.input),
    }


def _shorten(value: object) -> object:
    """Return a value or, where it is long, the first characters of a text or of its JSON."""
    if isinstance(value, str):
        return value[:INPUT_LIMIT_CHARACTERS]
    text = ""
    # In parts: it may be all of a body.
    for part in json.JSONEncoder(ensure_ascii=False).iterencode(value):
        text += part[: INPUT_LIMIT_CHARACTERS + 1]
        if len(text) > INPUT_LIMIT_CHARACTERS:
            return text[:INPUT_LIMIT_CHARACTERS]
    return value


# The first that fits.
ANSWERS: dict[type[Exception], Callable[[Any], Answer]] = {
    InvalidTasks: lambda error: _detail(422, [_describe(problem) for problem in error.problems]),
    NotText: lambda error: _detail(400, "There was an error parsing the body"),
    Busy: lambda error: _detail(
        503, "Another task is running", ("Retry-After", str(RETRY_AFTER_SECONDS))
    ),
    Unhealthy: lambda error: Answer(status=503),
    Forbidden: lambda error: _detail(403, str(error)),
    TaskStopped: lambda error: _detail(503, str(error)),
    Exception: lambda error: _detail(500, "An unexpected error occurred"),
}


def _answer_to(error: Exception) -> Answer:
    return next(build(error) for kind, build in ANSWERS.items() if isinstance(error, kind))


class _Client(io.RawIOBase):
    """Read from a client until a deadline that covers all reads together."""

    def __init__(self, connection: socket.socket) -> None:
        self.most_seconds = math.inf
        self._connection = connection
        self._deadline = 0.0

    def set_deadline(self, seconds: float) -> None:
        self._deadline = time.monotonic() + min(seconds, self.most_seconds)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Raise _Refused once the deadline is over."""
        left_seconds = self._deadline - time.monotonic()
        if left_seconds <= 0:
            raise _Refused(408)
        self._connection.settimeout(left_seconds)
        try:
            return self._connection.recv_into(buffer)
        except TimeoutError:
            raise _Refused(408) from None


class _Handler(BaseHTTPRequestHandler):
    """Speak HTTP/1.1 with one client, one request after the other."""

    server: Server
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.1"  # of answers to what is no request
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.limits = self.server.limits
        self._client = _Client(self.connection)
        self._input = io.BufferedReader(self._client)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError as error:
            self.log_message("A client went away: %s", error)

    def log_message(self, format: str, *args: object) -> None:
        self.server.log.debug(format % args)

    def handle_one_request(self) -> None:
        """Receive a request, act upon it, answer."""
        self.server.await_request(self.connection)
        self.command, self.requestline, self.request_version = "", "", self.default_request_version
        self.close_connection = self._is_unread = True
        try:
            if not self._receive_head():
                return
            length = self._body_length()
            self._is_unread = length != 0
            path = self._find_path()
            if path == INVOCATIONS:
                self._check_client()
            body = self._receive_body(length)
        except _Refused as refused:
            self._answer(refused.answer)
            return
        self.server.begin_answer(self.connection)
        if path == INVOCATIONS:
            self._invoke(body)
        elif path == PARAMETERS:
            self._answer(Answer(status=200, body=EXECUTION_PARAMETERS))
        else:
            self._answer(Answer(status=200 if self.server.application.is_healthy() else 503))

    def _receive_head(self) -> bool:
        """Read the request line and the fields; false when the client has no request."""
        self._client.set_deadline(self.limits.idle_seconds)
        try:
            if not self._input.peek(1):
                return False
        except _Refused:
            return False
        self._client.set_deadline(self.limits.head_seconds)
        head = bytearray()
        while not head.endswith((b"\n\r\n", b"\n\n")):
            head += self._receive_line(self.limits.head_bytes - len(head), 431 if head else 414)
            if bytes(head) in (b"\r\n", b"\n"):  # to be ignored: RFC 9112, 2.2
                head.clear()
        if not _HEAD.fullmatch(head):
            raise _Refused(400, "The request's head is malformed")
        self.raw_requestline, _, fields = head.partition(b"\n")
        self.rfile = io.BytesIO(fields)
        return self.parse_request()

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> NoReturn:
        """Refuse what parse_request() finds wrong."""
        raise _Refused(code)

    def handle_expect_100(self) -> bool:
        """Put off the 100 until it is known that the body will be read."""
        return True

    def _body_length(self) -> int | None:
        """Return the length in bytes, or None for a body in chunks: RFC 9112, 6.3."""
        codings = self.headers.get_all("Transfer-Encoding", [])
        fields = self.headers.get_all("Content-Length", [])
        lengths = {length.strip() for field in fields for length in field.split(",")}
        if codings:
            if lengths or self.request_version == "HTTP/1.0":
                raise _Refused(400, "Transfer-Encoding is not allowed here")
            if [coding.strip().lower() for coding in codings] != ["chunked"]:
                raise _Refused(501, "The only Transfer-Encoding supported is chunked")
            return None
        if len(lengths) > 1 or not all(map(LENGTH.fullmatch, lengths)):
            raise _Refused(400, "Content-Length must be one number")
        return int(lengths.pop()) if lengths else 0

    def _find_path(self) -> str:
        # Not self.path, where a leading "//" has become "/".
        path = _ORIGIN.sub("", self.requestline.split()[1]).partition("?")[0]
        if path not in METHODS:
            raise _Refused(404)
        if self.command != METHODS[path]:
            raise _Refused(405, "", ("Allow", METHODS[path]))
        return path

    def _check_client(self) -> None:
        try:
            self.server.application.check_client(self._ends())
        except Forbidden as error:
            raise _Refused(403, str(error)) from error

    def _ends(self) -> Ends:
        return Ends(client=self.client_address, server=self.connection.getsockname())

    def _receive_body(self, length: int | None) -> bytes:
        if length is not None and length > self.limits.body_bytes:
            raise _Refused(413)
        if self.request_version != "HTTP/1.0" and "Expect" in self.headers:
            if self.headers["Expect"].lower() != "100-continue":
                raise _Refused(417)
            if self._is_unread:
                self.send_response_only(100)
                self.end_headers()
        self._client.set_deadline(self.limits.body_seconds)
        body = self._receive_chunks() if length is None else self._receive_exactly(length)
        self._is_unread = False
        return body

    def _receive_chunks(self) -> bytes:
        """Decode a body in chunks: RFC 9112, 7.1. Trailers are dropped."""
        body = bytearray()
        while (size := parse_chunk_size(self._receive_line(CHUNK_LINE_LIMIT_BYTES, 400))) != 0:
            if size is None:
                raise _Refused(400, "The size of a chunk is malformed")
            if len(body) + size > self.limits.body_bytes:
                raise _Refused(413)
            body += self._receive_exactly(size)
            if self._receive_exactly(2) != b"\r\n":
                raise _Refused(400, "A chunk is longer than its size")
        room = self.limits.head_bytes
        while (line := self._receive_line(room, 431)) != b"\r\n":
            if not _TRAILER.fullmatch(line):
                raise _Refused(400, "A trailer is malformed")
            room -= len(line)
        return bytes(body)

    def _receive_line(self, limit_bytes: int, too_long: int) -> bytes:
        line = self._input.readline(limit_bytes + 1)
        if len(line) > limit_bytes:
            raise _Refused(too_long)
        if not line.endswith(b"\n"):
            raise _Refused(400, "The request is incomplete")
        return line

    def _receive_exactly(self, size_bytes: int) -> bytes:
        data = self._input.read(size_bytes)
        if len(data) < size_bytes:
            raise _Refused(400, "The request is incomplete")
        return data

    def _invoke(self, body: bytes) -> None:
        try:
            result = self.server.application.invoke(body, self._ends())
            answer = Answer(status=200, body=result)
        except Exception as error:
            answer = _answer_to(error)
            if answer.status == 500 and not isinstance(error, ShimError):  # those are told already
                self.server.log.exception("An invocation failed unexpectedly", error)
        try:
            self._answer(answer)
        finally:
            self.server.application.leave_if_unhealthy()

    def _answer(self, answer: Answer) -> None:
        """Write an answer, the connection's last if the request was not read to its end."""
        self.close_connection |= self._is_unread
        self.connection.settimeout(self.limits.answer_seconds)
        self.send_response_only(answer.status)
        self.send_header("Date", self.date_time_string())
        for name, value in answer.fields:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        if answer.body:
            self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close" if self.close_connection else "keep-alive")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)
        self.log_request(answer.status)
        if self._is_unread:
            self._linger()

    def _linger(self) -> None:
        """Drop what the client still sends: a reset would take the answer from it unread."""
        self.connection.shutdown(socket.SHUT_WR)
        self._client.set_deadline(self.limits.linger_seconds)
        received = 0
        with suppress(_Refused):
            while received < self.limits.linger_bytes and (data := self._input.read1()):
                received += len(data)


class _HurriedHandler(_Handler):
    """Answer one request in the accepting thread, which neither client nor task may keep."""

    def setup(self) -> None:
        super().setup()
        self._client.most_seconds = self.limits.hurry_seconds

    def parse_request(self) -> bool:
        is_request = super().parse_request()
        self.close_connection = True
        return is_request

    def _check_client(self) -> None:
        """Nothing begins here, whoever asks."""

    def _invoke(self, body: bytes) -> None:
        self._answer(_answer_to(Busy()))


class Server(ThreadingMixIn, TCPServer):
    """Accept connections, and know whose turn it is on each of them.

    Not an HTTPServer, which looks up its own name before it listens: 10 s without a DNS.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self,
        address: tuple[str, int],
        *,
        application: Application,
        log: Log,
        limits: Limits | None = None,
    ) -> None:
        """Listen on address; serve_forever() makes it answer.

        Raises OSError when it cannot listen there.
        """
        self.application, self.log, self.limits = application, log, limits or Limits()
        self._changed = threading.Condition()
        self._open = 0
        # The connections on which it is the client's turn, the longest wait first.
        self._awaited: dict[socket.socket, None] = {}
        super().__init__(address, _Handler)

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Answer until shutdown() is called from another thread."""
        usual_seconds = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        try:
            super().serve_forever(poll_interval)
        finally:
            sys.setswitchinterval(usual_seconds)

    def shutdown(self) -> None:
        """Stop accepting, at once; connections that are open go on."""
        # Wakes serve_forever(), which else looks up every half second.
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        super().shutdown()

    def drain(self, seconds: float) -> bool:
        """Wait until no request is being answered, at most so long; say whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: self._open == len(self._awaited), seconds)

    def await_request(self, connection: socket.socket) -> None:
        """Take note that it is the client's turn."""
        with self._changed:
            self._awaited[connection] = None
            self._changed.notify_all()

    def begin_answer(self, connection: socket.socket) -> None:
        """Take note that it is our turn."""
        with self._changed:
            self._awaited.pop(connection, None)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own or, if there can be none, in this one."""
        if self._admit(request):
            usual_bytes = threading.stack_size(STACK_BYTES)
            try:
                return super().process_request(request, client_address)
            except RuntimeError:
                pass  # the kernel refuses another thread
            finally:
                threading.stack_size(usual_bytes)
        try:
            _HurriedHandler(request, client_address, self)
            self.shutdown_request(request)
        finally:
            self._dismiss(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._dismiss(request)

    def handle_error(self, request: object, client_address: object) -> None:
        if error := sys.exception():
            self.log.exception("A connection failed unexpectedly", error)

    def _admit(self, connection: socket.socket) -> bool:
        """Count a connection; say whether it may have a thread, if need be another's."""
        with self._changed:
            if self._open >= self.limits.connections and self._awaited:
                longest = next(iter(self._awaited))
                del self._awaited[longest]
                # What has arrived may still be answered.
                with suppress(OSError):
                    longest.shutdown(socket.SHUT_RD)
            has_room = self._changed.wait_for(
                lambda: self._open < self.limits.connections, self.limits.hurry_seconds
            )
            self._open += 1
            self._awaited[connection] = None
            return has_room

    def _dismiss(self, connection: socket.socket) -> None:
        with self._changed:
            self._open -= 1
            self._awaited.pop(connection, None)
            self._changed.notify_all()
