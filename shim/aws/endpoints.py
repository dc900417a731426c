"""Which region is meant, and which endpoint a service has that no bucket is part of.

The order of precedence is boto3's; the rules are those of botocore's rule sets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from shim.http.errors import RemoteError, SettingInvalid
from shim.http.urls import Url, parse_url

URL_FORM = "http://host[:port] or https://host[:port], without a user name"

# Prefix of the region's name -> name and DNS suffix of the partition (data/partitions.json).
PARTITIONS = {
    "cn-": ("aws-cn", "amazonaws.com.cn"),
    "us-gov-": ("aws-us-gov", "amazonaws.com"),
    "us-iso-": ("aws-iso", "c2s.ic.gov"),
    "us-isob-": ("aws-iso-b", "sc2s.sgov.gov"),
    "us-isof-": ("aws-iso-f", "csp.hci.ic.gov"),
    "eu-isoe-": ("aws-iso-e", "cloud.adc-e.uk"),
    "eusc-de-": ("aws-eusc", "amazonaws.eu"),
}

# botocore args.py: LEGACY_GLOBAL_STS_REGIONS.
LEGACY_STS_REGIONS = frozenset(
    "ap-northeast-1 ap-south-1 ap-southeast-1 ap-southeast-2 aws-global ca-central-1 eu-central-1 "
    "eu-north-1 eu-west-1 eu-west-2 eu-west-3 sa-east-1 us-east-1 us-east-2 us-west-1 us-west-2"
    "".split()
)

_LABEL = re.compile(r"(?!-)[a-zA-Z0-9-]{1,63}(?<!-)")


class EndpointUnresolved(RemoteError, ValueError):
    """The configuration and the bucket do not lead to an endpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where requests for one bucket go, and what they are signed for.

    host is the Host header: with the port unless it is the scheme's default.
    base_path stands before "/key": percent-encoded, without a final slash, and in path style with
    the bucket.
    """

    scheme: str
    host: str
    port: int
    base_path: str
    region: str
    service: str

    @property
    def hostname(self) -> str:
        """The name or address to connect to, IPv6 without brackets."""
        return urlsplit(f"//{self.host}").hostname or ""


def is_true(text: str) -> bool:
    """Read a boolean as botocore does: only "true" is, in any case."""
    return text.lower() == "true"


def configured_region(
    environ: Mapping[str, str], profile: Mapping[str, str]
) -> tuple[str | None, bool]:
    """Return the region, and whether FIPS endpoints are asked for: by a switch or in its name."""
    fips = is_true(environ.get("AWS_USE_FIPS_ENDPOINT") or profile.get("use_fips_endpoint", ""))
    name, named = _first_set(environ, ("AWS_DEFAULT_REGION", "AWS_REGION"), profile, ("region",))
    if not named:
        return None, fips
    if not is_label(named):
        raise SettingInvalid(name, expected="a region such as eu-central-1", found=named)
    region = named.removeprefix("fips-").removesuffix("-fips")
    return region, fips or region != named


def configured_endpoint_url(
    environ: Mapping[str, str], profile: Mapping[str, str], *, service: str
) -> str | None:
    """Return the endpoint of a service ("s3", "sts"), the most specific setting first.

    Raises SettingInvalid for what is no URL.
    """
    variables: tuple[str, ...] = ("AWS_S3_ENDPOINT_URL",) if service == "s3" else ()
    options: tuple[str, ...] = ()
    if not is_true(
        environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS")
        or profile.get("ignore_configured_endpoint_urls", "")
    ):
        variables += (f"AWS_ENDPOINT_URL_{service.upper()}", "AWS_ENDPOINT_URL")
        options = (f"services.{service}.endpoint_url", "endpoint_url")
    name, url = _first_set(environ, variables, profile, options)
    if not url:
        return None
    try:
        _parse_endpoint(url)
    except ValueError:
        raise SettingInvalid(name, expected=URL_FORM, found=url) from None
    return url


def _first_set(
    environ: Mapping[str, str],
    variables: tuple[str, ...],
    profile: Mapping[str, str],
    options: tuple[str, ...],
) -> tuple[str, str]:
    """Return what the first that is set is called, and its text; two empty texts if none is."""
    for name in variables:
        if environ.get(name):
            return name, environ[name]
    for option in options:
        if profile.get(option):
            return f"{option} of the profile", profile[option]
    return "", ""


def resolve_sts_url(environ: Mapping[str, str], profile: Mapping[str, str]) -> str:
    """Return the URL of the Security Token Service, with a final slash."""
    if endpoint_url := configured_endpoint_url(environ, profile, service="sts"):
        endpoint = custom_endpoint(endpoint_url, "")
        return f"{endpoint.scheme}://{endpoint.host}{endpoint.base_path}/"
    region, fips = configured_region(environ, profile)
    mode = environ.get("AWS_STS_REGIONAL_ENDPOINTS") or profile.get("sts_regional_endpoints")
    if not fips and (not region or (mode == "legacy" and region in LEGACY_STS_REGIONS)):
        return "https://sts.amazonaws.com/"
    region = region or "us-east-1"
    name, suffix = partition(region)
    service = "sts-fips" if fips and name != "aws-us-gov" else "sts"
    return f"https://{service}.{region}.{suffix}/"


def partition(region: str) -> tuple[str, str]:
    """Return name and DNS suffix of the partition that a region belongs to."""
    for prefix, found in PARTITIONS.items():
        if region.startswith(prefix):
            return found
    return "aws", "amazonaws.com"


def _parse_endpoint(text: str) -> Url:
    url = parse_url(text)
    if any(mark in text for mark in "@?#"):
        raise ValueError
    return url


def custom_endpoint(text: str, region: str) -> Endpoint:
    try:
        url = _parse_endpoint(text)
    except ValueError:
        raise EndpointUnresolved(f"Custom endpoint was not a valid URI: {URL_FORM}") from None
    return Endpoint(
        scheme=url.scheme,
        host=url.netloc,
        port=url.port,
        base_path=quote(url.target.rstrip("/"), safe="/~%"),
        region=region,
        service="s3",
    )


def is_label(text: str) -> bool:
    return _LABEL.fullmatch(text) is not None
