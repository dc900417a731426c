"""SageMaker's three routes, answered by a separate process that runs real tasks."""

from __future__ import annotations

import http.client
import json
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.e2e.platform import Finished, Platform, finish, kill
from tests.serve.test_service import ASKER, PYTHON
from tests.support import UNPRIVILEGED_UID, free_port, needs_root, poll


class Server:
    """`serve` as a process, and its client."""

    def __init__(self, platform: Platform, port: int) -> None:
        self.port = port
        self.process: subprocess.Popen[str] = platform.start("serve", "--port", str(self.port))

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, Any, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            text = response.read()
            return response.status, json.loads(text) if text else None, response
        finally:
            connection.close()

    def invoke(self, task: Any, **headers: str) -> tuple[int, Any]:
        body = task if isinstance(task, bytes) else json.dumps(task).encode()
        return self.request("POST", "/invocations", body, **headers)[:2]

    def ping(self) -> int:
        try:
            return self.request("GET", "/ping")[0]
        except OSError:
            return 0

    def end(self, signum: int = signal.SIGTERM) -> Finished:
        self.process.send_signal(signum)
        return finish(self.process, seconds=25)


@contextmanager
def serving(platform: Platform, *, port: int = 0) -> Iterator[Server]:
    server = Server(platform, port or free_port())
    try:
        poll(lambda: server.ping() == 200 or server.process.poll() is not None, seconds=20)
        yield server
    finally:
        if server.process.poll() is None:
            kill(server.process)


def test_a_task_is_run_and_its_result_returned(platform: Platform) -> None:
    platform.put("in/a", b"x")
    platform.script("cp $I/a $O/b; echo hello")
    with serving(platform) as server:
        status, result = server.invoke(platform.task(inputs=[("a", "in/a")]))
        assert (200, 0) == (status, result["return_code"])
        assert platform.result() == result
        assert b"x" == platform.get("out/t/b")
        job = server.end()
    assert 0 == job.code
    texts = job.texts(level="INFO", internal=True)
    assert ["Not setting a memory limit", "Starting the model server"] == texts[:2]
    assert "Model server stopped" == texts[-1]
    assert ["hello"] == job.texts(internal=False, task="t")


def test_execution_parameters_are_sagemakers(platform: Platform) -> None:
    platform.script("true")
    with serving(platform) as server:
        assert {
            "MaxConcurrentTransforms": 1,
            "BatchStrategy": "SINGLE_RECORD",
            "MaxPayloadInMB": 6,
        } == server.request("GET", "/execution-parameters")[1]


def test_a_failing_algorithm_is_still_200(platform: Platform) -> None:
    platform.script("exit 7")
    with serving(platform) as server:
        assert (200, 7) == (lambda s, r: (s, r["return_code"]))(*server.invoke(platform.task()))
        assert (200, 7) == (lambda s, r: (s, r["return_code"]))(*server.invoke(platform.task("u")))
        assert 200 == server.ping()


def test_a_task_that_is_not_valid_is_422_with_its_path(platform: Platform) -> None:
    platform.script("true")
    with serving(platform) as server:
        status, body = server.invoke(platform.task(output_bucket_name="no bucket!"))
        assert 422 == status
        assert ["body", "output_bucket_name"] == body["detail"][0]["loc"]
        assert {"type", "loc", "msg", "input"} <= body["detail"][0].keys()
        assert 400 == server.invoke(b"\xff")[0]
        assert 200 == server.invoke(platform.task())[0]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-be"])
def test_a_task_is_read_in_every_encoding_that_json_knows(
    platform: Platform, encoding: str
) -> None:
    platform.script("true")
    with serving(platform) as server:
        body = json.dumps(platform.task("\u00e9"), ensure_ascii=False).encode(encoding)
        assert (200, "\u00e9") == (lambda s, r: (s, r["pk"]))(*server.invoke(body))


@needs_root
@pytest.mark.skipif(not PYTHON, reason="needs a Python and a checkout that everybody can read")
def test_an_algorithm_cannot_ask_for_tasks_while_it_runs(platform: Platform) -> None:
    """Not itself, nor by a process in namespaces of its own."""
    platform.set(USER=UNPRIVILEGED_UID)
    body = json.dumps(platform.task("mine"))
    port = free_port()
    ask = shlex.join([PYTHON, str(ASKER), str(port), body])
    platform.script(
        f"{ask} plain; {ask} half-closed; {ask} exec; {ask} gone; {ask} fork; unshare -Ur {ask}\n"
        "sleep 1"
    )
    with serving(platform, port=port) as server:
        status, result = server.invoke(platform.task())
        assert (200, 0) == (status, result["return_code"])
        assert 200 == server.ping()
        job = server.end()
    answers = [text for text in job.texts(internal=False, source="stdout") if text.isdigit()]
    assert len(answers) >= 4 and {"403"} == set(answers)
    assert [] == platform.keys("out/mine/")


def test_a_second_task_is_refused_while_one_runs(platform: Platform) -> None:
    platform.script("touch $O/begun; while [ ! -e $O/go ]; do sleep 0.02; done")
    output = platform.root / "output"
    with serving(platform) as server:
        answers: list[Any] = []
        first = threading.Thread(target=lambda: answers.append(server.invoke(platform.task())))
        first.start()
        poll((output / "begun").exists)
        began = time.monotonic()
        status, body, response = server.request(
            "POST", "/invocations", json.dumps(platform.task("u")).encode()
        )
        assert time.monotonic() - began < 1
        assert 503 == status and body["detail"] and response.getheader("Retry-After")
        assert 200 == server.ping()
        (output / "go").touch()
        first.join()
        assert 0 == answers[0][1]["return_code"]
        assert [] == platform.keys("out/u/")


def test_ping_answers_quickly_while_a_task_works(platform: Platform) -> None:
    platform.put("in/a", bytes(32 * 1024 * 1024))
    platform.script("i=0; while [ $i -lt 100000 ]; do echo line $i; i=$((i+1)); done")
    with serving(platform) as server:
        answers: list[Any] = []
        task = platform.task(inputs=[("a", "in/a")])
        worker = threading.Thread(target=lambda: answers.append(server.invoke(task)))
        assert server.process.stdout
        reader = threading.Thread(target=server.process.stdout.read)
        worker.start()
        reader.start()
        times = []
        while worker.is_alive():
            began = time.monotonic()
            assert 200 == server.ping()
            times.append(time.monotonic() - began)
        assert 0 == answers[0][1]["return_code"]
        server.process.terminate()
        reader.join()
    times.sort()
    # On a machine with idle processors every answer takes a few milliseconds.
    assert times[len(times) // 2] < 0.1, times[-5:]


def test_after_a_time_limit_it_answers_and_leaves(platform: Platform) -> None:
    platform.script("sleep 60")
    with serving(platform) as server:
        status, result = server.invoke(platform.task(timeout=0.3))
        assert (200, "Time limit exceeded") == (status, result["user_safe_error_message"])
        job = finish(server.process, seconds=10)
    assert 0 == job.code
    assert "Container unhealthy, terminating process" in job.texts(level="ERROR", internal=True)
    assert "Time limit exceeded" == platform.result()["user_safe_error_message"]


def test_sigterm_while_busy_stops_the_task_and_leaves_its_result(platform: Platform) -> None:
    platform.script("touch $O/begun; sleep 60")
    with serving(platform) as server:
        answers: list[Any] = []
        worker = threading.Thread(target=lambda: answers.append(server.invoke(platform.task())))
        worker.start()
        poll((platform.root / "output/begun").exists)
        job = server.end()
        worker.join()
    assert 0 == job.code
    assert "The task was stopped before it finished" == platform.result()["user_safe_error_message"]
    assert (503, {"detail": "The task was stopped before it finished"}) == answers[0]


def test_sigterm_while_idle_leaves_with_0(platform: Platform) -> None:
    platform.script("true")
    with serving(platform) as server:
        idle = http.client.HTTPConnection("127.0.0.1", server.port)
        idle.request("GET", "/ping")
        idle.getresponse().read()
        began = time.monotonic()
        assert 0 == server.end().code
        assert time.monotonic() - began < 5
        idle.close()


def test_a_client_that_goes_away_changes_nothing(platform: Platform) -> None:
    platform.script("touch $O/begun; sleep 0.5; echo x > $O/x")
    with serving(platform) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("POST", "/invocations", json.dumps(platform.task()))
        poll((platform.root / "output/begun").exists)
        connection.close()
        poll(lambda: platform.keys("out/t/.sagemaker_shim/"))
        assert 0 == platform.result()["return_code"]
        assert 200 == server.ping()


def test_an_unforeseen_failure_is_500_and_leaves_a_result(platform: Platform) -> None:
    platform.script("true")
    with serving(platform) as server:
        status, body = server.invoke(platform.task(inputs=[("a", "in/missing")]))
        assert 500 == status and "detail" in body
        assert 1 == platform.result()["return_code"]
        assert 200 == server.invoke(platform.task("u"))[0]


def test_a_failed_setup_leaves_with_0_and_a_result(platform: Platform) -> None:
    platform.set(MODEL=f"s3://{platform.bucket}/missing.tar")
    platform.script("true")
    with serving(platform) as server:
        job = finish(server.process, seconds=10)
    assert 0 == job.code
    assert 1 == platform.setup_result()["return_code"]
