"""The layer that puts the shim into an image: the same bytes for the same binary and mode.

input/           0755      a tar (USTAR) of root's entries, of 1970: no name of a machine,
output/          0777      no time of a build, no "./" before a name; runtimes set the modes
tmp/            01777      of directories that are there already and keep what is in them
sagemaker-shim   0500
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shim.oci.config import SHIM_PATH
from shim.oci.errors import ImageUnsuitable, StorageError
from shim.oci.model import Blob
from shim.oci.streams import PIECE_BYTES, PieceReader, compressed, describe, generated_blob
from shim.oci.tar import DIRECTORY, END, build_header, padding, read_members

BINARY_NAME = SHIM_PATH.lstrip("/")
DIRECTORIES = {"input": 0o755, "output": 0o777, "tmp": 0o1777}
_NAMES = {*DIRECTORIES, BINARY_NAME}


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """diff_id: the digest of the tar; blob: that tar, or its gzip form."""

    diff_id: str
    blob: Blob


def build_layer(binary: Path, *, mode: int, media_type: str, gzip: bool) -> Layer:
    """Describe the layer of a binary, which is read again for every reader of the blob.

    Raises StorageError when the file cannot be read.
    """

    def tar() -> Iterator[bytes]:
        return _tar_pieces(binary, mode)

    plain = describe(tar(), media_type)
    if gzip:
        blob = generated_blob(lambda: compressed(tar()), media_type, name=str(binary))
    else:
        blob = generated_blob(tar, media_type, name=str(binary))
    return Layer(diff_id=plain.digest, blob=blob)


def _tar_pieces(binary: Path, mode: int) -> Iterator[bytes]:
    try:
        with binary.open("rb", buffering=0) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            for name, directory_mode in DIRECTORIES.items():
                yield build_header(f"{name}/", mode=directory_mode, kind=DIRECTORY)
            yield build_header(BINARY_NAME, size_bytes=size_bytes, mode=mode)
            rest = size_bytes
            while rest and (piece := file.read(min(rest, PIECE_BYTES))):
                rest -= len(piece)
                yield piece
    except OSError as error:
        raise StorageError(f"{binary}: {error.strerror}") from error
    if rest:
        raise StorageError(f"{binary}: shrank while it was read")
    yield padding(size_bytes)
    yield END


def read_machine(binary: Path) -> int:
    """Return e_machine of an ELF executable. Raises StorageError, ImageUnsuitable for others."""
    try:
        with binary.open("rb") as file:
            header = file.read(20)
    except OSError as error:
        raise StorageError(f"{binary}: {error.strerror}") from error
    if len(header) < 20 or not header.startswith(b"\x7fELF\x02"):
        raise ImageUnsuitable(f"{binary}: expected the shim's binary, an ELF file of 64 bits")
    return int.from_bytes(header[18:20], "little" if header[5] == 1 else "big")


def is_shim_layer(tar: Iterator[bytes]) -> bool:
    """Say whether a layer holds exactly the entries that a shim's layer has, in any order."""
    stream, position = PieceReader(tar), 0

    def read_at(offset: int, size: int) -> bytes:
        nonlocal position
        data = b""
        while position < offset and (skipped := stream.read(min(offset - position, PIECE_BYTES))):
            position += len(skipped)
        while len(data) < size and (piece := stream.read(size - len(data))):
            data += piece
        position = offset + len(data)
        return data

    names = set()
    try:
        for member in read_members(read_at):
            names.add(member.name)
            if member.name not in _NAMES:
                return False
    except StorageError:
        return False
    return names == _NAMES
