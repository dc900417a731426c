from __future__ import annotations

import pytest

from shim.contract.errors import UsageError
from shim.oci.reference import Location, parse_destination, parse_location, parse_reference

HEX = "0123456789abcdef" * 4
DIGEST = f"sha256:{HEX}"


# From distribution/reference: reference_test.go and normalize_test.go.
@pytest.mark.parametrize(
    ("text", "registry", "repository", "identifier", "familiar"),
    [
        ("alpine", "registry-1.docker.io", "library/alpine", "latest", "alpine:latest"),
        ("test.com:tag", "registry-1.docker.io", "library/test.com", "tag", "test.com:tag"),
        ("localhost:5000", "registry-1.docker.io", "library/localhost", "5000", "localhost:5000"),
        ("a/b:1", "registry-1.docker.io", "a/b", "1", "a/b:1"),
        ("docker.io/a", "registry-1.docker.io", "library/a", "latest", "a:latest"),
        ("index.docker.io/a:b", "registry-1.docker.io", "library/a", "b", "a:b"),
        ("docker.io/library/a", "registry-1.docker.io", "library/a", "latest", "a:latest"),
        ("library/a", "registry-1.docker.io", "library/a", "latest", "a:latest"),
        ("localhost/a", "localhost", "a", "latest", "localhost/a:latest"),
        ("localhost:5000/a", "localhost:5000", "a", "latest", "localhost:5000/a:latest"),
        ("test.com/r:t", "test.com", "r", "t", "test.com/r:t"),
        ("Uppercase/a", "Uppercase", "a", "latest", "Uppercase/a:latest"),
        ("foo.com:80/a/b-c/d__e.f", "foo.com:80", "a/b-c/d__e.f", "latest", None),
        ("[2001:db8::1]:5000/r:t", "[2001:db8::1]:5000", "r", "t", None),
        ("[::1]/r", "[::1]", "r", "latest", None),
        ("xn--n3h.com/r", "xn--n3h.com", "r", "latest", None),
        ("a.b/a--b/x:A_.-z", "a.b", "a--b/x", "A_.-z", None),
        (f"x.y/r@{DIGEST}", "x.y", "r", DIGEST, f"x.y/r@{DIGEST}"),
        (f"x.y/r:t@{DIGEST}", "x.y", "r", DIGEST, f"x.y/r:t@{DIGEST}"),
        (f"r@sha512:{HEX * 2}", "registry-1.docker.io", "library/r", f"sha512:{HEX * 2}", None),
        ("x.y/" + "a" * 251, "x.y", "a" * 251, "latest", None),
        ("r:" + "t" * 128, "registry-1.docker.io", "library/r", "t" * 128, None),
    ],
)
def test_reads_references_as_docker_does(
    text: str, registry: str, repository: str, identifier: str, familiar: str | None
) -> None:
    reference = parse_reference(text)
    assert (registry, repository) == (reference.registry, reference.repository)
    assert identifier == reference.identifier
    assert familiar in (None, reference.familiar)
    assert reference == parse_reference(str(reference))


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":tag",
        "/a",
        "a/",
        "a//b",
        "a:",
        "a:b:c",
        "a:-b",
        "a: b",
        "a b",
        "é",
        "a:" + "t" * 129,
        "repo@sha256:abc",
        f"repo@sha256:{HEX.upper()}",
        f"repo@md5:{HEX}",
        f"repo@{DIGEST}@{DIGEST}",
        "repo@",
        HEX,
        "Uppercase",
        "Uppercase:tag",
        "test.com/Upper/case",
        "a_/b",
        "_a",
        "a..b",
        "a___b",
        "-a.com/b",
        "a-.com/b",
        "a..com/b",
        "[::1/b",
        "[fe80::1%eth0]/b",
        "host:port/a",
        "https://host.com/a",
        "x.y/" + "a" * 252,
        "a\n",
        "a:b\n",
    ],
)
def test_refuses_what_is_no_reference(text: str) -> None:
    with pytest.raises(UsageError):
        parse_reference(text)


def test_shows_nothing_before_an_at_sign() -> None:
    with pytest.raises(UsageError) as failure:
        parse_reference("alice:hunter2@registry.test/image")
    assert "hunter2" not in str(failure.value)


HUB = parse_reference("alpine:3")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alpine:3", Location(kind="docker", reference=HUB)),
        ("docker://alpine:3", Location(kind="docker", reference=HUB)),
        ("docker://x.tar", Location(kind="docker", reference=parse_reference("x.tar"))),
        ("oci:dir", Location(kind="oci", path="dir")),
        ("oci:/a/b:1.0", Location(kind="oci", path="/a/b", name="1.0")),
        ("oci:/a/b:x.y/z:1", Location(kind="oci", path="/a/b", name="x.y/z:1")),
        ("oci:a.tar", Location(kind="oci", path="a.tar")),
        ("oci-archive:a.tar:", Location(kind="oci-archive", path="a.tar")),
        ("oci-archive:a.tar:b", Location(kind="oci-archive", path="a.tar", name="b")),
        (
            "docker-archive:a.tar:alpine",
            Location(kind="docker-archive", path="a.tar", name="docker.io/library/alpine:latest"),
        ),
        ("/a", Location(kind="path", path="/a")),
        ("./a:b", Location(kind="path", path="./a:b")),
        ("../a", Location(kind="path", path="../a")),
        (".", Location(kind="path", path=".")),
        ("a.tar", Location(kind="path", path="a.tar")),
        ("a/b.tar.gz", Location(kind="path", path="a/b.tar.gz")),
        ("x:y.tgz", Location(kind="path", path="x:y.tgz")),
    ],
)
def test_reads_locations(text: str, expected: Location) -> None:
    assert expected == parse_location(text) == parse_destination(text)


@pytest.mark.parametrize(
    "text", ["", "oci:", "oci::tag", "docker-archive:", "docker-archive:a.tar:Upper", "docker:x:y"]
)
def test_refuses_what_is_no_location(text: str) -> None:
    with pytest.raises(UsageError):
        parse_location(text)


@pytest.mark.parametrize(
    "text", [f"x.y/r@{DIGEST}", f"docker://x.y/r:t@{DIGEST}", f"docker-archive:a.tar:r@{DIGEST}"]
)
def test_a_destination_has_no_digest(text: str) -> None:
    assert parse_location(text)
    with pytest.raises(UsageError, match="name a tag"):
        parse_destination(text)
