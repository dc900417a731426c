"""Which host, path and signing region serve a bucket.

The rules are those of botocore's rule set (data/s3/2006-03-01/endpoint-rule-set-1.json), the
configuration's order of precedence is boto3's; its sentences are kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from urllib.parse import quote

from shim.aws.endpoints import (
    Endpoint,
    EndpointUnresolved,
    configured_endpoint_url,
    configured_region,
    custom_endpoint,
    is_label,
    is_true,
    partition,
)
from shim.contract.uri import is_bucket_name

GLOBAL_REGION = "aws-global"


_IPV4 = re.compile(r"[0-9]{1,3}(\.[0-9]{1,3}){3}")
_AWS_URL = re.compile(
    r"https?://(?:[^/]*\.)?s3(?:-fips)?(?:\.dualstack)?[.-](?P<region>[a-z]+-[a-z0-9-]+-[0-9]+)"
    r"\.(?:vpce\.)?amazonaws\.com(?:\.cn)?(?::[0-9]+)?/?"
)

_INVALID_NAME = "Invalid ARN: The {} may only contain a-z, A-Z, 0-9 and `-`. Found: `{}`"

# Service of an ARN -> first label of its host, and how sentences about it begin.
_ARN_SERVICES = {
    "s3": ("s3-accesspoint", "Access Points do"),
    "s3-object-lambda": ("s3-object-lambda", "S3 Object Lambda does"),
    "s3-outposts": ("s3-outposts", "S3 Outposts does"),
}

_UNSUPPORTED = {
    "--x-s3": "Directory buckets (S3 Express One Zone)",
    "--xa-s3": "Access points of directory buckets (S3 Express One Zone)",
    "--op-s3": "Aliases of Outposts access points",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointConfiguration:
    """What the environment says about endpoints; no region means the global endpoint."""

    region: str | None = None
    endpoint_url: str | None = None
    addressing_style: str = "auto"
    use_fips: bool = False
    use_dualstack: bool = False
    use_accelerate: bool = False
    use_arn_region: bool = True
    use_global_endpoint: bool = False  # of us-east-1

    @classmethod
    def from_environ(
        cls, environ: Mapping[str, str], profile: Mapping[str, str]
    ) -> EndpointConfiguration:
        """Read the environment, then the profile's settings; an empty text counts as unset.

        Raises SettingInvalid for a region or an endpoint that can be none.
        """

        def setting(variable: str, key: str, default: str = "") -> str:
            return environ.get(variable) or profile.get(key) or default

        endpoint_url = configured_endpoint_url(environ, profile, service="s3")
        region, fips = configured_region(environ, profile)
        aws_url = _AWS_URL.fullmatch(endpoint_url or "")
        dualstack = profile.get("s3.use_dualstack_endpoint") or setting(
            "AWS_USE_DUALSTACK_ENDPOINT", "use_dualstack_endpoint"
        )
        regional = setting(
            "AWS_S3_US_EAST_1_REGIONAL_ENDPOINT", "s3.us_east_1_regional_endpoint", "legacy"
        )
        return cls(
            region=region or (aws_url["region"] if aws_url else None),
            endpoint_url=endpoint_url,
            addressing_style=profile.get("s3.addressing_style") or "auto",
            use_fips=not endpoint_url and fips,
            use_dualstack=not endpoint_url and is_true(dualstack),
            use_accelerate=is_true(profile.get("s3.use_accelerate_endpoint", "")),
            use_arn_region=is_true(setting("AWS_S3_USE_ARN_REGION", "s3.use_arn_region", "true")),
            use_global_endpoint=regional != "regional",
        )


def resolve(
    configuration: EndpointConfiguration, bucket: str, region: str | None = None
) -> Endpoint:
    """Return the endpoint of a bucket, raise EndpointUnresolved where none can be right.

    region: what the service told of the bucket, instead of the configured one.
    """
    c = configuration
    region = region or c.region or GLOBAL_REGION
    unsupported = next((what for end, what in _UNSUPPORTED.items() if bucket.endswith(end)), None)
    in_china = partition(region)[0] == "aws-cn"
    custom = bool(c.endpoint_url)
    _refuse(
        (c.use_accelerate and c.use_fips, "Accelerate cannot be used with FIPS"),
        (
            custom and c.use_dualstack,
            "Cannot set dual-stack in combination with a custom endpoint.",
        ),
        (custom and c.use_fips, "A custom endpoint cannot be combined with FIPS"),
        (custom and c.use_accelerate, "A custom endpoint cannot be combined with S3 Accelerate"),
        (c.use_fips and in_china, "Partition does not support FIPS"),
        (not is_label(region), "Invalid region: region was not a valid DNS name."),
        (unsupported, f"{unsupported} are not supported: `{bucket}`"),
    )
    endpoint = _service_endpoint(c, region)
    if bucket.startswith("arn:"):
        return _resolve_arn(c, endpoint, region, bucket)
    if _is_virtual_host(c, endpoint, bucket):
        _refuse((c.use_accelerate and in_china, "S3 Accelerate cannot be used in this region"))
        return replace(endpoint, host=f"{bucket}.{endpoint.host}")
    _refuse((c.use_accelerate, "Path-style addressing cannot be used with S3 Accelerate"))
    return replace(endpoint, base_path=f"{endpoint.base_path}/{quote(bucket, safe='')}")


def _service_endpoint(c: EndpointConfiguration, region: str) -> Endpoint:
    """The endpoint before a bucket has its place in it."""
    signing_region = "us-east-1" if region == GLOBAL_REGION else region
    if c.endpoint_url:
        return custom_endpoint(c.endpoint_url, signing_region)
    fips, dualstack = "-fips" * c.use_fips, ".dualstack" * c.use_dualstack
    is_global = region == GLOBAL_REGION or (region == "us-east-1" and c.use_global_endpoint)
    if c.use_accelerate:
        name = f"s3-accelerate{dualstack}"
    elif is_global and not (fips or dualstack):
        name = "s3"
    else:
        name = f"s3{fips}{dualstack}.{signing_region}"
    host = f"{name}.{partition(region)[1]}"
    return Endpoint(
        scheme="https", host=host, port=443, base_path="", region=signing_region, service="s3"
    )


def _is_virtual_host(c: EndpointConfiguration, endpoint: Endpoint, bucket: str) -> bool:
    """Tell whether the bucket becomes part of the host name; it does not with a custom endpoint."""
    asked = c.addressing_style == "virtual" or (c.addressing_style != "path" and not c.endpoint_url)
    # No wildcard certificate covers a name with dots.
    labels = bucket.split(".") if endpoint.scheme == "http" else [bucket]
    hostable = 3 <= len(bucket) and bucket == bucket.lower() and all(map(is_label, labels))
    return asked and hostable and not _is_ip(bucket) and not _is_ip(endpoint.hostname)


def _resolve_arn(c: EndpointConfiguration, endpoint: Endpoint, region: str, arn: str) -> Endpoint:
    """Resolve an access point; its ARN names the region, and the host is always a virtual one.

    arn:aws:SERVICE:REGION:ACCOUNT:accesspoint/NAME, or outpost/ID/accesspoint/NAME
    """
    _refuse((not is_bucket_name(arn), f"Invalid ARN: not that of an access point: `{arn}`"))
    _, _, service, arn_region, account, resource = arn.split(":", 5)
    kind, *names = resource.replace(":", "/").split("/")
    outposts, name = names[: kind == "outpost"], names[-1]
    label, does = _ARN_SERVICES[service]
    ours, theirs = partition(region)[0], partition(arn_region)[0]
    _refuse(
        (not arn_region and service != "s3", "Invalid ARN: bucket ARN is missing a region"),
        (not arn_region, "Multi-Region Access Points are not supported: they need SigV4A"),
        (
            arn_region != region and not c.use_arn_region,
            f"Invalid configuration: region from ARN `{arn_region}` does not match client region "
            f"`{region}` and UseArnRegion is `false`",
        ),
        (
            ours != theirs,
            f"Client was configured for partition `{ours}` but ARN (`{arn}`) has `{theirs}`",
        ),
        (not is_label(arn_region), f"Invalid region in ARN: `{arn_region}` (invalid DNS name)"),
        (service != "s3" and c.use_dualstack, f"{does} not support Dual-stack"),
        (outposts and c.use_fips, f"{does} not support FIPS"),
        (c.use_accelerate, f"{does} not support S3 Accelerate"),
        *((not is_label(one), _INVALID_NAME.format("outpost Id", one)) for one in outposts),
        (not is_label(name), _INVALID_NAME.format("access point name", name)),
    )
    label += "-fips" * c.use_fips + ".dualstack" * c.use_dualstack
    host = endpoint.host if c.endpoint_url else f"{label}.{arn_region}.{partition(arn_region)[1]}"
    host = ".".join([f"{name}-{account}", *outposts, host])
    return replace(endpoint, host=host, region=arn_region, service=service)


def _refuse(*rules: tuple[object, str]) -> None:
    """Raise the sentence of the first rule that is broken."""
    for broken, sentence in rules:
        if broken:
            raise EndpointUnresolved(sentence)


def _is_ip(host: str) -> bool:
    return ":" in host or _IPV4.fullmatch(host) is not None
