"""One task against fakes: whatever goes wrong, a signed result is left."""

from __future__ import annotations

import io
import json
import os
import signal
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from shim.contract.errors import TaskStopped, UserSafeError
from shim.contract.settings import Settings
from shim.contract.tasks import SIGNATURE_METADATA, InferenceIO, InferenceTask, result_key, sign
from shim.files.workspace import Workspace
from shim.http.errors import RemoteError
from shim.log.log import Log
from shim.process.stopping import STOPPED_MESSAGE, Stop
from shim.runner.modes import Outcome
from shim.runner.results import UNEXPECTED_MESSAGE
from shim.runner.task import (
    DOWNLOAD_MESSAGE,
    UPLOAD_MESSAGE,
    PlatformFailure,
    Runner,
)
from shim.s3.directory import DirectoryStore
from shim.s3.errors import ServiceError

KEY = b"key"


@dataclass
class FakeMode:
    """A mode whose run is a function of the test's."""

    act: Callable[[], Outcome | None] = lambda: None
    ran: list[str] = field(default_factory=list)
    alive: bool = True

    def setup(self) -> None: ...

    def teardown(self) -> None: ...

    def is_alive(self) -> bool:
        return self.alive

    def run(self, task: InferenceTask) -> Outcome:
        self.ran.append(task.pk)
        return self.act() or Outcome(return_code=0, exec_duration=timedelta(seconds=1))


class BrokenStore(DirectoryStore):
    """A store that fails in one method, but for results."""

    broken = ""

    def download(self, *arguments: Any, **options: Any) -> None:
        self._break("download")
        super().download(*arguments, **options)

    def upload(self, *arguments: Any, **options: Any) -> None:
        self._break("upload")
        super().upload(*arguments, **options)

    def put(self, *arguments: Any, **options: Any) -> None:
        self._break("put")
        super().put(*arguments, **options)

    def list(self, bucket: str, prefix: str) -> Iterator[Any]:
        self._break("list")
        return super().list(bucket, prefix)

    def _break(self, method: str) -> None:
        if method == self.broken:
            raise RemoteError(f"the {method} broke")


@dataclass
class Bench:
    """A runner, what it works with, and the lines that it wrote."""

    build_runner: Callable[..., Runner]
    runner: Runner
    mode: FakeMode
    store: BrokenStore
    stop: Stop
    root: Path
    log_path: Path

    def task(self, pk: str = "t", **more: Any) -> InferenceTask:
        given: dict[str, Any] = {
            "pk": pk,
            "inputs": (InferenceIO(relative_path="a", bucket_name="b", bucket_key="in/a"),),
            "output_bucket_name": "b",
            "output_prefix": f"out/{pk}/",
        }
        return InferenceTask(**given | more)

    def result(self, pk: str = "t") -> Mapping[str, Any]:
        key = result_key(f"out/{pk}/")
        body = self.store.get("b", key, max_bytes=1 << 20)
        assert sign(body, KEY) == self.store.head("b", key).metadata[SIGNATURE_METADATA]
        result: Mapping[str, Any] = json.loads(body)
        return result

    def lines(self, **wanted: object) -> list[str]:
        lines = map(json.loads, self.log_path.read_text().splitlines())
        return [
            line["log"]
            for line in lines
            if all(line[name] == value for name, value in wanted.items())
        ]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    store = BrokenStore(tmp_path / "store")
    store.put("b", "in/a", b"content")
    settings = Settings.from_environ(
        {
            "GRAND_CHALLENGE_COMPONENT_SIGNING_KEY_HEX": KEY.hex(),
            "GRAND_CHALLENGE_COMPONENT_OUTPUT_PATH": str(tmp_path / "output"),
        }
    )
    mode, stop = FakeMode(), Stop()
    with (tmp_path / "log").open("wb") as stream:
        log = Log(stdout_fd=stream.fileno(), stderr_fd=stream.fileno())
        workspace = Workspace(
            input_path=tmp_path / "input",
            output_path=tmp_path / "output",
            linked_input_parent=tmp_path / "linked",
            log=log,
        )
        build_runner = partial(
            Runner,
            settings=settings,
            connect=lambda: store,
            mode=mode,
            workspace=workspace,
            log=log,
            stop=stop,
        )
        yield Bench(build_runner, build_runner(), mode, store, stop, tmp_path, tmp_path / "log")


def raising(error: Exception) -> Callable[[], Outcome]:
    def act() -> Outcome:
        raise error

    return act


def test_inputs_are_there_and_outputs_are_left_sorted(bench: Bench) -> None:
    def act() -> None:
        assert "content" == (bench.root / "input/a").read_text()
        for name in ("c", "b", "d"):
            (bench.root / "output" / name).touch()

    bench.mode.act = act
    result = bench.runner.run_task(bench.task())
    assert ["b", "c", "d"] == [output.relative_path for output in result.outputs]
    assert json.loads(result.to_json()) == bench.result()
    assert [] == list((bench.root / "output").iterdir())


def test_outputs_of_a_failed_run_are_not_uploaded(bench: Bench) -> None:
    def act() -> Outcome:
        (bench.root / "output/half").touch()
        return Outcome(return_code=3, last_stderr_lines=("oops\n",))

    bench.mode.act = act
    bench.runner.run_task(bench.task())
    assert (3, [], ["oops\n"]) == (
        bench.result()["return_code"],
        bench.result()["outputs"],
        bench.result()["user_process_last_stderr_lines"],
    )
    assert bench.runner.is_healthy


def test_what_the_author_did_wrong_is_told_to_him(bench: Bench) -> None:
    bench.mode.act = raising(UserSafeError("No such command"))
    bench.runner.run_task(bench.task())
    assert (1, "No such command") == (
        bench.result()["return_code"],
        bench.result()["user_safe_error_message"],
    )
    assert ["No such command"] == bench.lines(level="ERROR", internal=False, task="t")


def test_an_exception_nobody_foresaw_leaves_a_result_and_a_traceback(bench: Bench) -> None:
    bench.mode.act = raising(RuntimeError("secret detail"))
    with pytest.raises(PlatformFailure):
        bench.runner.run_task(bench.task())
    assert (1, UNEXPECTED_MESSAGE) == (
        bench.result()["return_code"],
        bench.result()["user_safe_error_message"],
    )
    assert any("secret detail" in line for line in bench.lines(internal=True, level="ERROR"))
    assert not any("secret detail" in line for line in bench.lines(internal=False))


@pytest.mark.parametrize(
    ("broken", "message", "ran"),
    [("download", DOWNLOAD_MESSAGE, []), ("upload", UPLOAD_MESSAGE, ["t"])],
)
def test_a_bucket_that_fails_is_the_platforms_failure(
    bench: Bench, broken: str, message: str, ran: list[str]
) -> None:
    bench.store.broken = broken
    bench.mode.act = lambda: (bench.root / "output/x").touch()
    with pytest.raises(PlatformFailure, match=message):
        bench.runner.run_task(bench.task())
    assert (1, message, []) == (
        bench.result()["return_code"],
        bench.result()["user_safe_error_message"],
        bench.result()["outputs"],
    )
    assert ran == bench.mode.ran
    assert ("PT1S" if ran else None) == bench.result()["exec_duration"]
    assert any(f"the {broken} broke" in line for line in bench.lines(internal=True))


def test_a_result_that_cannot_be_left_is_not_passed_over(bench: Bench) -> None:
    bench.store.broken = "put"
    with pytest.raises(RemoteError):
        bench.runner.run_task(bench.task())


def test_a_stop_leaves_a_result_and_is_passed_on(bench: Bench) -> None:
    bench.mode.act = lambda: Outcome(return_code=-15, stopped=True)
    with pytest.raises(TaskStopped):
        bench.runner.run_tasks([bench.task("1"), bench.task("2")])
    assert (1, STOPPED_MESSAGE) == (
        bench.result("1")["return_code"],
        bench.result("1")["user_safe_error_message"],
    )
    assert ["1"] == bench.mode.ran


def test_no_task_begins_after_a_stop(bench: Bench) -> None:
    bench.stop.request(15)
    with pytest.raises(TaskStopped):
        bench.runner.run_tasks([bench.task()])
    assert [] == bench.mode.ran
    assert not (bench.root / "store/b/out").exists()


def test_the_first_failure_stops_the_list(bench: Bench) -> None:
    bench.mode.act = lambda: Outcome(return_code=int(len(bench.mode.ran) == 2))
    assert not bench.runner.run_tasks([bench.task(pk) for pk in "123"])
    assert ["1", "2"] == bench.mode.ran
    assert ["Stopping due to failure of task 2"] == bench.lines(level="ERROR", internal=True)


@pytest.mark.parametrize(
    ("outcome", "healthy"),
    [(Outcome(return_code=1), True), (Outcome(return_code=1, is_healthy=False), False)],
    ids=["failed", "timed out"],
)
def test_health_follows_the_outcome(bench: Bench, outcome: Outcome, healthy: bool) -> None:
    bench.mode.act = lambda: outcome
    bench.runner.run_task(bench.task())
    assert healthy == bench.runner.is_healthy


def test_a_mode_that_died_is_unhealthy(bench: Bench) -> None:
    assert bench.runner.is_healthy
    bench.mode.alive = False
    assert not bench.runner.is_healthy


def test_a_reset_that_fails_is_unhealthy_and_leaves_a_result(bench: Bench) -> None:
    (bench.root / "output").touch()
    bench.runner.run_task(bench.task())
    assert not bench.runner.is_healthy
    assert [] == bench.mode.ran
    assert "could not be reset" in bench.result()["user_safe_error_message"]


def test_a_stop_ends_the_unpacking_of_an_archive(bench: Bench) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", bytes(1 << 20))
    bench.store.put("b", "in/z.zip", buffer.getvalue())

    inputs = (
        InferenceIO(relative_path="z", bucket_name="b", bucket_key="in/z.zip", decompress=True),
    )
    checks: list[None] = []

    def stop_while_unpacking() -> None:
        checks.append(None)
        if len(checks) == 3:
            bench.stop.request(signal.SIGTERM)
        Stop.check(bench.stop)

    bench.stop.check = stop_while_unpacking  # type: ignore[method-assign]
    with pytest.raises(TaskStopped):
        bench.runner.run_task(bench.task(inputs=inputs))
    assert STOPPED_MESSAGE == bench.result()["user_safe_error_message"]
    assert [] == bench.mode.ran


def test_a_prefix_is_everything_below_it_without_its_markers(bench: Bench) -> None:
    for key in ("p/", "p/a", "p/d/", "p/d/b"):
        if not key.endswith("/"):
            bench.store.put("b", key, b"x")
    seen: list[str] = []

    def act() -> None:
        root = bench.root / "input"
        seen.extend(sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()))

    bench.mode.act = act
    inputs = (InferenceIO(relative_path=".", bucket_name="b", bucket_key="p/"),)
    bench.runner.run_task(bench.task(inputs=inputs))
    assert ["a", "d/b"] == seen


def warnings(bench: Bench) -> list[str]:
    return bench.lines(level="WARNING", internal=False, task="t")


def test_a_task_with_inputs_and_outputs_gives_no_reason_to_warn(bench: Bench) -> None:
    bench.mode.act = lambda: (bench.root / "output/x").touch()
    bench.runner.run_task(bench.task())
    assert [] == warnings(bench)


def test_a_task_without_inputs_and_outputs_is_told_once_each(bench: Bench) -> None:
    inputs = (InferenceIO(relative_path=".", bucket_name="b", bucket_key="none/"),)
    bench.runner.run_task(bench.task(inputs=inputs))
    assert ["The task has no inputs", "The command succeeded and wrote no output"] == (
        warnings(bench)
    )


def test_no_output_of_a_failed_run_is_missed(bench: Bench) -> None:
    bench.mode.act = lambda: Outcome(return_code=1)
    bench.runner.run_task(bench.task())
    assert [] == warnings(bench)


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
def test_nothing_of_the_users_takes_the_name_of_results(bench: Bench, kind: str) -> None:
    """The bucket is a directory, and one task's prefix lies below another's."""

    def act() -> None:
        for place in ("", "n/"):
            path = bench.root / "output" / place / ".sagemaker_shim"
            path.parent.mkdir(exist_ok=True)
            if kind == "directory":
                path.mkdir()
                (path / "inference_result.json").write_text("forged")
            elif kind == "link":
                path.symlink_to("../x")
            else:
                path.write_text("in the way")
        (bench.root / "output/x").touch()

    bench.runner.run_task(bench.task(output_prefix="out/t/n/"))
    neighbour = bench.root / "store/b/out/t/n/.sagemaker_shim/inference_result.json"
    before = neighbour.read_bytes()
    bench.mode.act = act
    bench.runner.run_task(bench.task())
    assert (0, ["x"]) == (
        bench.result()["return_code"],
        [output["relative_path"] for output in bench.result()["outputs"]],
    )
    assert before == neighbour.read_bytes()
    skipped = {line.partition(": ")[0] for line in warnings(bench) if "Skipping" in line}
    assert {
        "Skipping the output '.sagemaker_shim'",
        "Skipping the output 'n/.sagemaker_shim'",
    } == skipped


def test_two_sources_of_one_file_are_the_authors_failure(bench: Bench) -> None:
    bench.store.put("b", "p/a", b"other")
    inputs = (
        InferenceIO(relative_path="a", bucket_name="b", bucket_key="in/a"),
        InferenceIO(relative_path=".", bucket_name="b", bucket_key="p/"),
    )
    bench.runner.run_task(bench.task(inputs=inputs))
    message = "Two inputs need one place, 'a': s3://b/in/a and s3://b/p/a"
    assert (1, message) == (
        bench.result()["return_code"],
        bench.result()["user_safe_error_message"],
    )
    assert [] == bench.mode.ran


@pytest.mark.parametrize("change", ["grow", "shrink", "touch"])
def test_an_output_that_changes_while_it_is_uploaded_is_the_authors_failure(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    file = bench.root / "output/d/file"
    real_preadv = os.preadv

    def preadv(*arguments: Any) -> int:
        monkeypatch.undo()
        os.truncate(file, {"grow": 4 << 20, "shrink": 1 << 20, "touch": 2 << 20}[change])
        return real_preadv(*arguments)

    def act() -> None:
        file.parent.mkdir()
        file.write_bytes(bytes(2 << 20))
        monkeypatch.setattr(os, "preadv", preadv)

    bench.mode.act = act
    bench.runner.run_task(bench.task())
    assert (1, "The file for 'out/t/d/file' changed while it was uploaded", []) == (
        bench.result()["return_code"],
        bench.result()["user_safe_error_message"],
        bench.result()["outputs"],
    )
    assert not (bench.root / "store/b/out/t/d/file").exists()


REFUSALS = ["InvalidObjectName", "InvalidURI", "KeyTooLongError", "XMinioInvalidObjectName"]


@pytest.mark.parametrize("code", [*REFUSALS, "AccessDenied"])
def test_a_key_that_the_store_refuses_costs_this_output_alone(bench: Bench, code: str) -> None:
    class Picky(BrokenStore):
        def upload(self, bucket: str, key: str, *arguments: Any, **options: Any) -> None:
            if key.endswith("\x01"):
                raise ServiceError(
                    operation="PutObject",
                    bucket=bucket,
                    key=key,
                    status=400,
                    code=code,
                    message="No",
                    headers={},
                )
            super().upload(bucket, key, *arguments, **options)

    bench.store.__class__ = Picky

    def act() -> None:
        for name in ("a", "odd\x01", "z"):
            (bench.root / "output" / name).touch()

    bench.mode.act = act
    if code not in REFUSALS:
        with pytest.raises(PlatformFailure, match=UPLOAD_MESSAGE):
            bench.runner.run_task(bench.task())
        return
    result = bench.runner.run_task(bench.task())
    assert (0, ["a", "z"]) == (result.return_code, [item.relative_path for item in result.outputs])
    (warning,) = warnings(bench)
    assert warning.startswith("Skipping the output 'odd\\x01': ") and code in warning


def test_an_output_that_is_larger_than_an_object_can_be_is_skipped(
    bench: Bench,
) -> None:
    def act() -> None:
        for name, size in (("vast", 60 << 40), ("small", 1)):
            with (bench.root / "output" / name).open("wb") as file:
                file.truncate(size)

    bench.mode.act = act
    with TemporaryDirectory(dir="/dev/shm") as directory:  # tmpfs, where files may be vast
        (bench.root / "output").symlink_to(directory)
        result = bench.runner.run_task(bench.task())
    assert ["small"] == [item.relative_path for item in result.outputs]
    assert [
        f"Skipping the output 'vast': it has {60 << 40} bytes, more than S3 can hold"
    ] == warnings(bench)


@pytest.mark.parametrize("keep", [True, False])
def test_outputs_that_could_not_be_uploaded_are_kept_where_that_is_wanted(
    bench: Bench, keep: bool
) -> None:
    bench.store.broken = "upload"
    bench.mode.act = lambda: (bench.root / "output/x").touch()
    with pytest.raises(PlatformFailure):
        bench.build_runner(keep_outputs_on_failure=keep).run_task(bench.task())
    assert keep == (bench.root / "output/x").exists()
    place = f"What the command wrote is left in {bench.root}/output"
    assert ([place] if keep else []) == warnings(bench)
    assert not list((bench.root / "input").iterdir())


def test_outputs_of_a_command_that_failed_are_not_kept(bench: Bench) -> None:
    def act() -> Outcome:
        (bench.root / "output/x").touch()
        return Outcome(return_code=1)

    bench.mode.act = act
    bench.build_runner(keep_outputs_on_failure=True).run_task(bench.task())
    assert not list((bench.root / "output").iterdir())


def test_a_key_that_leads_out_of_the_input_is_refused(bench: Bench) -> None:
    class Listing(BrokenStore):
        def list(self, bucket: str, prefix: str) -> Iterator[Any]:
            from shim.s3.store import ObjectSummary

            yield ObjectSummary(key="p/../../evil", size=1)

    bench.store.__class__ = Listing
    inputs = (InferenceIO(relative_path=".", bucket_name="b", bucket_key="p/"),)
    with pytest.raises(PlatformFailure):
        bench.runner.run_task(bench.task(inputs=inputs))
    assert [] == bench.mode.ran
    assert any("p/../../evil" in line for line in bench.lines(internal=True))
