"""No key, token, password or signature is written by any command, at the most talkative level."""

from __future__ import annotations

import json

import pytest

from tests.e2e.platform import Finished, P, Platform
from tests.e2e.test_serve import serving


@pytest.fixture
def talkative(platform: Platform) -> Platform:
    """A platform full of secrets, with an input and a list of one task."""
    platform.put("in/a")
    platform.put("tasks.json", json.dumps([platform.task(inputs=[("a", "in/a")])]).encode())
    platform.script("true")
    platform.environ |= {
        "LOG_LEVEL": "DEBUG",
        "AWS_SESSION_TOKEN": "SESSIONSECRET",
        "http_proxy": "http://user:PROXYSECRET@127.0.0.1:9",
    }
    return platform


def written_secrets(platform: Platform, job: Finished) -> list[str]:
    secrets = [
        platform.environ["AWS_SECRET_ACCESS_KEY"],
        platform.environ[f"{P}SIGNING_KEY_HEX"],
        "SESSIONSECRET",
        "PROXYSECRET",
        "AWS4-HMAC",
        "Signature=",
    ]
    return [secret for secret in secrets if secret in job.stdout + job.stderr]


@pytest.mark.parametrize("model", ["none", "missing"])
@pytest.mark.parametrize("command", ["invoke", "check", "run"])
def test_no_secret_is_written_at_any_level(talkative: Platform, command: str, model: str) -> None:
    if model == "missing":
        talkative.set(MODEL=f"s3://{talkative.bucket}/none.tar")
    (talkative.root / "in").mkdir()
    arguments = ["-f", f"s3://{talkative.bucket}/tasks.json"]
    if command == "run":
        arguments = ["--input", "in", "--output", "out"]
    job = talkative.run(command, *arguments)
    assert ("DEBUG" in job.stdout) is (command == "invoke" and model == "none")
    assert [] == written_secrets(talkative, job)


def test_no_secret_is_written_while_serving(talkative: Platform) -> None:
    with serving(talkative) as server:
        tasks = [
            talkative.task(inputs=[("a", "in/a")]),
            talkative.task(output_bucket_name="none-such"),
            talkative.task(output_bucket_name="not valid!"),
            b"[" * 1000,
        ]
        statuses = [server.invoke(task)[0] for task in tasks]
        job = server.end()
    assert [200, 500, 422, 422] == statuses
    assert "DEBUG" in job.stdout
    assert [] == written_secrets(talkative, job)
