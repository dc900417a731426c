"""Debian's docker-registry on ports of its own, as users configure it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shim.http.proxies import Proxies
from shim.http.transport import Transport
from shim.http.trust import Trust
from shim.oci.auth import Login
from shim.oci.reference import parse_reference
from shim.oci.registry import Registry
from tests.s3_servers import running
from tests.support import free_port

needs_registry = pytest.mark.skipif(
    not shutil.which("docker-registry"), reason="needs the Debian package docker-registry"
)
# alice, pw: libxcrypt knows $2y$, Python's crypt is gone.
HTPASSWD = "alice:$2y$05$abcdefghijklmnopqrstuuHIrMEWpUCQe2YqFR3sXwQ75u4od..9q\n"
LOGIN = Login(username="alice", password="pw")


@contextmanager
def serving(directory: Path, *, http: str = "", rest: str = "") -> Iterator[str]:
    """Yield HOST:PORT; http: lines below `http:`, rest: other sections of config.yml."""
    port = free_port()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yml").write_text(
        f"version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n"
        f"    rootdirectory: {directory}/data\n  delete:\n    enabled: true\n"
        f"http:\n  addr: 127.0.0.1:{port}\n{http}{rest}"
    )
    argv = ["docker-registry", "serve", str(directory / "config.yml")]
    with running(argv, port, directory / "log"):
        yield f"127.0.0.1:{port}"


def make_transport(**environ: str) -> Transport:
    return Transport(proxies=Proxies({}), trust=Trust(environ), max_connections=8)


def open_registry(name: str, *, login: Login | None = None, **environ: str) -> Registry:
    return Registry(parse_reference(name), transport=make_transport(**environ), login=login)
