"""Archives: those of `docker save`, and OCI layouts in a tar, plain or in gzip.

What is written is both at once, so that every loader finds the same image, whichever of the two
it prefers:

    blobs/sha256/HEX    layers, configuration, manifest; layers are all compressed, or none is:
    oci-layout          crane looks at the first alone
    index.json          an entry for each name          podman load, containerd, oci-archive:
    manifest.json       [{Config, RepoTags, Layers}]    docker load, crane, docker-archive:
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from gzip import GzipFile
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any, Self

from shim.contract.errors import UsageError
from shim.oci import gojson, layout, mutate, reference, streams, tar
from shim.oci.config import check_config, diff_ids_of
from shim.oci.errors import ImageUnsuitable, StorageError
from shim.oci.model import Blob, Descriptor, Image, Readable, Sink, Source

MANIFEST = "manifest.json"
_MAX_LINKS = 10
# Of a compressed archive, which cannot be read in another order without beginning anew.
_KEPT_BYTES, _MAX_KEPT_BYTES = 1 << 20, 16 << 20
_UNUSABLE = {b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zX": "xz", b"BZh": "bzip2"}


class TarFiles:
    """The members of an archive; what was read of it is in memory, but no content of layers."""

    def __init__(self, name: str, read_at: Callable[[int, int], bytes], *, slow: bool) -> None:
        """read_at(offset, size): of the tar; slow: whether going back means to begin anew."""
        self.name, self._read_at, self._slow = name, read_at, slow
        self._members: dict[str, tar.Member] = {}
        self._twice: set[str] = set()
        self._kept: dict[str, bytes] = {}
        self._magic: dict[str, bytes] = {}
        self._described: dict[str, Descriptor] = {}

    def scan(self) -> None:
        """Find the members, once, in the order in which they stand."""
        kept_bytes = 0
        for member in tar.read_members(self._read_at):
            if member.name in self._members and member.kind == tar.FILE:
                self._twice.add(member.name)
            self._members[member.name] = member
            if not self._slow or member.kind != tar.FILE:
                continue
            if member.size_bytes <= min(_KEPT_BYTES, _MAX_KEPT_BYTES - kept_bytes):
                kept_bytes += member.size_bytes
                self._kept[member.name] = self._read_at(member.offset, member.size_bytes)
            if member.name not in self._twice and self.is_gzip(member.name):
                self.described(member.name)

    def __contains__(self, path: str) -> bool:
        return path in self._members

    def member(self, path: str) -> tar.Member:
        """Return a file, where links lead to it."""
        found = path
        for _ in range(_MAX_LINKS):
            member = self._members.get(found)
            if member is None or found in self._twice:
                reason = "is there twice" if member else "is missing"
                raise StorageError(f"{self.name}: {found!r:.300} {reason}")
            if member.kind == tar.FILE:
                return member
            if member.kind not in (tar.LINK, tar.SYMLINK):
                break
            found = member.link
        raise StorageError(f"{self.name}: {path!r:.300} is no file, and leads to none")

    def open(self, path: str, offset: int = 0) -> Readable:
        member = self.member(path)
        if member.name in self._kept:
            return streams.PieceReader(iter([self._kept[member.name][offset:]]))
        return streams.PieceReader(self._pieces(member, offset))

    def _pieces(self, member: tar.Member, offset: int) -> Iterator[bytes]:
        while rest := member.size_bytes - offset:
            piece = self._read_at(member.offset + offset, min(rest, streams.PIECE_BYTES))
            if not piece:
                raise StorageError(f"{self.name}: ends in the middle of {member.name!r:.300}")
            offset += len(piece)
            yield piece

    def position(self, path: str) -> int:
        with suppress(StorageError):  # what is to be had elsewhere is not here
            return self.member(path).offset
        return 0

    def magic(self, path: str) -> bytes:
        """Return the first bytes of a file, which say how it is compressed."""
        name = self.member(path).name
        if name not in self._magic:
            self._magic[name] = self.open(name).read(4)
        return self._magic[name]

    def is_gzip(self, path: str) -> bool:
        return self.magic(path).startswith(streams.GZIP_MAGIC)

    def described(self, path: str) -> Descriptor:
        """Return digest and size of a file's bytes as they are here."""
        name = self.member(path).name
        if name not in self._described:
            self._described[name] = streams.describe(streams.pieces(self.open(name)), "")
        return self._described[name]


@contextmanager
def open_tar(path: Path) -> Iterator[TarFiles]:
    """Open an archive, in gzip or not, and find its members. Raises StorageError."""
    with streams.storage_errors(path):
        file = path.open("rb")
    with file:
        descriptor, lock, name = file.fileno(), Lock(), str(path)
        with streams.storage_errors(path):
            unpacked = GzipFile(fileobj=file) if file.peek(2)[:2] == streams.GZIP_MAGIC else None

        def read_at(offset: int, size: int) -> bytes:
            with streams.storage_errors(name):
                if unpacked is None:
                    return os.pread(descriptor, size, offset)
                with lock:
                    unpacked.seek(offset)
                    return unpacked.read(size)

        files = TarFiles(name, read_at, slow=unpacked is not None)
        try:
            files.scan()
        except StorageError as error:
            text = str(error).removeprefix(f"{name}: ")
            raise StorageError(f"{name}: {text}") from error
        yield files


class ArchiveSource:
    """An image of a `docker save` archive: manifest.json is right, index.json only an ornament."""

    def __init__(self, files: TarFiles, name: str | None = None) -> None:
        self._files, self._name = files, name
        self._paths: dict[str, str] = {}

    def load(self, os_name: str, architecture: str) -> Image:
        """Return the image; an archive has one platform. UsageError when a name is wanted."""
        entry = self._choose()
        config_body = self._document(str(entry.get("Config")))
        config = gojson.loads(config_body, name="The configuration")
        paths = entry.get("Layers") or []
        if not isinstance(paths, list):
            raise ImageUnsuitable(f"{MANIFEST}: expected a list of layers")
        check_config(config, layers=len(paths))
        layers = [
            self._layer(tar.normal_name(str(path)), diff_id)
            for path, diff_id in zip(paths, diff_ids_of(config), strict=True)
        ]
        manifest = mutate.build_manifest(
            {},
            family=mutate.DOCKER,
            config=streams.describe([config_body], mutate.DOCKER_CONFIG),
            layers=layers,
        )
        image = Image(
            manifest_bytes=gojson.dumps(manifest),
            config_bytes=config_body,
            manifest=manifest,
            config=config,
            media_type=mutate.DOCKER_MANIFEST,
            names=tuple(_full_names(entry)),
        )
        return self._indexed(image, os_name, architecture) or image

    def _choose(self) -> dict[str, Any]:
        entries = gojson.loads_any(self._document(MANIFEST), name=MANIFEST)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ImageUnsuitable(f"{MANIFEST}: expected a list of objects")
        listed = ", ".join([name for entry in entries for name in _full_names(entry)][:100])
        if self._name:
            entries = [entry for entry in entries if self._name in _full_names(entry)]
        if len(entries) > 1:
            raise UsageError(f"{self._files.name} has several images, name one of: {listed}")
        if not entries:
            named = f" {self._name!r}: there is {listed or 'nothing'}" if self._name else ""
            raise StorageError(f"{self._files.name}: there is no image{named}")
        found: dict[str, Any] = entries[0]
        return found

    def _document(self, path: str) -> bytes:
        path = tar.normal_name(path)
        return streams.read_document(self._files.open(path), name=path)

    def _layer(self, path: str, diff_id: str) -> Descriptor:
        """Describe a layer by its content: an uncompressed one has the digest of its diff_id."""
        magic = self._files.magic(path)
        for mark, kind in _UNUSABLE.items():
            if magic.startswith(mark):
                raise ImageUnsuitable(f"A layer is compressed with {kind}: expected gzip, or none")
        if compressed := self._files.is_gzip(path):
            found = self._files.described(path)
            digest, size_bytes = found.digest, found.size_bytes
        else:
            digest, size_bytes = diff_id, self._files.member(path).size_bytes
        self._paths[digest] = path
        media_type = mutate.layer_type(mutate.DOCKER, compressed=compressed)
        return Descriptor(media_type=media_type, digest=digest, size_bytes=size_bytes)

    def _indexed(self, image: Image, os_name: str, architecture: str) -> Image | None:
        """Return the image as index.json has it, with annotations, if that is the same image."""
        if layout.INDEX not in self._files:
            return None
        try:
            source = layout.LayoutSource(self._files, image.names[0] if image.names else None)
            found = source.load(os_name, architecture)
        except (ImageUnsuitable, StorageError, UsageError):
            return None
        same = found.config_bytes == image.config_bytes and _facts(found) == _facts(image)
        return replace(found, names=image.names) if same else None

    def blob(self, descriptor: Descriptor) -> Blob:
        return layout.file_blob(self._files, self._paths[descriptor.digest], descriptor)


def _facts(image: Image) -> list[tuple[str, int, bool]]:
    layers = mutate.layers_of(image.manifest)
    return [(layer.digest, layer.size_bytes, mutate.is_plain(layer)) for layer in layers]


def _full_names(entry: dict[str, Any]) -> Iterator[str]:
    tags = entry.get("RepoTags") or []
    for tag in tags if isinstance(tags, list) else []:
        with suppress(UsageError):
            yield str(reference.parse_reference(str(tag)))


class ArchiveSink:
    """A new archive, which takes the place of what is there when it is complete."""

    def __init__(self, path: Path, name: str | None = None, *, docker: bool = True) -> None:
        """docker: with manifest.json, so that `docker load` takes it."""
        self._path, self._name, self._docker = path, name, docker
        self._partial = path.with_name(f".{path.name[:64]}.{secrets.token_hex(4)}")
        self._placed: set[str] = set()
        self._write: Callable[[bytes], object] = len
        self._finish: Callable[[], object] = int
        self._files, self._lock = ExitStack(), Lock()

    def __enter__(self) -> Self:
        with streams.storage_errors(self._path):
            self._files.callback(self._partial.unlink, missing_ok=True)
            file = self._files.enter_context(self._partial.open("xb", buffering=0))
            self._write = partial(layout.write_all, file.fileno())
            if self._path.name.endswith((".gz", ".tgz")):
                packed = GzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0)
                self._files.callback(packed.close)
                self._write, self._finish = packed.write, packed.close
        return self

    def __exit__(self, *failure: object) -> None:
        self._files.close()

    def current_digest(self) -> str | None:
        """Return the digest that index.json has; a text of its own for any other content."""
        if not self._path.exists():
            return None
        try:
            with open_tar(self._path) as files:
                body = streams.read_document(files.open(layout.INDEX), name=layout.INDEX)
                index = gojson.loads(body, name=layout.INDEX)
                digests = {str(entry.get("digest")) for entry in layout.entries_of(index)}
        except (ImageUnsuitable, StorageError):
            return "something else"
        return digests.pop() if len(digests) == 1 else "something else"

    def place(self, blob: Blob) -> str:
        """Append a blob unless it is there."""
        path = layout.blob_path(blob.descriptor.digest)
        with self._lock:
            if path in self._placed:
                return "exists"
            self._append(path, blob.descriptor.size_bytes, streams.pieces(blob.open(0)))
            self._placed.add(path)
        return "written"

    def _append(self, path: str, size_bytes: int, content: Iterable[bytes]) -> None:
        header = tar.build_header(path, size_bytes=size_bytes)
        for piece in chain([header], content, [tar.padding(size_bytes)]):
            with streams.storage_errors(self._path):  # an error of the source's is another
                self._write(piece)

    def reference(self, digest: str) -> str:
        return f"{self._path}@{digest}"

    def commit(self, image: Image) -> None:
        """Write the documents and give the file its name."""
        self.place(streams.document_blob(image.manifest_bytes, image.media_type))
        names = (self._name,) if self._name else image.names
        entries = [layout.index_entry(image, self._annotations(name)) for name in names or ("",)]
        index = {"schemaVersion": 2, "mediaType": mutate.OCI_INDEX, "manifests": entries}
        documents = {layout.LAYOUT_MARKER: layout.LAYOUT_VERSION, layout.INDEX: gojson.dumps(index)}
        if self._docker:
            documents[MANIFEST] = gojson.dumps([_entry(image, names)])
        for path, body in documents.items():
            self._append(path, len(body), [body])
        with streams.storage_errors(self._path):
            self._write(tar.END)
            self._finish()
            os.replace(self._partial, self._path)

    def _annotations(self, name: str) -> dict[str, str]:
        if not name or not self._docker and name == self._name:
            return {layout.REF_NAME: name} if name else {}
        full = reference.parse_reference(name)
        return {layout.FULL_NAME: str(full), layout.REF_NAME: full.identifier}


def _entry(image: Image, names: Sequence[str]) -> dict[str, Any]:
    if any(layer.media_type.endswith("zstd") for layer in mutate.layers_of(image.manifest)):
        raise ImageUnsuitable("An archive of docker save has no layers in zstd: use oci-archive:")
    return {
        "Config": layout.blob_path(mutate.config_of(image.manifest).digest),
        "RepoTags": [reference.parse_reference(name).familiar for name in names] or None,
        "Layers": [layout.blob_path(layer.digest) for layer in mutate.layers_of(image.manifest)],
    }


@contextmanager
def open_source(location: reference.Location) -> Iterator[Source]:
    """Open a directory or archive, known by its content where the kind is not named."""
    path = Path(location.path)
    if path.is_dir():
        yield layout.LayoutSource(layout.DirectoryFiles(path), location.name)
        return
    with open_tar(path) as files:
        is_sniffed = location.kind == reference.PATH and MANIFEST in files
        if location.kind == reference.DOCKER_ARCHIVE or is_sniffed:
            yield ArchiveSource(files, location.name)
        else:
            yield layout.LayoutSource(files, location.name)


def open_sink(location: reference.Location) -> Sink:
    """Return where an image is to be written; a path is an archive if its name is that of one."""
    path = Path(os.path.realpath(location.path))
    is_archive = path.name.endswith(reference.ARCHIVE_SUFFIXES) and not path.is_dir()
    if location.kind == reference.LAYOUT or location.kind == reference.PATH and not is_archive:
        return layout.LayoutSink(path, location.name)
    return ArchiveSink(path, location.name, docker=location.kind != reference.LAYOUT_ARCHIVE)
