from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.oci.errors import ImageUnsuitable, StorageError
from shim.oci.layer import build_layer, is_shim_layer, read_machine
from shim.oci.model import Blob
from shim.oci.streams import compressed, decompressed, gzip_blob, pieces
from shim.oci.tar import END, build_header, padding, read_members

MEDIA_TYPE = "application/vnd.oci.image.layer.v1.tar"


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    path = tmp_path / "shim"
    path.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(11) + b"\x3e\x00" + b"not really" * 70)
    return path


def content(blob: Blob, offset: int = 0) -> bytes:
    return b"".join(pieces(blob.open(offset)))


def layer_tar(binary: Path, mode: int = 0o500) -> bytes:
    return content(build_layer(binary, mode=mode, media_type=MEDIA_TYPE, gzip=False).blob)


def test_python_reads_the_layer(binary: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(layer_tar(binary))) as tar:
        found = [(m.name, m.mode, m.type, m.size) for m in tar]
        assert not [m for m in tar if m.mtime or m.uid or m.gid or m.uname or m.pax_headers]
        file = tar.extractfile("sagemaker-shim")
        assert file and binary.read_bytes() == file.read()
    assert [
        ("input", 0o755, tarfile.DIRTYPE, 0),
        ("output", 0o777, tarfile.DIRTYPE, 0),
        ("tmp", 0o1777, tarfile.DIRTYPE, 0),
        ("sagemaker-shim", 0o500, tarfile.REGTYPE, binary.stat().st_size),
    ] == found


def test_gnu_tar_lists_the_layer(binary: Path) -> None:
    listed = subprocess.run(
        ["tar", "tvf", "-", "--utc", "--numeric-owner"],
        input=layer_tar(binary, 0o555),
        capture_output=True,
        check=True,
    )
    assert b"" == listed.stderr
    lines = [line.split() for line in listed.stdout.decode().splitlines()]
    assert [
        ("drwxr-xr-x", "0/0", "input/"),
        ("drwxrwxrwx", "0/0", "output/"),
        ("drwxrwxrwt", "0/0", "tmp/"),
        ("-r-xr-xr-x", "0/0", "sagemaker-shim"),
    ] == [(line[0], line[1], line[5]) for line in lines]
    assert {("1970-01-01", "00:00")} == {(line[3], line[4]) for line in lines}


def test_gnu_tar_writes_the_same_layer(binary: Path, tmp_path: Path) -> None:
    """But for the names of owners, which GNU tar leaves out only with --numeric-owner."""
    root = tmp_path / "root"
    for name, mode in (("input", 0o755), ("output", 0o777), ("tmp", 0o1777)):
        (root / name).mkdir(parents=True)
        (root / name).chmod(mode)
    (root / "sagemaker-shim").write_bytes(binary.read_bytes())
    (root / "sagemaker-shim").chmod(0o500)
    command = "tar -C root -cf - -b 1 --format=ustar --mtime=@0 --owner=0 --group=0".split()
    command += ["--numeric-owner", "input", "output", "tmp", "sagemaker-shim"]
    theirs = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
    assert theirs == layer_tar(binary)


def test_the_layer_depends_on_binary_and_mode_alone(
    binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = build_layer(binary, mode=0o500, media_type=MEDIA_TYPE, gzip=True)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    copy = tmp_path / "copy"
    copy.write_bytes(binary.read_bytes())
    copy.chmod(0o7777)
    os.utime(copy, (1, 1))
    mask = os.umask(0o777)
    try:
        two = build_layer(copy, mode=0o500, media_type=MEDIA_TYPE, gzip=True)
    finally:
        os.umask(mask)
    assert (one.diff_id, one.blob.descriptor) == (two.diff_id, two.blob.descriptor)
    assert "sha256:33ba9ed66ee3dbfdea57d2de8c1241dadcbeed2ebaacf4a038f5c8b1e28ecca3" == one.diff_id
    other = build_layer(copy, mode=0o555, media_type=MEDIA_TYPE, gzip=True)
    assert one.diff_id != other.diff_id


def test_the_compressed_layer_is_made_anew_for_each_reader(binary: Path) -> None:
    layer = build_layer(binary, mode=0o500, media_type=MEDIA_TYPE, gzip=True)
    packed = content(layer.blob)
    assert layer_tar(binary) == gzip.decompress(packed)
    assert layer.blob.descriptor.size_bytes == len(packed)
    assert bytes(4) == packed[4:8]  # no time
    for offset in (0, 1, 100, len(packed)):
        assert packed[offset:] == content(layer.blob, offset)


@pytest.mark.parametrize("change", ["longer than it was", b"", None], ids=str)
def test_a_binary_that_changes_is_noticed(binary: Path, change: object) -> None:
    layer = build_layer(binary, mode=0o500, media_type=MEDIA_TYPE, gzip=True)
    if change is None:
        binary.unlink()
    else:
        binary.write_bytes(str(change).encode() * 1000)
    with pytest.raises(StorageError, match=str(binary)):
        content(layer.blob)


def test_reads_the_machine(binary: Path, tmp_path: Path) -> None:
    assert 62 == read_machine(binary)
    script = tmp_path / "script"
    for body in (b"", b"#!/bin/sh\nexec true # and more", b"\x7fELF\x01" + bytes(40)):
        script.write_bytes(body)
        with pytest.raises(ImageUnsuitable, match="ELF"):
            read_machine(script)
    with pytest.raises(StorageError, match="No such file"):
        read_machine(tmp_path / "missing")


def upstream_layer(*names: str, mtime: float = 1.5) -> bytes:
    """As the existing tool makes it: absolute names, a time with a fraction."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.mtime = mtime  # type: ignore[assignment]
            data = b"x" * 3000 if name.endswith("shim") else b""
            info.size, info.type = len(data), tarfile.REGTYPE if data else tarfile.DIRTYPE
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def in_pieces(data: bytes, size: int = 700) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


@pytest.mark.parametrize("size", [1, 512, 700, 1 << 20])
def test_recognises_the_layer_of_the_existing_tool(size: int) -> None:
    names = ("/input", "/output", "/tmp", "sagemaker-shim")
    assert is_shim_layer(in_pieces(upstream_layer(*names), size))
    assert not is_shim_layer(in_pieces(upstream_layer(*names[:3]), size))
    assert not is_shim_layer(in_pieces(upstream_layer(*names, "etc/passwd"), size))
    assert not is_shim_layer(in_pieces(b"no tar" * 1000, size))
    assert not is_shim_layer(in_pieces(upstream_layer(*names)[:700], size))


def test_gzip_of_a_blob_is_verified(binary: Path) -> None:
    plain = build_layer(binary, mode=0o500, media_type=MEDIA_TYPE, gzip=False).blob
    packed = gzip_blob(plain, "x")
    assert content(plain) == gzip.decompress(content(packed))
    assert content(packed) == b"".join(compressed([content(plain)]))
    assert content(plain) == b"".join(decompressed(in_pieces(content(packed), 3)))


DAMAGED = {
    "nothing": b"",
    "the magic alone": b"\x1f\x8b",
    "no gzip": b"no gzip",
    "cut off": gzip.compress(b"x" * 999)[:-4],
}


@pytest.mark.parametrize("body", DAMAGED.values(), ids=DAMAGED)
def test_damaged_gzip_is_noticed(body: bytes) -> None:
    with pytest.raises(StorageError, match="gzip"):
        list(decompressed(iter([body])))


def read_at(data: bytes):  # type: ignore[no-untyped-def]
    return lambda offset, size: data[offset : offset + size]


LONG = "d" * 90 + "/" + "n" * 150


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_python_writes(format_: int) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format_) as tar:
        for name in ("./a", "b/../c", LONG[:150], LONG[:97] + "é"):
            info = tarfile.TarInfo(name)
            info.size = 5
            tar.addfile(info, io.BytesIO(b"hello"))
        link = tarfile.TarInfo("x/y/layer.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "../../a"
        tar.addfile(link)
        link.name, link.linkname = "absolute", "/x/../a"
        tar.addfile(link)
        if format_ != tarfile.USTAR_FORMAT:
            tar.addfile(tarfile.TarInfo(LONG))
            link.name, link.linkname = "z/long", LONG
            tar.addfile(link)
    data = file.getvalue()
    members = [*read_members(read_at(data))]
    names = ["a", "c", LONG[:150], LONG[:97] + "é", "x/y/layer.tar", "absolute"]
    links = ["a", "a"]
    if format_ != tarfile.USTAR_FORMAT:
        names += [LONG, "z/long"]
        links += [f"z/{LONG}"]
    assert names == [member.name for member in members]
    assert links == [member.link for member in members if member.kind == tarfile.SYMTYPE]
    assert {b"hello"} == {data[m.offset : m.offset + m.size_bytes] for m in members[:4]}


def pax(record: bytes, kind: bytes = b"x") -> bytes:
    header = build_header("pax", size_bytes=len(record), kind=kind)
    return header + record + padding(len(record)) + build_header("a") + END


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"x" * 512, id="no tar"),
        pytest.param(build_header("a")[:511], id="cut off"),
        pytest.param(build_header("a").replace(b"a", b"b", 1), id="checksum"),
        pytest.param(build_header("a", size_bytes=1 << 20, kind=b"x"), id="long pax header"),
        pytest.param(build_header("a", size_bytes=1 << 62, kind=b"L"), id="huge GNU name"),
        pytest.param(pax(b"99 path=x\n"), id="pax record too long"),
        pytest.param(pax(b"0 path=x\n"), id="pax record of nothing"),
        pytest.param(pax(b"path=x\n"), id="pax record without length"),
        pytest.param(pax(b"11 size=-1\n"), id="negative size"),
        pytest.param(pax(b"10 size=x\n"), id="size of letters"),
        pytest.param(pax(b"1511 path=" + b"n" * 1500 + b"\n"), id="long name"),
        pytest.param(pax(b"1515 linkpath=" + b"n" * 1500 + b"\n"), id="long target"),
        pytest.param(build_header("a") * 20_001, id="many members"),
    ],
)
def test_hostile_headers_are_refused(data: bytes) -> None:
    with pytest.raises(StorageError):
        list(read_members(read_at(data)))


def test_a_name_that_ustar_cannot_hold_is_refused() -> None:
    assert build_header("n" * 100)
    with pytest.raises(StorageError, match="too long"):
        build_header("n" * 101)


def test_sizes_beyond_octal_digits_are_written_as_gnu_does() -> None:
    size = 20 << 30
    header = build_header("a", size_bytes=size)
    assert size == tarfile.TarInfo.frombuf(header, "utf-8", "strict").size
    assert size == next(read_members(read_at(header))).size_bytes
