"""Descriptors, images and the two seams between them and where they are kept.

digest: of the bytes as they are stored and sent, compressed or not.
diff_id: the digest of a layer's uncompressed tar.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self


class Readable(Protocol):
    """A stream; b"" is its end, and comes only when all of it was right."""

    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Descriptor:
    """What a document says of a blob; members: all of it, unknown ones too (descriptor.md)."""

    media_type: str
    digest: str
    size_bytes: int
    members: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Blob:
    """Content that a sink may need.

    open: a new stream from the offset on, verified against the descriptor when from 0.
    origin: registry host and repository that hold it already, for a mount.
    position: where it stands in its source, which is read fastest in this order.
    """

    descriptor: Descriptor
    open: Callable[[int], Readable]
    origin: tuple[str, str] | None = None
    position: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """One image of one platform.

    manifest_bytes, config_bytes: as stored: what they are hashed as.
    manifest, config: what they say. names: of an archive or layout, in full.
    """

    manifest_bytes: bytes
    config_bytes: bytes
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    media_type: str
    names: tuple[str, ...] = ()


class Source(Protocol):
    """Where an image is read from: a registry, a layout, an archive."""

    def load(self, os_name: str, architecture: str) -> Image: ...

    def blob(self, descriptor: Descriptor) -> Blob: ...


class Sink(Protocol):
    """Where an image is written to; leaving the context without commit() leaves it as it was."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *failure: object) -> None: ...

    def current_digest(self) -> str | None:
        """Return the digest of what is there under this name, None when nothing is."""

    def place(self, blob: Blob) -> str:
        """Make sure that the blob is there; return "exists", "mounted" or "written"."""

    def commit(self, image: Image) -> None:
        """Publish the manifest, when all blobs are there, and let the name be this image's."""

    def reference(self, digest: str) -> str:
        """Return what the image of a digest is called here."""
