from __future__ import annotations

import gzip
import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import botocore
import botocore.exceptions
import botocore.loaders
import botocore.session
import pytest
from botocore.awsrequest import AWSRequest, AWSResponse
from botocore.endpoint_provider import EndpointProvider

from shim.aws.endpoints import (
    PARTITIONS,
    URL_FORM,
    Endpoint,
    EndpointUnresolved,
    configured_endpoint_url,
    partition,
    resolve_sts_url,
)
from shim.aws.profiles import read_profile
from shim.contract.uri import is_bucket_name
from shim.http.errors import SettingInvalid
from shim.s3.endpoints import EndpointConfiguration, resolve
from tests.oracles import read_botocore_json

DATA = Path(botocore.__file__).parent / "data"
ACCESS_POINT = "arn:aws:s3:us-west-2:123456789012:accesspoint:reader"
OBJECT_LAMBDA = "arn:aws:s3-object-lambda:us-west-2:123456789012:accesspoint/reader"
OUTPOST = "arn:aws:s3-outposts:us-west-2:123456789012:outpost:op-01:accesspoint:reader"


def provider_of(service: str, version: str) -> EndpointProvider:
    with gzip.open(DATA / service / version / "endpoint-rule-set-1.json.gz") as rules:
        rule_set = json.load(rules)
    return EndpointProvider(rule_set, json.loads((DATA / "partitions.json").read_text()))


@pytest.fixture(scope="module")
def s3_rules() -> EndpointProvider:
    return provider_of("s3", "2006-03-01")


def configuration_of(parameters: Mapping[str, Any]) -> EndpointConfiguration:
    return EndpointConfiguration(
        region=parameters.get("Region"),
        endpoint_url=parameters.get("Endpoint"),
        addressing_style="path" if parameters.get("ForcePathStyle") else "virtual",
        use_fips=parameters.get("UseFIPS", False),
        use_dualstack=parameters.get("UseDualStack", False),
        use_accelerate=parameters.get("Accelerate", False),
        use_arn_region=parameters.get("UseArnRegion", True),
        use_global_endpoint=parameters.get("UseGlobalEndpoint", False),
    )


def describe(endpoint: Endpoint) -> tuple[str, str, str]:
    url = f"{endpoint.scheme}://{endpoint.host}{endpoint.base_path}"
    return url, endpoint.region, endpoint.service


def describe_rule_set(url: str, properties: Mapping[str, Any]) -> tuple[str, str, str]:
    scheme = next(one for one in properties["authSchemes"] if one["name"] == "sigv4")
    return url.rstrip("/"), scheme["signingRegion"], scheme["signingName"]


def outcome(parameters: Mapping[str, Any]) -> tuple[str, str, str] | str:
    try:
        return describe(resolve(configuration_of(parameters), parameters["Bucket"]))
    except EndpointUnresolved as error:
        return str(error)


NO_ARN = "no ARN of an access point: boto3 and we refuse it in other words"


def why_not_applicable(case: Mapping[str, Any]) -> str | None:
    """Say why one of botocore's cases cannot be ours."""
    parameters = case["params"]
    bucket = parameters.get("Bucket")
    error = case["expect"].get("error")
    if bucket is None:
        return "no bucket: every request of ours has one"
    if bucket.endswith(("--x-s3", "--xa-s3")):
        return "S3 Express is not supported"
    if bucket.endswith("--op-s3"):
        return "aliases on Outposts are not supported"
    if "s3::" in bucket:
        return "multi-region access points are not supported"
    if "Region" not in parameters:
        return "boto3 and we take aws-global where no region is set"
    if error == "Access points are not supported for this operation":
        return "operations that we never send"
    if error == "Path-style addressing cannot be used with ARN buckets":
        return "boto3 and we drop path style for ARNs"
    if "s3-accelerate.dualstack.us-east-1" in case["expect"].get("endpoint", {}).get("url", ""):
        return "not a host of S3: s3-accelerate.dualstack has no region in its name"
    if bucket.startswith("arn:") and not is_bucket_name(bucket):
        return NO_ARN
    return None


def test_resolves_the_cases_of_botocore() -> None:
    cases = read_botocore_json("functional/endpoint-rules/s3/endpoint-tests-1.json")["testCases"]
    left_out = Counter(filter(None, map(why_not_applicable, cases)))
    assert {
        "no bucket: every request of ours has one": 46,
        "S3 Express is not supported": 112,
        "aliases on Outposts are not supported": 11,
        "multi-region access points are not supported": 8,
        "boto3 and we take aws-global where no region is set": 1,
        "operations that we never send": 2,
        "boto3 and we drop path style for ARNs": 3,
        "not a host of S3: s3-accelerate.dualstack has no region in its name": 1,
        NO_ARN: 25,
    } == left_out
    checked = 0
    for case in cases:
        expect = case["expect"]
        if (reason := why_not_applicable(case)) is not None:
            if reason is NO_ARN:
                assert "not that of an access point" in outcome(case["params"])
            continue
        expected = expect.get("error") or describe_rule_set(
            expect["endpoint"]["url"], expect["endpoint"]["properties"]
        )
        if "was not a valid URI" in expected:
            expected = f"Custom endpoint was not a valid URI: {URL_FORM}"  # it may hold a password
        assert expected == outcome(case["params"]), case["documentation"]
        checked += 1
    assert 184 == checked


def draw_parameters(random_: random.Random) -> dict[str, Any]:
    """Draw a set of parameters such as boto3 can pass to the rule set."""
    endpoint = random_.choice(
        [None] * 3
        + ["http://127.0.0.1:9000", "https://minio.example:9000", "http://minio.example",
           "https://[::1]:9000", "https://s3.example/base", "http://10.0.0.1/a/b/"]
    )  # fmt: skip
    bucket = random_.choice(
        ["bucket", "my-bucket", "my.bucket", "UPPER", "a_b", "ab", "x" * 63, "x" * 64, "1.2.3.4",
         "-a-", "a..b", ACCESS_POINT, OBJECT_LAMBDA, OUTPOST, ACCESS_POINT.replace("west", "east"),
         "arn:aws-cn:s3:cn-north-1:123456789012:accesspoint/reader",
         "arn:aws:s3:us-west-2:123456789012:accesspoint:my.dotted",
         "arn:aws:s3-outposts:us-west-2:123456789012:outpost:op_1:accesspoint:reader"]
    )  # fmt: skip
    region = random_.choice(
        ["us-east-1", "us-west-2", "eu-central-1", "cn-north-1", "us-gov-west-1", "us-iso-east-1",
         "us-isob-east-1", "eu-isoe-west-1", "us-isof-south-1", "eusc-de-east-1", "aws-global"]
    )  # fmt: skip
    return {
        "Bucket": bucket,
        "Region": region,
        **({"Endpoint": endpoint} if endpoint else {}),
        "ForcePathStyle": random_.random() < 0.4 and not bucket.startswith("arn:"),
        "UseFIPS": random_.random() < 0.2,
        "UseDualStack": random_.random() < 0.2,
        "Accelerate": random_.random() < 0.1,
        "UseArnRegion": random_.random() < 0.8,
        "UseGlobalEndpoint": random_.random() < 0.5,
    }


def differs_by_intention(parameters: Mapping[str, Any]) -> bool:
    """Tell where we choose an address that works over the rule set's."""
    bucket, endpoint = parameters["Bucket"], parameters.get("Endpoint", "")
    return (
        # A name cannot be put before an address, and aws-global asks for https.
        ("." in bucket and endpoint.startswith("http://"))
        # The rule set forgets the endpoint's scheme and path.
        or (bucket.startswith("arn:aws:s3-outposts") and endpoint != "")
        or (parameters["Accelerate"] and parameters["UseDualStack"])
    )


def test_resolves_as_the_rule_set_does(s3_rules: EndpointProvider) -> None:
    random_ = random.Random(20061)
    outcomes: Counter[str] = Counter()
    while outcomes.total() < 4000:
        parameters = draw_parameters(random_)
        if differs_by_intention(parameters):
            continue
        try:
            theirs = s3_rules.resolve_endpoint(**parameters)
        except botocore.exceptions.EndpointProviderError as error:
            assert isinstance(outcome(parameters), str), f"{parameters}: {error}"
            outcomes["refused"] += 1
        else:
            assert describe_rule_set(theirs.url, theirs.properties) == outcome(parameters)
            outcomes["resolved"] += 1
    assert outcomes["resolved"] > 1500


def test_knows_the_partitions_of_botocore() -> None:
    partitions = json.loads((DATA / "partitions.json").read_text())["partitions"]
    regions = {
        region: (one["id"], one["outputs"]["dnsSuffix"])
        for one in partitions
        for region in one["regions"]
        if not region.endswith("-global")
    }
    assert regions == {region: partition(region) for region in regions}
    assert {one["id"] for one in partitions} == {"aws", *(name for name, _ in PARTITIONS.values())}


# The environment of a process, seen by boto3 and by us.

ENVIRONMENTS = {
    "nothing": {},
    "region": {"AWS_DEFAULT_REGION": "eu-central-1"},
    "us-east-1": {"AWS_DEFAULT_REGION": "us-east-1"},
    "us-east-1 regional": {
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_S3_US_EAST_1_REGIONAL_ENDPOINT": "regional",
    },
    "china": {"AWS_DEFAULT_REGION": "cn-north-1"},
    "fips": {"AWS_DEFAULT_REGION": "us-west-2", "AWS_USE_FIPS_ENDPOINT": "True"},
    "fips pseudo region": {"AWS_DEFAULT_REGION": "fips-us-west-2"},
    "fips pseudo region, other end": {"AWS_DEFAULT_REGION": "us-west-2-fips"},
    "dualstack": {"AWS_DEFAULT_REGION": "us-west-2", "AWS_USE_DUALSTACK_ENDPOINT": "true"},
    "dualstack without region": {"AWS_USE_DUALSTACK_ENDPOINT": "true"},
    "fips, not a boolean": {"AWS_DEFAULT_REGION": "us-west-2", "AWS_USE_FIPS_ENDPOINT": "1"},
    "endpoint": {"AWS_ENDPOINT_URL": "http://minio:9000"},
    "endpoint of s3": {
        "AWS_ENDPOINT_URL": "http://other:9000",
        "AWS_ENDPOINT_URL_S3": "http://minio:9000/base/",
    },
    "endpoint ignored": {
        "AWS_ENDPOINT_URL": "http://other:9000",
        "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
    },
    "endpoint, fips, dualstack": {
        "AWS_ENDPOINT_URL": "http://[::1]:9000",
        "AWS_USE_FIPS_ENDPOINT": "true",
        "AWS_USE_DUALSTACK_ENDPOINT": "true",
    },
    "empty endpoint": {"AWS_ENDPOINT_URL": "", "AWS_DEFAULT_REGION": "eu-west-1"},
}
PROFILES = {
    "no profile": "",
    "virtual": "[default]\ns3 =\n  addressing_style = virtual\n",
    "virtual at an endpoint": "[default]\nendpoint_url = http://minio:9000\n"
    "s3 =\n  addressing_style = virtual\n",
    "path": "[default]\nregion = eu-west-3\ns3 =\n  addressing_style = path\n",
    "services": "[default]\nregion = eu-west-3\nservices = mine\nendpoint_url = http://other\n"
    "[services mine]\ns3 =\n  endpoint_url = http://minio:9000\n",
    "flags": "[default]\nregion = us-west-2\nuse_fips_endpoint = true\n"
    "use_dualstack_endpoint = true\n",
    "dualstack of s3": "[default]\nregion = us-west-2\ns3 =\n  use_dualstack_endpoint = true\n",
    "accelerate": "[default]\nregion = us-west-2\ns3 =\n  use_accelerate_endpoint = true\n",
    "regional": "[default]\nregion = us-east-1\ns3 =\n  us_east_1_regional_endpoint = regional\n",
    "own arn region": "[default]\nregion = us-east-1\ns3 =\n  use_arn_region = false\n",
}


LOADER = botocore.loaders.create_loader()


class Sent(Exception):
    """Ends a request of boto3 before it is sent."""


def url_of_boto3(bucket: str) -> str:
    def stop(request: AWSRequest, **_: object) -> AWSResponse:
        raise Sent(request.url)

    session = botocore.session.Session()
    session.register_component("data_loader", LOADER)  # parses the service's model once
    client = session.create_client("s3")
    client.meta.events.register("before-send.s3", stop)
    with pytest.raises(Sent) as sent:
        client.get_object(Bucket=bucket, Key="key")
    return str(sent.value)


def url_of_ours(environ: Mapping[str, str], bucket: str) -> str:
    profile = read_profile(environ)
    configuration = EndpointConfiguration.from_environ(environ, profile.settings)
    return describe(resolve(configuration, bucket))[0] + "/key"


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Leave nothing of AWS in the process but files in an empty directory, and static keys."""
    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    environ = {
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_ACCESS_KEY_ID": "AK",
        "AWS_SECRET_ACCESS_KEY": "SK",
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return environ


def assert_same_url(environ: Mapping[str, str], bucket: str = "bucket") -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        expected = url_of_boto3(bucket)
    assert expected == url_of_ours(environ, bucket)


@pytest.mark.parametrize("environ", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_reads_the_environment_as_boto3_does(
    environ: dict[str, str], clean_environment: dict[str, str]
) -> None:
    assert_same_url(clean_environment | environ)


@pytest.mark.parametrize("config", PROFILES.values(), ids=PROFILES)
def test_reads_the_profile_as_boto3_does(config: str, clean_environment: dict[str, str]) -> None:
    Path(clean_environment["AWS_CONFIG_FILE"]).write_text(config)
    assert_same_url(clean_environment)


@pytest.mark.parametrize("bucket", [ACCESS_POINT, OBJECT_LAMBDA, "my.bucket", "UPPER_case"])
@pytest.mark.parametrize("endpoint", [{}, {"AWS_ENDPOINT_URL_S3": "https://minio:9000"}])
def test_places_a_bucket_as_boto3_does(
    bucket: str, endpoint: dict[str, str], clean_environment: dict[str, str]
) -> None:
    assert_same_url(clean_environment | {"AWS_DEFAULT_REGION": "us-west-2"} | endpoint, bucket)


def configure(environ: Mapping[str, str], **settings: str) -> EndpointConfiguration:
    return EndpointConfiguration.from_environ(environ, settings)


@pytest.mark.parametrize(
    ("environ", "region"),
    [
        ({}, None),
        ({"AWS_REGION": "eu-west-1"}, "eu-west-1"),
        ({"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "eu-west-2"}, "eu-west-2"),
        ({"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": ""}, "eu-west-1"),
        ({"AWS_ENDPOINT_URL": "https://s3.eu-north-1.amazonaws.com"}, "eu-north-1"),
        ({"AWS_ENDPOINT_URL": "https://s3.dualstack.eu-north-1.amazonaws.com/"}, "eu-north-1"),
        ({"AWS_ENDPOINT_URL": "https://s3.cn-north-1.amazonaws.com.cn"}, "cn-north-1"),
        (
            {"AWS_ENDPOINT_URL": "https://bucket.vpce-1a-5e.s3.us-west-2.vpce.amazonaws.com"},
            "us-west-2",
        ),
        ({"AWS_ENDPOINT_URL": "https://s3.amazonaws.com"}, None),
        ({"AWS_ENDPOINT_URL": "http://s3.eu-north-1.example.com"}, None),
    ],
)
def test_finds_the_region(environ: dict[str, str], region: str | None) -> None:
    assert region == configure(environ).region


def test_takes_the_region_of_the_profile_last() -> None:
    assert "eu-west-3" == configure({}, region="eu-west-3").region
    assert "eu-west-1" == configure({"AWS_REGION": "eu-west-1"}, region="eu-west-3").region


@pytest.mark.parametrize("region", ["eu west", "-eu", "eu/x", "a.b", "x" * 64, "eu\n"])
def test_refuses_a_region_that_is_no_host_label(region: str) -> None:
    with pytest.raises(SettingInvalid, match="AWS_DEFAULT_REGION: expected a region such as"):
        configure({"AWS_DEFAULT_REGION": region})
    with pytest.raises(EndpointUnresolved, match="region was not a valid DNS name"):
        resolve(EndpointConfiguration(), "bucket", region)


@pytest.mark.parametrize(
    "url",
    ["minio:9000", "minio", "ftp://minio", "http://", "http://h:x", "http://h:99999", "http://[::1",
     "http://h?x=1", "http://a b", "http://h\r\nX: y", "http://a..b:9", "http://h:0", "http://h#x",
     "http://user:hidden@minio", "http://us/er:hidden@minio", f"http://{'a' * 64}", "http://\udcff",
     "http://h/\udcff", f"http://h:{'9' * 5000}"],
)  # fmt: skip
def test_refuses_an_endpoint_that_is_no_url_and_does_not_show_it(url: str) -> None:
    with pytest.raises(EndpointUnresolved, match="was not a valid URI"):
        resolve(EndpointConfiguration(endpoint_url=url), "bucket")
    length = f"found a text of {len(url)} characters"
    for environ, profile, name in (
        ({"AWS_ENDPOINT_URL": url}, {}, "AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL_S3": url}, {}, "AWS_ENDPOINT_URL_S3"),
        ({}, {"endpoint_url": url}, "endpoint_url of the profile"),
    ):
        with pytest.raises(SettingInvalid) as refused:
            configure(environ, **profile)
        assert f"{name}: expected {URL_FORM}, {length}" == str(refused.value)


@pytest.mark.parametrize(
    ("bucket", "sentence"),
    [
        ("data--use1-az4--x-s3", "Directory buckets .* are not supported"),
        ("data--use1-az4--xa-s3", "are not supported"),
        ("x--op-s3", "are not supported"),
        ("arn:aws:s3::123456789012:accesspoint/m.mrap", "Multi-Region .* SigV4A"),
    ],
)
def test_names_what_it_does_not_support(bucket: str, sentence: str) -> None:
    with pytest.raises(EndpointUnresolved, match=sentence):
        resolve(EndpointConfiguration(region="us-east-1"), bucket)


@pytest.mark.parametrize(
    ("url", "host", "hostname", "port", "base_path"),
    [
        ("http://minio", "minio", "minio", 80, "/b"),
        ("https://MinIO:443/", "minio", "minio", 443, "/b"),
        ("https://minio:9000/base/", "minio:9000", "minio", 9000, "/base/b"),
        ("http://[::1]:9000", "[::1]:9000", "::1", 9000, "/b"),
        ("http://minio_server:9000", "minio_server:9000", "minio_server", 9000, "/b"),
    ],
)
def test_describes_a_custom_endpoint(
    url: str, host: str, hostname: str, port: int, base_path: str
) -> None:
    endpoint = resolve(EndpointConfiguration(endpoint_url=url), "b")
    assert (host, hostname, port, base_path) == (
        endpoint.host,
        endpoint.hostname,
        endpoint.port,
        endpoint.base_path,
    )


def test_another_region_of_a_custom_endpoint_changes_the_signature_alone() -> None:
    configuration = EndpointConfiguration(endpoint_url="http://minio:9000")
    before, after = resolve(configuration, "b"), resolve(configuration, "b", "eu-west-1")
    assert ("us-east-1", "eu-west-1") == (before.region, after.region)
    assert (before.host, before.base_path) == (after.host, after.base_path)


@pytest.mark.parametrize(
    ("url", "bucket", "host"),
    [
        ("http://minio", "my.bucket", "my.bucket.minio"),
        ("https://minio", "my.bucket", "minio"),
        ("http://minio", "1.2.3.4", "minio"),
        ("http://127.0.0.1:9000", "my.bucket", "127.0.0.1:9000"),
        ("http://127.0.0.1:9000", "bucket", "127.0.0.1:9000"),
        ("http://[::1]", "bucket", "[::1]"),
    ],
)
def test_puts_into_a_host_name_only_what_makes_one(url: str, bucket: str, host: str) -> None:
    configuration = EndpointConfiguration(endpoint_url=url, addressing_style="virtual")
    assert host == resolve(configuration, bucket).host


PROFILE_TESTS = "functional/configured_endpoint_urls/profile-tests.json"


def write_config(suite: Mapping[str, Any], name: str) -> str:
    def block(heading: str, options: Mapping[str, Any]) -> Iterator[str]:
        yield f"[{heading}]"
        for option, value in options.items():
            if isinstance(value, dict):
                yield f"{option} ="
                yield from (f"  {nested} = {text}" for nested, text in value.items())
            else:
                yield f"{option} = {value}"

    profile = suite["profiles"][name]
    lines = [*block(f"profile {name}", profile)]
    if services := profile.get("services"):
        lines += block(f"services {services}", suite["services"][services])
    return "\n".join(lines)


def test_finds_the_endpoints_of_botocores_profile_cases(tmp_path: Path) -> None:
    suite = read_botocore_json(PROFILE_TESTS)["testSuites"][0]
    config = tmp_path / "config"
    checked = 0
    for case in suite["endpointUrlTests"]:
        client = suite["client_configs"][case["client_config"]]
        environ = {"AWS_CONFIG_FILE": str(config), "AWS_PROFILE": case["profile"]}
        environ |= {"HOME": str(tmp_path)} | suite["environments"][case["environment"]]
        # What a program hands to its client, the environment hands to us.
        if "endpoint_url" in client:
            environ["AWS_S3_ENDPOINT_URL"] = client["endpoint_url"]
        if client.get("ignore_configured_endpoint_urls"):
            environ["AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"] = "true"
        config.write_text(write_config(suite, case["profile"]))
        settings = read_profile(environ).settings
        found = configured_endpoint_url(environ, settings, service=case["service"])
        if case["service"] == "s3" or "endpoint_url" not in client:
            expected = case["output"]["endpointUrl"]
            expected = None if expected.endswith("fake-region-10.amazonaws.com") else expected
            assert expected == found, case["name"]
            checked += 1
    assert 39 == checked


STS_CASES = [
    ({}, "https://sts.amazonaws.com/"),
    ({"AWS_REGION": "eu-west-1"}, "https://sts.eu-west-1.amazonaws.com/"),
    ({"AWS_REGION": "cn-north-1"}, "https://sts.cn-north-1.amazonaws.com.cn/"),
    (
        {"AWS_REGION": "eu-west-1", "AWS_STS_REGIONAL_ENDPOINTS": "legacy"},
        "https://sts.amazonaws.com/",
    ),
    (
        {"AWS_REGION": "af-south-1", "AWS_STS_REGIONAL_ENDPOINTS": "legacy"},
        "https://sts.af-south-1.amazonaws.com/",
    ),
    ({"AWS_REGION": "fips-us-west-2"}, "https://sts-fips.us-west-2.amazonaws.com/"),
    ({"AWS_ENDPOINT_URL_STS": "http://127.0.0.1:5000"}, "http://127.0.0.1:5000/"),
    ({"AWS_ENDPOINT_URL": "http://127.0.0.1:5000/"}, "http://127.0.0.1:5000/"),
    ({"AWS_S3_ENDPOINT_URL": "http://127.0.0.1:5000/"}, "https://sts.amazonaws.com/"),
]


@pytest.mark.parametrize(("environ", "url"), STS_CASES)
def test_finds_the_security_token_service(environ: dict[str, str], url: str) -> None:
    assert url == resolve_sts_url(environ, {})


def test_finds_the_security_token_service_where_the_rule_set_does() -> None:
    rules = provider_of("sts", "2011-06-15")
    for region in ["us-east-1", "eu-central-1", "us-gov-west-1", "us-isob-east-1", "cn-north-1"]:
        for fips in (False, True):
            expected = rules.resolve_endpoint(
                Region=region, UseFIPS=fips, UseDualStack=False, UseGlobalEndpoint=False
            )
            environ = {"AWS_REGION": region, "AWS_USE_FIPS_ENDPOINT": str(fips)}
            assert f"{expected.url}/" == resolve_sts_url(environ, {})
