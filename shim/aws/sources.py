"""The places that credentials come from, each asked as botocore asks it.

Rule 1: None means not configured; a place that is configured but fails is an error.
Rule 2: what comes from outside may hold secrets: it is checked, never quoted.
Rule 3: endpoints of the container and the machine are asked directly, never through a proxy.
Rule 4: which place it is follows from the environment and the profile, which are read once, before
        the image's command runs. What must be read again later, tokens that are renewed in files,
        is read only while the command could not have written it: EKS projects them as root's, on a
        mount of their own, behind a link of root's. What a credential_process is and does is the
        image's affair: it runs as the image's user, whoever that is.
"""

from __future__ import annotations

import ipaddress
import json
import re
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from shim.aws.endpoints import is_true, resolve_sts_url
from shim.aws.errors import CredentialsFailed
from shim.aws.profiles import Profile
from shim.aws.sigv4 import Credentials
from shim.aws.xml import Element, parse
from shim.files.exposure import find_exposure
from shim.http.attempts import Attempts, Policy
from shim.http.errors import SettingInvalid, TransportError
from shim.http.transport import FetchResponse
from shim.http.urls import Url, parse_url

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
UNAVAILABLE = "unavailable"
PAUSE_SECONDS = 1.0
INSTANCE_ADDRESS, INSTANCE_ADDRESS_IPV6 = "http://169.254.169.254", "http://[fd00:ec2::254]"
INSTANCE_ROLE_PATH = "/latest/meta-data/iam/security-credentials/"
INSTANCE_TOKEN_SECONDS = "21600"
INSTANCE_COUNTS = (
    ("AWS_METADATA_SERVICE_TIMEOUT", "metadata_service_timeout"),
    ("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "metadata_service_num_attempts"),
)
HELPER_TIMEOUT_SECONDS = 60.0
MAX_TOKEN_BYTES = 64 * 1024
URL_FORM = "http://host[:port]/path or https://host[:port]/path"
# What a profile may have instead of keys, supported or not.
PROFILE_OPTIONS = (
    "sso_session sso_start_url sso_account_id login_session credential_process aws_access_key_id"
).split()
_COUNT = re.compile(r"[0-9]{1,6}")
_TARGET = re.compile(r"[!-~]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The place that credentials come from; load() gives None when there are none after all.

    url: what load() asks, "" when it asks no server.
    """

    name: str
    load: Callable[[], Credentials | None]
    url: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """One method for each place that can give credentials; None where it is not configured."""

    environ: Mapping[str, str] = field(repr=False)
    profile: Profile
    fetch: Fetch
    run_helper: Callable[[list[str], float], bytes]
    now: Callable[[], datetime]
    sleep: Callable[[float], None]
    exposure: Callable[[str], str] = find_exposure

    def choose(self) -> Source:
        """Decide by what is configured, without asking anybody; the first place is the one.

        Raises SettingInvalid where a variable or an option of that place can be none.
        """
        settings = self.profile.settings
        # Asked last, but what is said of it is checked like everything else.
        instance = Source(
            name="the instance metadata", load=self.instance, url=self._instance_url()
        )
        for variable, option in INSTANCE_COUNTS:
            self._count(variable, option)
        if self.environ.get("AWS_ACCESS_KEY_ID"):
            return Source(name="the environment", load=self.environment)
        is_role_alone = "role_arn" in settings and "web_identity_token_file" not in settings
        if is_role_alone or self._token_file():
            url = resolve_sts_url(self.environ, settings)
            return Source(name="a web identity", load=self.web_identity, url=url)
        if any(settings.get(option) is not None for option in PROFILE_OPTIONS):
            return Source(name=f"the profile {self.profile.name}", load=self.profile_keys)
        if url := self._container_url():
            return Source(name="the container", load=self.container, url=url)
        return instance

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
        token_file = self._token_file()
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
            "WebIdentityToken": self._read_token(token_file),
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
        url = self._container_url()
        return self._attempt(lambda: self._get_container_credentials(url)) if url else None

    def _container_url(self) -> str:
        relative = self.environ.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
        if relative:
            name, url = "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", CONTAINER_ADDRESS + relative
            if not relative.startswith("/"):
                raise SettingInvalid(name, expected="a path that begins with /", found=relative)
        else:
            name = "AWS_CONTAINER_CREDENTIALS_FULL_URI"
            url = self.environ.get(name, "")
        if url:
            _check_container_host(name, url)
        return url

    def _get_container_credentials(self, url: str) -> Credentials:
        headers = {"accept": "application/json"}
        if path := self.environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"):
            headers["authorization"] = self._read_token(path)
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
        url = self._instance_url() + path
        timeout, attempts = (self._count(*names) for names in INSTANCE_COUNTS)
        for _ in range(attempts):
            try:
                response = self._ask(method, url, headers, timeout)
            except TransportError:
                continue
            if response.status < 500:
                return response
        return None

    def _instance_url(self) -> str:
        name = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
        base = self._setting(name, name.lower().removeprefix("aws_"))
        mode = self._setting(f"{name}_MODE", "ec2_metadata_service_endpoint_mode")
        if not base:
            return INSTANCE_ADDRESS_IPV6 if mode.lower() == "ipv6" else INSTANCE_ADDRESS
        _parse(f"{name}, or its option in the profile", base)
        return base.rstrip("/")

    def _count(self, variable: str, option: str) -> int:
        text = self._setting(variable, option) or "1"
        if not _COUNT.fullmatch(text):
            name = f"{variable}, or {option} of the profile"
            raise SettingInvalid(name, expected="a whole number up to 999999", found=text)
        return int(text)

    def _token_file(self) -> str:
        return self._setting("AWS_WEB_IDENTITY_TOKEN_FILE", "web_identity_token_file")

    def _read_token(self, path: str) -> str:
        """Read a token that may have been renewed, unless others could have written it (rule 4)."""
        try:
            if reason := self.exposure(path):
                raise CredentialsFailed(f"The token file {path} is not read: {reason}")
            with Path(path).open("rb") as file:
                text = file.read(MAX_TOKEN_BYTES).decode()
        except (OSError, ValueError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or "it is not UTF-8"
            raise CredentialsFailed(f"Unable to read the token file {path}: {reason}") from None
        return _one_line(text, f"token in {path}")

    def _setting(self, variable: str, option: str) -> str:
        return self.environ.get(variable) or self.profile.settings.get(option) or ""

    def _not_supported(self, option: str) -> str:
        return (
            f"The profile {self.profile.name} gets its credentials by {option}, which is not "
            "supported: use keys, a web identity token, a credential_process, or the role of the "
            "container or machine"
        )

    def _attempt(self, ask: Callable[[], Credentials]) -> Credentials:
        attempts = Attempts({UNAVAILABLE: Policy()}, most=ATTEMPTS)
        while True:
            try:
                return ask()
            except (TransportError, _Unavailable) as error:
                if not attempts.add(UNAVAILABLE):
                    raise CredentialsFailed(str(error)) from error
                self.sleep(PAUSE_SECONDS)

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
        except ValueError:  # of what would break the head of a request
            raise CredentialsFailed("The request for credentials cannot be written") from None


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
    """Parse the forms that are met: ISO 8601 and that of RFC 1123."""
    for parse_form in (datetime.fromisoformat, parsedate_to_datetime):
        with suppress(ValueError, OverflowError):
            time_ = parse_form(str(text))
            return time_ if time_.tzinfo else time_.replace(tzinfo=UTC)
    raise CredentialsFailed(f"The expiration of {source} is not a time")


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


def _one_line(text: str, what: str) -> str:
    """Strip a token; what cannot be the value of a header is refused."""
    text = text.strip()
    if not (text.isascii() and text.isprintable()):
        raise CredentialsFailed(f"The {what} is not one line of ASCII text")
    return text


def _parse(name: str, text: str) -> Url:
    try:
        url = parse_url(text)
        if not _TARGET.fullmatch(url.target):
            raise ValueError
    except ValueError:
        raise SettingInvalid(name, expected=URL_FORM, found=text) from None
    return url


def _check_container_host(name: str, text: str) -> None:
    """Refuse to ask hosts that have no business with credentials."""
    url = _parse(name, text)
    is_loopback = False
    with suppress(ValueError):  # a name is no address
        is_loopback = ipaddress.ip_address(url.host).is_loopback
    if url.scheme != "https" and not is_loopback and url.host not in CONTAINER_HOSTS:
        expected = f"https, or http to a loopback address or one of {', '.join(CONTAINER_HOSTS)}"
        raise SettingInvalid(name, expected=expected, found=text)
