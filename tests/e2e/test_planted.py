"""What the image's user writes decides nothing that root does: profiles, tokens, bundles."""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Iterator

import pytest

from tests.e2e.platform import ROOT, Finished, P, Platform, finish
from tests.e2e.test_serve import Server, serving
from tests.e2e.test_supervision import AS_PID_1, needs_namespaces, shim_pid
from tests.fakes.container_credentials import RecordingServer
from tests.s3_servers import ACCESS_KEY, SECRET_KEY
from tests.support import UNPRIVILEGED_UID, free_port, needs_root, poll

pytestmark = [needs_root, needs_namespaces]

KEYS = {"AccessKeyId": ACCESS_KEY, "SecretAccessKey": SECRET_KEY}


@pytest.fixture
def container() -> Iterator[RecordingServer]:
    """The platform's credentials, as SageMaker gives them."""
    with RecordingServer(lambda request: (200, json.dumps(KEYS).encode())) as server:
        yield server


@pytest.fixture
def attacked(platform: Platform, container: RecordingServer) -> Platform:
    """A container with a user of its own, whose home is the shim's: nothing names a profile."""
    for name in (
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
        *("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"),
    ):
        del platform.environ[name]
    for name in ("home", "seen"):
        (platform.root / name).mkdir()
        os.chown(platform.root / name, UNPRIVILEGED_UID, UNPRIVILEGED_UID)
    platform.environ |= {
        "HOME": str(platform.root / "home"),
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{container.url}/role",
    }
    platform.set(USER=f"{UNPRIVILEGED_UID}:{UNPRIVILEGED_UID}")
    platform.wrapper = AS_PID_1
    return platform


def credential_process(platform: Platform) -> str:
    """Return a configuration whose program gives valid keys, and leaves in `seen` what it saw."""
    answer = json.dumps({"Version": 1, **KEYS})
    (platform.root / "helper").write_text(
        f"#!/bin/sh\nid -u > {platform.root}/seen/uid; id -G > {platform.root}/seen/groups\n"
        f"env > {platform.root}/seen/environment\necho {shlex.quote(answer)}\n"
    )
    (platform.root / "helper").chmod(0o755)
    return f"[default]\ncredential_process = {platform.root}/helper\n"


def planting(platform: Platform) -> str:
    """Return a line of shell that plants such a configuration in the user's home."""
    config = shlex.quote(credential_process(platform))
    return f"mkdir -p $HOME/.aws && printf %s {config} > $HOME/.aws/config && id -u >&2"


def seen(platform: Platform) -> dict[str, str]:
    return {path.name: path.read_text() for path in (platform.root / "seen").iterdir()}


def end(server: Server) -> Finished:
    if server.process.poll() is None:
        os.kill(shim_pid(server.process), signal.SIGTERM)
    return finish(server.process, seconds=25)


def without_setup_result(platform: Platform) -> None:
    """Let nothing be needed from S3 before the first task."""
    for name in ("BUCKET_NAME", "PREFIX"):
        del platform.environ[f"{P}RUNTIME_OUTPUT_{name}"]


@pytest.mark.parametrize("method", ["exec", "invoke"])
def test_a_profile_planted_by_the_command_is_never_read(attacked: Platform, method: str) -> None:
    without_setup_result(attacked)
    attacked.script(planting(attacked))
    if method == "invoke":
        port = free_port()
        attacked.set(API_METHOD="invoke", USER_WEBSERVER_PORT=port)
        server = ["/usr/bin/python3", str(ROOT / "tests/data/inference_server.py"), str(port)]
        # The tests' own interpreter is perhaps not for everybody.
        start = shlex.join([*server, str(attacked.root / "output")])
        attacked.script(f"{planting(attacked)} && exec {start}")
    with serving(attacked) as server_:
        status, result = server_.invoke(attacked.task())
        job = end(server_)
    assert (200, 0) == (status, result["return_code"]), job.stderr
    assert (attacked.root / "home/.aws/config").exists()
    assert f"{UNPRIVILEGED_UID}" in job.texts(internal=False, source="stderr")
    assert {} == seen(attacked)
    assert attacked.result() == result


@pytest.mark.parametrize("method", ["exec", "invoke"])
@pytest.mark.parametrize("command", ["invoke", "serve", "check"])
def test_a_profile_planted_in_a_former_life_is_ignored_with_a_warning(
    attacked: Platform, command: str, method: str
) -> None:
    attacked.script("id -u")
    attacked.set(API_METHOD=method, START_AND_HEALTH_TIMEOUT_SECONDS=1)
    plant_in_a_former_life(attacked)
    home = attacked.root / "home"
    job = run(attacked, command)
    assert {} == seen(attacked)
    warnings = "\n".join(job.texts(level="WARNING", internal=True))
    assert f"{home}/.aws/config is ignored: {home} belongs to uid {UNPRIVILEGED_UID}" in warnings
    if command != "check":
        assert (0 if method == "exec" else 1) == attacked.setup_result()["return_code"]


def plant_in_a_former_life(platform: Platform) -> None:
    home = platform.root / "home"
    (home / ".aws").mkdir()
    (home / ".aws/config").write_text(credential_process(platform))
    for path in (home / ".aws", home / ".aws/config"):
        os.chown(path, UNPRIVILEGED_UID, UNPRIVILEGED_UID)


@pytest.mark.parametrize("user", [f"{UNPRIVILEGED_UID}", "no-such-user", "\udcff"])
@pytest.mark.parametrize("command", ["invoke", "serve"])
def test_a_planted_profile_is_not_read_to_say_that_a_setting_is_wrong(
    attacked: Platform, command: str, user: str
) -> None:
    plant_in_a_former_life(attacked)
    attacked.script("true")
    attacked.set(USER=user, MAX_MEMORY_MB="much")
    arguments = ["-t", json.dumps([attacked.task()])] if command == "invoke" else []
    assert 2 == attacked.run(command, *arguments).code
    assert {} == seen(attacked)
    assert 1 == attacked.setup_result()["return_code"]


def test_a_credential_process_of_a_user_that_does_not_exist_is_not_run(attacked: Platform) -> None:
    del attacked.environ["AWS_CONTAINER_CREDENTIALS_FULL_URI"]
    plant_in_a_former_life(attacked)
    home = attacked.root / "home"
    for path in (home, home / ".aws", home / ".aws/config"):
        os.chown(path, 0, 0)
    attacked.set(USER="no-such-user")
    attacked.script("true")
    job = attacked.invoke(attacked.task())
    assert 1 == job.code
    assert {} == seen(attacked)
    assert "as whom it would run, is not known" in job.stderr


def run(platform: Platform, command: str) -> Finished:
    if command == "invoke":
        return platform.invoke(platform.task())
    if command == "check":
        return platform.run("check")
    with serving(platform) as server:
        if server.process.poll() is None:
            server.invoke(platform.task())
        return end(server)


def test_a_planted_profile_leads_to_no_other_server_and_reads_no_file(attacked: Platform) -> None:
    secret = attacked.root / "secret"
    secret.write_text("of-root-alone")
    secret.chmod(0o600)
    with RecordingServer(lambda request: (403, b"")) as evil:
        config = (
            f"[default]\nendpoint_url = {evil.url}\nrole_arn = arn\nservices = mine\n"
            f"web_identity_token_file = {secret}\nca_bundle = {secret}\n"
            f"[services mine]\ns3 =\n  endpoint_url = {evil.url}\n"
            f"sts =\n  endpoint_url = {evil.url}\n"
        )
        (attacked.root / "planted").write_text(config)
        os.chown(attacked.root / "planted", UNPRIVILEGED_UID, UNPRIVILEGED_UID)
        attacked.environ["AWS_CONFIG_FILE"] = str(attacked.root / "planted")
        attacked.script("true")
        assert 0 == attacked.invoke(attacked.task()).code
        assert [] == evil.requests
    assert 0 == attacked.result()["return_code"]


@pytest.mark.parametrize("command", ["invoke", "serve"])
def test_a_credential_process_runs_as_the_images_user_without_our_variables(
    attacked: Platform, command: str
) -> None:
    del attacked.environ["AWS_CONTAINER_CREDENTIALS_FULL_URI"]
    attacked.script("true")
    home = attacked.root / "home"
    (home / ".aws").mkdir()
    (home / ".aws/config").write_text(credential_process(attacked))
    os.chown(home, 0, 0)
    assert 0 == run(attacked, command).code
    assert 0 == attacked.result()["return_code"]
    found = seen(attacked)
    assert (f"{UNPRIVILEGED_UID}\n", f"{UNPRIVILEGED_UID}\n") == (found["uid"], found["groups"])
    assert "AWS_DEFAULT_REGION=eu-central-1" in found["environment"]
    assert "grand_challenge" not in found["environment"].casefold()


def test_a_token_replaced_by_the_command_is_not_sent(attacked: Platform) -> None:
    without_setup_result(attacked)
    secret = attacked.root / "secret"
    secret.write_text("of-root-alone")
    secret.chmod(0o600)
    tokens = attacked.root / "home/tokens"
    attacked.script(f"mkdir -p {tokens} && ln -sf {secret} {tokens}/token")
    with RecordingServer(lambda request: (403, b"")) as sts:
        attacked.environ |= {
            "AWS_WEB_IDENTITY_TOKEN_FILE": f"{tokens}/token",
            "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/pod",
            "AWS_ENDPOINT_URL_STS": sts.url,
        }
        with serving(attacked) as server:
            status, _ = server.invoke(attacked.task())
            job = end(server)
        assert [] == sts.requests
    assert 500 == status
    assert f"The token file {tokens}/token is not read: " in job.stderr


def test_serving_needs_no_credentials_before_a_task_does(attacked: Platform) -> None:
    del attacked.environ["AWS_CONTAINER_CREDENTIALS_FULL_URI"]
    without_setup_result(attacked)
    attacked.script("true")
    with serving(attacked) as server:
        poll(lambda: server.ping() == 200)
        assert 0 == end(server).code
