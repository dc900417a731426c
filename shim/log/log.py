"""Write log lines in the form the platform parses.

One JSON object a line, in this key order, ASCII only, never longer than MAX_LINE_BYTES:

    {"log": "text", "level": "INFO", "source": "stdout", "internal": false, "task": "pk"}
      |              |                |                   |                  |
      one line       INFO = stdout    the stream that     the shim's own     pk, or null for
      of text        WARNING = stderr the line goes to    lines: true        the shim's own lines
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from json.encoder import encode_basestring_ascii as escape

TYPE_CHECKING = False  # typing: 3 ms
if TYPE_CHECKING:
    from typing import Literal

    Source = Literal["stdout", "stderr"]
    Style = Literal["json", "text"]
else:
    Source = Style = str

# Container engines cut a log line into parts of 16 KiB; the newline is counted here.
MAX_LINE_BYTES = 16_383

# A pk names a directory, so an honest one has at most 255 bytes. A longer one is cut in log lines
# only: escaped, it must leave room for text.
MAX_TASK_CHARACTERS = 255

# Lines encoded and written at once: enough to be fast, few enough to need little memory.
_BATCH_LINES = 2048

LOG_FORMATS = ("json", "text")
LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}

_PREFIX = '{"log": '
_COLOURS = {"INFO": "\x1b[2m", "WARNING": "\x1b[33m", "ERROR": "\x1b[31m"}
_COLOUR_END = "\x1b[0m"


class Log:
    """Write the shim's own lines and the user's to the two standard streams.

    No method raises, and none may be called from a signal handler. A reader who is slow blocks the
    writer, as a pipe does; what a reader who went away would have read is dropped.

    - level: least level of the shim's own lines, a key of LEVELS; it never hides the user's lines
    - style: "json", or "text" for people, in colour on a terminal
    """

    def __init__(
        self, *, stdout_fd: int = 1, stderr_fd: int = 2, level: str = "INFO", style: Style = "json"
    ) -> None:
        self._fds = {"stdout": stdout_fd, "stderr": stderr_fd}
        self._threshold = LEVELS[level]
        self.is_text = style == "text"
        # One lock for both streams: often they are one pipe, where lines must not be torn either.
        self._lock = threading.Lock()

    def debug(self, message: str, *, internal: bool = True, task: str | None = None) -> None:
        """Write a DEBUG line for each line of message."""
        self.lines(split(message), level="DEBUG", internal=internal, task=task)

    def info(self, message: str, *, internal: bool = True, task: str | None = None) -> None:
        """Write an INFO line for each line of message."""
        self.lines(split(message), level="INFO", internal=internal, task=task)

    def warning(self, message: str, *, internal: bool = True, task: str | None = None) -> None:
        """Write a WARNING line for each line of message."""
        self.lines(split(message), level="WARNING", internal=internal, task=task)

    def error(self, message: str, *, internal: bool = True, task: str | None = None) -> None:
        """Write an ERROR line for each line of message."""
        self.lines(split(message), level="ERROR", internal=internal, task=task)

    def exception(self, message: str, error: BaseException) -> None:
        """Write message and the traceback of error as internal ERROR lines."""
        import traceback  # 2 ms

        self.error("\n".join([message, *traceback.format_exception(error)]))

    def lines(self, lines: Sequence[str], *, level: str, internal: bool, task: str | None) -> None:
        """Write lines, which hold no line breaks and no NUL."""
        if internal and LEVELS[level] < self._threshold:
            return
        source: Source = "stdout" if LEVELS[level] <= LEVELS["INFO"] else "stderr"
        for start in range(0, len(lines), _BATCH_LINES):
            batch = lines[start : start + _BATCH_LINES]
            if self.is_text:
                data = self._text(batch, level=level, source=source, internal=internal)
            else:
                data = encode(batch, level=level, source=source, internal=internal, task=task)
            self.write(source, data)

    def write(self, source: Source, data: bytes) -> None:
        """Write whole, encoded lines to one of the streams."""
        fd = self._fds[source]
        remaining = memoryview(data)
        with self._lock:
            while remaining:
                try:
                    remaining = remaining[os.write(fd, remaining) :]
                except BlockingIOError:  # the fd was made non-blocking by whoever shares it with us
                    poller = select.poll()
                    poller.register(fd, select.POLLOUT)
                    poller.poll()
                except OSError:  # nobody reads any more, and there is nobody else to tell
                    return

    def _text(self, lines: Sequence[str], *, level: str, source: Source, internal: bool) -> bytes:
        """Render lines for people: the user's as they are, the shim's marked."""
        mark = "shim: " if internal else ""
        if level != "INFO" and (internal or level == "ERROR"):
            mark += f"{level}: "
        start, end = mark, "\n"
        if mark and level in _COLOURS and os.isatty(self._fds[source]):
            start, end = _COLOURS[level] + mark, _COLOUR_END + "\n"
        text = "".join([f"{start}{line}{end}" for line in lines])
        return text.encode("utf-8", "backslashreplace")


def split(text: str) -> list[str]:
    """Return the lines of a text, as str.splitlines tells them apart; at least one."""
    return text.replace("\0", "").splitlines() or [""]


def encode(
    lines: Sequence[str], *, level: str, source: Source, internal: bool, task: str | None
) -> bytes:
    """Return complete JSON lines, one or more for each."""
    suffix = _suffix(level, source, internal, task)
    room = MAX_LINE_BYTES - len(_PREFIX) - len(suffix)
    escaped = list(map(escape, lines))
    if max(map(len, escaped)) > room:
        escaped = [piece for line in lines for piece in _pieces(line, room=room)]
    return f"{_PREFIX}{(suffix + _PREFIX).join(escaped)}{suffix}".encode("ascii")


@lru_cache(maxsize=16)
def _suffix(level: str, source: Source, internal: bool, task: str | None) -> str:
    """Return what follows the text in a line, newline included."""
    pk = "null" if task is None else escape(task[:MAX_TASK_CHARACTERS])
    flag = "true" if internal else "false"
    names = f'"level": {escape(level)}, "source": {escape(source)}'
    return f', {names}, "internal": {flag}, "task": {pk}}}\n'


def _pieces(line: str, *, room: int) -> Iterator[str]:
    """Yield line escaped, in pieces of at most `room` bytes, cut between characters."""
    start = 0
    while True:
        size = room  # every character takes one byte or more
        while len(piece := escape(line[start : start + size])) > room:
            size = size * room // len(piece)
        yield piece
        start += size
        if start >= len(line):
            return
