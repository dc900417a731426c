"""The store over directories, as strict about its bounds as S3 is about rights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from shim.aws.endpoints import EndpointUnresolved
from shim.http.errors import RemoteError, SettingInvalid
from shim.http.stream import unchecked
from shim.s3.client import connect
from shim.s3.crew import Crew
from shim.s3.directory import DirectoryStore
from shim.s3.errors import ServiceError
from shim.s3.store import ObjectSummary
from shim.s3.transfer import Transfers, Upload
from tests.s3_clients import Stopped, download_to, stopping
from tests.support import UNPRIVILEGED_UID, needs_root

CREW = Crew(concurrency=0, check=unchecked)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "root")


@contextmanager
def open_directory(path: Path) -> Iterator[int]:
    directory = os.open(path, os.O_PATH)
    yield directory
    os.close(directory)


def connect_to(environ: dict[str, str]) -> Any:
    return connect(
        environ,
        concurrency=1,
        max_connections=1,
        log=lambda level, message: None,
        run_helper=lambda argv, seconds: b"",
    )


@pytest.mark.parametrize(
    "variable", ["AWS_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"]
)
def test_a_file_url_selects_the_directory(tmp_path: Path, variable: str) -> None:
    (tmp_path / "with space").mkdir()
    # A profile that is missing does not matter: nothing is asked of AWS.
    for start in ("file://", "file:", "file://localhost", "file:///"):
        url = f"{start}{tmp_path}/with%20space"
        store = connect_to({variable: url, "AWS_PROFILE": "missing"})
        store.put("bucket", "a/b", start.encode())
        found = (tmp_path / "with space" / "bucket" / "a" / "b").read_bytes()
        assert start.encode() == found


@pytest.mark.parametrize(
    "url", ["file:", "file://", "file:dir", "file://user:hidden@h/d", "file://[hidden"]
)
def test_a_file_url_that_names_no_directory_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(SettingInvalid) as refused:
        connect_to({"AWS_ENDPOINT_URL": url})
    expected = "AWS_ENDPOINT_URL: expected file:///directory, found a text of"
    assert f"{expected} {len(url)} characters" == str(refused.value)


@pytest.mark.parametrize("what", ["nothing", "a file"])
def test_a_directory_that_is_none_is_named_and_not_made(tmp_path: Path, what: str) -> None:
    url = f"file://{tmp_path}/root"
    if what == "a file":
        (tmp_path / "root").touch()
    before = os.listdir(tmp_path)
    with pytest.raises(EndpointUnresolved, match=f"^The endpoint {url} is not a directory"):
        connect_to({"AWS_S3_ENDPOINT_URL": url})
    assert before == os.listdir(tmp_path)


def test_what_is_put_can_be_read_in_every_way(store: DirectoryStore, tmp_path: Path) -> None:
    store.put("bucket", "/a//b c", b"body", metadata={"signature_hmac_sha256": "00"})
    assert b"body" == store.get("bucket", "/a//b c", max_bytes=4)
    head = store.head("bucket", "/a//b c")
    assert (4, {"signature_hmac_sha256": "00"}) == (head.size, head.metadata)
    with store.open("bucket", "/a//b c") as stream:
        assert b"body" == stream.read()
    with open_directory(tmp_path) as directory:
        store.download("bucket", "/a//b c", directory, "copy", crew=CREW)
    assert b"body" == (tmp_path / "copy").read_bytes()


def test_metadata_of_an_object_that_was_replaced_are_gone(store: DirectoryStore) -> None:
    store.put("bucket", "key", b"", metadata={"a": "b"})
    store.put("bucket", "key", b"other")
    assert {} == store.head("bucket", "key").metadata


def test_transfers_work_as_with_s3(store: DirectoryStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3_000_000))
    transfers = Transfers(store, concurrency=2, check=unchecked)
    transfers.upload_all(
        Upload(bucket="bucket", key=f"p/{n}", open=lambda: os.open(source, os.O_RDONLY))
        for n in range(3)
    )
    transfers.download_all(
        download_to(tmp_path / item.key[2:], key=item.key) for item in store.list("bucket", "p/")
    )
    assert {source.read_bytes()} == {(tmp_path / str(n)).read_bytes() for n in range(3)}


def test_listings_have_the_order_of_keys_and_the_prefix_as_asked(store: DirectoryStore) -> None:
    for key in ("p/b", "p/a/z", "p/a.txt", "p/é", "q/a", "pa"):
        store.put("bucket", key, b"x", metadata={"a": "b"})
    keys = [summary.key for summary in store.list("bucket", "p/")]
    assert ["p/a.txt", "p/a/z", "p/b", "p/é"] == keys
    assert ["p/a.txt", "p/a/z"] == [summary.key for summary in store.list("bucket", "p/a")]
    assert ["/p/b"] == [summary.key for summary in store.list("bucket", "/p/b")]
    assert 6 == len(list(store.list("bucket", "")))
    assert [] == list(store.list("bucket", "no/"))
    assert [] == list(store.list("nobucket", ""))


def test_an_object_that_is_too_long_is_refused(store: DirectoryStore) -> None:
    store.put("bucket", "key", b"12345")
    with pytest.raises(RemoteError, match="longer than 4 bytes"):
        store.get("bucket", "key", max_bytes=4)


CALLS: dict[str, Callable[[DirectoryStore, str], object]] = {
    "get": lambda store, key: store.get("bucket", key, max_bytes=1),
    "head": lambda store, key: store.head("bucket", key),
    "open": lambda store, key: store.open("bucket", key),
    "download": lambda store, key: store.download("bucket", key, -1, "file", crew=CREW),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("key", ["no", "directory", "file/below"])
def test_a_missing_object_is_told_as_by_s3(
    store: DirectoryStore, call: Callable[[DirectoryStore, str], object], key: str
) -> None:
    store.put("bucket", "file", b"x")
    store.put("bucket", "directory/file", b"x")
    with pytest.raises(ServiceError, match=r"^An error occurred \(404\) when calling the HeadObj"):
        call(store, key)


OUTSIDE = ["..", "../other/key", "a/../../../etc/passwd", "a/..", "nul\0", "link/passwd"]


@pytest.mark.parametrize("key", OUTSIDE)
@pytest.mark.parametrize("bucket", ["bucket"])
def test_keys_cannot_leave_their_bucket(
    store: DirectoryStore, tmp_path: Path, bucket: str, key: str
) -> None:
    store.put(bucket, "file", b"x")
    (tmp_path / "root" / "bucket" / "link").symlink_to("/etc")
    for call in (
        lambda: store.get(bucket, key, max_bytes=1),
        lambda: store.put(bucket, key, b"", metadata={"a": "b"}),
        lambda: list(store.list(bucket, f"{key}/")),
    ):
        with pytest.raises(ServiceError, match="InvalidArgument|HeadObject"):
            call()
    assert not (tmp_path / "root" / ".metadata").exists()


@pytest.mark.parametrize("bucket", ["..", ".", ".metadata"])
def test_what_is_no_bucket_is_none(store: DirectoryStore, bucket: str) -> None:
    with pytest.raises(ServiceError, match="NoSuchBucket"):
        store.put(bucket, "key", b"")


def test_a_failed_download_leaves_nothing(store: DirectoryStore, tmp_path: Path) -> None:
    store.put("bucket", "key", b"x")
    with open_directory(tmp_path) as directory:
        with pytest.raises(RemoteError, match="directory"):
            store.download("bucket", "key", directory, "root", crew=CREW)
    assert ["root"] == os.listdir(tmp_path)


def test_a_mapping_gives_each_bucket_its_directory(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_bytes(b"body")
    store = DirectoryStore.from_buckets({"input": tmp_path / "in", "output": tmp_path / "out"})
    assert [ObjectSummary(key="file", size=4)] == list(store.list("input", ""))
    store.put("output", "/a/b", b"result", metadata={"signature_hmac_sha256": "00"})
    assert b"result" == (tmp_path / "out" / "a" / "b").read_bytes()
    assert {} == store.head("output", "/a/b").metadata
    assert {"in", "out"} == set(os.listdir(tmp_path))
    with pytest.raises(ServiceError, match="NoSuchBucket"):
        store.put("other", "key", b"")


@pytest.fixture
def vast(tmp_path: Path) -> Iterator[Path]:
    """Yield a file of a tebibyte that holds nothing."""
    with TemporaryDirectory(dir="/dev/shm") as directory:
        path = Path(directory) / "vast"
        path.touch()
        os.truncate(path, 1 << 40)
        yield path


def test_a_stop_ends_the_copy_of_a_vast_file(
    store: DirectoryStore, vast: Path, tmp_path: Path
) -> None:
    """Nothing is left of it, in either direction."""
    calls = iter(range(1000))
    transfers = Transfers(store, concurrency=1, check=stopping(lambda: next(calls) > 20))
    upload = Upload(bucket="bucket", key="d/key", open=lambda: os.open(vast, os.O_RDONLY))
    with pytest.raises(Stopped):
        transfers.upload_all([upload])
    assert [] == os.listdir(tmp_path / "root/bucket/d")
    store = DirectoryStore.from_buckets({"bucket": vast.parent})
    calls = iter(range(1000))
    transfers = Transfers(store, concurrency=1, check=stopping(lambda: next(calls) > 20))
    with pytest.raises(Stopped):
        transfers.download_all([download_to(tmp_path / "copy", key="vast")])
    assert ["root"] == os.listdir(tmp_path)


@pytest.mark.parametrize("umask", [0o077, 0o022])
def test_downloads_are_for_everybody_and_objects_as_the_umask_says(
    store: DirectoryStore, tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        store.put("bucket", "d/key", b"x")
        with open_directory(tmp_path) as directory:
            store.download("bucket", "d/key", directory, "copy", crew=CREW)
    finally:
        os.umask(before)
    modes = [
        oct(p.stat().st_mode & 0o777) for p in (tmp_path / "copy", tmp_path / "root/bucket/d/key")
    ]
    assert [oct(0o644), oct(0o666 & ~umask)] == modes


def test_a_place_is_written_to_without_a_trace(store: DirectoryStore, tmp_path: Path) -> None:
    store.put("bucket", "kept/x", b"")
    before = sorted(tmp_path.rglob("*"))
    for bucket, prefix in (("bucket", "kept/"), ("bucket", "new/deep/"), ("new", "a/")):
        store.head_bucket(bucket)
        store.probe(bucket, prefix)
    assert before == sorted(tmp_path.rglob("*"))


@pytest.mark.parametrize("prefix", ["kept/x/", "kept/x/y/", "../out/"])
def test_a_place_that_cannot_be_written_to_is_told(
    store: DirectoryStore, tmp_path: Path, prefix: str
) -> None:
    store.put("bucket", "kept/x", b"")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RemoteError):
        store.probe("bucket", prefix)
    assert before == sorted(tmp_path.rglob("*"))


def test_a_bucket_that_is_a_file_is_none(store: DirectoryStore, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/bucket").touch()
    with pytest.raises(ServiceError, match="HeadBucket"):
        store.head_bucket("bucket")


@needs_root
def test_a_directory_that_cannot_be_listed_is_written_to() -> None:
    with TemporaryDirectory(dir="/dev/shm") as directory:  # where everybody may search
        os.chmod(directory, 0o300)
        os.chown(directory, UNPRIVILEGED_UID, UNPRIVILEGED_UID)
        store = DirectoryStore.from_buckets({"bucket": Path(directory)})
        os.seteuid(UNPRIVILEGED_UID)
        try:
            store.put("bucket", "key", b"x")
        finally:
            os.seteuid(0)
        assert b"x" == store.get("bucket", "key", max_bytes=9)
