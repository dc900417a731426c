"""Images made on the spot: layouts and every shape of `docker save`."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OCI, DOCKER = "application/vnd.oci.image.", "application/vnd.docker."
REF_NAME = "org.opencontainers.image.ref.name"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def layer(*names: str, content: bytes = b"hello") -> bytes:
    """A layer with a file of each name."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


@dataclass(kw_only=True)
class Made:
    """An image: layers are uncompressed."""

    layers: list[bytes] = field(default_factory=lambda: [layer("a", "b"), layer("c")])
    inner: dict[str, Any] = field(
        default_factory=lambda: {"Env": ["PATH=/bin"], "Cmd": ["sh"], "User": "1000"}
    )
    outer: dict[str, Any] = field(default_factory=dict)
    name: str = "example.test/some/base:1.0"
    zipped: bool = False
    annotations: dict[str, str] = field(default_factory=dict)

    @property
    def config(self) -> bytes:
        diff_ids = [f"sha256:{sha256(data)}" for data in self.layers]
        document = {
            "created": "2024-01-01T00:00:00Z",
            "architecture": "amd64",
            "os": "linux",
            "config": self.inner,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": [{"created_by": f"layer {data[:1]!r}"} for data in self.layers],
        }
        return json.dumps(document | self.outer, separators=(",", ":")).encode()

    @property
    def stored(self) -> list[bytes]:
        return [gzip.compress(data, mtime=0) if self.zipped else data for data in self.layers]

    def manifest(self, *, docker: bool = False) -> bytes:
        kind, config, plain = (
            (f"{DOCKER}distribution.manifest.v2+json", f"{DOCKER}container.image.v1+json",
             f"{DOCKER}image.rootfs.diff.tar")
            if docker
            else (f"{OCI}manifest.v1+json", f"{OCI}config.v1+json", f"{OCI}layer.v1.tar")
        )  # fmt: skip
        suffix = (".gzip" if docker else "+gzip") if self.zipped else ""
        document: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": kind,
            "config": entry(config, self.config),
            "layers": [entry(plain + suffix, data) for data in self.stored],
        }
        if self.annotations:
            document["annotations"] = self.annotations
        return json.dumps(document).encode()

    def blobs(self, *, docker: bool = False) -> dict[str, bytes]:
        contents = [*self.stored, self.config, self.manifest(docker=docker)]
        return {f"blobs/sha256/{sha256(data)}": data for data in contents}


def entry(media_type: str, data: bytes, **members: Any) -> dict[str, Any]:
    return {
        "mediaType": media_type,
        "digest": f"sha256:{sha256(data)}",
        "size": len(data),
        **members,
    }


def index(*entries: dict[str, Any]) -> bytes:
    return json.dumps({"schemaVersion": 2, "manifests": [*entries]}).encode()


def layout_files(*images: Made) -> dict[str, bytes]:
    """An OCI layout, the last part of each name as its reference."""
    files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}'}
    entries = []
    for image in images:
        files |= image.blobs()
        annotations = {REF_NAME: image.name.rpartition(":")[2]} if image.name else {}
        entries.append(
            entry(f"{OCI}manifest.v1+json", image.manifest(), annotations=annotations)
        )  # fmt: skip
    return files | {"index.json": index(*entries)}


def write_layout(root: Path, *images: Made) -> Path:
    for name, data in layout_files(*images).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def saved(image: Made, config: str, layers: list[str]) -> dict[str, Any]:
    return {"Config": config, "RepoTags": [image.name] if image.name else None, "Layers": layers}


def old_docker(image: Made) -> dict[str, bytes | str]:
    """Docker 20.10; a text is the target of a symlink: the second of equal layers."""
    files: dict[str, bytes | str] = {}
    paths: list[str] = []
    first: dict[bytes, str] = {}
    for number, data in enumerate(image.layers):
        directory = sha256(bytes([number]) + data)
        paths.append(f"{directory}/layer.tar")
        files |= {f"{directory}/VERSION": b"1.0", f"{directory}/json": b"{}"}
        files[paths[-1]] = f"../{first[data]}" if data in first else data
        first.setdefault(data, paths[-1])
    config = f"{sha256(image.config)}.json"
    files |= {config: image.config, "repositories": b"{}"}
    return files | {"manifest.json": json.dumps([saved(image, config, paths)]).encode()}


def hybrid(image: Made, *, docker: bool = False, useless: bool = False) -> dict[str, bytes | str]:
    """Docker 25 and later; docker: index.json leads to a manifest as it was pulled."""
    files: dict[str, bytes | str] = {**image.blobs(docker=docker)}
    paths = [f"blobs/sha256/{sha256(data)}" for data in image.stored]
    kind = f"{DOCKER}distribution.manifest.v2+json" if docker else f"{OCI}manifest.v1+json"
    names = {"io.containerd.image.name": image.name, REF_NAME: image.name.rpartition(":")[2]}
    listed = index(entry(kind, image.manifest(docker=docker), annotations=names))
    files["index.json"] = b'{"schemaVersion":2,"manifests":null}' if useless else listed
    files["oci-layout"] = b'{"imageLayoutVersion":"1.0.0"}'
    config = f"blobs/sha256/{sha256(image.config)}"
    return files | {"manifest.json": json.dumps([saved(image, config, paths)]).encode()}


def nested(image: Made) -> dict[str, bytes | str]:
    """The containerd store: an index in index.json, with platforms that are absent."""
    files = hybrid(image)
    absent = entry(
        f"{OCI}manifest.v1+json", b"absent", platform={"os": "linux", "architecture": "arm64"}
    )
    present = entry(
        f"{OCI}manifest.v1+json",
        image.manifest(),
        platform={"os": "linux", "architecture": "amd64"},
    )
    inner = index(absent, present)
    files[f"blobs/sha256/{sha256(inner)}"] = inner
    files["index.json"] = index(
        entry(f"{OCI}index.v1+json", inner, annotations={"io.containerd.image.name": image.name})
    )
    return files


def crane(image: Made) -> dict[str, bytes | str]:
    config = f"sha256:{sha256(image.config)}"
    files: dict[str, bytes | str] = {config: image.config}
    paths = []
    for data in image.layers:
        zipped = gzip.compress(data, mtime=0)
        paths.append(f"{sha256(zipped)}.tar.gz")
        files[paths[-1]] = zipped
    return files | {"manifest.json": json.dumps([saved(image, config, paths)]).encode()}


def podman(image: Made) -> dict[str, bytes | str]:
    config = f"{sha256(image.config)}.json"
    files: dict[str, bytes | str] = {}
    paths = []
    for number, data in enumerate(image.layers):
        paths.append(f"{sha256(data)}.tar")
        files[paths[-1]] = data
        files[f"{sha256(bytes([number]))}/layer.tar"] = f"../{paths[-1]}"
    files[config] = image.config
    return files | {"manifest.json": json.dumps([saved(image, config, paths)]).encode()}


def dotted(files: dict[str, bytes | str]) -> dict[str, bytes | str]:
    """Repacked by hand: `tar -C directory -cf archive.tar .`"""
    return {f"./{name}": data for name, data in files.items()}


def write_tar(path: Path, files: dict[str, bytes | str] | dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type, info.linkname = tarfile.SYMTYPE, data
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_binary(path: Path) -> Path:
    """Write what could be the binary, as far as its header goes."""
    path.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(11) + b"\x3e\x00" + b"the binary" * 7000)
    return path
