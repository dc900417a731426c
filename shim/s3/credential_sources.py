"""The places that credentials come from, each asked as botocore asks it.

Rule 1: None means not configured; a place that is configured but fails is an error.
Rule 2: what comes from outside may hold secrets: it is checked, never quoted.
Rule 3: endpoints of the container and the machine are asked directly, never through a proxy.
"""

from __future__ import annotations

import ipaddress
import json
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

from shim.s3 import affinity
from shim.s3.endpoints import is_true, resolve_sts_url
from shim.s3.errors import CredentialsFailed, TransportError
from shim.s3.profiles import Profile
from shim.s3.sigv4 import Credentials
from shim.s3.transport import FetchResponse
from shim.s3.xml import Element, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# fetch(method, url, headers, body, timeout_seconds, proxied)
Fetch = Callable[[str, str, Mapping[str, str], bytes | None, float, bool], FetchResponse]

# When instance metadata cannot renew its keys, S3 goes on accepting the old ones: botocore
# utils.py, InstanceMetadataFetcher._evaluate_expiration.
STALE_EXTENSION = timedelta(minutes=20)

STS_TIMEOUT_SECONDS = 20.0
STS_RETRIED_CODES = ("IDPCommunicationError", "Throttling")
CONTAINER_ADDRESS = "http://169.254.170.2"
CONTAINER_HOSTS = ("localhost", "169.254.170.2", "169.254.170.23", "fd00:ec2::23")
CONTAINER_TIMEOUT_SECONDS = 2.0
ATTEMPTS = 3
PAUSE_SECONDS = 1.0
INSTANCE_ADDRESS, INSTANCE_ADDRESS_IPV6 = "http://169.254.169.254", "http://[fd00:ec2::254]"
INSTANCE_ROLE_PATH = "/latest/meta-data/iam/security-credentials/"
INSTANCE_TOKEN_SECONDS = "21600"
HELPER_TIMEOUT_SECONDS = 60.0
MAX_TOKEN_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """One method for each place that can give credentials; None where it is not configured."""

    environ: Mapping[str, str] = field(repr=False)
    profile: Profile
    fetch: Fetch
    run_helper: Callable[[list[str], float], bytes]
    now: Callable[[], datetime]
    sleep: Callable[[float], None]

    def environment(self) -> Credentials | None:
        """Take the keys of the environment."""
        if not self.environ.get("AWS_ACCESS_KEY_ID"):
            return None
        older = self.environ.get("AWS_SECURITY_TOKEN")
        token = "AWS_SECURITY_TOKEN" if older else "AWS_SESSION_TOKEN"
        keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", token)
        return _credentials("env", self.environ, *keys, "AWS_CREDENTIAL_EXPIRATION")

    def web_identity(self) -> Credentials | None:
        """Assume a role with the token that Kubernetes keeps in a file."""
        settings = self.profile.settings
        if "role_arn" in settings and "web_identity_token_file" not in settings:
            raise CredentialsFailed(self._not_supported("role_arn"))
        token_file = self._setting("AWS_WEB_IDENTITY_TOKEN_FILE", "web_identity_token_file")
        if not token_file:
            return None
        role_arn = self._setting("AWS_ROLE_ARN", "role_arn")
        if not role_arn:
            raise CredentialsFailed(
                "A web identity token file is configured but no role: set AWS_ROLE_ARN, or "
                "role_arn in the profile"
            )
        form = {
            "Action": "AssumeRoleWithWebIdentity",
            "Version": "2011-06-15",
            "RoleArn": role_arn,
            "RoleSessionName": self._setting("AWS_ROLE_SESSION_NAME", "role_session_name")
            or f"botocore-session-{self.now().timestamp():.0f}",
            "WebIdentityToken": _read_token(token_file),
        }
        return self._attempt(lambda: self._assume_role_with_web_identity(urlencode(form).encode()))

    def _assume_role_with_web_identity(self, form: bytes) -> Credentials:
        url = resolve_sts_url(self.environ, self.profile.settings)
        headers = {"content-type": "application/x-www-form-urlencoded; charset=utf-8"}
        response = self._ask("POST", url, headers, STS_TIMEOUT_SECONDS, form=form)
        root = parse(response.body)
        if response.status == 200:
            found = _descend(root, "AssumeRoleWithWebIdentityResult", "Credentials")
            names = ("AccessKeyId", "SecretAccessKey", "SessionToken", "Expiration")
            return _credentials(url, {name: found.find(name) for name in names}, *names)
        error = _descend(root, "Error")
        sentence = (
            f"An error occurred ({error.find('Code')}) when calling the AssumeRoleWithWebIdentity "
            f"operation: {error.find('Message')}"
        )
        if response.status >= 500 or error.find("Code").startswith(STS_RETRIED_CODES):
            raise _Unavailable(sentence)
        raise CredentialsFailed(sentence)

    def profile_keys(self) -> Credentials | None:
        """Take the profile's keys, or those that its program prints."""
        settings, shared = self.profile.settings, self.profile.credentials
        for option in ("sso_session", "sso_start_url", "sso_account_id"):
            if option in settings:
                raise CredentialsFailed(self._not_supported(option))
        if "aws_access_key_id" in shared:
            return _profile_keys("shared-credentials-file", shared)
        if "login_session" in settings:
            raise CredentialsFailed(self._not_supported("login_session"))
        if command := settings.get("credential_process"):
            return self._run_process(command)
        if "aws_access_key_id" in settings:
            return _profile_keys("config-file", settings)
        return None

    def _run_process(self, command: str) -> Credentials:
        affinity.spread()
        try:
            output = self.run_helper(shlex.split(command), HELPER_TIMEOUT_SECONDS)
        except (OSError, ValueError) as error:
            raise CredentialsFailed(f"The credential_process failed: {error}") from error
        answer = _decode_json(output, "credential_process")
        if (version := answer.get("Version")) != 1:
            raise CredentialsFailed(
                f"Unsupported version {version!r} for credential process provider, supported "
                "versions: 1"
            )
        names = ("AccessKeyId", "SecretAccessKey", "SessionToken", "Expiration")
        return _credentials("credential_process", answer, *names)

    def container(self) -> Credentials | None:
        """Ask the endpoint that ECS, EKS or SageMaker names in the environment."""
        relative = self.environ.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
        full = self.environ.get("AWS_CONTAINER_CREDENTIALS_FULL_URI")
        if not relative and not full:
            return None
        if relative and not relative.startswith("/"):
            raise CredentialsFailed("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI must begin with /")
        url = CONTAINER_ADDRESS + relative if relative else full or ""
        _check_container_host(url)
        return self._attempt(lambda: self._get_container_credentials(url))

    def _get_container_credentials(self, url: str) -> Credentials:
        headers = {"accept": "application/json"}
        if path := self.environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"):
            headers["authorization"] = _read_token(path)
        elif token := self.environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN"):
            headers["authorization"] = _one_line(token, "AWS_CONTAINER_AUTHORIZATION_TOKEN")
        response = self._ask("GET", url, headers, CONTAINER_TIMEOUT_SECONDS)
        if response.status != 200:
            raise _Unavailable(f"The container's credentials endpoint answered {response.status}")
        answer = _decode_json(response.body, "the container's credentials endpoint")
        names = ("AccessKeyId", "SecretAccessKey", "Token", "Expiration")
        return _credentials("container", answer, *names)

    def instance(self) -> Credentials | None:
        """Ask the metadata service of EC2, version 2 first."""
        if is_true(self.environ.get("AWS_EC2_METADATA_DISABLED", "")):
            return None
        token = self._get_instance_token()
        if token is None:
            return None
        headers = {"x-aws-ec2-metadata-token": token} if token else {}
        role = self._ask_instance("GET", INSTANCE_ROLE_PATH, headers)
        names = role.body.decode(errors="replace").split() if role and role.status == 200 else []
        if not names:
            return None
        response = self._ask_instance("GET", INSTANCE_ROLE_PATH + quote(names[0]), headers)
        if response is None or response.status != 200:
            return None
        answer = _decode_json(response.body, "instance metadata")
        keys = ("AccessKeyId", "SecretAccessKey", "Token", "Expiration")
        if not all(map(answer.get, keys)):
            return None
        found = _credentials("instance metadata", answer, *keys)
        end = found.expiration or self.now()
        return replace(found, expiration=max(end, self.now() + STALE_EXTENSION))

    def _get_instance_token(self) -> str | None:
        """Return a token of version 2, "" to go on with version 1, None to give up."""
        headers = {"x-aws-ec2-metadata-token-ttl-seconds": INSTANCE_TOKEN_SECONDS}
        response = self._ask_instance("PUT", "/latest/api/token", headers)
        if response and response.status == 200:
            return _one_line(response.body.decode(errors="replace"), "token of instance metadata")
        if response and response.status == 400:
            return None
        if is_true(self._setting("AWS_EC2_METADATA_V1_DISABLED", "ec2_metadata_v1_disabled")):
            raise CredentialsFailed(
                "Unable to retrieve token for use in IMDSv2 call and IMDSv1 has been disabled"
            )
        return ""

    def _ask_instance(
        self, method: str, path: str, headers: Mapping[str, str]
    ) -> FetchResponse | None:
        base = self._setting("AWS_EC2_METADATA_SERVICE_ENDPOINT", "ec2_metadata_service_endpoint")
        mode = self._setting(
            "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "ec2_metadata_service_endpoint_mode"
        )
        default = INSTANCE_ADDRESS_IPV6 if mode.lower() == "ipv6" else INSTANCE_ADDRESS
        url = (base or default).rstrip("/") + path
        timeout = self._count("AWS_METADATA_SERVICE_TIMEOUT", "metadata_service_timeout")
        attempts = self._count("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "metadata_service_num_attempts")
        for _ in range(attempts):
            try:
                response = self._ask(method, url, headers, timeout)
            except TransportError:
                continue
            if response.status < 500:
                return response
        return None

    def _count(self, variable: str, option: str) -> int:
        text = self._setting(variable, option) or "1"
        if not text.isdecimal():
            raise CredentialsFailed(f"{variable} is not a whole number: {text!r}")
        return int(text)

    def _setting(self, variable: str, option: str) -> str:
        return self.environ.get(variable) or self.profile.settings.get(option) or ""

    def _not_supported(self, option: str) -> str:
        return (
            f"The profile {self.profile.name} gets its credentials by {option}, which is not "
            "supported: use keys, a web identity token, a credential_process, or the role of the "
            "container or machine"
        )

    def _attempt(self, ask: Callable[[], Credentials]) -> Credentials:
        for _ in range(ATTEMPTS - 1):
            try:
                return ask()
            except (TransportError, _Unavailable):
                self.sleep(PAUSE_SECONDS)
        try:
            return ask()
        except TransportError as error:
            raise CredentialsFailed(str(error)) from error

    def _ask(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        timeout_seconds: float,
        form: bytes | None = None,
    ) -> FetchResponse:
        """Make one request; only a form, which goes to a public service, may go through a proxy."""
        try:
            return self.fetch(method, url, headers, form, timeout_seconds, form is not None)
        except OSError as error:
            raise TransportError(str(error)) from error
        except ValueError:
            raise CredentialsFailed(f"Not an address to get credentials from: {url!r}") from None


class _Unavailable(CredentialsFailed):
    """A source that may answer when it is asked again."""


def _profile_keys(source: str, section: Mapping[str, str]) -> Credentials:
    token = "aws_security_token" if "aws_security_token" in section else "aws_session_token"
    return _credentials(source, section, "aws_access_key_id", "aws_secret_access_key", token, "")


def _credentials(
    source: str,
    values: Mapping[str, Any],
    access_key: str,
    secret_key: str,
    token: str,
    expiration: str,
) -> Credentials:
    """Build credentials from the values of these names; the last two may be missing."""
    for name in (access_key, secret_key, token):
        value = values.get(name) or ""
        if not value and name != token:
            raise CredentialsFailed(f"Partial credentials found in {source}, missing: {name}")
        if not isinstance(value, str) or not value.isascii() or not value.isprintable():
            raise CredentialsFailed(f"The {name} of {source} holds characters that no key has")
    end = values.get(expiration)
    return Credentials(
        access_key=values[access_key],
        secret_key=values[secret_key],
        token=values.get(token) or None,
        expiration=_parse_time(end, source) if end else None,
    )


def _parse_time(text: object, source: str) -> datetime:
    try:
        time_ = datetime.fromisoformat(str(text))
    except ValueError:
        raise CredentialsFailed(f"The expiration of {source} is not a time: {text!r}") from None
    return time_ if time_.tzinfo else time_.replace(tzinfo=UTC)


def _decode_json(body: bytes, source: str) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        # Not quoted: it may hold keys.
        raise _Unavailable(f"Unable to parse JSON returned from {source}")
    return answer


def _descend(element: Element, *names: str) -> Element:
    for name in names:
        element = next((one for one in element.children if one.name == name), Element(name))
    return element


def _read_token(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_TOKEN_BYTES).decode()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise CredentialsFailed(f"Unable to read the token file {path}: {reason}") from None
    return _one_line(text, f"token in {path}")


def _one_line(text: str, what: str) -> str:
    """Strip a token; what cannot be the value of a header is refused."""
    text = text.strip()
    if not (text.isascii() and text.isprintable()):
        raise CredentialsFailed(f"The {what} is not one line of ASCII text")
    return text


def _check_container_host(url: str) -> None:
    """Refuse to ask hosts that have no business with credentials."""
    scheme = host = ""
    is_loopback = False
    with suppress(ValueError):  # of urlsplit; a name is no address
        scheme, host = urlsplit(url).scheme, urlsplit(url).hostname or ""
        is_loopback = ipaddress.ip_address(host).is_loopback
    if scheme != "https" and not is_loopback and host not in CONTAINER_HOSTS:
        raise CredentialsFailed(
            f"Unsupported host {host!r}.  Can only retrieve metadata from a loopback address or "
            f"one of these hosts: {', '.join(CONTAINER_HOSTS)}"
        )
