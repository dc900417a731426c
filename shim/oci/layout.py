"""OCI image layouts (image-layout.md): directories, and what reads them from archives as well."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, Self

from shim.contract.errors import UsageError
from shim.oci import gojson, streams
from shim.oci.errors import ImageUnsuitable, StorageError
from shim.oci.model import Blob, Descriptor, Image, Readable
from shim.oci.mutate import load_image, resolve_manifest
from shim.oci.reference import parse_reference

LAYOUT_MARKER, INDEX = "oci-layout", "index.json"
LAYOUT_VERSION = b'{"imageLayoutVersion":"1.0.0"}'
REF_NAME = "org.opencontainers.image.ref.name"
# What containerd calls an image, in full; Docker writes both.
FULL_NAME = "io.containerd.image.name"
DEFAULT_NAME = "latest"


class Files(Protocol):
    """The files of a directory or an archive; paths are relative, with "/"."""

    name: str

    def open(self, path: str, offset: int = 0) -> Readable:
        """Return a stream; StorageError when there is no such file."""

    def position(self, path: str) -> int:
        """Return where a file stands, for reading many in order."""


class DirectoryFiles:
    def __init__(self, root: Path) -> None:
        self._root, self.name = root, str(root)

    def open(self, path: str, offset: int = 0) -> Readable:
        with streams.storage_errors(self._root / path):
            file = (self._root / path).open("rb", buffering=0)
            file.seek(offset)
        return file

    def position(self, path: str) -> int:
        return 0


def blob_path(digest: str) -> str:
    """Return where a blob is, below the layout; the digest was checked."""
    return f"blobs/{digest.replace(':', '/')}"


def names_of(annotations: object) -> list[str]:
    """Return what an entry of index.json is called, the full name first."""
    members = annotations if isinstance(annotations, dict) else {}
    return [str(members[key]) for key in (FULL_NAME, REF_NAME) if members.get(key)]


def file_blob(files: Files, path: str, descriptor: Descriptor) -> Blob:
    """Return the blob that is in a file."""
    return streams.verified_blob(
        descriptor,
        lambda offset: files.open(path, offset),
        name=files.name,
        position=files.position(path),
    )


def entries_of(index: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of index.json, which Docker has written as null."""
    entries = index.get("manifests") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ImageUnsuitable(f"{INDEX}: expected a list of descriptors")
    return entries


def _full_names(entries: list[dict[str, Any]]) -> set[str]:
    """Return the names that are more than a tag."""
    names = {name for entry in entries for name in names_of(entry.get("annotations"))}
    found = set()
    for name in names:
        with suppress(UsageError):
            found.add(str(parse_reference(name)) if "/" in name else "")
    return found - {""}


class LayoutSource:
    """An image in a layout; without a name there must be only one."""

    def __init__(self, files: Files, name: str | None = None) -> None:
        self._files, self._name = files, name

    def load(self, os_name: str, architecture: str) -> Image:
        """Return the image of a platform. UsageError when several are there and none is named."""
        body = streams.read_document(self._files.open(INDEX), name=INDEX)
        index = gojson.loads(body, name=INDEX)
        chosen = self._choose(index)
        narrowed = gojson.dumps({**index, "manifests": chosen})
        return load_image(
            resolve_manifest(narrowed, "", self.read, os_name=os_name, architecture=architecture),
            self.read,
            names=tuple(sorted(_full_names(chosen))),
        )

    def _choose(self, index: Mapping[str, Any]) -> list[dict[str, Any]]:
        entries = entries_of(index)
        if self._name:
            entries = [e for e in entries if self._name in names_of(e.get("annotations"))]
        names = {found[0] for e in entries if (found := names_of(e.get("annotations")))}
        if len(names) > 1 and len({str(entry.get("digest")) for entry in entries}) > 1:
            listed = ", ".join(sorted(names)[:100])
            raise UsageError(f"{self._files.name} has several images, name one of: {listed}")
        if not entries:
            named = f" of the name {self._name!r}" if self._name else ""
            raise StorageError(f"{self._files.name}: there is no image{named}")
        return entries

    def read(self, descriptor: Descriptor) -> bytes:
        """Return a document, verified."""
        return streams.read_document(self.blob(descriptor).open(0), name=descriptor.digest)

    def blob(self, descriptor: Descriptor) -> Blob:
        return file_blob(self._files, blob_path(descriptor.digest), descriptor)


class LayoutSink:
    """A layout in a directory, made unless it is there; other images in it stay."""

    def __init__(self, root: Path, name: str | None = None) -> None:
        self._root, self._name = root, name or DEFAULT_NAME
        self._undo: list[Path] = []

    def __enter__(self) -> Self:
        if self._root.exists() and not (self._root / LAYOUT_MARKER).exists():
            with streams.storage_errors(self._root):
                if next(self._root.iterdir(), None):
                    raise StorageError(f"{self._root}: expected an OCI layout, or nothing")
        return self

    def __exit__(self, *failure: object) -> None:
        for path in reversed(self._undo):
            with suppress(OSError):  # not empty: somebody else uses it by now
                path.rmdir() if path.is_dir() else path.unlink()

    def current_digest(self) -> str | None:
        """Return the digest under this name, None when nothing is."""
        for entry in entries_of(self._index()):
            if self._name in names_of(entry.get("annotations")):
                return str(entry.get("digest"))
        return None

    def _index(self) -> dict[str, Any]:
        if not (self._root / INDEX).exists():
            return {"schemaVersion": 2, "manifests": []}
        body = streams.read_document(DirectoryFiles(self._root).open(INDEX), name=INDEX)
        return gojson.loads(body, name=str(self._root / INDEX))

    def place(self, blob: Blob) -> str:
        """Write a blob unless one of this name and size is there."""
        path = self._root / blob_path(blob.descriptor.digest)
        if path.exists() and path.stat().st_size == blob.descriptor.size_bytes:
            return "exists"
        self._write(path, blob.open(0))
        return "written"

    def reference(self, digest: str) -> str:
        return f"oci:{self._root}:{self._name}@{digest}"

    def commit(self, image: Image) -> None:
        """Write the manifest, then let index.json name it."""
        index = self._index()
        kept = [
            entry
            for entry in entries_of(index)
            if self._name not in names_of(entry.get("annotations"))
        ]
        entry = index_entry(image, {REF_NAME: self._name})
        body = gojson.dumps({**index, "manifests": [*kept, entry]})
        self.place(streams.document_blob(image.manifest_bytes, image.media_type))
        if not (self._root / LAYOUT_MARKER).exists():
            self._write(self._root / LAYOUT_MARKER, streams.PieceReader(iter([LAYOUT_VERSION])))
        self._write(self._root / INDEX, streams.PieceReader(iter([body])))
        self._undo = []

    def _write(self, path: Path, stream: Readable) -> None:
        """Write a file that takes its name when it is complete."""
        partial = path.with_name(f".{path.name[:64]}.{secrets.token_hex(4)}")
        with streams.storage_errors(path):
            for directory in reversed((path.parent, *path.parent.parents)):
                if not directory.exists():
                    directory.mkdir(exist_ok=True)
                    self._undo.append(directory)
            is_new, file = not path.exists(), partial.open("xb", buffering=0)
        try:
            with file:
                for piece in streams.pieces(stream):
                    with streams.storage_errors(path):  # an error of the source's is another
                        write_all(file.fileno(), piece)
            with streams.storage_errors(path):
                os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        if is_new:
            self._undo.append(path)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of the data: one write() may take less."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def index_entry(image: Image, annotations: Mapping[str, str]) -> dict[str, Any]:
    """Return the entry of index.json for an image."""
    manifest = streams.describe([image.manifest_bytes], image.media_type)
    platform = {name: image.config.get(name) for name in ("architecture", "os")}
    return {
        "mediaType": manifest.media_type,
        "digest": manifest.digest,
        "size": manifest.size_bytes,
        **({"annotations": dict(annotations)} if annotations else {}),
        "platform": platform,
    }
