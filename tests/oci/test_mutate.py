from __future__ import annotations

from typing import Any

import pytest

from shim.oci import gojson
from shim.oci.errors import ImageUnsuitable
from shim.oci.model import Descriptor
from shim.oci.mutate import (
    DOCKER,
    DOCKER_CONFIG,
    DOCKER_INDEX,
    DOCKER_LAYER,
    DOCKER_MANIFEST,
    OCI,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    build_manifest,
    config_of,
    document_type,
    is_foreign,
    is_plain,
    layers_of,
    parse_descriptor,
    resolve_manifest,
)

A, B, C, D = (f"sha256:{letter * 64}" for letter in "abcd")
OCI_FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar"
DOCKER_FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar"


def entry(media_type: str, digest: str = A, **members: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": 7, **members}


def manifest(family: str = OCI, *layers: dict[str, Any], **members: Any) -> dict[str, Any]:
    oci = family == OCI
    return {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST if oci else DOCKER_MANIFEST,
        "config": entry(OCI_CONFIG if oci else DOCKER_CONFIG, D),
        "layers": [*layers],
        **members,
    }


def index(*entries: object, **members: Any) -> dict[str, Any]:
    return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [*entries], **members}


def child(name: str, document: str, **members: Any) -> dict[str, Any]:
    """An entry whose digest stands for the document that it leads to."""
    os_name, _, architecture = name.partition("/")
    platform = {"platform": {"os": os_name, "architecture": architecture}} if name else {}
    kind = OCI_INDEX if document.startswith("index") else OCI_MANIFEST
    return entry(kind, f"sha256:{document.encode().hex():0<64}", **platform, **members)


def resolve(documents: dict[str, dict[str, Any]], *, platform: str = "linux/amd64") -> str:
    """Return which of the documents is reached from the one called index."""

    def read(descriptor: Descriptor) -> bytes:
        found = next(
            name for name in documents if descriptor.digest == f"sha256:{name.encode().hex():0<64}"
        )
        return gojson.dumps(documents[found])

    os_name, _, architecture = platform.partition("/")
    body, document, media_type = resolve_manifest(
        gojson.dumps(documents["index"]), "", read, os_name=os_name, architecture=architecture
    )
    assert gojson.loads(body, name="x") == document
    assert OCI_MANIFEST == media_type
    return str(document["name"])


M, N = manifest(name="m"), manifest(name="n")
ATTESTATION = {"vnd.docker.reference.type": "attestation-manifest"}


@pytest.mark.parametrize(
    ("platform", "documents"),
    [
        pytest.param("linux/amd64", {"index": M}, id="no index"),
        pytest.param(
            "linux/amd64",
            {"index": index(child("linux/arm64", "n"), child("linux/amd64", "m")), "n": N, "m": M},
            id="two platforms",
        ),
        pytest.param(
            "linux/arm64",
            {"index": index(child("linux/arm64", "m"), child("linux/amd64", "n")), "n": N, "m": M},
            id="the other platform",
        ),
        pytest.param(
            "linux/amd64",
            {
                "index": index(
                    child("unknown/unknown", "n", annotations=ATTESTATION),
                    child("", "n", annotations=ATTESTATION),
                    child("linux/amd64", "m"),
                ),
                "n": N,
                "m": M,
            },
            id="attestations",
        ),
        pytest.param(
            "linux/amd64",
            {"index": index(child("", "index2")), "index2": index(child("", "m")), "m": M},
            id="nested",
        ),
        pytest.param(
            "linux/amd64",
            {"index": index(child("", "n"), child("linux/amd64", "m")), "n": N, "m": M},
            id="a named platform before one without",
        ),
        pytest.param(
            "linux/amd64",
            {"index": index(entry("application/x", A), child("", "m")), "m": M},
            id="something else beside it",
        ),
    ],
)
def test_an_index_leads_to_the_platform(platform: str, documents: dict[str, Any]) -> None:
    assert "m" == resolve(documents, platform=platform)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ({"index": index(child("linux/arm64", "m")), "m": M}, "for linux/amd64; it is for linux/"),
        ({"index": index()}, "it is for nothing"),
        ({"index": {**index(), "manifests": None}}, "it is for nothing"),
        ({"index": {**index(), "manifests": {"a": 1}}}, "list of manifests"),
        ({"index": index(5)}, "descriptor"),
        ({"index": {**M, "layers": [{**entry(OCI_LAYER), "mediaType": 5}]}}, "text as media type"),
        ({"index": index(child("", "m", annotations=5)), "m": {**M, "Layers": []}}, "'Layers'"),
        ({"index": {**M, "layers": [entry(OCI_LAYER, Digest=B)]}}, "Layer 1 has a member 'Digest'"),
        ({"index": index(child("", "index"))}, "nested more than 3"),
        ({"index": {**M, "manifests": []}}, "index and a manifest at once"),
        ({"index": {**M, "schemaVersion": 1}}, "schema 1"),
        ({"index": {**M, "mediaType": OCI_INDEX}}, "expected an image"),
        ({"index": {**M, "mediaType": 5}}, "expected an image"),
        ({"index": {**M, "config": entry("application/vnd.cncf.helm.config.v1+json")}}, "no image"),
        ({"index": {**M, "config": None}}, "The configuration: expected a descriptor"),
        ({"index": {**M, "layers": {"a": 1}}}, "list of layers"),
        ({"index": {**M, "layers": [entry(OCI_LAYER, "md5:x")]}}, "Layer 1: expected a digest"),
        ({"index": {**M, "layers": [entry(OCI_LAYER, size=-1)]}}, "Layer 1: expected a size"),
        ({"index": {**M, "layers": [entry(OCI_LAYER, size=True)]}}, "Layer 1: expected a size"),
        ({"index": {**M, "layers": [entry(OCI_LAYER, size=1.5)]}}, "Layer 1: expected a size"),
    ],
)
def test_refuses_what_leads_to_no_image(documents: dict[str, Any], message: str) -> None:
    with pytest.raises(ImageUnsuitable, match=message):
        resolve(documents)


@pytest.mark.parametrize(
    ("members", "hint", "expected"),
    [
        ({"layers": []}, "", OCI_MANIFEST),
        ({"manifests": []}, "", OCI_INDEX),
        ({"layers": []}, DOCKER_MANIFEST, DOCKER_MANIFEST),
        ({"manifests": []}, DOCKER_INDEX, DOCKER_INDEX),
        ({"layers": [], "mediaType": DOCKER_MANIFEST}, OCI_MANIFEST, DOCKER_MANIFEST),
        ({"layers": []}, "application/json", OCI_MANIFEST),
    ],
)
def test_a_document_says_what_it_is(members: dict[str, Any], hint: str, expected: str) -> None:
    assert expected == document_type({"schemaVersion": 2, **members}, hint)


PAIRS = [
    (DOCKER_LAYER, OCI_LAYER),
    (f"{DOCKER_LAYER}.gzip", f"{OCI_LAYER}+gzip"),
    (DOCKER_FOREIGN, OCI_FOREIGN),
    (f"{DOCKER_FOREIGN}.gzip", f"{OCI_FOREIGN}+gzip"),
]


def rebuilt(document: dict[str, Any], family: str) -> dict[str, Any]:
    return build_manifest(
        document, family=family, config=config_of(document), layers=layers_of(document)
    )


@pytest.mark.parametrize(("docker", "oci"), PAIRS)
def test_conversion_changes_media_types_alone(docker: str, oci: str) -> None:
    theirs = manifest(DOCKER, entry(docker, urls=["x"]), entry(docker, B))
    ours = manifest(OCI, entry(oci, urls=["x"]), entry(oci, B))
    assert ours == rebuilt(theirs, OCI)
    assert theirs == rebuilt(ours, DOCKER)
    assert ours == rebuilt(ours, OCI)
    assert theirs == rebuilt(theirs, DOCKER)


def test_zstd_stays_in_oci_alone() -> None:
    oci = manifest(OCI, entry(f"{OCI_LAYER}+zstd"))
    assert oci == rebuilt(oci, OCI)
    assert oci == rebuilt(manifest(DOCKER, entry(f"{DOCKER_LAYER}.zstd")), OCI)
    for document in (oci, manifest(DOCKER, entry(f"{DOCKER_LAYER}.zstd"))):
        with pytest.raises(ImageUnsuitable, match="zstd is not possible"):
            rebuilt(document, DOCKER)


@pytest.mark.parametrize("family", [OCI, DOCKER])
def test_an_unknown_layer_is_not_called_something_else(family: str) -> None:
    other = DOCKER if family == OCI else OCI
    prefix = "application/vnd.docker.x" if other == DOCKER else f"{OCI_LAYER}+gzip+encrypted"
    document = manifest(other, entry(prefix))
    assert document == rebuilt(document, other)
    with pytest.raises(ImageUnsuitable, match="unknown there"):
        rebuilt(document, family)


def test_annotations_and_unknown_members_stay_where_they_can() -> None:
    layer = entry(f"{OCI_LAYER}+gzip", annotations={"toc": "x"}, platform={"x": 1})
    document = manifest(OCI, layer, annotations={"a": "b"}, other=[1], subject=entry(OCI_MANIFEST))
    kept = rebuilt(document, OCI)
    assert ({"a": "b"}, [1], [layer]) == (kept["annotations"], kept["other"], kept["layers"])
    assert "subject" not in kept
    docker = rebuilt(document, DOCKER)
    assert "annotations" not in docker and "annotations" not in docker["layers"][0]
    assert [1] == docker["other"]


def test_the_media_type_is_always_written_and_embedded_content_dropped() -> None:
    document = manifest(OCI)
    del document["mediaType"]
    document["config"]["data"] = "e30="
    built = rebuilt(document, OCI)
    assert ["schemaVersion", "mediaType", "config", "layers"] == [*built]
    assert entry(OCI_CONFIG, D) == built["config"]


def test_more_layers_than_docker_mounts_are_refused() -> None:
    layers = [entry(OCI_LAYER)] * 125
    assert rebuilt(manifest(OCI, *layers), DOCKER)
    with pytest.raises(ImageUnsuitable, match="126 layers, of at most 125"):
        rebuilt(manifest(OCI, *layers, entry(OCI_LAYER)), DOCKER)


def test_kinds_of_layers() -> None:
    def layer(media_type: str) -> Descriptor:
        return parse_descriptor(entry(media_type), name="x")

    assert is_foreign(layer(OCI_FOREIGN)) and is_foreign(layer(DOCKER_FOREIGN))
    assert is_plain(layer(OCI_LAYER)) and is_plain(layer(DOCKER_LAYER))
    assert not is_plain(layer(OCI_FOREIGN)) and not is_plain(layer(f"{OCI_LAYER}+gzip"))


def test_a_descriptor_keeps_what_we_do_not_know() -> None:
    value = entry(OCI_LAYER, x=1)
    assert value == parse_descriptor(value, name="x").members
