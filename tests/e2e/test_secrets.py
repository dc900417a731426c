"""No key, token, password or signature is written by any command, at the most talkative level."""

from __future__ import annotations

import base64
import json

import pytest

from tests.e2e.platform import Finished, P, Platform
from tests.e2e.test_serve import serving
from tests.e2e.test_supervision import needs_namespaces
from tests.fakes.container_credentials import RecordingServer
from tests.support import free_port, needs_root


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


# Settings that cannot be right, each with a part that may be secret, and what names them.
BROKEN = [
    ("https_proxy", "http://user:PROXYSECRET@proxy.example:port"),
    ("https_proxy", "http://user:PROXYSECRET@[::1"),
    ("HTTP_PROXY", "socks5://user:PROXYSECRET@proxy.example"),
    ("http_proxy", "http://proxy.example:PROXYSECRET"),
    ("AWS_ENDPOINT_URL", "http://user:PROXYSECRET@minio:9000"),
    ("AWS_ENDPOINT_URL_S3", "http://PROXYSECRET..b:9"),
    ("AWS_S3_ENDPOINT_URL", "http://user:PROXYSECRET@minio:9000"),
    ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://user:PROXYSECRET@[::1"),
    ("AWS_MAX_ATTEMPTS", "PROXYSECRET"),
    ("AWS_RETRY_MODE", "PROXYSECRET"),
    ("AWS_DEFAULT_REGION", "PROXYSECRET/../eu"),
    ("AWS_REGION", "PROXY SECRET.example#"),
    ("AWS_METADATA_SERVICE_TIMEOUT", "PROXYSECRET"),
]


@pytest.mark.parametrize(("name", "text"), BROKEN)
@pytest.mark.parametrize("command", ["invoke", "check"])
def test_a_setting_that_cannot_be_right_is_named_and_not_shown(
    platform: Platform, command: str, name: str, text: str
) -> None:
    platform.script("touch $O/ran")
    for other in ("AWS_S3_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        del platform.environ[other]
    platform.environ["AWS_ENDPOINT_URL"] = platform.s3.meta.endpoint_url
    platform.environ[name] = text
    job = platform.invoke(platform.task()) if command == "invoke" else platform.run(command)
    assert (2 if command == "invoke" else 1) == job.code
    written = job.stdout + job.stderr
    assert f"{name}" in written
    assert f"found a text of {len(text)} characters" in written
    assert "SECRET" not in written and "Traceback" not in written
    assert [] == platform.keys("out")


@pytest.mark.parametrize("method", ["exec", "invoke"])
def test_a_server_with_such_a_setting_leaves_before_any_command_starts(
    platform: Platform, method: str
) -> None:
    for name in ("BUCKET_NAME", "PREFIX"):
        del platform.environ[f"{P}RUNTIME_OUTPUT_{name}"]
    platform.set(API_METHOD=method, USER_WEBSERVER_PORT=free_port())
    platform.environ["https_proxy"] = "http://user:PROXYSECRET@proxy.example:port"
    platform.script(f"touch {platform.root}/ran")
    job = platform.run("serve", "--port", str(free_port()), seconds=20)
    assert 2 == job.code
    assert "https_proxy: expected http://host:port" in job.stderr
    assert "SECRET" not in job.stdout + job.stderr
    assert not (platform.root / "ran").exists()


@needs_root
@needs_namespaces
def test_the_reason_of_a_failed_job_shows_no_secret(platform: Platform) -> None:
    failure = platform.root / "failure"
    place = "mount -t tmpfs none /opt && mkdir -p /opt/ml/output"
    keep = f"code=$?; cp /opt/ml/output/failure {failure}; exit $code"
    platform.wrapper = ["unshare", "--mount", "sh", "-c", f'{place} && "$@"; {keep}', "sh"]
    platform.environ["https_proxy"] = "http://user:s3cr#et@proxy.example:none"
    assert 2 == platform.invoke(platform.task()).code
    assert failure.read_text().startswith("https_proxy: expected http://host:port")
    assert "et@" not in failure.read_text() and "s3cr" not in failure.read_text()


def test_a_password_with_odd_characters_reaches_the_proxy(platform: Platform) -> None:
    platform.script("true")
    with RecordingServer(lambda request: (407, b"")) as proxy:
        address = proxy.url.removeprefix("http://")
        platform.environ |= {
            "http_proxy": f"http://user:s3/c[r#e@t@{address}",
            "AWS_S3_ENDPOINT_URL": "http://s3.example.test",
            "AWS_MAX_ATTEMPTS": "1",
        }
        job = platform.run("invoke", "-f", "s3://bucket/tasks.json")
    login = base64.b64encode(b"user:s3/c[r#e@t").decode()
    assert f"Basic {login}" == proxy.requests[0].headers["proxy-authorization"]
    assert not [part for part in ("s3/c", "e@t", login) if part in job.stdout + job.stderr]
