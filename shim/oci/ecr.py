"""Amazon ECR: the login that an account's registry takes, got with AWS credentials.

https://docs.aws.amazon.com/AmazonECR/latest/APIReference/API_GetAuthorizationToken.html
"""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64decode
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from shim.aws.credentials import credential_provider
from shim.aws.endpoints import configured_endpoint_url, partition
from shim.aws.profiles import read_profile
from shim.aws.sigv4 import Credentials, SignedRequest, sign
from shim.files.exposure import never_exposed
from shim.http.transport import Transport
from shim.http.urls import parse_url
from shim.oci.auth import Login
from shim.oci.errors import RegistryError

ACTION = "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken"
BODY = b"{}"
SECONDS = 20.0
# amazon-ecr-credential-helper, ecr-login/api/client.go: the name's second form has IPv6 too.
_HOST = re.compile(
    r"[a-zA-Z0-9][\w-]*\.dkr[.-]ecr(-fips)?\.([a-zA-Z0-9][\w-]*)\."
    r"(?:amazonaws\.(?:com(?:\.cn)?|eu)|on\.(?:aws|amazonwebservices\.com\.cn)|sc2s\.sgov\.gov|"
    r"c2s\.ic\.gov|cloud\.adc-e\.uk|csp\.hci\.ic\.gov)",
    re.ASCII,
)


def find_region(domain: str) -> tuple[str, bool]:
    """Return the region of a registry, and whether it is a FIPS endpoint; "" if it is not ECR's."""
    match = _HOST.fullmatch(domain)
    return (match[2], bool(match[1])) if match else ("", False)


def resolve_url(
    region: str, fips: bool, environ: Mapping[str, str], settings: Mapping[str, str]
) -> str:
    """Return the URL of the API; settings: of the profile."""
    if url := configured_endpoint_url(environ, settings, service="ecr"):
        return url
    return f"https://{'ecr-fips' if fips else 'api.ecr'}.{region}.{partition(region)[1]}/"


def sign_request(
    url: str, *, region: str, credentials: Credentials, timestamp: datetime
) -> SignedRequest:
    """Build the one request of this service; timestamp: aware."""
    parts = parse_url(url)
    return sign(
        method="POST",
        host=parts.netloc,
        path=parts.target or "/",
        query=(),
        headers={"content-type": "application/x-amz-json-1.1", "x-amz-target": ACTION},
        payload_hash=hashlib.sha256(BODY).hexdigest(),
        credentials=credentials,
        region=region,
        service="ecr",
        timestamp=timestamp,
    )


def parse_answer(body: bytes) -> Login:
    """Read the login out of the answer."""
    try:
        (found,) = json.loads(body)["authorizationData"]
        pair = b64decode(found["authorizationToken"], validate=True).decode()
        username, _, password = pair.partition(":")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RegistryError("The answer of ECR holds no authorization token") from None
    return Login(username=username, password=password)


def get_login(
    domain: str,
    *,
    environ: Mapping[str, str],
    transport: Transport,
    run_helper: Callable[[list[str], float], bytes],
    log: Callable[[str, str], None],
) -> Login:
    """Ask ECR for a login to one of its hosts, as whom the AWS credentials say.

    run_helper(argv, timeout_seconds): of a profile's credential_process.
    Raises RemoteError: without credentials, or where they are refused.
    """
    region, fips = find_region(domain)
    profile = read_profile(environ, never_exposed)
    credentials = credential_provider(
        environ,
        profile=profile,
        region=region,
        fetch=transport.fetch,
        run_helper=run_helper,
        now=lambda: datetime.now(UTC),
        log=log,
        exposure=never_exposed,
    ).get()
    url = resolve_url(region, fips, environ, profile.settings)
    signed = sign_request(url, region=region, credentials=credentials, timestamp=datetime.now(UTC))
    answer = transport.fetch("POST", url, signed.headers, BODY, SECONDS, proxied=True)
    if answer.status != 200:
        raise RegistryError(f"ECR in {region} gives no login: {_read_error(answer.body)}")
    return parse_answer(answer.body)


def _read_error(body: bytes) -> str:
    """Return the kind of an error: its message may repeat what was signed."""
    try:
        kind = str(json.loads(body)["__type"]).rpartition("#")[2]
    except (ValueError, KeyError, TypeError, RecursionError):
        kind = ""
    return kind if kind.isidentifier() else "an answer that is no JSON error"
