from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qs

import botocore.credentials
import botocore.exceptions
import botocore.session
import botocore.utils
import pytest

from shim.aws.credentials import CredentialProvider, credential_provider
from shim.aws.errors import CredentialsFailed, NoCredentials
from shim.aws.profiles import read_profile
from shim.aws.sigv4 import Credentials
from shim.http.errors import RemoteError, SettingInvalid, TransportError
from shim.http.proxies import Proxies
from shim.http.transport import FetchResponse, Transport
from shim.http.trust import Trust
from tests.fakes.container_credentials import (
    Answer,
    ContainerCredentials,
    RecordingServer,
    Request,
)
from tests.support import free_port, poll

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
CONFIG = """\
[default]
aws_access_key_id = CONFIG
aws_secret_access_key = hidden-config
[profile only-config]
aws_access_key_id = ONLYCONFIG
aws_secret_access_key = hidden-config
aws_session_token = hidden-token
[profile process]
credential_process = {python} -c 'print(open("{directory}/process.json").read())'
aws_access_key_id = NOTME
aws_secret_access_key = hidden-config
[profile web]
role_arn = arn:aws:iam::123456789012:role/profile
web_identity_token_file = {directory}/token
role_session_name = of-profile
aws_access_key_id = NOTME
aws_secret_access_key = hidden-config
[profile empty]
region = eu-west-1
"""
CREDENTIALS = """\
[default]
aws_access_key_id = SHARED
aws_secret_access_key = hidden-shared
[both-tokens]
aws_access_key_id = BOTH
aws_secret_access_key = hidden-shared
aws_session_token = hidden-new
aws_security_token = hidden-old
"""
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "ENV", "AWS_SECRET_ACCESS_KEY": "hidden-env"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A home with files of all kinds, for botocore and for us."""
    config = CONFIG.format(directory=tmp_path, python=sys.executable)
    (tmp_path / "config").write_text(config)
    (tmp_path / "credentials").write_text(CREDENTIALS)
    (tmp_path / "token").write_text("eyJ.web.identity")
    (tmp_path / "process.json").write_text(
        '{"Version": 1, "AccessKeyId": "PROCESS", "SecretAccessKey": "hidden-process"}'
    )
    return tmp_path


def environ_of(directory: Path, **variables: str) -> dict[str, str]:
    return {
        "HOME": str(directory),
        "AWS_CONFIG_FILE": str(directory / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(directory / "credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
        **variables,
    }


def run_helper(argv: list[str], timeout_seconds: float) -> bytes:
    try:
        return subprocess.run(argv, check=True, capture_output=True, timeout=timeout_seconds).stdout
    except subprocess.SubprocessError as error:
        raise OSError("exit status 1") from error


class Ours:
    """Our provider over real HTTP, with its log, its pauses and the time in the test's hands."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.log: list[str] = []
        self.pauses: list[float] = []
        self.proxied: list[bool] = []
        self.time = NOW
        self._transport = Transport(
            proxies=Proxies(environ), trust=Trust(environ), max_connections=1
        )
        self.provider = credential_provider(
            environ,
            profile=read_profile(environ),
            region="eu-west-1",
            fetch=self._fetch,
            run_helper=run_helper,
            now=lambda: self.time,
            log=lambda level, message: self.log.append(f"{level} {message}"),
            sleep=self.pauses.append,
        )

    def _fetch(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
        timeout_seconds: float,
        proxied: bool,
    ) -> FetchResponse:
        self.proxied.append(proxied)
        try:
            return self._transport.fetch(method, url, headers, body, timeout_seconds, proxied)
        finally:
            self._transport.close()


def keys_of_botocore(environ: Mapping[str, str]) -> tuple[str, str, str | None]:
    """Return access key, secret key and token that botocore finds in this environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("AWS_", "HTTP", "http")):
                patch.delenv(name)
        for name, value in environ.items():
            patch.setenv(name, value)
        patch.setattr(botocore.utils.ContainerMetadataFetcher, "SLEEP_TIME", 0)
        found = botocore.session.Session().get_credentials()
        if found is None:
            raise botocore.exceptions.NoCredentialsError
        frozen = found.get_frozen_credentials()
    return frozen.access_key, frozen.secret_key, frozen.token


def keys_of(credentials: Credentials) -> tuple[str, str, str | None]:
    return credentials.access_key, credentials.secret_key, credentials.token


def assert_same_keys(environ: Mapping[str, str], access_key: str) -> None:
    ours = keys_of(Ours(environ).provider.get())
    assert keys_of_botocore(environ) == ours
    assert access_key == ours[0]


def refusal(environ: Mapping[str, str]) -> str:
    with pytest.raises(RemoteError) as refused:
        Ours(environ).provider.get()
    assert "hidden" not in str(refused.value)
    return str(refused.value)


# The environment and the files.


@pytest.mark.parametrize(
    ("variables", "access_key"),
    [
        (ENVIRONMENT, "ENV"),
        (ENVIRONMENT | {"AWS_SESSION_TOKEN": "new"}, "ENV"),
        (ENVIRONMENT | {"AWS_SESSION_TOKEN": "new", "AWS_SECURITY_TOKEN": "old"}, "ENV"),
        (ENVIRONMENT | {"AWS_SESSION_TOKEN": "new", "AWS_SECURITY_TOKEN": ""}, "ENV"),
        (ENVIRONMENT | {"AWS_PROFILE": "both-tokens"}, "ENV"),
        (ENVIRONMENT | {"AWS_ACCESS_KEY_ID": ""}, "SHARED"),
        ({}, "SHARED"),
        ({"AWS_PROFILE": "both-tokens"}, "BOTH"),
        ({"AWS_PROFILE": "only-config"}, "ONLYCONFIG"),
        ({"AWS_PROFILE": "process"}, "PROCESS"),
        ({"AWS_SHARED_CREDENTIALS_FILE": "/missing"}, "CONFIG"),
    ],
)
def test_finds_the_keys_that_botocore_finds(
    variables: dict[str, str], access_key: str, directory: Path
) -> None:
    assert_same_keys(environ_of(directory, **variables), access_key)


def test_names_the_half_that_is_missing(directory: Path) -> None:
    environ = environ_of(directory, AWS_ACCESS_KEY_ID="AK")
    with pytest.raises(botocore.exceptions.PartialCredentialsError) as theirs:
        keys_of_botocore(environ)
    assert str(theirs.value) == refusal(environ)


def test_finds_no_credentials_and_looks_once(directory: Path) -> None:
    environ = environ_of(directory, AWS_PROFILE="empty")
    with pytest.raises(botocore.exceptions.NoCredentialsError) as theirs:
        keys_of_botocore(environ)
    provider = Ours(environ).provider
    for _ in range(2):
        with pytest.raises(NoCredentials) as ours:
            provider.get()
        assert str(theirs.value) == str(ours.value)


@pytest.mark.parametrize(
    "options",
    [
        "role_arn = arn\nsource_profile = default",
        "role_arn = arn\ncredential_source = EcsContainer",
        "sso_session = mine\nsso_account_id = 1\nsso_role_name = r",
        "sso_start_url = https://x\nsso_account_id = 1\nsso_role_name = r",
        "login_session = arn",
    ],
)
def test_says_what_it_does_not_support(options: str, directory: Path) -> None:
    (directory / "config").write_text(f"[profile other]\n{options}\n")
    sentence = refusal(environ_of(directory, AWS_PROFILE="other"))
    assert "The profile other gets its credentials by " in sentence
    assert "which is not supported: use keys" in sentence


def test_keys_of_the_environment_win_over_a_profile_that_is_not_supported(directory: Path) -> None:
    (directory / "config").write_text("[profile other]\nrole_arn = arn\nsource_profile = x\n")
    environ = environ_of(directory, AWS_PROFILE="other", **ENVIRONMENT)
    assert "ENV" == Ours(environ).provider.get().access_key


@pytest.mark.parametrize("text", ["1.5", "-1", "soon", "9" * 5000, "\udcff", "²"])
@pytest.mark.parametrize("source", [{}, ENVIRONMENT], ids=["instance", "environment"])
def test_refuses_a_timeout_that_is_no_number(
    text: str, source: dict[str, str], directory: Path
) -> None:
    variables = {"AWS_EC2_METADATA_DISABLED": "", "AWS_METADATA_SERVICE_TIMEOUT": text, **source}
    with pytest.raises(SettingInvalid) as refused:
        Ours(environ_of(directory, AWS_PROFILE="empty", **variables))
    assert str(refused.value).startswith("AWS_METADATA_SERVICE_TIMEOUT, or metadata_service_")
    assert "expected a whole number up to 999999, found a text of" in str(refused.value)


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("hidden", "Unable to parse JSON returned from credential_process"),
        ("[]", "Unable to parse JSON returned from credential_process"),
        ('{"AccessKeyId": "hidden"}', "Unsupported version None for credential process provider"),
        ('{"Version": 1, "AccessKeyId": "A"}', "found in credential_process, missing: Secret"),
        ('{"Version": 1, "AccessKeyId": "A", "SecretAccessKey": ["hidden"]}', "holds characters"),
        (
            '{"Version": 1, "AccessKeyId": "A", "SecretAccessKey": "hidden", "Expiration": "x"}',
            "The expiration of credential_process is not a time",
        ),
    ],
)
def test_refuses_what_a_credential_process_must_not_print(
    output: str, sentence: str, directory: Path
) -> None:
    (directory / "process.json").write_text(output)
    assert sentence in refusal(environ_of(directory, AWS_PROFILE="process"))


@pytest.mark.parametrize(
    "text",
    [
        "Wed, 25 Nov 2026 20:00:00 GMT",
        "Wed, 25 Nov 2026 21:00:00 +0100",
        "25 Nov 2026 20:00:00 -0000",
        "2026-11-25T20:00:00Z",
        "2026-11-25T20:00:00",
        "2026-11-25T21:00:00.000+01:00",
    ],
)
def test_reads_the_expiration_in_the_forms_that_are_met(text: str, directory: Path) -> None:
    environ = environ_of(directory, **ENVIRONMENT, AWS_CREDENTIAL_EXPIRATION=text)
    found = Ours(environ).provider.get()
    assert datetime(2026, 11, 25, 20, tzinfo=UTC) == found.expiration


@pytest.mark.parametrize(
    "text", ["hidden", "Wed, 99 Nov 2026", "1 Jan 99999999999 00:00:00 GMT", "0", "GMT"]
)
def test_does_not_show_an_expiration_that_is_no_time(text: str, directory: Path) -> None:
    environ = environ_of(directory, **ENVIRONMENT, AWS_CREDENTIAL_EXPIRATION=text)
    assert "The expiration of env is not a time" == refusal(environ)


def test_reports_a_credential_process_that_fails(directory: Path) -> None:
    (directory / "process.json").unlink()
    assert "The credential_process failed: exit status 1" == refusal(
        environ_of(directory, AWS_PROFILE="process")
    )


def test_refuses_keys_that_would_break_a_header(directory: Path) -> None:
    variables = ENVIRONMENT | {"AWS_SESSION_TOKEN": "hidden\r\nX-Evil: 1"}
    sentence = refusal(environ_of(directory, **variables))
    assert "The AWS_SESSION_TOKEN of env holds characters that no key has" == sentence


# The container.


@pytest.fixture
def container() -> Iterator[tuple[RecordingServer, ContainerCredentials]]:
    """The container's endpoint and its behaviour."""
    behaviour = ContainerCredentials()
    with RecordingServer(behaviour) as server:
        yield server, behaviour


Container = tuple[RecordingServer, ContainerCredentials]


def container_environ(directory: Path, server: RecordingServer, **variables: str) -> dict[str, str]:
    url = f"{server.url}/v1/credentials"
    return environ_of(
        directory, AWS_PROFILE="empty", AWS_CONTAINER_CREDENTIALS_FULL_URI=url, **variables
    )


def wire(request: Request) -> tuple[str, str, str | None, str | None]:
    headers = request.headers
    return request.method, request.path, headers.get("accept"), headers.get("authorization")


@pytest.mark.parametrize("source", ["no token", "token", "token file"])
def test_asks_the_container_as_botocore_does(
    source: str, directory: Path, container: Container
) -> None:
    server, behaviour = container
    (directory / "eks-token").write_text("Bearer file")
    variables = {"token": {"AWS_CONTAINER_AUTHORIZATION_TOKEN": "Basic env"}}
    variables["token file"] = variables["token"] | {
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(directory / "eks-token")
    }
    behaviour.token = {"token": "Basic env", "token file": "Bearer file"}.get(source)
    environ = container_environ(directory, server, **variables.get(source, {}))
    theirs = keys_of_botocore(environ)
    ours = Ours(environ)
    found = ours.provider.get()
    assert theirs[1:] == keys_of(found)[1:]
    assert behaviour.expiration.replace(microsecond=0) == found.expiration
    asked_by_botocore, asked_by_us = map(wire, server.requests)
    assert asked_by_botocore == asked_by_us
    assert [False] == ours.proxied
    assert ["INFO Credentials come from the container; region: eu-west-1"] == ours.log


def test_asks_the_container_again_and_reads_its_token_anew(
    directory: Path, container: Container
) -> None:
    server, behaviour = container
    token = directory / "eks-token"
    token.write_text("Bearer one\n")
    behaviour.token = "Bearer one"
    behaviour.expiration = NOW + timedelta(hours=1)
    ours = Ours(
        container_environ(directory, server, AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=str(token))
    )
    assert "CONTAINER1" == ours.provider.get().access_key
    token.write_text("Bearer two")
    behaviour.token = "Bearer two"
    ours.time += timedelta(minutes=50)
    behaviour.expiration += timedelta(hours=1)
    assert "CONTAINER2" == ours.provider.get().access_key


def test_asks_the_container_three_times(directory: Path, container: Container) -> None:
    server, behaviour = container
    behaviour.failures = [(500, b"hidden"), (200, b"not json, hidden")]
    ours = Ours(container_environ(directory, server))
    assert "CONTAINER1" == ours.provider.get().access_key
    assert [1.0, 1.0] == ours.pauses


def test_a_container_that_fails_is_an_error_and_no_other_source_is_asked(
    directory: Path, container: Container
) -> None:
    server, behaviour = container
    behaviour.failures = [(500, b"hidden")] * 6
    with RecordingServer(lambda request: (200, b"")) as metadata:
        environ = container_environ(directory, server) | {
            "AWS_EC2_METADATA_DISABLED": "false",
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url,
        }
        with pytest.raises(botocore.exceptions.CredentialRetrievalError):
            keys_of_botocore(environ)
        assert "The container's credentials endpoint answered 500" == refusal(environ)
        assert [] == metadata.requests
    assert 6 == len(server.requests)


def test_a_container_that_cannot_be_reached_is_an_error(directory: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/"
    variables = {"AWS_PROFILE": "empty", "AWS_CONTAINER_CREDENTIALS_FULL_URI": url}
    assert "Could not connect" in refusal(environ_of(directory, **variables))


NO_HOSTS = ["http://[::1", "http://127.0.0.1:hidden/", "http://localhost:99999/", "http://a..b:9",
            "http://u:hidden@localhost/"]  # fmt: skip
NO_PATHS = ["http://localhost/hidden path", "http://localhost/h\xefdden", "http://localhost/\udcff"]


@pytest.mark.parametrize(
    ("name", "others", "url"),
    [
        *(("AWS_CONTAINER_CREDENTIALS_FULL_URI", {}, url) for url in NO_HOSTS + NO_PATHS),
        *(("AWS_EC2_METADATA_SERVICE_ENDPOINT", {}, url) for url in NO_HOSTS + NO_PATHS),
        *(("AWS_EC2_METADATA_SERVICE_ENDPOINT", ENVIRONMENT, url) for url in NO_HOSTS),
        *(("AWS_ENDPOINT_URL_STS", {"AWS_WEB_IDENTITY_TOKEN_FILE": "t"}, url) for url in NO_HOSTS),
    ],
)
def test_refuses_what_is_no_address(
    name: str, others: dict[str, str], url: str, directory: Path
) -> None:
    environ = environ_of(directory, AWS_PROFILE="empty", **others, **{name: url})
    with pytest.raises(SettingInvalid) as refused:
        Ours(environ)
    assert str(refused.value).startswith(name)
    assert str(refused.value).endswith(f"found a text of {len(url)} characters")


@pytest.mark.parametrize(
    ("url", "is_allowed"),
    [
        ("http://127.0.0.1:1/", True),
        ("http://127.8.8.8/", True),
        ("http://[::1]/", True),
        ("http://localhost/", True),
        ("http://169.254.170.2/", True),
        ("http://169.254.170.23/v1/credentials", True),
        ("http://[fd00:ec2::23]/v1/credentials", True),
        ("https://anywhere.example/", True),
        ("http://anywhere.example/", False),
        ("http://169.254.169.254/", False),
        ("http://127.0.0.1.example/", False),
        ("http://127.0.0.1@evil.example/", False),
        ("http:///nowhere", False),
        ("ftp://evil.example/", False),
    ],
)
def test_gives_the_containers_token_to_the_hosts_that_botocore_allows(
    url: str, is_allowed: bool, directory: Path
) -> None:
    def fetch(*arguments: object) -> FetchResponse:
        raise TransportError("asked")

    environ = environ_of(directory, AWS_PROFILE="empty", AWS_CONTAINER_CREDENTIALS_FULL_URI=url)
    with pytest.raises(CredentialsFailed if is_allowed else SettingInvalid) as failed:
        credential_provider(
            environ,
            profile=read_profile(environ),
            region=None,
            fetch=fetch,
            run_helper=run_helper,
            now=lambda: NOW,
            log=lambda level, message: None,
            sleep=lambda seconds: None,
        ).get()
    assert ("asked" if is_allowed else "AWS_CONTAINER_CREDENTIALS_FULL_URI") in str(failed.value)
    validate = botocore.utils.ContainerMetadataFetcher()._validate_allowed_url
    if is_allowed:
        validate(url)
    else:
        with pytest.raises(ValueError, match="Unsupported host"):
            validate(url)


def test_the_relative_address_stays_at_the_container(directory: Path) -> None:
    variables = {"AWS_PROFILE": "empty", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "@evil.example/"}
    sentence = refusal(environ_of(directory, **variables))
    assert sentence.startswith(
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI: expected a path that begins"
    )


@pytest.mark.parametrize("token", ["hidden\r\nX-Evil: 1", "hidden\nhidden", "hiddén"])
def test_refuses_a_token_that_would_break_a_header(
    token: str, directory: Path, container: Container
) -> None:
    server, _ = container
    environ = container_environ(directory, server, AWS_CONTAINER_AUTHORIZATION_TOKEN=token)
    sentence = refusal(environ)
    assert "The AWS_CONTAINER_AUTHORIZATION_TOKEN is not one line of ASCII text" == sentence


def test_names_a_token_file_that_is_missing(directory: Path, container: Container) -> None:
    server, _ = container
    variables = {"AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "/missing/token"}
    sentence = refusal(container_environ(directory, server, **variables))
    assert "Unable to read the token file /missing/token: No such file or directory" == sentence


# The web identity and the instance metadata, as moto answers them.


@pytest.fixture(scope="module")
def moto() -> Iterator[int]:
    """The port of a moto server."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            poll(lambda: is_listening(port), seconds=60)
            yield port
        finally:
            server.terminate()


def is_listening(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/moto-api/data.json")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.fixture
def recorder(moto: int) -> Iterator[RecordingServer]:
    """A server that hands everything on to moto."""

    def forward(request: Request) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", moto, timeout=10)
        connection.request(request.method, request.path, request.body, dict(request.headers))
        response = connection.getresponse()
        answer = response.status, response.read()
        connection.close()
        return answer

    with RecordingServer(forward) as server:
        yield server


def form(request: Request) -> dict[str, list[str]]:
    return parse_qs(request.body.decode(), strict_parsing=True)


def web_environ(directory: Path, sts: RecordingServer, **variables: str) -> dict[str, str]:
    return environ_of(
        directory,
        AWS_WEB_IDENTITY_TOKEN_FILE=str(directory / "token"),
        AWS_ROLE_ARN="arn:aws:iam::123456789012:role/pod",
        AWS_ENDPOINT_URL_STS=sts.url,
        **variables,
    )


@pytest.mark.parametrize(
    "variables",
    [
        {"AWS_ROLE_SESSION_NAME": "a session/with+signs"},
        {"AWS_PROFILE": "web", "AWS_ROLE_SESSION_NAME": "of-environment"},
        {"AWS_PROFILE": "web"},
    ],
    ids=["environment", "both", "profile's session name"],
)
def test_assumes_the_role_of_a_web_identity_as_botocore_does(
    variables: dict[str, str], directory: Path, recorder: RecordingServer
) -> None:
    environ = web_environ(directory, recorder, **variables)
    theirs = keys_of_botocore(environ)
    ours = Ours(environ)
    found = ours.provider.get()
    assert theirs[0][:4] == found.access_key[:4] == "ASIA"
    assert found.token and found.expiration
    by_botocore, by_us = recorder.requests
    assert wire(by_botocore)[:2] == wire(by_us)[:2] == ("POST", "/")
    assert by_botocore.headers["content-type"] == by_us.headers["content-type"]
    assert form(by_botocore) == form(by_us)
    assert "authorization" not in by_us.headers
    assert [True] == ours.proxied
    assert ["INFO Credentials come from a web identity; region: eu-west-1"] == ours.log


def test_names_its_session_after_the_time(directory: Path, recorder: RecordingServer) -> None:
    Ours(web_environ(directory, recorder)).provider.get()
    expected = [f"botocore-session-{NOW.timestamp():.0f}"]
    assert expected == form(recorder.requests[0])["RoleSessionName"]


def test_sends_the_web_identity_token_without_its_line_end(
    directory: Path, recorder: RecordingServer
) -> None:
    (directory / "token").write_text("eyJ.one\n")
    ours = Ours(web_environ(directory, recorder))
    rejected = ours.provider.get()
    (directory / "token").write_text("eyJ.two\n")
    ours.provider.refresh(rejected)
    tokens = [form(request)["WebIdentityToken"] for request in recorder.requests]
    assert [["eyJ.one"], ["eyJ.two"]] == tokens


def test_a_web_identity_needs_a_role(directory: Path) -> None:
    variables = {"AWS_WEB_IDENTITY_TOKEN_FILE": str(directory / "token")}
    assert "set AWS_ROLE_ARN" in refusal(environ_of(directory, **variables))


STS_ERROR = (
    b'<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type>'
    b"<Code>%s</Code><Message>%s</Message></Error><RequestId>1</RequestId></ErrorResponse>"
)


@pytest.mark.parametrize(
    ("answer", "attempts", "sentence"),
    [
        (
            (400, STS_ERROR % (b"ExpiredTokenException", b"Token expired")),
            1,
            "An error occurred (ExpiredTokenException) when calling the AssumeRoleWithWebIdentity "
            "operation: Token expired",
        ),
        (
            (400, STS_ERROR % (b"IDPCommunicationError", b"again")),
            3,
            "An error occurred (IDPCommunicationError) when calling the AssumeRoleWithWebIdentity "
            "operation: again",
        ),
        ((503, b"<html>"), 3, "not well-formed XML"),
        ((200, b"<other/>"), 1, "Partial credentials found in http://127.0.0.1"),
    ],
    ids=["refused", "identity provider down", "not XML", "no credentials"],
)
def test_reports_the_errors_of_the_security_token_service(
    answer: Answer, attempts: int, sentence: str, directory: Path
) -> None:
    with RecordingServer(lambda request: answer) as sts:
        assert sentence in refusal(web_environ(directory, sts))
        assert attempts == len(sts.requests)


def metadata_environ(directory: Path, server: RecordingServer, **variables: str) -> dict[str, str]:
    return environ_of(directory, AWS_PROFILE="empty") | {
        "AWS_EC2_METADATA_DISABLED": "false",
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": server.url,
        **variables,
    }


def metadata_wire(request: Request) -> tuple[str, str, str | None, str | None]:
    headers = request.headers
    return (
        request.method,
        request.path,
        headers.get("x-aws-ec2-metadata-token"),
        headers.get("x-aws-ec2-metadata-token-ttl-seconds"),
    )


def halves(requests: list[Request]) -> tuple[list[Request], list[Request]]:
    middle = len(requests) // 2
    return requests[:middle], requests[middle:]


def test_asks_the_instance_metadata_as_botocore_does(
    directory: Path, recorder: RecordingServer
) -> None:
    environ = metadata_environ(directory, recorder)
    theirs = keys_of_botocore(environ)
    ours = Ours(environ)
    assert theirs == keys_of(ours.provider.get())
    by_botocore, by_us = halves(recorder.requests)
    assert list(map(metadata_wire, by_botocore)) == list(map(metadata_wire, by_us))
    assert ["PUT", "GET", "GET"] == [request.method for request in by_us]
    assert [False, False, False] == ours.proxied


INSTANCE_KEYS = {
    "Code": "Success",
    "AccessKeyId": "INSTANCE",
    "SecretAccessKey": "hidden-instance",
    "Token": "hidden-token",
    "Expiration": "2036-01-01T12:00:00Z",
}
ROLES = "/latest/meta-data/iam/security-credentials/"


def metadata(answers: Mapping[str, Answer]) -> RecordingServer:
    defaults: dict[str, Answer] = {
        "/latest/api/token": (200, b"TOKEN=="),
        ROLES: (200, b"role"),
        f"{ROLES}role": (200, json.dumps(INSTANCE_KEYS).encode()),
    }
    return RecordingServer(lambda request: (defaults | answers).get(request.path, (404, b"")))


@pytest.mark.parametrize(
    ("answers", "variables", "finds"),
    [
        ({}, {}, True),
        ({"/latest/api/token": (403, b"")}, {}, True),
        ({"/latest/api/token": (404, b"")}, {}, True),
        ({"/latest/api/token": (400, b"")}, {}, False),
        ({ROLES: (404, b"")}, {}, False),
        ({ROLES: (200, b"")}, {}, False),
        ({f"{ROLES}role": (500, b"")}, {}, False),
        (
            {f"{ROLES}role": (200, b'{"Code": "AssumeRoleUnauthorizedAccess", "Message": "m"}')},
            {},
            False,
        ),
        ({}, {"AWS_EC2_METADATA_DISABLED": "TRUE"}, False),
        ({}, {"AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": "ipv6"}, True),
    ],
    ids=[
        "v2", "v2 forbidden", "no v2", "bad request", "no role", "empty role", "error",
        "not trusted", "disabled", "endpoint wins over mode",
    ],
)  # fmt: skip
def test_takes_the_answers_of_instance_metadata_as_botocore_does(
    answers: dict[str, Answer], variables: dict[str, str], finds: bool, directory: Path
) -> None:
    with metadata(answers) as server:
        environ = metadata_environ(directory, server, **variables)
        if finds:
            assert_same_keys(environ, "INSTANCE")
        else:
            with pytest.raises(botocore.exceptions.NoCredentialsError):
                keys_of_botocore(environ)
            assert "Unable to locate credentials" == refusal(environ)
        by_botocore, by_us = halves(server.requests)
        assert list(map(metadata_wire, by_botocore)) == list(map(metadata_wire, by_us))


def test_instance_metadata_of_version_1_can_be_forbidden(directory: Path) -> None:
    with metadata({"/latest/api/token": (403, b"")}) as server:
        environ = metadata_environ(directory, server, AWS_EC2_METADATA_V1_DISABLED="true")
        with pytest.raises(botocore.exceptions.MetadataRetrievalError) as theirs:
            keys_of_botocore(environ)
        assert refusal(environ) in str(theirs.value)


def test_takes_the_first_role_of_several(directory: Path) -> None:
    with metadata({ROLES: (200, b"role\nother\n")}) as server:
        environ = metadata_environ(directory, server)
        assert "INSTANCE" == Ours(environ).provider.get().access_key


def test_looks_for_instance_metadata_once(directory: Path) -> None:
    with metadata({ROLES: (404, b"")}) as server:
        provider = Ours(metadata_environ(directory, server)).provider
        for _ in range(3):
            with pytest.raises(NoCredentials):
                provider.get()
        assert 2 == len(server.requests)


def test_keeps_stale_keys_of_instance_metadata_for_a_while(directory: Path) -> None:
    stale = json.dumps(INSTANCE_KEYS | {"Expiration": "2026-01-01T12:03:00Z"}).encode()
    with metadata({f"{ROLES}role": (200, stale)}) as server:
        found = Ours(metadata_environ(directory, server)).provider.get()
    assert NOW + timedelta(minutes=20) == found.expiration


def test_does_not_send_a_proxy_to_near_endpoints(directory: Path, container: Container) -> None:
    server, _ = container
    proxy = {"http_proxy": f"http://127.0.0.1:{free_port()}"}
    environ = container_environ(directory, server) | proxy
    assert "CONTAINER1" == Ours(environ).provider.get().access_key


def test_asks_the_sources_in_the_order_of_botocore(
    directory: Path, container: Container, recorder: RecordingServer
) -> None:
    server, _ = container
    environ = container_environ(directory, server) | web_environ(
        directory,
        recorder,
        AWS_EC2_METADATA_DISABLED="false",
        AWS_EC2_METADATA_SERVICE_ENDPOINT=recorder.url,
        **ENVIRONMENT,
    )
    del environ["AWS_PROFILE"]
    found = []
    for variable, value in [
        ("AWS_ACCESS_KEY_ID", ""),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", ""),
        ("AWS_SHARED_CREDENTIALS_FILE", "/missing"),
        ("AWS_CONFIG_FILE", "/missing"),
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", None),
        (None, None),
    ]:
        theirs, ours = keys_of_botocore(environ), keys_of(Ours(environ).provider.get())
        assert theirs[0][:4] == ours[0][:4]
        found.append(ours[0][:4])
        if variable and value is not None:
            environ[variable] = value
        elif variable:
            del environ[variable]
    assert ["ENV", "ASIA", "SHAR", "CONF", "CONT", "test"] == found


# Renewal, with the time in the test's hands.


class Clockwork:
    """A source whose credentials last one hour, and a provider over it."""

    def __init__(self) -> None:
        self.time = NOW
        self.lasts = timedelta(hours=1)
        self.loads = 0
        self.fails = False
        self.before_load: Callable[[], object] = lambda: None
        self.log: list[str] = []
        self.provider = CredentialProvider(
            {"a test": self._load},
            region=None,
            now=lambda: self.time,
            log=lambda level, message: self.log.append(f"{level} {message}"),
        )

    def _load(self) -> Credentials:
        self.before_load()
        self.loads += 1
        if self.fails:
            raise CredentialsFailed("no answer")
        return Credentials(
            access_key=f"KEY{self.loads}",
            secret_key="hidden",
            expiration=self.time + self.lasts,
        )

    def get_after(self, minutes: float) -> str:
        self.time = NOW + timedelta(minutes=minutes)
        return self.provider.get().access_key


@pytest.mark.parametrize(
    ("minutes", "access_key"), [(0, "KEY1"), (45, "KEY1"), (45.1, "KEY2"), (61, "KEY2")]
)
def test_renews_a_quarter_of_an_hour_before_the_end(minutes: float, access_key: str) -> None:
    clock = Clockwork()
    clock.get_after(0)
    assert access_key == clock.get_after(minutes)


def test_keeps_credentials_without_an_end() -> None:
    provider = CredentialProvider(
        {"a test": lambda: Credentials(access_key="A", secret_key="s")},
        region=None,
        now=lambda: NOW,
        log=lambda level, message: None,
    )
    assert provider.get() is provider.get()


@pytest.mark.parametrize("minutes", [46, 51, 59], ids=["advisory", "mandatory", "at the end"])
def test_uses_valid_credentials_while_renewal_fails(minutes: float) -> None:
    clock = Clockwork()
    clock.get_after(0)
    clock.fails = True
    assert "KEY1" == clock.get_after(minutes)
    assert "WARNING Refreshing temporary credentials failed: no answer" == clock.log[-1]


def test_waits_a_minute_after_a_renewal_that_failed() -> None:
    clock = Clockwork()
    clock.get_after(0)
    clock.fails = True
    for minutes in (46, 46.5, 46.9):
        clock.get_after(minutes)
    assert 2 == clock.loads
    clock.fails = False
    assert "KEY3" == clock.get_after(47.1)


def test_fails_when_expired_credentials_cannot_be_renewed() -> None:
    clock = Clockwork()
    clock.get_after(0)
    clock.fails = True
    for _ in range(2):
        with pytest.raises(CredentialsFailed, match="no answer"):
            clock.get_after(61)
    assert 3 == clock.loads


def test_asks_at_once_when_credentials_expire_in_that_minute() -> None:
    clock = Clockwork()
    clock.get_after(0)
    clock.fails = True
    assert "KEY1" == clock.get_after(59.5)
    clock.fails = False
    assert "KEY3" == clock.get_after(60.1)


def test_asks_at_once_when_credentials_are_rejected_in_that_minute() -> None:
    clock = Clockwork()
    clock.get_after(0)
    clock.fails = True
    clock.get_after(50)
    clock.fails = False
    assert "KEY3" == clock.provider.refresh(clock.provider.get()).access_key


def test_fails_when_renewed_credentials_have_expired_already() -> None:
    clock = Clockwork()
    clock.get_after(0)
    clock.lasts = timedelta(minutes=-1)
    with pytest.raises(CredentialsFailed, match="the refreshed credentials are still expired"):
        clock.get_after(61)


def test_one_thread_renews_while_others_go_on() -> None:
    clock = Clockwork()
    clock.get_after(0)
    started, may_end = threading.Event(), threading.Event()

    def block() -> None:
        started.set()
        may_end.wait(10)

    clock.before_load = block
    clock.time = NOW + timedelta(minutes=46)
    renewed: list[str] = []
    thread = threading.Thread(target=lambda: renewed.append(clock.provider.get().access_key))
    thread.start()
    assert started.wait(10)
    assert "KEY1" == clock.provider.get().access_key
    may_end.set()
    thread.join(10)
    assert ["KEY2"] == renewed
    assert 2 == clock.loads


def test_all_threads_wait_for_one_renewal_near_the_end() -> None:
    clock = Clockwork()
    clock.get_after(0)
    clock.time = NOW + timedelta(minutes=55)
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(clock.provider.get().access_key))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert ["KEY2"] * 8 == found
    assert 2 == clock.loads


def test_refreshes_rejected_credentials_once() -> None:
    clock = Clockwork()
    rejected = clock.provider.get()
    found = [clock.provider.refresh(rejected).access_key for _ in range(3)]
    assert ["KEY2"] * 3 == found
    assert 2 == clock.loads


def test_returns_rejected_credentials_when_there_are_no_others() -> None:
    clock = Clockwork()
    rejected = clock.provider.get()
    clock.fails = True
    assert [rejected] * 2 == [clock.provider.refresh(rejected) for _ in range(2)]
    assert 2 == clock.loads


def test_keys_of_the_environment_cannot_be_refreshed(directory: Path) -> None:
    provider = Ours(environ_of(directory, **ENVIRONMENT)).provider
    rejected = provider.get()
    assert rejected == provider.refresh(rejected)


def test_logs_the_source_once() -> None:
    clock = Clockwork()
    for minutes in (0, 1, 46):
        clock.get_after(minutes)
    assert ["INFO Credentials come from a test; region: not set"] == clock.log


def test_shows_no_secret(directory: Path) -> None:
    ours = Ours(environ_of(directory, **ENVIRONMENT))
    assert "hidden" not in f"{ours.provider.get()!r} {vars(ours.provider)!r} {ours.log!r}"
