"""A platform in small: buckets, an environment, and the shim as a separate process."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support import UNPRIVILEGED_UID

P = "GRAND_CHALLENGE_COMPONENT_"
ROOT = Path(__file__).parents[2]
# What is tested: `python -m shim` from the checkout, or any other command that this variable names.
COMMAND = shlex.split(os.environ.get("SHIM_COMMAND", "")) or [sys.executable, "-m", "shim"]
IS_PYTHON = len(COMMAND) > 1  # and no binary
NO_INPUTS = "The task has no inputs"
NO_OUTPUT = "The command succeeded and wrote no output"
REMARKS = (NO_INPUTS, NO_OUTPUT)
SIGNING_KEY = bytes(range(32))


def without_remarks(lines: str) -> str:
    """Return log lines but for the remarks that most of these tasks ask for."""
    kept = [line for line in lines.splitlines(keepends=True) if not any(x in line for x in REMARKS)]
    return "".join(kept)


def b64j(value: object) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


@dataclass(frozen=True)
class Finished:
    """A process that has ended; `lines` are its log lines, stdout's before stderr's."""

    code: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.stdout + self.stderr).splitlines()]

    @property
    def user_lines(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if not line["internal"]]

    def texts(self, **wanted: object) -> list[str]:
        """Return the texts of lines, but for the remarks."""
        return [
            line["log"]
            for line in self.lines
            if all(line[name] == value for name, value in wanted.items())
            and line["log"] not in REMARKS
        ]

    @property
    def remarks(self) -> list[tuple[str, str]]:
        """Return the remarks in order, each with its task."""
        return [
            (line["log"], line["task"])
            for line in self.user_lines
            if line["log"] in REMARKS and line["level"] == "WARNING"
        ]


@dataclass
class Platform:
    """One job's directories below `root`, its bucket, and its environment."""

    s3: Any
    bucket: str
    root: Path
    environ: dict[str, str] = field(default_factory=dict)
    # What the shim is started by, such as a program that makes namespaces.
    wrapper: Sequence[str] = ()
    command_line: Sequence[str] = tuple(COMMAND)
    identity: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("opt", "tmp"):
            (self.root / name).mkdir()
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": "/root",
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.root / "tmp"),
            **self.environ,
            f"{P}INPUT_PATH": str(self.root / "input"),
            f"{P}OUTPUT_PATH": str(self.root / "output"),
            f"{P}LINKED_INPUT_PARENT": str(self.root / "opt/linked"),
            f"{P}MODEL_DEST": str(self.root / "opt/model"),
            f"{P}GROUND_TRUTH_DEST": str(self.root / "opt/ground_truth"),
            f"{P}WRITABLE_DIRECTORIES": f"{self.root}/opt/data:{self.root}/opt/model",
            f"{P}POST_CLEAN_DIRECTORIES": f"{self.root}/opt/data:{self.root}/opt/model",
            f"{P}SIGNING_KEY_HEX": SIGNING_KEY.hex(),
            f"{P}RUNTIME_OUTPUT_BUCKET_NAME": self.bucket,
            f"{P}RUNTIME_OUTPUT_PREFIX": "runtime",
            f"{P}SIGTERM_GRACE_SECONDS": "1",
        }

    def set(self, **variables: object) -> None:
        """Set variables of the component by the part of their name after the prefix."""
        self.environ |= {P + name: str(value) for name, value in variables.items()}

    def command(self, *argv: str) -> None:
        self.set(ENTRYPOINT_B64J=b64j(None), CMD_B64J=b64j(list(argv)))

    def script(self, text: str) -> None:
        """Let the task run a shell script with $I and $O for its directories."""
        self.command("/bin/sh", "-c", f"I={self.root}/input O={self.root}/output\n{text}")

    def put(self, key: str, body: bytes = b"content") -> None:
        self.s3.put_object(Bucket=self.bucket, Key=key, Body=body)

    def get(self, key: str) -> bytes:
        return self.s3.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def task(self, pk: str = "t", inputs: Sequence[tuple[str, str]] = (), **more: Any) -> dict:
        """Describe a task; inputs are (relative path, key)."""
        return {
            "pk": pk,
            "inputs": [
                {"relative_path": path, "bucket_name": self.bucket, "bucket_key": key}
                for path, key in inputs
            ],
            "output_bucket_name": self.bucket,
            "output_prefix": f"out/{pk}",
            "timeout": "PT1M",
            **more,
        }

    def leave_root(self) -> None:
        """Have the shim run by somebody else than root, who can reach it and owns the job."""
        checkout = self.root / "checkout"
        leave_out = shutil.ignore_patterns("__pycache__")  # others write there meanwhile
        shutil.copytree(ROOT / "shim", checkout / "shim", ignore=leave_out)
        reasons = []
        self.environ["PYTHONPATH"] = str(checkout)
        for path in (self.root, *self.root.rglob("*")):
            os.chown(path, UNPRIVILEGED_UID, UNPRIVILEGED_UID)
        # An interpreter below /root is not for everybody.
        for python in (COMMAND[0], "/usr/bin/python3"):
            self.command_line = [python, *COMMAND[1:]] if IS_PYTHON else COMMAND
            self.identity = {
                "user": UNPRIVILEGED_UID,
                "group": UNPRIVILEGED_UID,
                "extra_groups": [],
            }
            try:
                done = self.run("--version")
            except PermissionError as error:
                reasons.append(str(error))
            else:
                if done.code == 0:
                    return
                reasons.append(done.stderr)
        pytest.skip(f"needs a shim that everybody can run, such as Debian's python3: {reasons}")

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.wrapper, *self.command_line, *arguments],
            **self.identity,
            env=self.environ,
            cwd=self.root,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,  # not a session: a test beside this one may reap those of others
            **options,
        )

    def run(self, *arguments: str, stdin: str | None = None, seconds: float = 60) -> Finished:
        with self.start(*arguments, stdin=subprocess.PIPE) as process:
            return finish(process, stdin=stdin, seconds=seconds)

    def invoke(self, *tasks: Mapping[str, Any]) -> Finished:
        return self.run("invoke", "-t", json.dumps(tasks))

    def result(self, pk: str = "t") -> dict[str, Any]:
        """Return a task's result once its signature has been verified."""
        return self.signed(f"out/{pk}/.sagemaker_shim/inference_result.json")

    def setup_result(self) -> dict[str, Any]:
        return self.signed("runtime/.sagemaker_shim/runtime_setup_result.json")

    def signed(self, key: str) -> dict[str, Any]:
        answer = self.s3.get_object(Bucket=self.bucket, Key=key)
        body = answer["Body"].read()
        metadata = {name.lower(): value for name, value in answer["Metadata"].items()}
        expected = hmac.new(SIGNING_KEY, body, hashlib.sha256).hexdigest()
        assert expected == metadata["signature_hmac_sha256"]
        return json.loads(body)


def finish(
    process: subprocess.Popen[str], *, stdin: str | None = None, seconds: float = 60
) -> Finished:
    try:
        stdout, stderr = process.communicate(stdin, timeout=seconds)
    except subprocess.TimeoutExpired:
        stdout, stderr = kill(process)
        raise AssertionError(f"still running after {seconds} s:\n{stdout}\n{stderr}") from None
    return Finished(process.returncode, stdout, stderr)


def kill(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End a shim at once, all processes that the packaging makes of it, and return its output."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()
