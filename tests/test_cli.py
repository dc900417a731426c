"""The command line: usage, exit codes, and the reason that is left of a failure."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shim import cli
from shim.commands import rehearsal
from shim.contract.errors import InvalidSettings, Problem, TaskStopped, UsageError
from shim.http.errors import RemoteError
from shim.log.log import Log
from shim.process.stopping import Stop
from shim.runner.task import PlatformFailure
from tests.e2e.platform import ROOT
from tests.support import free_port


def stopped_by(signum: int) -> Stop:
    stop = Stop()
    stop.request(signum)
    return stop


@pytest.mark.parametrize(
    ("error", "stop", "code"),
    [
        (UsageError("x"), Stop(), 2),
        (InvalidSettings([Problem(loc=("X",), type="t", message="m")]), Stop(), 2),
        (TaskStopped("x"), stopped_by(signal.SIGTERM), 143),
        (TaskStopped("x"), stopped_by(signal.SIGINT), 130),
        (PlatformFailure("x"), Stop(), 1),
        (RemoteError("x"), Stop(), 1),
        (RuntimeError("x"), Stop(), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_error_has_its_exit_code(error: Exception, stop: Stop, code: int) -> None:
    assert code == cli.exit_code(error, stop, Log())


@pytest.mark.parametrize(
    "argv",
    [[], ["fly"], ["serve", "--port", "x"], ["run", "--input", "x"], ["invoke", "--tasks"]],
    ids=" ".join,
)
def test_wrong_usage_is_told_with_the_usage(argv: list[str]) -> None:
    with pytest.raises(UsageError, match="usage: sagemaker-shim"):
        cli.build_parser().parse_args(argv)


@pytest.mark.parametrize(
    ("argv", "command", "sentence"),
    [
        ("run --input a --output b python3 -c x", "run", "-c"),
        ("run --input a --output b python3 --c=x", "run", "--c"),
        ("check bash -x", "check", "-x: put -- before"),
        ("run --inptu a --output b", "run", "--inptu"),
        ("run --output b --timeout -5 --wrong", "run", "--wrong"),
        ("run --output b", "run", "required: --input"),
        ("invoke --taks [] x", "invoke", "--taks"),
        ("invoke x --taks=[]", "invoke", "--taks"),
        ("invoke -t [] x", "invoke", "unrecognized arguments: x"),
        ("serve --prot 1", "serve", "--prot"),
        ("--verbose serve", "", "--verbose"),
    ],
)
def test_wrong_usage_names_its_cause_and_its_command(
    argv: str, command: str, sentence: str
) -> None:
    with pytest.raises(UsageError) as caught:
        cli.build_parser().parse_args(argv.split())
    message, usage = str(caught.value).splitlines()
    assert sentence in message
    assert usage.startswith(f"usage: sagemaker-shim {command}".rstrip())
    is_command = ("python3" in argv or "bash" in argv) and "timeout" not in argv
    assert is_command == message.endswith("put -- before the command")


@pytest.mark.parametrize(
    ("argv", "cmd"),
    [
        ("-- python3 -c x", ["python3", "-c", "x"]),
        ("true", ["true"]),
        ("--timeout -5 -- a --input c", ["a", "--input", "c"]),
        ("--log-format=text -- -x", ["-x"]),
    ],
)
def test_what_follows_two_dashes_is_the_command(argv: str, cmd: list[str]) -> None:
    words = ["run", "--input", "a", "--output", "b", *argv.split()]
    assert cmd == cli.build_parser().parse_args(words).cmd


def on_terminal(argv: list[str], environ: dict[str, str]) -> tuple[int, str]:
    """Run the program on a terminal; return its exit code and what stands there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "shim", *argv],
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], **environ},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # EIO at the end
        while piece := os.read(ours, 1 << 16):
            text += piece
    os.close(ours)
    return process.wait(30), text.decode()


USAGE = [
    (["invoke"], "One of tasks or file should be set"),
    (["invoke", "-t", "[]"], "Empty task list provided"),
    (["invoke", "-t", "[1]"], "The tasks definition is invalid:"),
    (["invoke", "-f", "ftp://u:pass@x/y"], "found ftp://"),
    (["run", "--input", "/none", "--output", "x"], "--input /none: expected a directory"),
]


@pytest.mark.parametrize(("argv", "sentence"), USAGE, ids=lambda value: str(value))
def test_wrong_usage_is_text_on_a_terminal_and_json_elsewhere(
    argv: list[str], sentence: str
) -> None:
    code, text = on_terminal(argv, {})
    first, *_, usage = text.splitlines()
    assert (2, True) == (code, sentence in first)
    assert first.startswith("sagemaker-shim: ")
    assert usage.startswith(f"usage: sagemaker-shim {argv[0]} ")
    code, text = on_terminal(argv, {"GRAND_CHALLENGE_COMPONENT_USER": "x"})
    logs = [json.loads(line)["log"] for line in text.splitlines()]
    assert (2, True) == (code, sentence in logs[0])
    assert usage == logs[-1]
    assert "pass" not in text
    assert 2 == on_terminal([*argv, "--log-format", "text"], {})[0]


def test_wrong_variables_are_json_where_nobody_reads() -> None:
    environ = {"GRAND_CHALLENGE_COMPONENT_API_METHOD": "x", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "shim", "invoke", "-t", TASK], env=environ, capture_output=True
    )
    assert (2, b"") == (done.returncode, done.stdout)
    (line,) = map(json.loads, done.stderr.splitlines())
    assert ("ERROR", True) == (line["level"], "API_METHOD: expected exec or" in line["log"])


TASK = '[{"pk": "t", "inputs": [], "output_bucket_name": "b", "output_prefix": "p"}]'


@pytest.mark.parametrize("command", ["invoke", "serve"])
def test_log_format_is_json_by_default_and_text_on_request(command: str, tmp_path: Path) -> None:
    prefix = "GRAND_CHALLENGE_COMPONENT_"
    environ = {
        f"{prefix}{name}": str(tmp_path / name)
        for name in ("INPUT_PATH", "OUTPUT_PATH", "LINKED_INPUT_PARENT")
    } | {
        f"{prefix}WRITABLE_DIRECTORIES": "",
        f"{prefix}POST_CLEAN_DIRECTORIES": "",
        "AWS_S3_ENDPOINT_URL": f"file://{tmp_path}",
    }
    options = ["-t", TASK] if command == "invoke" else ["--port", str(free_port())]
    code, text = on_terminal([command, *options], environ)
    logs = [json.loads(line)["log"] for line in text.splitlines()]
    assert 0 == code
    code, text = on_terminal([command, *options, "--log-format", "text"], environ)
    assert [f"shim: {log}" for log in logs[:2]] == [
        line.removeprefix("\x1b[2m").removesuffix("\x1b[0m") for line in text.splitlines()[:2]
    ]


@pytest.mark.parametrize("is_kept", [False, True])
def test_outputs_that_could_not_be_stored_are_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    is_kept: bool,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail() -> None:
        with rehearsal.scratch_directory(Log()) as scratch:
            assert scratch
            (scratch / "output").mkdir()
            if is_kept:
                (scratch / "output/dear").touch()
            raise PlatformFailure("The outputs of the task could not be uploaded")

    with pytest.raises(PlatformFailure):
        fail()
    kept = [str(path) for path in tmp_path.rglob("output")]
    assert is_kept == bool(kept) == any(tmp_path.iterdir())
    assert is_kept == (str(*kept) in capfd.readouterr().err if kept else False)


def test_the_reason_is_left_where_the_platform_looks(tmp_path: Path) -> None:
    cli.write_failure("x" * 5000, tmp_path / "failure")
    assert "x" * 1024 == (tmp_path / "failure").read_text()


def test_no_reason_is_left_without_the_directory(tmp_path: Path) -> None:
    cli.write_failure("x", tmp_path / "missing/failure")
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_the_reason_goes_nowhere_else(tmp_path: Path, kind: str) -> None:
    path, dear = tmp_path / "failure", tmp_path / "dear"
    dear.write_text("dear")
    {
        "link": lambda: path.symlink_to(dear),
        "fifo": lambda: os.mkfifo(path),
        "directory": path.mkdir,
    }[kind]()
    cli.write_failure("reason", path)
    assert "dear" == dear.read_text()
    assert kind == "directory" or (path.is_file() and "reason" == path.read_text())


def test_a_fault_of_our_own_ends_us_although_its_signal_is_taken() -> None:
    program = (
        "import ctypes; from shim.cli import take_signals; from shim.process.stopping import Stop;"
        "take_signals(Stop()); ctypes.string_at(0)"
    )
    assert -signal.SIGSEGV == subprocess.run([sys.executable, "-c", program]).returncode
