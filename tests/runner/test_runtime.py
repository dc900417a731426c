"""What is made before the first task, and where."""

from __future__ import annotations

import io
import json
import os
import stat
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shim.contract.settings import Settings
from shim.log.log import Log
from shim.process.stopping import Stop
from shim.runner.runtime import Runtime
from shim.s3.directory import DirectoryStore
from tests.files.test_workspace import owned_link
from tests.runner.test_inputs import open_up, read_as_nobody
from tests.support import UNPRIVILEGED_UID, needs_root

P = "GRAND_CHALLENGE_COMPONENT_"
SetUp = Callable[..., bool]


class IdleMode:
    """A mode without a server."""

    def setup(self) -> None: ...

    def teardown(self) -> None: ...


class Opens:
    """A store that notes what is opened in it; barrier: what each of them waits at."""

    def __init__(self, path: Path) -> None:
        self.store, self.keys = DirectoryStore(path), list[str]()
        self.barrier = threading.Barrier(1)
        self.put = self.store.put

    def open(self, bucket: str, key: str) -> io.BufferedReader:
        self.keys.append(key)
        self.barrier.wait()
        return self.store.open(bucket, key)


@pytest.fixture
def opens(tmp_path: Path) -> Opens:
    return Opens(tmp_path / "store")


@pytest.fixture
def set_up(tmp_path: Path, opens: Opens) -> Iterator[SetUp]:
    """Return what runs a set-up with a model and a ground truth."""
    store: Any = opens
    for name in ("model", "truth"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            member = tarfile.TarInfo(f"{name}/file")
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
        store.put("b", f"{name}.tar", buffer.getvalue())

    def run(**variables: object) -> bool:
        environ = {
            "MODEL": "s3://b/model.tar",
            "MODEL_DEST": tmp_path / "opt/ml/model",
            "GROUND_TRUTH": "s3://b/truth.tar",
            "GROUND_TRUTH_DEST": tmp_path / "opt/ml/input/data/ground_truth",
            "WRITABLE_DIRECTORIES": "",
            "POST_CLEAN_DIRECTORIES": "",
            "RUNTIME_OUTPUT_BUCKET_NAME": "b",
            "RUNTIME_OUTPUT_PREFIX": "runtime",
            **variables,
        }
        settings = Settings.from_environ({P + name: str(value) for name, value in environ.items()})
        mode: Any = IdleMode()
        with (tmp_path / "log").open("ab") as stream:
            log = Log(stdout_fd=stream.fileno(), stderr_fd=stream.fileno())
            runtime = Runtime(
                settings=settings, connect=lambda: store, mode=mode, log=log, stop=Stop()
            )
            return runtime.setup()

    yield run


def message(root: Path) -> str:
    result = root / "store/b/runtime/.sagemaker_shim/runtime_setup_result.json"
    text: str = json.loads(result.read_text())["user_safe_error_message"]
    return text


@needs_root
def test_what_is_unpacked_is_readable_for_the_user_whatever_the_umask(
    tmp_path: Path, set_up: SetUp
) -> None:
    open_up(tmp_path)
    umask = os.umask(0o077)
    try:
        assert set_up(USER=UNPRIVILEGED_UID, WRITABLE_DIRECTORIES=tmp_path / "opt/ml/checkpoints")
    finally:
        os.umask(umask)
    assert {
        "ml/model/model/file": "model",
        "ml/input/data/ground_truth/truth/file": "truth",
    } == read_as_nobody(tmp_path / "opt")
    ways = ("opt", "opt/ml", "opt/ml/model", "opt/ml/input", "opt/ml/input/data")
    assert {0o755} == {stat.S_IMODE((tmp_path / way).stat().st_mode) for way in ways}
    assert 0o777 == stat.S_IMODE((tmp_path / "opt/ml/checkpoints").stat().st_mode)


@needs_root
@pytest.mark.parametrize("place", ["opt", "opt/ml", "opt/ml/model"])
def test_nothing_is_unpacked_behind_a_link_of_the_users(
    tmp_path: Path, set_up: SetUp, place: str
) -> None:
    """In a container that is started again, what the user made is there."""
    (outside := tmp_path / "outside").mkdir()
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    owned_link(tmp_path / place, outside, UNPRIVILEGED_UID)
    assert not set_up(WRITABLE_DIRECTORIES=f"{tmp_path}/opt/ml/model")
    assert f"Could not set up model: {tmp_path}/opt/ml/model cannot be used: Not a directory" == (
        message(tmp_path)
    )
    assert [] == os.listdir(outside)
    assert 0o755 == stat.S_IMODE(outside.stat().st_mode)


def test_links_that_the_image_has_are_followed(tmp_path: Path, set_up: SetUp) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "opt").symlink_to("data")
    (tmp_path / "data/ml").mkdir()
    (tmp_path / "data/ml/model").symlink_to(tmp_path / "data/models")
    assert set_up()
    assert "model" == (tmp_path / "data/models/model/file").read_text()
    assert "truth" == (tmp_path / "data/ml/input/data/ground_truth/truth/file").read_text()


def test_model_and_ground_truth_come_at_once(tmp_path: Path, set_up: SetUp, opens: Opens) -> None:
    """Each waits for the other one here."""
    opens.barrier = threading.Barrier(2, timeout=10)
    assert set_up()


@pytest.mark.parametrize("inner", ["MODEL", "GROUND_TRUTH"])
def test_what_lies_in_the_other_comes_later(
    tmp_path: Path, set_up: SetUp, opens: Opens, inner: str
) -> None:
    outer = {"MODEL": "GROUND_TRUTH", "GROUND_TRUTH": "MODEL"}[inner]
    (tmp_path / "link").symlink_to("opt")
    assert set_up(**{
        f"{outer}_DEST": tmp_path / "opt/all",
        f"{inner}_DEST": tmp_path / "link/all/x",
    })  # fmt: skip
    assert ["model.tar", "truth.tar"] == opens.keys
    assert (tmp_path / "opt/all/x").is_dir()


@pytest.mark.parametrize("broken", [["model"], ["truth"], ["model", "truth"]])
def test_the_first_failure_is_told_and_ends_the_other(
    tmp_path: Path, set_up: SetUp, opens: Opens, broken: list[str]
) -> None:
    for name in broken:
        opens.store.put("b", f"{name}.tar", b"\x1f\x8bdamaged")
    if len(broken) == 2:
        opens.barrier = threading.Barrier(2, timeout=10)
    assert not set_up()
    name = {"model": "model", "truth": "ground truth"}[broken[0]]
    assert f"Could not set up {name}: Tarfile could not be extracted" == message(tmp_path)
