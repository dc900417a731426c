"""Which processors the threads of a transfer use, and what nobody else notices of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.s3 import affinity
from shim.s3.buffers import borrow_buffer
from shim.s3.client import connect
from shim.s3.crew import Crew
from shim.s3.transfer import Transfers, Upload
from tests.fakes.s3_double import Object, S3Double
from tests.s3_clients import REGION, build_harness, download_to, running_double
from tests.s3_servers import ACCESS_KEY, SECRET_KEY

SHOW = [sys.executable, "-c", "import os; print(*sorted(os.sched_getaffinity(0)))"]

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")


@pytest.fixture
def double() -> Iterator[S3Double]:
    with running_double() as double:
        yield double


def here() -> set[int]:
    return os.sched_getaffinity(0)


def seen_by_child() -> set[int]:
    return set(map(int, subprocess.check_output(SHOW).split()))


def seen_in_crew(concurrency: int, number: int = 8) -> dict[int, set[int]]:
    """Return where each thread of a crew may run, by thread."""
    seen: dict[int, set[int]] = {}
    left = iter(range(number))

    def step() -> bool:
        seen[threading.get_ident()] = here()
        return next(left, None) is not None

    Crew(concurrency=concurrency, cancelled=lambda: False).run(step)
    return seen


def test_threads_of_a_crew_share_one_processor() -> None:
    before = here()
    masks = {frozenset(mask) for mask in seen_in_crew(4).values()}
    ((processor,),) = masks
    assert processor in before


def test_a_caller_that_works_itself_is_never_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = here()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert {threading.get_ident(): before} == seen_in_crew(4)
    assert {threading.get_ident(): before} == seen_in_crew(0)


@pytest.mark.parametrize("concurrency", [0, 1, 8])
def test_after_many_small_objects_the_caller_and_its_children_see_all_processors(
    double: S3Double, tmp_path: Path, concurrency: int
) -> None:
    before = here()
    source = tmp_path / "source"
    source.write_bytes(b"small")
    transfers = Transfers(
        build_harness(double.url).client, concurrency=concurrency, cancelled=lambda: False
    )
    transfers.upload_all(
        Upload(bucket="bucket", key=str(n), open=lambda: os.open(source, os.O_RDONLY))
        for n in range(40)
    )
    transfers.download_all(download_to(tmp_path / str(n), key=str(n)) for n in range(40))
    assert (before, before) == (here(), seen_by_child())


def test_a_thread_with_a_large_body_may_run_anywhere_until_its_next_step() -> None:
    before = here()
    seen = []
    left = iter([True, False])

    def step() -> bool:
        seen.append(here())
        with borrow_buffer():
            seen.append(here())
        return next(left)

    Crew(concurrency=1, cancelled=lambda: False).run(step)
    assert [1, len(before), 1, len(before)] == list(map(len, seen))


def test_a_thread_that_a_kept_one_starts_can_be_spread() -> None:
    before, seen = here(), []
    barrier = threading.Barrier(3)  # each thread is started by the one before it

    def step() -> bool:
        barrier.wait(10)
        affinity.spread()
        seen.append(here())
        return False

    Crew(concurrency=3, cancelled=lambda: False).run(step)
    assert [before] * 3 == seen


def test_a_credential_process_sees_all_processors(double: S3Double, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[default]\ncredential_process = helper\n")
    before, seen = here(), []

    def run_helper(argv: list[str], timeout_seconds: float) -> bytes:
        seen.append((threading.current_thread().name, seen_by_child()))
        keys = {"AccessKeyId": ACCESS_KEY, "SecretAccessKey": SECRET_KEY}
        return json.dumps({"Version": 1, **keys}).encode()

    store = connect(
        {
            "AWS_S3_ENDPOINT_URL": double.url,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_CONFIG_FILE": str(tmp_path / "config"),
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        },
        concurrency=4,
        max_connections=4,
        log=lambda level, message: None,
        run_helper=run_helper,
    )
    double.buckets["bucket"]["key"] = Object(body=b"x")
    transfers = Transfers(store, concurrency=4, cancelled=lambda: False)
    transfers.download_all([download_to(tmp_path / "file", key="key")])
    assert [("s3-transfer", before)] == seen


def test_a_system_that_allows_no_affinity_is_served_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(pid: int, processors: set[int]) -> None:
        raise PermissionError("seccomp")

    before = here()
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    assert all(before == mask for mask in seen_in_crew(4).values())


def test_a_processor_that_cannot_be_told_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    before = here()
    monkeypatch.setattr(affinity, "_current_processor", lambda: -1)
    assert all(before == mask for mask in seen_in_crew(4).values())
