"""The grammar of HTTP/1.1, RFC 9112: bytes in, values out.

    status line, fields, an empty line, then the body:
    as long as Content-Length says | chunks | until the connection is closed
    chunks: "size in hex" CRLF bytes CRLF ... "0" CRLF trailer fields CRLF

Rule 1: what is doubtful is refused: contradicting lengths, folded fields, unknown codings.
Rule 2: of a server that an author wrote by hand, "lenient", more is understood: lines that end with
        a bare line feed, fields without a colon, any coding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from shim.http.errors import TransportError

HEAD_LIMIT_BYTES = 64 << 10  # of a status line with its fields; of trailers too
CHUNKED = -1  # instead of a length

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
FIELD = TOKEN + rb":[\t -~\x80-\xff]*\r?\n"
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[\t ]*(?:;[\t -~\x80-\xff]*)?\r?\n")
LENGTH = re.compile(r"[0-9]{1,19}")
_LENIENT_END = re.compile(rb"\r?\n\r?\n")


def find_head(
    buffer: bytearray, start: int, end: int, *, is_lenient: bool = False
) -> tuple[int, int] | None:
    """Return where the head that begins at start ends, and where the body begins; None if cut."""
    if is_lenient:
        found = _LENIENT_END.search(buffer, start, end)
        return found and found.span()
    stop = buffer.find(b"\r\n\r\n", start, end)
    return None if stop < 0 else (stop, stop + 4)


def parse_head(data: bytes, *, is_lenient: bool = False) -> tuple[int, str, dict[str, str], bool]:
    """Return status, reason, header fields (names in lower case), and if this is HTTP/1.1."""
    if is_lenient:
        data = data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    status_line, *lines = data.decode("latin-1").split("\r\n")
    version, _, rest = status_line.partition(" ")
    status, _, reason = rest.partition(" ")
    if not version.startswith("HTTP/1.") or len(status) != 3 or not status.isdecimal():
        raise TransportError(f"Not an HTTP/1.1 answer: {status_line[:100]!r}")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        is_malformed = not colon or name != name.strip() or not name or "\n" in line or "\r" in line
        if is_malformed and not is_lenient:
            raise TransportError(f"The answer has a malformed header field: {line[:100]!r}")
        if headers.get(name, value) != value:
            if name in ("content-length", "content-range"):
                raise TransportError(f"The answer contradicts itself about its {name}")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return int(status), reason, headers, version == "HTTP/1.1"


def body_length(
    method: str, status: int, headers: Mapping[str, str], *, is_lenient: bool = False
) -> int | None:
    """Return the length of an answer's body, CHUNKED, or None: until the close. RFC 9112, 6.3."""
    if method == "HEAD" or status in (204, 304):
        return 0
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if not is_lenient and (coding.lower() != "chunked" or length is not None):
            raise TransportError("The answer has an unknown or doubtful transfer coding")
        return CHUNKED if coding.rpartition(",")[2].strip().lower() == "chunked" else None
    if length is None:
        return None
    if not LENGTH.fullmatch(length):
        raise TransportError(f"The answer has a malformed length: {length[:40]!r}")
    return int(length)


def parse_chunk_size(line: bytes, *, is_lenient: bool = False) -> int | None:
    """Return the size that the line before a chunk gives, None where it gives none."""
    match = _CHUNK_SIZE.fullmatch(line)
    is_ended = is_lenient or line.endswith(b"\r\n")
    return int(match[1], 16) if match and is_ended else None
