"""The command line: usage, exit codes, and the reason that is left of a failure."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from shim import cli
from shim.errors import InvalidSettings, Problem, TaskStopped, UsageError
from shim.logs import Log
from shim.runner import PlatformFailure
from shim.s3.errors import S3ClientError
from shim.stopping import Stop


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
        (S3ClientError("x"), Stop(), 1),
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
