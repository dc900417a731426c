from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shim.log.log import MAX_LINE_BYTES, Log, encode, split
from tests.support import poll


class Streams:
    """A log whose two streams are pipes, read in the background."""

    def __init__(self, **options: object) -> None:
        stdout, self.stdout_fd = os.pipe()
        stderr, self.stderr_fd = os.pipe()
        self.out = bytearray()
        self.err = bytearray()
        self._threads = [
            threading.Thread(target=self._read, args=pair)
            for pair in ((stdout, self.out), (stderr, self.err))
        ]
        for thread in self._threads:
            thread.start()
        self.log = Log(stdout_fd=self.stdout_fd, stderr_fd=self.stderr_fd, **options)

    def _read(self, fd: int, into: bytearray) -> None:
        while data := os.read(fd, 65536):
            into += data
        os.close(fd)

    def close(self) -> tuple[str, str]:
        os.close(self.stdout_fd)
        os.close(self.stderr_fd)
        for thread in self._threads:
            thread.join()
        return self.out.decode("ascii"), self.err.decode("ascii")


def lines_of(text: str, *, task: str | None = "pk") -> list[bytes]:
    data = encode(split(text), level="INFO", source="stdout", internal=False, task=task)
    return data.splitlines(keepends=True)


def decode(lines: list[bytes]) -> list[str]:
    return [json.loads(line)["log"] for line in lines]


def test_user_line_is_compatible_to_the_byte() -> None:
    expected = (
        b'{"log": "a \\u00e9 \\"\\\\ \\u001b", "level": "WARNING", "source": "stderr",'
        b' "internal": false, "task": "0b1"}\n'
    )
    actual = encode(
        split('a é "\\ \x1b'), level="WARNING", source="stderr", internal=False, task="0b1"
    )
    assert expected == actual


def test_own_line_is_compatible_to_the_byte() -> None:
    expected = (
        b'{"log": "x", "level": "INFO", "source": "stdout", "internal": true, "task": null}\n'
    )
    actual = encode(split("x"), level="INFO", source="stdout", internal=True, task=None)
    assert expected == actual


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("a\nb", ["a", "b"], id="two lines"),
        pytest.param("a\n", ["a"], id="newline at the end"),
        pytest.param("a\r\n\r\nb\rc", ["a", "", "b", "c"], id="carriage returns"),
        pytest.param("a\vb\fc\x1cd\x85e\u2028f", list("abcdef"), id="all that splitlines knows"),
        pytest.param("\n", [""], id="blank line"),
        pytest.param("", [""], id="nothing is a blank line"),
        pytest.param("a\0b\0", ["ab"], id="NUL is removed"),
    ],
)
def test_text_is_split_as_splitlines_does(text: str, expected: list[str]) -> None:
    assert expected == decode(lines_of(text))


@pytest.mark.parametrize("character", ["x", '"', "é", "\x01", "\U0001f600", "\ud800"])
def test_no_line_exceeds_what_container_engines_tear(character: str) -> None:
    text = character * 40_000
    lines = lines_of(text)
    assert MAX_LINE_BYTES >= max(map(len, lines))
    assert text == "".join(decode(lines))


def test_pieces_are_as_long_as_they_may_be() -> None:
    first, *_ = lines_of("x" * 40_000)
    assert MAX_LINE_BYTES == len(first)


@given(
    st.text(alphabet=st.sampled_from('x"\\é\x01\U0001f600\n'), max_size=200), st.integers(1, 200)
)
@settings(max_examples=60, deadline=None)
def test_pieces_joined_are_the_text(text: str, times: int) -> None:
    lines = lines_of(text * times)
    assert MAX_LINE_BYTES >= max(map(len, lines))
    assert (text * times).replace("\n", "") == "".join(decode(lines))


def test_hostile_pk_is_just_a_string_and_leaves_room_for_text() -> None:
    pk = '"}\n{"log": "' + "\U0001f600" * 20_000
    (line,) = lines_of("x" * 1000, task=pk)
    assert MAX_LINE_BYTES >= len(line)
    assert pk.startswith(json.loads(line)["task"])


@pytest.mark.parametrize(
    ("method", "source"),
    [("debug", "stdout"), ("info", "stdout"), ("warning", "stderr"), ("error", "stderr")],
)
def test_level_chooses_the_stream(method: str, source: str) -> None:
    streams = Streams(level="DEBUG")
    getattr(streams.log, method)("x")
    out, err = streams.close()
    line = json.loads(out if source == "stdout" else err)
    assert {
        "log": "x",
        "level": method.upper(),
        "source": source,
        "internal": True,
        "task": None,
    } == line
    assert "" == (err if source == "stdout" else out)


def test_level_hides_own_lines_only() -> None:
    streams = Streams(level="ERROR")
    streams.log.info("hidden")
    streams.log.warning("hidden")
    streams.log.info("shown", internal=False, task="pk")
    streams.log.lines(["relayed"], level="INFO", internal=False, task="pk")
    streams.log.error("shown")
    out, err = streams.close()
    assert ["shown", "relayed"] == [json.loads(line)["log"] for line in out.splitlines()]
    assert ["shown"] == [json.loads(line)["log"] for line in err.splitlines()]


def test_traceback_is_lines_of_json() -> None:
    streams = Streams()
    try:
        raise ValueError("multi\nline")
    except ValueError as error:
        streams.log.exception("It failed", error)
    _, err = streams.close()
    lines = [json.loads(line) for line in err.splitlines()]
    assert ["It failed", "Traceback (most recent call last):"] == [x["log"] for x in lines[:2]]
    assert ["ValueError: multi", "line"] == [x["log"] for x in lines[-2:]]
    assert {("ERROR", True)} == {(x["level"], x["internal"]) for x in lines}


def test_whoever_went_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    log = Log(stdout_fd=writer, stderr_fd=writer)
    log.info("x")
    os.close(writer)
    log.error("a closed descriptor is none either")


def test_non_blocking_stream_loses_nothing() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    log = Log(stdout_fd=writer, stderr_fd=writer)
    text = "\n".join(f"line {number}" for number in range(20_000))
    thread = threading.Thread(target=log.info, args=(text,))
    thread.start()
    received = bytearray()
    while received.count(b"\n") < 20_000:
        received += os.read(reader, 65536)
    thread.join()
    os.close(reader)
    os.close(writer)
    assert text.split("\n") == [json.loads(line)["log"] for line in received.splitlines()]


def test_lines_of_two_threads_are_not_torn_on_one_pipe() -> None:
    reader, writer = os.pipe()
    log = Log(stdout_fd=writer, stderr_fd=writer)
    text = "\n".join("x" * 5000 for _ in range(20))
    threads = [
        threading.Thread(target=method, args=(text,)) for method in (log.info, log.error) * 2
    ]
    for thread in threads:
        thread.start()
    received = bytearray()
    while received.count(b"\n") < 80:
        received += os.read(reader, 65536)
    for thread in threads:
        thread.join()
    os.close(reader)
    os.close(writer)
    assert {"x" * 5000} == {json.loads(line)["log"] for line in received.splitlines()}


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    controller, terminal = os.openpty()
    yield controller, terminal
    os.close(controller)
    os.close(terminal)


def test_text_style_is_plain_and_marks_own_lines() -> None:
    streams = Streams(style="text")
    streams.log.lines(["from the user"], level="INFO", internal=False, task="pk")
    streams.log.lines(["from the user"], level="WARNING", internal=False, task="pk")
    streams.log.info("hello")
    streams.log.warning("careful")
    streams.log.error("Time limit exceeded", internal=False, task="pk")
    out, err = streams.close()
    assert "from the user\nshim: hello\n" == out
    assert "from the user\nshim: WARNING: careful\nERROR: Time limit exceeded\n" == err


def test_text_style_is_coloured_on_a_terminal(terminal: tuple[int, int]) -> None:
    controller, fd = terminal
    Log(stdout_fd=fd, stderr_fd=fd, style="text").error("bad")
    received = bytearray()

    def is_complete() -> bool:
        received.extend(os.read(controller, 100))
        return received.endswith(b"\n")

    poll(is_complete)
    assert b"\x1b[31mshim: ERROR: bad\x1b[0m\r\n" == bytes(received)
