"""What `check` says of scripts agrees with what becomes of them."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from shim.process.scripts import find_fault
from shim.process.users import User

GOOD = b"#!/bin/sh\nexit 0\n"


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with scripts of every kind."""
    contents = {
        "good.sh": GOOD,
        "crlf.sh": b"set -e\r\ncd .\r\nexit 0\r\n",
        "good.py": b"import sys\r\nsys.exit(0)\r\n",
        "env": b"#!/usr/bin/env sh\nexit 0\n",
        "env-space": b"#! /usr/bin/env  sh \nexit 0\n",
        "env-missing": b"#!/usr/bin/env no-such-program\n",
        "env-crlf": b"#!/usr/bin/env sh\r\nexit 0\r\n",
        "env-two": b"#!/usr/bin/env sh -e\nexit 0\n",
        "env-split": b"#!/usr/bin/env -S A=1 sh -e\nexit 0\n",
        "env-split-missing": b"#!/usr/bin/env -S A=1 no-such-program -e\n",
        "env-bare": b"#!/usr/bin/env",
        "bin/tool": GOOD,
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("./good.sh", []),
        ("./env", []),
        ("./env-space", []),
        ("./env-split", []),
        ("./env-missing", ["env-missing", "'no-such-program'", "PATH"]),
        ("./env-split-missing", ["'no-such-program'"]),
        ("./env-crlf", ["carriage return", "LF"]),
        ("./env-two", ["'sh -e'", "env -S"]),
        ("python3 {0}/good.py", []),
        ("python3 -u -W ignore good.py --none", []),
        ("python3 -c pass none.py", []),
        ("python3 -um this none.py", []),
        ("python3 {0}/none.py", ["python3", "none.py", "does not exist"]),
        ("python3 -Xdev -u {0}/none.py", ["none.py", "does not exist"]),
        ("python3 -- none.py", ["none.py", "does not exist in {0}"]),
        ("python3 good.py/none.py", ["does not exist"]),
        ("sh good.sh", []),
        ("sh -eu good.sh", []),
        ("bash -euo pipefail none.sh", ["none.sh", "does not exist"]),
        ("bash crlf.sh", ["crlf.sh", "carriage return", "LF"]),
        ("sh {0}/crlf.sh", ["carriage return"]),
        ("bash tool", []),
        ("perl -e exit none.pl", []),
        ("perl -w none.pl", ["does not exist"]),
        ("/usr/bin/env python3 {0}/none.py", ["does not exist"]),
        ("/usr/bin/env no-such-program", ["'no-such-program'", "PATH"]),
        ("env A=1 python3 none.py", ["does not exist"]),
        ("sh -c 'exec python3 none.py'", ["does not exist"]),
        ("sh -c 'A=1 python3 {0}/none.py --x'", ["does not exist"]),
        ("sh -c 'python3 good.py'", []),
        ("sh -c 'cd / && python3 none.py; exit 0'", []),
        ("sh -c 'true none.py'", []),
        ("mkdir {0}/new", []),
    ],
)
def test_fault_is_seen_where_the_command_fails(image: Path, command: str, words: list[str]) -> None:
    argv = shlex.split(command.format(image))
    path = f"{image}/bin:{os.environ['PATH']}"
    fault = find_fault(argv, path=path, user=User())
    assert all(word.format(image) in fault for word in words), fault
    assert bool(words) == bool(fault)
    done = subprocess.run(argv, env={"PATH": path}, capture_output=True)
    assert bool(fault) == bool(done.returncode), done.stderr


def test_script_that_the_user_may_not_read_is_a_fault(image: Path) -> None:
    (image / "good.py").chmod(0o600)
    user = User(uid=12345, gid=12345)
    assert "uid 12345 may not read" in find_fault(
        ["python3", "good.py"], path=os.environ["PATH"], user=user
    )
    (image / "good.py").chmod(0o644)
    assert "" == find_fault(["python3", "good.py"], path=os.environ["PATH"], user=user)


@pytest.mark.parametrize("argv", [["sh", "-c", "'"], ["sh", "-c", ""], ["env"], ["exec"], ["A=1"]])
def test_command_that_is_odd_is_left_to_others(image: Path, argv: list[str]) -> None:
    assert "" == find_fault(argv, path=os.environ["PATH"], user=User())


def test_file_that_never_ends_is_not_read(image: Path) -> None:
    os.mkfifo(image / "fifo", 0o755)
    assert "" == find_fault(["sh", "fifo"], path=os.environ["PATH"], user=User())
