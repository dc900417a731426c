"""The login to ECR: the requests are botocore's, the answers moto's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import boto3
import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials as BotoCredentials

from shim.aws.errors import NoCredentials
from shim.aws.sigv4 import Credentials
from shim.http.errors import RemoteError, SettingInvalid
from shim.oci.auth import Login
from shim.oci.ecr import ACTION, BODY, find_region, get_login, resolve_url, sign_request
from shim.oci.errors import RegistryError
from tests.fakes.container_credentials import RecordingServer
from tests.fakes.proxy import running_proxy
from tests.oci.images import Made, write_binary, write_layout
from tests.oci.registries import make_transport, needs_registry, serving
from tests.s3_servers import S3Server, make_certificate

HOST = "123456789012.dkr.ecr.eu-central-1.amazonaws.com"
KEYS = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "SECRETKEY"}
# AWS and the password that moto gives; libxcrypt knows $2y$.
HTPASSWD = "AWS:$2y$05$abcdefghijklmnopqrstuu/4ofrUS75HrKu6f.iuRo0I/XlrmpqlC\n"


@pytest.mark.parametrize(
    ("domain", "region", "fips"),
    [
        (HOST, "eu-central-1", False),
        ("123456789012.dkr.ecr-fips.us-east-1.amazonaws.com", "us-east-1", True),
        ("123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn", "cn-north-1", False),
        ("123456789012.dkr-ecr.eu-west-1.on.aws", "eu-west-1", False),
        (f"{HOST}.example.test", "", False),
        (f"{HOST}:5000", "", False),
        ("public.ecr.aws", "", False),
        ("dkr.ecr.eu-central-1.amazonaws.com", "", False),
        ("123456789012xdkr.ecr.eu-central-1.amazonaws.com", "", False),
        ("r.test", "", False),
    ],
)
def test_registries_of_accounts_are_known_by_their_names(
    domain: str, region: str, fips: bool
) -> None:
    assert (region, fips) == find_region(domain)


@pytest.mark.parametrize("fips", [False, True])
@pytest.mark.parametrize("region", ["eu-central-1", "us-east-1", "us-gov-west-1", "cn-north-1"])
def test_the_api_is_where_botocore_asks_for_it(region: str, fips: bool) -> None:
    if fips and region.startswith("cn-"):
        return  # China has none; no registry there is named so
    client = boto3.client(
        "ecr",
        region_name=region,
        config=Config(use_fips_endpoint=fips),
        aws_access_key_id="a",
        aws_secret_access_key="b",
    )
    assert f"{client.meta.endpoint_url}/" == resolve_url(region, fips, {}, {})


def test_an_endpoint_that_is_configured_is_asked() -> None:
    for environ, settings in (
        ({"AWS_ENDPOINT_URL_ECR": "https://e.test/", "AWS_ENDPOINT_URL": "https://o.test/"}, {}),
        ({}, {"services.ecr.endpoint_url": "https://e.test/", "endpoint_url": "https://o.test/"}),
    ):
        assert "https://e.test/" == resolve_url("eu-west-1", False, environ, settings)
    with pytest.raises(SettingInvalid, match="AWS_ENDPOINT_URL_ECR"):
        resolve_url("eu-west-1", False, {"AWS_ENDPOINT_URL_ECR": "nonsense"}, {})


@pytest.mark.parametrize("token", [None, "TOKEN"])
def test_the_request_is_signed_as_botocore_signs_it(
    token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime(2026, 11, 26, 12, tzinfo=UTC)
    url = "https://api.ecr.eu-central-1.amazonaws.com/"
    keys = Credentials(access_key="AKIDEXAMPLE", secret_key="SECRETKEY", token=token)
    ours = sign_request(url, region="eu-central-1", credentials=keys, timestamp=now)
    signed = {"content-type", "x-amz-target", "x-amz-content-sha256"}
    theirs = AWSRequest("POST", url, {name: ours.headers[name] for name in signed}, BODY)
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda: now.replace(tzinfo=None))
    keys_ = BotoCredentials(keys.access_key, keys.secret_key, token)
    SigV4Auth(keys_, "ecr", "eu-central-1").add_auth(theirs)
    assert theirs.headers["Authorization"] == ours.headers["authorization"]
    assert ("/", ACTION) == (ours.target, ours.headers["x-amz-target"])


def login(url: str, **environ: str) -> Login:
    def run_helper(argv: list[str], timeout_seconds: float) -> bytes:
        raise AssertionError

    return get_login(
        HOST,
        environ={
            "AWS_ENDPOINT_URL_ECR": url,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            **environ,
        },
        transport=make_transport(),
        run_helper=run_helper,
        log=lambda level, sentence: None,
    )


def test_the_login_is_the_one_that_boto3_gets(moto: S3Server) -> None:
    client = boto3.client(
        "ecr",
        endpoint_url=moto.url,
        region_name="eu-central-1",
        aws_access_key_id="a",
        aws_secret_access_key="b",
    )
    (theirs,) = client.get_authorization_token()["authorizationData"]
    assert f"Basic {theirs['authorizationToken']}" == login(moto.url, **KEYS).basic


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (400, b'{"__type": "UnrecognizedClientException", "message": "AKIDEXAMPLE SECRETKEY"}',
         "ECR in eu-central-1 gives no login: UnrecognizedClientException"),
        (403, b"<html>SECRETKEY</html>", "no login: an answer that is no JSON error"),
        (400, b'{"__type": "a b SECRETKEY"}', "no login: an answer that is no JSON error"),
        (200, b"{}", "holds no authorization token"),
        (200, b'{"authorizationData": [{"authorizationToken": "!"}]}', "no authorization token"),
        (200, b'{"authorizationData": []}', "holds no authorization token"),
    ],
)  # fmt: skip
def test_refusals_name_what_is_wrong_and_no_key(status: int, body: bytes, said: str) -> None:
    with RecordingServer(lambda request: (status, body)) as server:
        with pytest.raises(RegistryError, match=said) as caught:
            login(server.url, **KEYS)
    assert "KEY" not in str(caught.value)


def test_without_credentials_it_says_so() -> None:
    with pytest.raises(NoCredentials, match="Unable to locate credentials"):
        login("http://127.0.0.1:1")


def test_an_api_that_cannot_be_reached_is_an_error() -> None:
    with pytest.raises(RemoteError, match="Could not connect"):
        login("http://127.0.0.1:1", **KEYS)


@needs_registry
def test_an_image_is_patched_in_the_registry_of_an_account(tmp_path: Path, moto: S3Server) -> None:
    """A proxy leads the name of the account's registry to a registry here."""
    certificate, key = make_certificate(tmp_path, host=HOST)
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    auth = f"auth:\n  htpasswd:\n    realm: https://{HOST}/\n    path: {tmp_path}/htpasswd\n"
    tls = f"  tls:\n    certificate: {certificate}\n    key: {key}\n"
    fake = write_binary(tmp_path / "fake")
    base = write_layout(tmp_path / "base", Made(zipped=True))
    environ = {
        "PATH": os.environ["PATH"],
        **KEYS,
        "HOME": str(tmp_path),
        "AWS_ENDPOINT_URL_ECR": moto.url,
        "NO_PROXY": "127.0.0.1",
        "SSL_CERT_FILE": str(certificate),
    }
    with serving(tmp_path / "registry", http=tls, rest=auth) as server:
        with running_proxy(int(server.rpartition(":")[2])) as (port, heads):
            environ["HTTPS_PROXY"] = f"http://127.0.0.1:{port}"
            for source, dest in ((base, f"{HOST}/a:1"), (f"{HOST}/a:1", f"{HOST}/b:1")):
                words = ["patch", source, dest, "--binary", fake, "--json"]
                done = subprocess.run(
                    [sys.executable, "-m", "shim", *map(str, words)],
                    cwd=Path(__file__).parents[2],
                    env=environ,
                    capture_output=True,
                    text=True,
                )
                assert 0 == done.returncode, done.stderr
                assert "Credentials come from the environment" in done.stderr
                assert KEYS["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr
                assert json.loads(done.stdout)["reference"].startswith(dest.rpartition(":")[0])
    assert {f"CONNECT {HOST}:443 HTTP/1.1".encode()} == {head.split(b"\r\n")[0] for head in heads}
