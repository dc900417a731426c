"""Streams of blobs: made of pieces, verified, compressed, read whole where they are small."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from shim.oci.errors import ImageUnsuitable, StorageError
from shim.oci.gojson import MAX_DOCUMENT_BYTES
from shim.oci.model import Blob, Descriptor, Readable

PIECE_BYTES = 1 << 18
GZIP_MAGIC = b"\x1f\x8b"
# Most of what is compressed here is compressed already: level 9 is no smaller, only slower.
_LEVEL = 1
_GZIP_WINDOW = 31  # zlib.h: 15 bits of window, and 16 for a gzip header without name and time


class PieceReader:
    """A stream over pieces of any size; closing it closes the generator."""

    def __init__(self, pieces: Iterator[bytes], *, skip_bytes: int = 0) -> None:
        self._pieces, self._rest = pieces, b""
        while skip_bytes and (skipped := self.read(min(skip_bytes, PIECE_BYTES))):
            skip_bytes -= len(skipped)

    def read(self, size: int, /) -> bytes:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._rest = piece
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def close(self) -> None:
        self._rest, self._pieces = b"", iter(())


class VerifiedReader:
    """A stream that ends only if its bytes were those of the descriptor."""

    def __init__(
        self,
        stream: Readable,
        descriptor: Descriptor,
        *,
        name: str,
        error: type[Exception] = StorageError,
    ) -> None:
        """name: where the stream comes from, for messages; error: what is raised of other bytes."""
        self._stream, self._descriptor, self._name = stream, descriptor, name
        self._error = error
        self._hash = new_hash(descriptor.digest)
        self._size_bytes = 0
        self.close = stream.close

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(size)
        self._hash.update(data)
        self._size_bytes += len(data)
        expected = self._descriptor
        if self._size_bytes > expected.size_bytes or not data:
            self._check_size()
            if not expected.digest.endswith(f":{self._hash.hexdigest()}"):
                raise self._error(f"{self._name}: the content is not that of {expected.digest}")
        return data

    def _check_size(self) -> None:
        expected = self._descriptor.size_bytes
        if self._size_bytes != expected:
            raise self._error(
                f"{self._name}: expected {expected:,} bytes of {self._descriptor.digest}, "
                f"found {'more' if self._size_bytes > expected else f'{self._size_bytes:,}'}"
            )


@contextmanager
def storage_errors(name: object) -> Iterator[None]:
    """Raise StorageError for what a disk or a damaged file of that name does."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"{name}: {reason}") from error


def new_hash(digest: str) -> hashlib._Hash:
    """Return the hash function of a digest that was checked (reference.is_digest)."""
    return hashlib.new(digest.partition(":")[0], usedforsecurity=False)


def pieces(stream: Readable) -> Iterator[bytes]:
    """Yield what a stream holds, then close it."""
    try:
        while piece := stream.read(PIECE_BYTES):
            yield piece
    finally:
        stream.close()


def read_document(stream: Readable, *, name: str) -> bytes:
    """Read a document to its end, at most MAX_DOCUMENT_BYTES; closes the stream."""
    body = bytearray()
    for piece in pieces(stream):
        body += piece
        if len(body) > MAX_DOCUMENT_BYTES:
            raise ImageUnsuitable(f"{name}: longer than {MAX_DOCUMENT_BYTES:,} bytes")
    return bytes(body)


def describe(data: Iterable[bytes], media_type: str) -> Descriptor:
    """Return the descriptor of content that is in no document yet."""
    hash_, size_bytes = hashlib.sha256(), 0
    for piece in data:
        hash_.update(piece)
        size_bytes += len(piece)
    digest = f"sha256:{hash_.hexdigest()}"
    return Descriptor(media_type=media_type, digest=digest, size_bytes=size_bytes)


def document_blob(body: bytes, media_type: str) -> Blob:
    """Return a blob of a document that is held in memory."""
    return Blob(
        descriptor=describe([body], media_type),
        open=lambda offset: PieceReader(iter([body[offset:]])),
    )


def compressed(data: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the gzip form: the same bytes for the same data and the same zlib."""
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)
    for piece in data:
        if packed := packer.compress(piece):
            yield packed
    yield packer.flush()


def decompressed(data: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what a gzip file of any number of members holds, in pieces of bounded size."""
    unpacker = zlib.decompressobj(_GZIP_WINDOW)
    try:
        for piece in data:
            while piece:
                if unpacker.eof:
                    unpacker = zlib.decompressobj(_GZIP_WINDOW)
                yield unpacker.decompress(piece, PIECE_BYTES)
                piece = unpacker.unconsumed_tail or unpacker.unused_data
    except zlib.error as error:
        raise StorageError(f"A gzip stream is damaged: {error}") from error
    if not unpacker.eof:
        raise StorageError("A gzip stream ends too early")


def verified_blob(
    descriptor: Descriptor,
    open_at: Callable[[int], Readable],
    *,
    name: str,
    position: int = 0,
    origin: tuple[str, str] | None = None,
    error: type[Exception] = StorageError,
) -> Blob:
    """Return a blob that is verified where it is read from its start; open_at(offset)."""

    def open_(offset: int) -> Readable:
        stream = open_at(offset)
        return stream if offset else VerifiedReader(stream, descriptor, name=name, error=error)

    return Blob(descriptor=descriptor, open=open_, origin=origin, position=position)


def generated_blob(generate: Callable[[], Iterator[bytes]], media_type: str, *, name: str) -> Blob:
    """Return a blob that is made anew for every reader, and never held: twice the work, no copy."""
    return verified_blob(
        describe(generate(), media_type),
        lambda offset: PieceReader(generate(), skip_bytes=offset),
        name=name,
    )


def gzip_blob(blob: Blob, media_type: str) -> Blob:
    """Return the gzip form of an uncompressed blob."""
    digest = blob.descriptor.digest
    made = generated_blob(lambda: compressed(pieces(blob.open(0))), media_type, name=digest)
    return replace(made, position=blob.position)
