"""The invoke method: the image's command is a server, started once and asked for each task."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest

from shim.contract.durations import parse_duration
from tests.e2e.platform import ROOT, Finished, Platform, finish
from tests.e2e.test_serve import serving
from tests.serve.test_service import PYTHON
from tests.support import UNPRIVILEGED_UID, free_port, needs_root, poll

START_MESSAGE = "Failed to start the algorithm container's inference server"


def serve_tasks(platform: Platform, *manners: str, python: str = sys.executable) -> int:
    """Make the image's command a server with some manners; return its port."""
    port = free_port()
    platform.set(
        API_METHOD="invoke",
        USER_WEBSERVER_PORT=port,
        START_AND_HEALTH_TIMEOUT_SECONDS=20,
        HEALTH_CHECK_CALL_TIMEOUT_SECONDS=1,
    )
    script = str(ROOT / "tests/data/inference_server.py")
    platform.command(python, script, str(port), str(platform.root / "output"), *manners)
    return port


def external_errors(job: Finished) -> str:
    return "\n".join(job.texts(level="ERROR", internal=False))


def has_child(port: int) -> bool:
    """Tell whether the process lives that a server with the manner `child` leaves behind."""
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"sleep\x00600.{port}\x00".encode() == (directory / "cmdline").read_bytes():
                return True
    return False


def test_a_server_is_started_once_for_all_tasks(platform: Platform) -> None:
    serve_tasks(platform)
    job = platform.invoke(platform.task("1"), platform.task("2"))
    assert 0 == job.code, job.stderr
    assert (b"1", b"2") == (platform.get("out/1/n"), platform.get("out/2/n"))
    result = platform.result("2")
    assert (0, None, ["err 2\n"]) == (
        result["return_code"],
        result["exec_duration"],
        result["user_process_last_stderr_lines"],
    )
    assert result["invoke_duration"].startswith("PT0.")
    assert ["started"] == job.texts(internal=False, task=None, source="stdout")
    assert ["out 1"] == job.texts(internal=False, task="1", source="stdout")
    assert ["out 2"] == job.texts(internal=False, task="2", source="stdout")


def test_a_fast_server_is_not_waited_for(platform: Platform) -> None:
    serve_tasks(platform)
    began = time.monotonic()
    assert 0 == platform.invoke(platform.task()).code
    assert time.monotonic() - began < 10


def test_a_slow_server_is_waited_for(platform: Platform) -> None:
    serve_tasks(platform, "slow")
    platform.invoke(platform.task())
    assert 0 == platform.result()["return_code"]


def test_all_of_stderr_is_in_the_result_without_a_fixed_wait(platform: Platform) -> None:
    serve_tasks(platform, "lines")
    platform.invoke(platform.task())
    assert [f"line {i}\n" for i in range(900, 1000)] == platform.result()[
        "user_process_last_stderr_lines"
    ]


@pytest.mark.parametrize(
    ("manners", "reason"),
    [
        (["die-at-start"], "exit status 7"),
        (["redirect"], "Health endpoint returned redirect response"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_server_that_cannot_start_fails_the_setup_at_once(
    platform: Platform, manners: list[str], reason: str
) -> None:
    serve_tasks(platform, *manners)
    began = time.monotonic()
    job = platform.invoke(platform.task())
    assert time.monotonic() - began < 15
    assert (0, 1, START_MESSAGE) == (
        job.code,
        platform.setup_result()["return_code"],
        platform.setup_result()["user_safe_error_message"],
    )
    assert reason in external_errors(job)
    assert [] == platform.keys("out/")


def test_the_last_words_of_a_server_that_died_are_shown(platform: Platform) -> None:
    serve_tasks(platform, "die-at-start")
    assert "cannot load the model" in external_errors(platform.invoke(platform.task()))


def test_a_server_that_does_not_exist_fails_the_setup(platform: Platform) -> None:
    serve_tasks(platform)
    platform.command("/no/such/server")
    job = platform.invoke(platform.task())
    assert START_MESSAGE == platform.setup_result()["user_safe_error_message"]
    assert "does not exist" in external_errors(job)


@pytest.mark.parametrize("manner", ["never", "404", "garbage", "hang-health"])
def test_a_server_that_never_becomes_healthy_fails_the_setup(
    platform: Platform, manner: str
) -> None:
    serve_tasks(platform, manner)
    platform.set(START_AND_HEALTH_TIMEOUT_SECONDS=2)
    job = platform.invoke(platform.task())
    message = platform.setup_result()["user_safe_error_message"]
    assert (0, 1) == (job.code, platform.setup_result()["return_code"])
    assert "pass the health check within 2 seconds" in message
    assert message in external_errors(job)


def test_a_server_on_another_port_is_told_which_one_is_expected(platform: Platform) -> None:
    port = serve_tasks(platform, "other-port")
    platform.set(START_AND_HEALTH_TIMEOUT_SECONDS=8)
    job = platform.invoke(platform.task())
    message = platform.setup_result()["user_safe_error_message"]
    sentence = f"It is expected to listen on port {port}; the command listens on {port + 1}."
    assert message.endswith(sentence)
    assert message in external_errors(job)


def test_the_answer_ends_with_its_last_byte(platform: Platform) -> None:
    serve_tasks(platform, "stream")
    assert 0 == platform.invoke(platform.task()).code
    result = platform.result()
    assert (0, ["result.json"]) == (
        result["return_code"],
        [output["relative_path"] for output in result["outputs"]],
    )
    assert parse_duration(result["invoke_duration"]) >= timedelta(seconds=0.5)
    assert ["err 1\n", "what failed\n"] == result["user_process_last_stderr_lines"]


def test_an_answer_that_breaks_off_is_a_failure(platform: Platform) -> None:
    serve_tasks(platform, "stream", "break-off")
    job = platform.invoke(platform.task())
    assert (1, "HTTP error calling invoke endpoint") == (
        platform.result()["return_code"],
        platform.result()["user_safe_error_message"],
    )
    assert "HTTP error calling invoke endpoint" in external_errors(job)


def test_the_time_limit_covers_the_whole_answer(platform: Platform) -> None:
    serve_tasks(platform, "stream", "stream-for-ever")
    platform.invoke(platform.task(timeout=1))
    assert "Time limit exceeded" == platform.result()["user_safe_error_message"]


def test_a_stop_is_heard_while_an_answer_streams(platform: Platform) -> None:
    serve_tasks(platform, "stream", "stream-for-ever")
    process = platform.start("invoke", "-t", json.dumps([platform.task()]))
    assert process.stdout
    while '"log": "out 1"' not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    assert 128 + signal.SIGTERM == finish(process, seconds=20).code
    assert "The task was stopped before it finished" == platform.result()["user_safe_error_message"]


def test_what_the_author_says_of_an_error_comes_before_what_we_say(platform: Platform) -> None:
    serve_tasks(platform, "500")
    job = platform.invoke(platform.task())
    # Both go to stderr, in this order.
    texts = job.texts(internal=False, task="t", source="stderr")
    assert ["err 1", "the reason", "Invoke endpoint returned status 500, expected 201"] == texts


@needs_root
@pytest.mark.skipif(not PYTHON, reason="needs a Python and a checkout that everybody can read")
def test_the_server_cannot_ask_for_tasks_itself(platform: Platform) -> None:
    platform.set(USER=UNPRIVILEGED_UID)
    port = free_port()
    serve_tasks(platform, f"attack={port}", python=PYTHON)
    with serving(platform, port=port) as server:
        first = server.invoke(platform.task("1"))[1]
        assert 0 == first["return_code"], "".join(first["user_process_last_stderr_lines"])
        # It asks in between, too.
        refused = 0
        assert server.process.stdout
        while refused < 20:
            line = json.loads(server.process.stdout.readline())["log"]
            assert not line.startswith("got ") or line == "got 403"
            assert not line.startswith("ping ") or line == "ping 200"
            refused += line == "got 403"
        assert 0 == server.invoke(platform.task("2"))[1]["return_code"]
        job = server.end()
    assert 0 == job.code
    assert any("An algorithm may not ask for tasks" in text for text in job.texts(internal=False))
    assert ["1", "2"] == sorted({key.split("/")[1] for key in platform.keys("out/")})


def test_another_status_than_201_is_return_code_1(platform: Platform) -> None:
    serve_tasks(platform, "500")
    job = platform.invoke(platform.task("1"), platform.task("2"))
    assert (0, 1, "") == (
        job.code,
        platform.result("1")["return_code"],
        platform.result("1")["user_safe_error_message"],
    )
    assert "500" in external_errors(job)
    assert [] == platform.keys("out/2/")


def test_a_server_that_dies_while_it_works_is_noticed_at_once(platform: Platform) -> None:
    serve_tasks(platform, "die")
    began = time.monotonic()
    job = platform.invoke(platform.task())
    assert time.monotonic() - began < 15
    result = platform.result()
    assert (1, "HTTP error calling invoke endpoint") == (
        result["return_code"],
        result["user_safe_error_message"],
    )
    assert "last words\n" in result["user_process_last_stderr_lines"]
    assert "exit status 9" in external_errors(job)


def test_a_server_that_died_between_tasks_fails_the_next(platform: Platform) -> None:
    serve_tasks(platform, "die-after")
    platform.invoke(platform.task("1"), platform.task("2"))
    assert 0 == platform.result("1")["return_code"]
    result = platform.result("2")
    assert 1 == result["return_code"]
    # The second, when the task meets the server in the moment of its death.
    assert result["user_safe_error_message"] in (
        "Could not connect to invoke endpoint",
        "HTTP error calling invoke endpoint",
    )


def test_a_hanging_invocation_ends_with_its_time_limit(platform: Platform) -> None:
    serve_tasks(platform, "hang")
    job = platform.invoke(platform.task("1", timeout=0.5), platform.task("2"))
    result = platform.result("1")
    assert (0, 1, "Time limit exceeded") == (
        job.code,
        result["return_code"],
        result["user_safe_error_message"],
    )
    assert "Time limit exceeded" == job.texts(level="ERROR", internal=False, task="1")[-1]
    assert [] == platform.keys("out/2/")


def test_after_a_time_limit_serve_is_unhealthy_and_leaves(platform: Platform) -> None:
    serve_tasks(platform, "hang")
    with serving(platform) as server:
        status, result = server.invoke(platform.task(timeout=0.5))
        assert (200, "Time limit exceeded") == (status, result["user_safe_error_message"])
        assert 0 == finish(server.process, seconds=20).code


def test_proxies_are_for_others(platform: Platform) -> None:
    platform.environ |= {"http_proxy": "http://127.0.0.1:1", "no_proxy": "localhost,127.0.0.1"}
    serve_tasks(platform)
    platform.invoke(platform.task())
    assert 0 == platform.result()["return_code"]


def test_the_server_and_its_children_end_with_the_job(platform: Platform) -> None:
    port = serve_tasks(platform, "child")
    assert 0 == platform.invoke(platform.task()).code
    assert not has_child(port)


def test_a_stop_leaves_a_result_and_ends_the_server(platform: Platform) -> None:
    port = serve_tasks(platform, "hang", "child")
    process = platform.start("invoke", "-t", json.dumps([platform.task()]))
    poll(lambda: has_child(port), seconds=20)
    assert process.stdout
    while '"log": "out 1"' not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    job = finish(process, seconds=20)
    assert 128 + signal.SIGINT == job.code
    assert "The task was stopped before it finished" == platform.result()["user_safe_error_message"]
    assert not has_child(port)


def test_a_stop_while_the_server_starts_ends_it(platform: Platform) -> None:
    serve_tasks(platform, "never")
    process = platform.start("invoke", "-t", json.dumps([platform.task()]))
    assert process.stdout
    while '"log": "Running' not in process.stdout.readline():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    assert 128 + signal.SIGTERM == finish(process, seconds=20).code
    assert "stopped" in platform.setup_result()["user_safe_error_message"]
