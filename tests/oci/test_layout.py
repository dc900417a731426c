from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from shim.contract.errors import UsageError
from shim.http.errors import TransportError
from shim.oci.archive import ArchiveSink, ArchiveSource, TarFiles, open_sink, open_source
from shim.oci.errors import ImageUnsuitable, StorageError
from shim.oci.layout import DirectoryFiles, LayoutSink, LayoutSource
from shim.oci.model import Descriptor
from shim.oci.mutate import layers_of
from shim.oci.reference import parse_location
from shim.oci.streams import document_blob, pieces
from tests.oci import images
from tests.oci.images import OCI, REF_NAME, Made, entry, index, sha256, write_layout, write_tar
from tests.oci.test_patcher import SHAPES, made_for, needs, patched, run, skopeo_config, verified

MADE = Made(name="x:one")
MANIFEST_PATH = f"blobs/sha256/{sha256(MADE.manifest())}"
CONFIG_PATH = f"blobs/sha256/{sha256(MADE.config)}"


def load(root: Path, name: str | None = None) -> Any:
    return LayoutSource(DirectoryFiles(root), name).load("linux", "amd64")


def named(made: Made, *names: str) -> bytes:
    return index(
        *(
            entry(f"{OCI}manifest.v1+json", made.manifest(), annotations={REF_NAME: name})
            for name in names
        )
    )


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("index.json", lambda body: b"{", "index.json: Invalid JSON"),
        ("index.json", lambda body: b'{"schemaVersion":2,"manifests":null}', "there is no image"),
        ("index.json", lambda body: b'{"schemaVersion":2,"manifests":[1]}', "list of descriptors"),
        ("index.json", lambda body: b'{"manifests":[{"digest":"../x"}]}', "schema"),
        ("index.json", lambda body: body.replace(b'"sha256:', b'"../sha256:'), "digest"),
        ("index.json", None, "index.json: No such file"),
        (MANIFEST_PATH, None, "No such file"),
        (MANIFEST_PATH, lambda body: body + b" ", "found more"),
        (MANIFEST_PATH, lambda body: body[:-1], "found"),
        (MANIFEST_PATH, lambda body: body.replace(b"2", b"3", 1), "the content is not that of"),
        (CONFIG_PATH, lambda body: body.replace(b"1000", b"1001"), "the content is not that of"),
        (CONFIG_PATH, lambda body: b"", "found 0"),
    ],
)
def test_a_damaged_layout_is_refused(
    path: str, change: Callable[[bytes], bytes] | None, message: str, tmp_path: Path
) -> None:
    file = write_layout(tmp_path, MADE) / path
    if change:
        file.write_bytes(change(file.read_bytes()))
    else:
        file.unlink()
    with pytest.raises((StorageError, ImageUnsuitable), match=message):
        load(tmp_path)


def test_a_layout_is_read_by_name(tmp_path: Path) -> None:
    other = Made(name="x:two", layers=[])
    write_layout(tmp_path, MADE, other)
    assert MADE.config == load(tmp_path, "one").config_bytes
    assert other.config == load(tmp_path, "two").config_bytes
    with pytest.raises(StorageError, match="no image of the name 'three'"):
        load(tmp_path, "three")
    with pytest.raises(UsageError, match="one, two"):
        load(tmp_path)


def test_names_of_one_image_are_no_choice(tmp_path: Path) -> None:
    (write_layout(tmp_path, MADE) / "index.json").write_bytes(named(MADE, "a", "d/c:1", "b/c:1"))
    image = load(tmp_path)
    assert MADE.config == image.config_bytes
    assert ("docker.io/b/c:1", "docker.io/d/c:1") == image.names


def test_an_image_without_a_name_is_read(tmp_path: Path) -> None:
    assert MADE.config == load(write_layout(tmp_path, Made(name=""))).config_bytes


def test_a_blob_can_be_read_from_an_offset(tmp_path: Path) -> None:
    source = LayoutSource(DirectoryFiles(write_layout(tmp_path, MADE)))
    data = MADE.layers[0]
    descriptor = Descriptor(
        media_type="", digest=f"sha256:{sha256(data)}", size_bytes=len(data)
    )  # fmt: skip
    assert data[700:710] == source.blob(descriptor).open(700).read(10)


def test_only_a_layout_or_nothing_becomes_a_layout(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="expected an OCI layout, or nothing"):
        LayoutSink(tmp_path).__enter__()
    with pytest.raises(StorageError, match="Not a directory"):
        LayoutSink(tmp_path / "file").__enter__()
    (tmp_path / "empty").mkdir()
    with LayoutSink(tmp_path / "empty") as sink:
        assert sink.current_digest() is None


def test_a_blob_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    blob = document_blob(b"content", "")
    with LayoutSink(tmp_path / "new") as sink:
        assert ["written", "exists"] == [sink.place(blob), sink.place(blob)]
    assert not (tmp_path / "new").exists()


def test_an_index_that_is_damaged_is_not_replaced(tmp_path: Path) -> None:
    write_layout(tmp_path, MADE)
    (tmp_path / "index.json").write_bytes(b'{"schemaVersion":2,"manifests":[1]}')
    with LayoutSink(tmp_path) as sink, pytest.raises(ImageUnsuitable, match="list of descriptors"):
        sink.current_digest()


@needs("skopeo")
@pytest.mark.parametrize("zipped", [False, True])
def test_archives_of_layouts_come_and_go(zipped: bool, tmp_path: Path, binary: Path) -> None:
    made = Made(name="x:one", zipped=zipped)
    source = write_tar(tmp_path / "in.tar", images.layout_files(made))
    patched(f"oci-archive:{source}:one", f"oci-archive:{tmp_path}/out.tar:new", binary)
    assert "new" in run("tar", "-xOf", tmp_path / "out.tar", "index.json")
    assert "manifest.json" not in run("tar", "-tf", tmp_path / "out.tar")
    config = skopeo_config(f"oci-archive:{tmp_path}/out.tar:new")
    assert ["/sagemaker-shim"] == config["config"]["Entrypoint"]
    assert [] == verified(f"{tmp_path}/out.tar", binary)


@needs("skopeo")
def test_a_layout_keeps_zstd_and_archives_of_docker_refuse_it(tmp_path: Path, binary: Path) -> None:
    run("skopeo", "--insecure-policy", "copy", "--dest-compress-format", "zstd",
        "--dest-compress", f"oci:{write_layout(tmp_path / 'in', Made(name='x:one'))}:one",
        f"oci:{tmp_path}/zstd:one")  # fmt: skip
    outcome = patched(f"oci:{tmp_path}/zstd", f"oci:{tmp_path}/out:one", binary)
    kinds = [layer["mediaType"].rpartition("+")[2] for layer in outcome.image.manifest["layers"]]
    assert ["zstd", "zstd", "gzip"] == kinds
    assert skopeo_config(f"oci:{tmp_path}/out:one")
    with pytest.raises(ImageUnsuitable, match="zstd"):
        patched(f"oci:{tmp_path}/zstd", f"{tmp_path}/out.tar", binary)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_layers_to_be_had_elsewhere_stay_in_a_layout(tmp_path: Path, binary: Path) -> None:
    made = Made(name="x:one")
    files = images.layout_files(made)
    manifest = json.loads(made.manifest())
    manifest["layers"][0]["mediaType"] = f"{OCI}layer.nondistributable.v1.tar"
    manifest["layers"][0]["urls"] = ["https://example.test/layer"]
    body = json.dumps(manifest).encode()
    del files[f"blobs/sha256/{sha256(made.layers[0])}"]
    files[f"blobs/sha256/{sha256(body)}"] = body
    files["index.json"] = index(entry(f"{OCI}manifest.v1+json", body))
    source = write_tar(tmp_path / "in.tar", files)
    outcome = patched(source, f"oci:{tmp_path}/out", binary)
    assert manifest["layers"][0] == outcome.image.manifest["layers"][0]
    with pytest.raises(ImageUnsuitable, match="foreign"):
        patched(source, tmp_path / "out.tar", binary)


def test_a_link_to_an_archive_stays_a_link(tmp_path: Path, binary: Path) -> None:
    source = write_tar(tmp_path / "in.tar", images.old_docker(Made()))
    (tmp_path / "link.tar").symlink_to("target.tar")
    patched(source, tmp_path / "link.tar", binary)
    assert (tmp_path / "link.tar").is_symlink()
    assert [] == verified(tmp_path / "target.tar", binary)
    patched(source, source, binary, force=True)
    assert [] == verified(source, binary)


def test_a_new_archive_has_the_mode_of_new_files(tmp_path: Path, binary: Path) -> None:
    source = write_tar(tmp_path / "in.tar", images.old_docker(Made()))
    mask = os.umask(0o027)
    try:
        patched(source, tmp_path / "out.tar", binary)
    finally:
        os.umask(mask)
    assert 0o640 == (tmp_path / "out.tar").stat().st_mode & 0o777


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="missing.tar: No such file"):
        with open_source(parse_location(f"{tmp_path}/missing.tar")):
            pass
    with pytest.raises(StorageError, match="No such file"):
        with open_sink(parse_location(f"{tmp_path}/no/out.tar")):
            pass


@pytest.mark.parametrize("dest", ["out.tar", "out.tar.gz", "oci:layout"])
def test_an_error_of_the_source_is_not_one_of_the_disk(dest: str, tmp_path: Path) -> None:
    def broken(offset: int) -> Any:
        raise TransportError("reset")

    kind, colon, path = dest.rpartition(":")
    blob = replace(document_blob(b"content", ""), open=broken)
    with pytest.raises(TransportError):
        with open_sink(parse_location(f"{kind}{colon}{tmp_path / path}")) as sink:
            sink.place(blob)
    assert [] == [*tmp_path.iterdir()]


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with LayoutSink(tmp_path / "new") as sink, ArchiveSink(tmp_path / "out.tar") as archive:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            for place in (sink.place, archive.place):
                with pytest.raises(StorageError, match="File too large"):
                    place(document_blob(b"content" * 1000, ""))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
    assert [] == [*tmp_path.iterdir()]


@pytest.mark.parametrize("shape", SHAPES)
def test_an_archive_that_cannot_be_read_backwards_is_read_once(shape: str, tmp_path: Path) -> None:
    """In gzip, each step back means to begin anew."""
    made = made_for(shape)
    made.layers += [images.layer("big", content=Random(seed).randbytes(2 << 20)) for seed in (1, 2)]
    data = write_tar(tmp_path / "in.tar", SHAPES[shape](made)).read_bytes()
    offsets: list[int] = []

    def read_at(offset: int, size: int) -> bytes:
        offsets.append(offset)
        return data[offset : offset + size]

    files = TarFiles("x", read_at, slow=True)
    files.scan()
    scanned = len(offsets)
    source = ArchiveSource(files)
    image = source.load("linux", "amd64")
    assert scanned == len(offsets)
    blobs = [source.blob(layer) for layer in layers_of(image.manifest)]
    for blob in sorted(blobs, key=lambda blob: blob.position):
        assert list(pieces(blob.open(0)))
    assert len(offsets) > scanned
    assert offsets[scanned:] == sorted(offsets[scanned:])


def test_an_entry_that_is_there_stays_in_its_place(tmp_path: Path, binary: Path) -> None:
    root = write_layout(tmp_path / "layout", MADE)
    patched(f"oci:{root}:one", f"oci:{root}:new", binary)
    patched(f"oci:{root}:one", f"oci:{root}:other", binary)
    before = (root / "index.json").read_bytes()
    patched(f"oci:{root}:one", f"oci:{root}:new", binary)
    assert before == (root / "index.json").read_bytes()
