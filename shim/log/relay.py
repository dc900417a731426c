"""Turn the bytes a process writes to stdout and stderr into log lines.

Rule 1: a relay never raises and reads to the end: no process ever waits for a dead relay.
Rule 2: no byte is lost: NUL is removed, what is not UTF-8 becomes U+FFFD, all else goes out.
Rule 3: lines end where str.splitlines ends them; CR LF is one break, also when a read parts them.
Rule 4: an unfinished line goes out after about a second, a long one in pieces; what follows is a
        new log line, and the break that ends it later makes no blank line.
Rule 5: memory is bounded, whatever is written: one chunk, one held line, one hundred kept lines.
Rule 6: work goes by chunks, not by lines: one read, one split, one write.
Rule 7: a slow reader of the log slows the process down, as a pipe would.
Rule 8: everything written before finish() is out when it returns, also when somebody who
        outlived the process still holds the pipe and will never let it end.
"""

from __future__ import annotations

import codecs
import fcntl
import os
import select
import sys
import termios
import threading
import time
from collections import deque

from shim.log.log import Log, Source

CHUNK_BYTES = 65_536  # what a pipe holds
MAX_HELD_CHARACTERS = 16_384  # about one JSON line: more cannot go out in one piece anyway
UNFINISHED_SECONDS = 1.0
QUIET_SECONDS = 0.2  # after finish(): silence that long means nothing more will come

MAX_KEPT_LINES = 100  # contract, section 4
MAX_KEPT_CHARACTERS = 16_384

# Where str.splitlines ends a line, but for CR: that one may be half of CR LF.
_BREAKS = ("\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029")


class Relay:
    """Relay the pipes of one process: attach both, start, then finish when the process has ended.

    - task: the pk that the lines carry; set_task changes it
    """

    def __init__(self, log: Log, *, task: str | None) -> None:
        self._log = log
        self._task = task
        self._streams: dict[int, _Stream] = {}
        self._kept = _KeptLines()
        self._lock = threading.Lock()  # held for each read with the write that follows from it
        self._poller = select.poll()
        self._deadline: float | None = None  # when finish() loses patience
        self._quiet_at = 0.0
        self._wake_fd = -1
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    def attach(self, fd: int, *, source: Source) -> None:
        """Take over the read end of a pipe; the relay closes it."""
        os.set_blocking(fd, False)
        self._streams[fd] = _Stream(fd, source=source)
        self._poller.register(fd, select.POLLIN)

    def start(self) -> None:
        """Start the thread that reads."""
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._poller.register(self._wake_fd, select.POLLIN)
        self._thread.start()

    def set_task(self, task: str | None) -> None:
        """Write what came so far for the old task; from here on it is the new one's."""
        self.flush()
        with self._lock:
            self._task = task
            self._kept = _KeptLines()

    @property
    def last_stderr_lines(self) -> tuple[str, ...]:
        """The last 100 lines of stderr, ended by newlines only, each with its own.

        A last line without one comes as it is. Of a longer line the last MAX_KEPT_CHARACTERS are
        kept: what an exception says stands at its end.
        """
        with self._lock:
            return self._kept.lines()

    def flush(self) -> None:
        """Write all that has been written to the pipes until now, unfinished lines too."""
        with self._lock:
            for stream in list(self._streams.values()):
                self._drain(stream)
                self._write(stream, stream.release())

    def finish(self, *, deadline_seconds: float = 5.0) -> None:
        """Read to the end of both pipes, write everything, close them.

        Where somebody still holds a pipe, the end is QUIET_SECONDS of silence or the deadline.
        Blocks longer only for a reader of the log who does not read.
        """
        if self._thread.is_alive():
            self._quiet_at = time.monotonic() + QUIET_SECONDS
            self._deadline = time.monotonic() + deadline_seconds
            os.eventfd_write(self._wake_fd, 1)
            self._thread.join()
        with self._lock:
            for stream in list(self._streams.values()):
                self._drain(stream)
            for stream in list(self._streams.values()):
                self._close(stream)
        if self._wake_fd >= 0:
            os.close(self._wake_fd)
            self._wake_fd = -1

    def _run(self) -> None:
        while self._streams and not self._is_over():
            try:
                self._step()
            except Exception as error:  # Rule 1
                self._log.exception("Could not relay some output of the user's process", error)

    def _is_over(self) -> bool:
        return self._deadline is not None and time.monotonic() >= min(
            self._deadline, self._quiet_at
        )

    def _step(self) -> None:
        """Wait for the next thing to do and do it."""
        ready = {fd for fd, _ in self._poller.poll(self._timeout_milliseconds())}
        if self._wake_fd in ready:
            self._poller.unregister(self._wake_fd)
        with self._lock:
            for stream in list(self._streams.values()):
                if stream.fd in ready:
                    self._read(stream, CHUNK_BYTES)
                    self._quiet_at = time.monotonic() + QUIET_SECONDS
                if stream.due is not None and time.monotonic() >= stream.due:
                    self._write(stream, stream.release())

    def _timeout_milliseconds(self) -> float | None:
        times = [stream.due for stream in self._streams.values() if stream.due is not None]
        if self._deadline is not None:
            times.append(min(self._deadline, self._quiet_at))
        return max(0.0, min(times) - time.monotonic()) * 1000 + 1 if times else None

    def _drain(self, stream: _Stream) -> None:
        """Read what the pipe holds at this moment: a writer who never stops cannot keep us."""
        count = fcntl.ioctl(stream.fd, termios.FIONREAD, bytes(4))
        remaining = int.from_bytes(count, sys.byteorder)
        while remaining > 0 and stream.fd in self._streams:
            remaining -= self._read(stream, min(remaining, CHUNK_BYTES))

    def _read(self, stream: _Stream, size: int) -> int:
        """Relay one chunk; return its size. At the end of the pipe, close it."""
        try:
            data = os.read(stream.fd, size)
        except BlockingIOError:  # somebody else, flush(), was faster
            return 0
        if not data:
            self._close(stream)
            return 0
        self._take(stream, stream.decoder.decode(data.replace(b"\0", b"")))
        return len(data)

    def _close(self, stream: _Stream) -> None:
        self._poller.unregister(stream.fd)
        del self._streams[stream.fd]
        os.close(stream.fd)
        self._take(stream, stream.decoder.decode(b"", final=True))
        self._write(stream, stream.release())

    def _take(self, stream: _Stream, text: str) -> None:
        if stream.source == "stderr":
            self._kept.add(text)
        self._write(stream, stream.split(text))

    def _write(self, stream: _Stream, lines: list[str]) -> None:
        self._log.lines(lines, level=stream.level, internal=False, task=self._task)


class _Stream:
    """One pipe, and what of its last line has not gone out."""

    def __init__(self, fd: int, *, source: Source) -> None:
        self.fd = fd
        self.source = source
        self.level = "INFO" if source == "stdout" else "WARNING"
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.due: float | None = None  # when the held text is to go out at the latest
        self._held = ""  # holds no break, but may end in one CR
        self._continues = False  # the beginning of the line we are in has gone out

    def split(self, text: str) -> list[str]:
        """Return the lines that text completes; hold the rest."""
        # splitlines tells no finished last line from an unfinished one: the end of the text does.
        # A CR at its end is held, for it may be half of CR LF; with the line that it ends, so that
        # the two are split as one. When the start of a line has gone out already, its break, which
        # comes now, would make an empty line: that one is dropped.
        text = self._held + text
        lines = text.splitlines()
        self._held = ""
        if lines and not text.endswith(_BREAKS):
            self._held = lines.pop() + ("\r" if text.endswith("\r") else "")
        if lines and self._continues:
            self._continues = False
            if not lines[0]:
                del lines[0]
        if len(self._held) > MAX_HELD_CHARACTERS:
            lines += self.release()
        if lines or not self._is_releasable():
            self.due = None
        if self.due is None and self._is_releasable():
            self.due = time.monotonic() + UNFINISHED_SECONDS
        return lines

    def release(self) -> list[str]:
        """Return what is held, the line unfinished as it is."""
        self.due = None
        if not self._is_releasable():
            return []
        line = self._held.removesuffix("\r")
        self._held = self._held[len(line) :]
        self._continues = True
        return [line]

    def _is_releasable(self) -> bool:
        return bool(self._held) and not (self._continues and self._held == "\r")


class _KeptLines:
    """The last lines of a text that comes in parts."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=MAX_KEPT_LINES)
        self._unfinished = ""

    def add(self, text: str) -> None:
        first, *others = text.rsplit("\n", MAX_KEPT_LINES)
        _, newline, first = first.rpartition("\n")
        if newline:  # of lines that need not be kept
            self._unfinished = ""
        *complete, self._unfinished = (
            line[-MAX_KEPT_CHARACTERS:] for line in [self._unfinished + first, *others]
        )
        self._lines.extend(line + "\n" for line in complete)

    def lines(self) -> tuple[str, ...]:
        unfinished = [self._unfinished] if self._unfinished else []
        return (*self._lines, *unfinished)[-MAX_KEPT_LINES:]
