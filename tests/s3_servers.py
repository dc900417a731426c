"""Start real S3 servers on 127.0.0.1 for the tests: rclone (plain and TLS), moto."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support import free_port, poll

ACCESS_KEY, SECRET_KEY = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running server; where it stores buckets as directories, root is their parent."""

    url: str
    root: Path | None = None
    ca_bundle: Path | None = None
    environ: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        environ = {
            "AWS_S3_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "eu-central-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        if self.ca_bundle:
            environ["AWS_CA_BUNDLE"] = str(self.ca_bundle)
        object.__setattr__(self, "environ", environ)

    def boto3(self) -> Any:
        """Return a boto3 client, the judge of what our client did."""
        return _boto3(self.url, str(self.ca_bundle) if self.ca_bundle else None)

    def make_bucket(self, name: str) -> str:
        """Create a bucket and return its name."""
        self.boto3().create_bucket(
            Bucket=name, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"}
        )
        return name


@cache  # half a second each
def _boto3(url: str, ca_bundle: str | None) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=url,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="eu-central-1",
        verify=ca_bundle,
        config=Config(
            s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, read_timeout=10
        ),
    )


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def running(argv: list[str], port: int, log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        # In our session: tests that end what a task left in other sessions must not end it.
        process = subprocess.Popen(argv, stdout=output, stderr=output)
    try:
        poll(lambda: process.poll() is not None or _accepts(port), seconds=30)
        if process.poll() is not None:
            raise RuntimeError(f"{argv[0]} ended: {log.read_text()}")
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def find_program(name: str) -> str:
    """Return the path of a program that the test extra installs; skip the test without it."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        pytest.skip(f"needs {name} (pip install .[test])")
    return str(path)


@contextmanager
def rclone_server(directory: Path, *, tls: bool = False) -> Iterator[S3Server]:
    """Serve the directories below `directory`/buckets as buckets; rclone verifies signatures."""
    root, port = directory / "buckets", free_port()
    root.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{port}"
    argv = [find_program("rclone"), "serve", "s3", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"]
    argv += ["--addr", address, "--config", os.devnull, "--cache-dir", str(directory / "cache")]
    certificate = None
    if tls:
        certificate, key = make_certificate(directory)
        argv += ["--cert", str(certificate), "--key", str(key)]
    scheme = "https" if tls else "http"
    with running([*argv, str(root)], port, directory / "rclone.log"):
        yield S3Server(url=f"{scheme}://{address}", root=root, ca_bundle=certificate)


@contextmanager
def moto_server(directory: Path) -> Iterator[S3Server]:
    """Serve AWS as moto imitates it: also STS and instance metadata; no signature is verified."""
    port = free_port()
    argv = [find_program("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with running(argv, port, directory / "moto.log"):
        yield S3Server(url=f"http://127.0.0.1:{port}")


EC_KEY = ("ec", "-pkeyopt", "ec_paramgen_curve:P-256")


def make_certificate(
    directory: Path, *, key_form: Sequence[str] = EC_KEY, host: str = "s3.example.test"
) -> tuple[Path, Path]:
    """Make a self-signed certificate for this machine and a host; return it and its key."""
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    if not certificate.exists():
        argv = ["openssl", "req", "-x509", "-newkey", *key_form]
        argv += ["-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext"]
        names = f"IP:127.0.0.1,DNS:localhost,DNS:{host}"
        argv += [f"subjectAltName={names}", "-keyout", str(key)]
        subprocess.run([*argv, "-out", str(certificate)], check=True, capture_output=True)
    return certificate, key
