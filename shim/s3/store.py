"""What the program asks of object storage: the interface of S3 and of a directory."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from shim.s3.crew import Crew

Report = Callable[[str, str], None]  # level, message


class Store(Protocol):
    """Buckets that hold objects; every method raises S3ClientError."""

    def get(self, bucket: str, key: str, *, max_bytes: int) -> bytes:
        """Return a whole object, refuse one that is longer."""

    def put(
        self,
        bucket: str,
        key: str,
        body: bytes,
        *,
        metadata: Mapping[str, str] = ...,
        persistent: bool = False,
    ) -> None:
        """Store a small object; persistent: retry hardest, also after a request to stop."""

    def head(self, bucket: str, key: str) -> ObjectHead:
        """Describe an object."""

    def head_bucket(self, bucket: str) -> None:
        """Ask whether there is such a bucket, and whether it may be listed."""

    def probe(self, bucket: str, prefix: str) -> None:
        """Write a small object below a prefix, and remove it again."""

    def list(self, bucket: str, prefix: str) -> Iterator[ObjectSummary]:
        """Yield what lies below a prefix, in the order of keys."""

    def open(self, bucket: str, key: str) -> io.BufferedReader:
        """Open an object for reading in order."""

    def download(self, bucket: str, key: str, directory: int, name: str, *, crew: Crew) -> None:
        """Make the name in an open directory hold the object's bytes, or leave it as it was.

        The file has mode 0644 whatever the umask.
        """

    def upload(self, bucket: str, key: str, fd: int, *, size: int, crew: Crew) -> None:
        """Store the first size bytes of a file; its position is neither used nor moved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectHead:
    """metadata: names in lower case with "_" for "-", since servers return them changed."""

    size: int
    metadata: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectSummary:
    """A line of a listing; size in bytes."""

    key: str
    size: int
