"""One HTTP/1.1 exchange with the user's own server: a status, once its answer has ended.

The server is hostile: it may send garbage, one byte a minute, or nothing at all. So the exchange
waits for it and for what should end the wait in one place, and keeps nothing of its answer but the
head. It is always with 127.0.0.1 and never by way of a proxy.
"""

from __future__ import annotations

import io
import re
import select
import socket
import time
from collections.abc import Callable

from shim.contract.errors import ShimError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HOST = "127.0.0.1"
CONNECT_SECONDS = 5.0
MAX_HEAD_BYTES = 65_536  # of the trailers too
PIECE_BYTES = 65_536
# How soon it is seen that nobody waits for the answer any more.
SLICE_SECONDS = 0.05
# How long what has come already may then still be read.
REST_SECONDS = 1.0

_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])(?: [^\r\n]*)?\r?\n")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[\t ]*(?:;[^\r\n]*)?\r?\n")
_LENGTH = re.compile(rb"[0-9]{1,19}")
_WITHOUT_BODY = (204, 304)


class CannotConnect(ShimError):
    """Nobody listens on the port."""


class BrokenAnswer(ShimError):
    """What came back, if anything did, is not HTTP, or not all of it."""


class Abandoned(ShimError):
    """The wait was given up before the answer had ended."""


def exchange(
    method: str,
    path: str,
    *,
    port: int,
    timeout_seconds: float | None,
    is_abandoned: Callable[[], bool],
) -> int:
    """Send a request without a body; return the status of the answer once its last byte has come.

    - is_abandoned: looked at again and again; what has come already still counts

    Raises TimeoutError, CannotConnect, BrokenAnswer, and Abandoned when is_abandoned() says so.
    """
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    try:
        connection = socket.create_connection((HOST, port), timeout=CONNECT_SECONDS)
    except OSError as error:
        raise CannotConnect(f"{HOST}:{port}: {error}") from error
    with connection:
        request = (
            f"{method} {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Length: 0\r\n"
            "Accept: */*\r\nConnection: close\r\n\r\n"
        )
        try:
            connection.sendall(request.encode("ascii"))
            answer = io.BufferedReader(_Answer(connection, deadline, is_abandoned), PIECE_BYTES)
            return _read_answer(answer)
        except TimeoutError:
            raise
        except OSError as error:
            raise BrokenAnswer(f"the connection was lost: {error}") from error


class _Answer(io.RawIOBase):
    """What a server sends, waited for as long as somebody needs it."""

    def __init__(
        self, connection: socket.socket, deadline: float | None, is_abandoned: Callable[[], bool]
    ) -> None:
        self._connection = connection
        self._deadline = deadline
        self._is_abandoned = is_abandoned
        self._rest_until: float | None = None
        self._poller = select.poll()
        self._poller.register(connection, select.POLLIN)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._may_read():
            pass
        return self._connection.recv_into(buffer)

    def _may_read(self) -> bool:
        """Wait a while for bytes or the end. Raises TimeoutError and Abandoned."""
        now = time.monotonic()
        if self._deadline is not None and now >= self._deadline:
            raise TimeoutError
        if not self._is_abandoned():
            return bool(self._poller.poll(SLICE_SECONDS * 1000))
        if self._rest_until is None:
            self._rest_until = now + REST_SECONDS
        if now >= self._rest_until or not self._poller.poll(0):
            raise Abandoned
        return True


def _read_answer(answer: io.BufferedReader[_Answer]) -> int:
    """Read an answer to its end: RFC 9112, 6.3. Informational ones (1xx) may come before it."""
    status = 0
    while status < 200:
        status, fields = _read_head(answer)
    if status in _WITHOUT_BODY:
        return status
    codings = b",".join(fields.get(b"transfer-encoding", []))
    lengths = {
        length.strip() for length in b",".join(fields.get(b"content-length", [])).split(b",")
    }
    if codings:
        if codings.rpartition(b",")[2].strip().lower() == b"chunked":
            _drop_chunks(answer)
        else:
            _drop(answer, None)
    elif lengths == {b""}:
        _drop(answer, None)
    elif len(lengths) == 1 and _LENGTH.fullmatch(length := lengths.pop()):
        _drop(answer, int(length))
    else:
        raise BrokenAnswer(f"the Content-Length is not one number: {sorted(lengths)!r:.80}")
    return status


def _read_head(answer: io.BufferedReader[_Answer]) -> tuple[int, dict[bytes, list[bytes]]]:
    """Read a status line and the fields below it; their names come in lower case."""
    lines = _read_lines(answer)
    status = _STATUS.fullmatch(lines[0])
    if not status:
        raise BrokenAnswer(f"the answer is not HTTP: {lines[0][:40]!r}")
    fields: dict[bytes, list[bytes]] = {}
    for line in lines[1:]:
        name, _, value = line.partition(b":")
        fields.setdefault(name.lower(), []).append(value.strip())
    return int(status[1]), fields


def _read_lines(answer: io.BufferedReader[_Answer]) -> list[bytes]:
    """Read lines up to an empty one, which is left out unless it is the first."""
    lines: list[bytes] = []
    room = MAX_HEAD_BYTES
    while line := answer.readline(room):
        room -= len(line)
        if lines and line in (b"\r\n", b"\n"):
            return lines
        lines.append(line)
        if room <= 0:
            raise BrokenAnswer("the head of the answer is too long")
    raise BrokenAnswer("the connection was closed before an answer came")


def _drop_chunks(answer: io.BufferedReader[_Answer]) -> None:
    """Read a body in chunks and its trailers: RFC 9112, 7.1."""
    while True:
        line = answer.readline(MAX_HEAD_BYTES)
        size = _CHUNK_SIZE.fullmatch(line)
        if not size:
            raise BrokenAnswer(f"a chunk of the answer has no size: {line[:40]!r}")
        if not int(size[1], 16):
            break
        _drop(answer, int(size[1], 16))
        if answer.readline(2) not in (b"\r\n", b"\n"):
            raise BrokenAnswer("a chunk of the answer is longer than its size")
    room = MAX_HEAD_BYTES
    while (line := answer.readline(room)) not in (b"\r\n", b"\n"):
        room -= len(line)
        if not line.endswith(b"\n") or room <= 0:
            raise BrokenAnswer("the answer broke off, or its trailers are too long")


def _drop(answer: io.BufferedReader[_Answer], size_bytes: int | None) -> None:
    """Read so much and keep nothing of it; without a size, to the end of the connection."""
    while size_bytes is None or size_bytes > 0:
        piece = answer.read1(PIECE_BYTES if size_bytes is None else min(size_bytes, PIECE_BYTES))
        if not piece and size_bytes is None:
            return
        if not piece:
            raise BrokenAnswer(f"the answer broke off {size_bytes} bytes before its end")
        if size_bytes is not None:
            size_bytes -= len(piece)
