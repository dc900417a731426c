from __future__ import annotations

import json
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shim.log import relay as relay_module
from shim.log.log import MAX_LINE_BYTES, Log
from shim.log.relay import MAX_KEPT_CHARACTERS, Relay
from tests.support import poll


class Harness:
    """A relay between two pipes of ours and a log in files."""

    def __init__(self, folder: Path, *, task: str | None = "pk") -> None:
        self._paths = {name: folder / name for name in ("stdout", "stderr")}
        self._log_fds = {
            name: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for name, path in self._paths.items()
        }
        self.log = Log(stdout_fd=self._log_fds["stdout"], stderr_fd=self._log_fds["stderr"])
        self.relay = Relay(self.log, task=task)
        self.writers: dict[str, int] = {}
        for source in ("stdout", "stderr"):
            reader, self.writers[source] = os.pipe()
            self.relay.attach(reader, source=source)
        self.relay.start()

    def write(self, data: bytes, source: str = "stdout") -> None:
        while data:
            data = data[os.write(self.writers[source], data) :]

    def records(self, source: str = "stdout") -> list[dict[str, object]]:
        data = self._paths[source].read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        return [json.loads(line) for line in complete.splitlines()]

    def lines(self, source: str = "stdout") -> list[object]:
        return [record["log"] for record in self.records(source)]

    def close_writers(self) -> None:
        for fd in self.writers.values():
            os.close(fd)
        self.writers.clear()

    def finish(self) -> None:
        self.close_writers()
        self.relay.finish()

    def close(self) -> None:
        self.finish()
        for fd in self._log_fds.values():
            os.close(fd)


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    harness = Harness(tmp_path)
    yield harness
    harness.close()


def test_streams_keep_their_source_and_level(harness: Harness) -> None:
    harness.write(b"out\n")
    harness.write(b"err\n", "stderr")
    harness.finish()
    common = {"internal": False, "task": "pk"}
    assert [{"log": "out", "level": "INFO", "source": "stdout", **common}] == harness.records()
    assert [{"log": "err", "level": "WARNING", "source": "stderr", **common}] == harness.records(
        "stderr"
    )


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        pytest.param([b"a\nb\n"], ["a", "b"], id="lines"),
        pytest.param([b"a", b"b\n"], ["ab"], id="line in two chunks"),
        pytest.param([b"a\n", b"b"], ["a", "b"], id="end without newline"),
        pytest.param([b"\n\n"], ["", ""], id="blank lines"),
        pytest.param([b"a\r", b"\nb\n"], ["a", "b"], id="CR LF in two chunks"),
        pytest.param([b"\r", b"\r", b"\n"], ["", ""], id="CR, CR LF in three chunks"),
        pytest.param([b"1%\r", b"2%\r", b"3%\n"], ["1%", "2%", "3%"], id="progress"),
        pytest.param([b"1%\r"], ["1%"], id="CR at the end"),
        pytest.param([b"\xf0\x9f", b"\x98", b"\x80\n"], ["\U0001f600"], id="character in chunks"),
        pytest.param([b"a\xffb\xc3\n"], ["a\ufffdb\ufffd"], id="not UTF-8"),
        pytest.param([b"a\xc3"], ["a\ufffd"], id="half a character at the end"),
        pytest.param([b"a\0b\n", b"\0\n"], ["ab", ""], id="NUL"),
        pytest.param(["a\x85b\u2028c\n".encode()], ["a", "b", "c"], id="other breaks"),
        pytest.param([], [], id="nothing"),
    ],
)
def test_bytes_become_lines(harness: Harness, chunks: list[bytes], expected: list[str]) -> None:
    for chunk in chunks:
        harness.write(chunk)
    harness.finish()
    assert expected == harness.lines()


@given(
    chunks=st.lists(
        st.text(alphabet="ab\r\n\v\x85\u2028\U0001f600", max_size=6).map(str.encode), max_size=8
    )
)
@settings(max_examples=200, deadline=None)
def test_lines_do_not_depend_on_the_chunks(chunks: list[bytes]) -> None:
    stream = relay_module._Stream(-1, source="stdout")
    lines = [line for data in chunks for line in stream.split(stream.decoder.decode(data))]
    lines += stream.release()
    assert b"".join(chunks).decode().splitlines() == lines


@given(
    chunks=st.lists(st.text(alphabet="ab\r\n\x85", max_size=4), max_size=8),
    releases=st.sets(st.integers(0, 8)),
)
@settings(max_examples=200, deadline=None)
def test_what_goes_out_early_adds_neither_text_nor_blank_lines(
    chunks: list[str], releases: set[int]
) -> None:
    stream = relay_module._Stream(-1, source="stdout")
    lines = []
    for number, text in enumerate(chunks):
        lines += stream.split(text)
        if number in releases:
            lines += stream.release()
    lines += stream.release()
    whole = "".join(chunks).splitlines()
    assert "".join(whole) == "".join(lines)
    assert whole.count("") == lines.count("")


def test_unfinished_line_goes_out_after_about_a_second(harness: Harness) -> None:
    began = time.monotonic()
    harness.write(b"50%")
    poll(harness.lines)
    assert 0.9 < time.monotonic() - began < 3
    assert ["50%"] == harness.lines()


def test_break_after_an_unfinished_line_makes_no_blank_line(harness: Harness) -> None:
    harness.write(b"unfinished")
    harness.relay.flush()
    harness.write(b"\nnext\n")
    harness.finish()
    assert ["unfinished", "next"] == harness.lines()


def test_flush_writes_what_was_written_before(harness: Harness) -> None:
    harness.write(b"a\nb")
    harness.write(b"c", "stderr")
    harness.relay.flush()
    assert (["a", "b"], ["c"]) == (harness.lines(), harness.lines("stderr"))


def test_long_line_goes_out_in_pieces_in_bounded_memory(tmp_path: Path) -> None:
    sink = os.open("/dev/null", os.O_WRONLY)
    relay = Relay(Log(stdout_fd=sink, stderr_fd=sink), task="pk")
    reader, writer = os.pipe()
    relay.attach(reader, source="stderr")
    relay.start()
    block = b"x" * (1 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(200):
        os.write(writer, block)
    os.write(writer, b"the end")
    os.close(writer)
    relay.finish()
    os.close(sink)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 16 * 1024
    assert ("x" * (MAX_KEPT_CHARACTERS - 7) + "the end",) == relay.last_stderr_lines


def test_no_character_of_a_long_line_is_lost(harness: Harness) -> None:
    text = "é\\x" * 100_000
    harness.write(text.encode() + b"\nnext\n")
    harness.finish()
    *pieces, last = harness.lines()
    assert (text, "next") == ("".join(map(str, pieces)), last)
    assert MAX_LINE_BYTES > max(len(json.dumps(record)) for record in harness.records())


def test_flood_of_blank_lines_is_written_in_bounded_memory() -> None:
    sink = os.open("/dev/null", os.O_WRONLY)
    log = Log(stdout_fd=sink, stderr_fd=sink)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    log.lines([""] * 65_536, level="INFO", internal=False, task="\U0001f600" * 1024)
    os.close(sink)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("a\nb\n", ("a\n", "b\n"), id="each with its newline"),
        pytest.param("a\nb", ("a\n", "b"), id="last without one"),
        pytest.param("1%\r2%\nb\n", ("1%\r2%\n", "b\n"), id="only newlines end lines"),
        pytest.param("\n\n", ("\n", "\n"), id="blank lines"),
        pytest.param("a\0\n", ("a\n",), id="NUL is removed"),
        pytest.param(
            "\n".join(map(str, range(250))),
            tuple(f"{number}\n" for number in range(150, 249)) + ("249",),
            id="one hundred, the last without newline",
        ),
        pytest.param(
            "\n".join(map(str, range(1000))) + "\n",
            tuple(f"{number}\n" for number in range(900, 1000)),
            id="one hundred",
        ),
        pytest.param("", (), id="nothing"),
    ],
)
def test_last_stderr_lines_have_the_form_that_platforms_know(
    harness: Harness, text: str, expected: tuple[str, ...]
) -> None:
    harness.write(b"not stderr\n")
    harness.write(text.encode(), "stderr")
    harness.finish()
    assert expected == harness.relay.last_stderr_lines


@given(parts=st.lists(st.text(alphabet="a\n", max_size=150), max_size=6))
@settings(max_examples=100, deadline=None)
def test_kept_lines_do_not_depend_on_the_parts(parts: list[str]) -> None:
    kept = relay_module._KeptLines()
    for part in parts:
        kept.add(part)
    lines = "".join(parts).split("\n")
    expected = [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
    assert tuple(expected[-100:]) == kept.lines()


FULL = MAX_KEPT_CHARACTERS
UPDATES = "".join(f"\r{number}%" for number in range(2000))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        pytest.param(["a" + "b" * FULL + "\nc\n"], ("b" * FULL + "\n", "c\n"), id="long"),
        pytest.param(["a" * FULL, "b", "c\n"], ("a" * (FULL - 2) + "bc\n",), id="in parts"),
        pytest.param(["a" * FULL, "", "b"], ("a" * (FULL - 1) + "b",), id="unfinished"),
        pytest.param(["é" * FULL + "\n"], ("é" * FULL + "\n",), id="as long as allowed"),
        pytest.param(["a\n", UPDATES, "\nb"], ("a\n", UPDATES + "\n", "b"), id="progress bar"),
        pytest.param([UPDATES * 9 + "x\n"], ((UPDATES * 9 + "x")[-FULL:] + "\n",), id="long bar"),
    ],
)
def test_the_end_of_a_long_line_is_kept(parts: list[str], expected: tuple[str, ...]) -> None:
    kept = relay_module._KeptLines()
    for part in parts:
        kept.add(part)
    assert expected == kept.lines()


def test_a_new_task_gets_its_own_lines_only(harness: Harness) -> None:
    harness.write(b"first\n", "stderr")
    harness.relay.set_task("pk-2")
    harness.write(b"second\n", "stderr")
    harness.finish()
    assert [("first", "pk"), ("second", "pk-2")] == [
        (record["log"], record["task"]) for record in harness.records("stderr")
    ]
    assert ("second\n",) == harness.relay.last_stderr_lines


def test_finish_does_not_wait_for_a_child_that_holds_the_pipe(harness: Harness) -> None:
    harness.write(b"last words")
    began = time.monotonic()
    harness.relay.finish()
    assert time.monotonic() - began < 2
    assert ["last words"] == harness.lines()


def test_who_still_writes_renews_the_silence_that_is_waited_for(harness: Harness) -> None:
    words = [f"word {number}" for number in range(8)]

    def write_now_and_then() -> None:
        for word in words:
            harness.write(word.encode() + b"\n")
            time.sleep(relay_module.QUIET_SECONDS / 4)

    thread = threading.Thread(target=write_now_and_then)
    thread.start()
    poll(harness.lines)
    harness.relay.finish()
    thread.join()
    assert words == harness.lines()


def test_finish_ends_although_a_child_writes_for_ever(harness: Harness) -> None:
    def write_for_ever() -> None:
        try:
            while True:
                harness.write(b"y\n" * 1000)
        except BrokenPipeError:
            pass

    thread = threading.Thread(target=write_for_ever)
    thread.start()
    poll(harness.lines)
    harness.relay.finish(deadline_seconds=0.3)
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_finish_writes_all_of_a_full_pipe_to_a_slow_reader(tmp_path: Path) -> None:
    reader, log_fd = os.pipe()
    relay = Relay(Log(stdout_fd=log_fd, stderr_fd=log_fd), task="pk")
    relay_end, writer = os.pipe()
    relay.attach(relay_end, source="stdout")
    relay.start()
    text = b"".join(b"line %d\n" % number for number in range(5000))
    os.write(writer, text)
    os.close(writer)
    finisher = threading.Thread(target=relay.finish, kwargs={"deadline_seconds": 0})
    finisher.start()
    received = bytearray()
    while received.count(b"\n") < 5000:
        received += os.read(reader, 4096)
    finisher.join()
    os.close(reader)
    os.close(log_fd)
    assert (
        text.decode().split()
        == " ".join(json.loads(line)["log"] for line in received.splitlines()).split()
    )


def test_a_reader_of_the_log_who_went_away_does_not_stop_the_process() -> None:
    reader, log_fd = os.pipe()
    os.close(reader)
    relay = Relay(Log(stdout_fd=log_fd, stderr_fd=log_fd), task="pk")
    relay_end, writer = os.pipe()
    relay.attach(relay_end, source="stdout")
    relay.start()
    for _ in range(100):
        os.write(writer, b"x\n" * 10_000)
    os.close(writer)
    relay.finish()
    os.close(log_fd)


def test_a_failure_inside_does_not_end_the_relay(harness: Harness) -> None:
    class FailingOnce(Log):
        failures = 1

        def lines(self, *args: object, **options: object) -> None:
            if self.failures:
                self.failures -= 1
                raise MemoryError
            super().lines(*args, **options)

    log = FailingOnce(stdout_fd=harness.log._fds["stdout"], stderr_fd=harness.log._fds["stderr"])
    relay = Relay(log, task="pk")
    reader, writer = os.pipe()
    relay.attach(reader, source="stdout")
    relay.start()
    os.write(writer, b"lost\n")
    poll(lambda: harness.lines("stderr"))
    os.write(writer, b"relayed\n")
    os.close(writer)
    relay.finish()
    assert "Could not relay some output of the user's process" == harness.lines("stderr")[0]
    assert ["relayed"] == harness.lines()


def test_finish_may_be_called_twice_and_without_start() -> None:
    log = Log()
    relay = Relay(log, task=None)
    reader, writer = os.pipe()
    relay.attach(reader, source="stdout")
    relay.finish()
    relay.finish()
    with pytest.raises(BrokenPipeError):
        os.write(writer, b"x")
    os.close(writer)


def test_a_line_that_was_left_unfinished_long_ago_is_not_kept() -> None:
    kept = relay_module._KeptLines()
    kept.add("long ago")
    kept.add("x\n" * (relay_module.MAX_KEPT_LINES + 5))
    assert ("x\n",) * relay_module.MAX_KEPT_LINES == kept.lines()
