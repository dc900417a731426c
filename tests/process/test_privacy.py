"""What a process shows of itself to others of its own user."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import UNPRIVILEGED_UID, needs_root

OVERWRITE = """
import os
from shim.process.privacy import overwrite_environment
overwrite_environment()
with open("/proc/self/environ", "rb") as file:
    os.write(1, file.read())
os.write(1, os.environb.get(b"GRAND_CHALLENGE_A", b"none"))
"""
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ([b"GRAND_CHALLENGE_A=secret", b"B=x"], b"GRAND_CHALLENGE_A=******\0B=x\0secret"),
        ([b"B=\xff=", b"grand_Challenge_\xe9=\xff\xff"], b"B=\xff=\0grand_Challenge_\xe9=**\0none"),
        ([b"GRAND_CHALLENGE_A="], b"GRAND_CHALLENGE_A=\0"),
        ([b"X_GRAND_CHALLENGE_A=x"], b"X_GRAND_CHALLENGE_A=x\0none"),
        ([b"GRAND_CHALLENGE_A=" + b"x" * 100_000], b"*" * 100_000 + b"\0" + b"x" * 100_000),
    ],
    ids=["first", "not UTF-8", "empty", "another", "long"],
)
def test_secrets_are_overwritten_where_the_kernel_shows_them(
    environ: list[bytes], expected: bytes
) -> None:
    variables = {entry.partition(b"=")[0]: entry.partition(b"=")[2] for entry in environ}
    command = [sys.executable, "-ISc", f"import sys; sys.path.insert(0, {str(ROOT)!r}){OVERWRITE}"]
    done = subprocess.run(command, env=variables, capture_output=True, check=True)
    assert done.stdout.endswith(expected)


@needs_root
def test_a_process_that_forbids_inspection_gives_its_child_back_to_its_user() -> None:
    program = f"""
import os, sys
from shim.frozen import load_everything
from shim.process.privacy import find_prctl, forbid_inspection
from tests.processes import GRACE, NEVER, begin, close
find_prctl(), load_everything()
os.setresgid(*[{UNPRIVILEGED_UID}] * 3)
os.setresuid(*[{UNPRIVILEGED_UID}] * 3)
process = begin("stat", "-c", "%u", "/proc/self/environ", "/proc/%d/environ" % os.getpid())
process.wait(timeout=None, grace=GRACE, stop=NEVER)
print(close(process)[0].split(), forbid_inspection())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"{[str(UNPRIVILEGED_UID), '0']} True\n" == done.stdout, done.stderr
