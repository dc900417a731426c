"""What all tests share: servers, one of each kind for a worker when first asked for; the binary."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.s3_servers import S3Server, moto_server, rclone_server

ROOT = Path(__file__).parents[1]

_numbers = itertools.count()


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server over plain HTTP that verifies signatures."""
    with rclone_server(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture(scope="session")
def rclone_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server over TLS, with a certificate of its own making."""
    with rclone_server(tmp_path_factory.mktemp("rclone-tls"), tls=True) as server:
        yield server


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An imitation of S3, STS and instance metadata."""
    with moto_server(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture
def bucket(rclone: S3Server) -> str:
    """A new bucket of the rclone server."""
    return rclone.make_bucket(f"bucket-{next(_numbers)}")


@pytest.fixture
def new_bucket() -> Callable[[S3Server], str]:
    """Return a function that makes a new bucket on any of the servers."""
    return lambda server: server.make_bucket(f"bucket-{next(_numbers)}")


@pytest.fixture(scope="session")
def binary() -> Path:
    """The binary of these sources, built unless it is there."""
    done = subprocess.run([ROOT / "build.sh", "binary"], capture_output=True, text=True)
    if done.returncode and not os.environ.get("CI"):
        pytest.skip(f"the binary cannot be built here: {done.stderr.splitlines()[-1]}")
    assert 0 == done.returncode, done.stderr
    return Path(done.stdout.split()[-1])
