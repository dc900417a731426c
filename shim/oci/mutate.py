"""Manifests and indexes: their media types, the choice of a platform, the patched manifest.

Conversion between OCI and Docker changes media types alone: configuration and layers stay as they
are. Digests are of bytes, so a document that is only copied is never written anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shim.oci import gojson
from shim.oci.errors import ImageUnsuitable
from shim.oci.model import Descriptor, Image
from shim.oci.reference import is_digest

OCI, DOCKER = "oci", "docker"

_OCI, _DOCKER = "application/vnd.oci.image.", "application/vnd.docker."
OCI_INDEX, OCI_MANIFEST = f"{_OCI}index.v1+json", f"{_OCI}manifest.v1+json"
OCI_CONFIG, OCI_LAYER = f"{_OCI}config.v1+json", f"{_OCI}layer.v1.tar"
DOCKER_INDEX = f"{_DOCKER}distribution.manifest.list.v2+json"
DOCKER_MANIFEST = f"{_DOCKER}distribution.manifest.v2+json"
DOCKER_CONFIG = f"{_DOCKER}container.image.v1+json"
DOCKER_LAYER = f"{_DOCKER}image.rootfs.diff.tar"
_FOREIGN = (f"{_OCI}layer.nondistributable.", f"{_DOCKER}image.rootfs.foreign.")
INDEXES = (OCI_INDEX, DOCKER_INDEX)
MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)

# The same thing in both families. What has no counterpart is refused.
_TO_OCI = {
    DOCKER_MANIFEST: OCI_MANIFEST,
    DOCKER_CONFIG: OCI_CONFIG,
    DOCKER_LAYER: OCI_LAYER,
    f"{DOCKER_LAYER}.gzip": f"{OCI_LAYER}+gzip",
    f"{_FOREIGN[1]}diff.tar": f"{_FOREIGN[0]}v1.tar",
    f"{_FOREIGN[1]}diff.tar.gzip": f"{_FOREIGN[0]}v1.tar+gzip",
}
_TO_DOCKER = {oci: docker for docker, oci in _TO_OCI.items()}
# CRI-O, containerd and podman cannot pull it under this name.
_DOCKER_ZSTD = f"{DOCKER_LAYER}.zstd"

_DESCRIPTOR = "mediaType digest size urls annotations data platform artifactType".split()
_DOCUMENT = "schemaVersion mediaType config layers manifests annotations subject fsLayers".split()

MAX_LAYERS = 125  # moby layer_store.go, maxLayerDepth
_MAX_NESTING = 3
_ATTESTATION = "vnd.docker.reference.type"


def layer_type(family: str, *, compressed: bool) -> str:
    """Return the media type of a layer that we make."""
    if family == OCI:
        return OCI_LAYER + "+gzip" * compressed
    return DOCKER_LAYER + ".gzip" * compressed


def is_foreign(layer: Descriptor) -> bool:
    """Say whether a layer is to be had elsewhere, and is neither read nor written."""
    return layer.media_type.startswith(_FOREIGN)


def is_plain(layer: Descriptor) -> bool:
    """Say whether a layer is an uncompressed tar that travels with the image."""
    return layer.media_type in (OCI_LAYER, DOCKER_LAYER)


def parse_descriptor(value: object, *, name: str) -> Descriptor:
    """Read a descriptor; name: of what it describes. Raises ImageUnsuitable."""
    if not isinstance(value, dict):
        raise ImageUnsuitable(f"{name}: expected a descriptor")
    gojson.check_names(value, _DESCRIPTOR, name=name)
    digest, size_bytes = value.get("digest"), value.get("size")
    if not is_digest(digest):
        raise ImageUnsuitable(f"{name}: expected a digest of sha256 or sha512 in its descriptor")
    if type(size_bytes) is not int or not 0 <= size_bytes < 1 << 63:
        raise ImageUnsuitable(f"{name}: expected a size in its descriptor")
    media_type = value.get("mediaType") or ""
    if not isinstance(media_type, str):
        raise ImageUnsuitable(f"{name}: expected a text as media type")
    return Descriptor(
        media_type=media_type, digest=str(digest), size_bytes=size_bytes, members=value
    )


def descriptor_json(descriptor: Descriptor) -> dict[str, Any]:
    """Return a descriptor as a member of a document, without embedded content."""
    named = {
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size_bytes,
    }
    return named | {k: v for k, v in descriptor.members.items() if k not in (*named, "data")}


def document_type(document: Mapping[str, Any], hint: str) -> str:
    """Return the media type of a manifest or index: its own word, else the hint, else its shape."""
    gojson.check_names(document, _DOCUMENT, name="The manifest")
    named = document.get("mediaType") or hint
    if "manifests" in document and "layers" in document:
        raise ImageUnsuitable("A document is an index and a manifest at once: expected one of both")
    if document.get("schemaVersion") != 2 or str(named).startswith(
        f"{_DOCKER}distribution.manifest.v1"
    ):
        raise ImageUnsuitable(
            "The manifest is of schema 1, or of none: push the image again with a current tool"
        )
    shape = OCI_INDEX if "manifests" in document else OCI_MANIFEST
    if named in INDEXES + MANIFESTS and (named in INDEXES) == (shape == OCI_INDEX):
        return str(named)
    if named in ("", "application/json", "application/octet-stream"):
        return shape
    raise ImageUnsuitable(f"The document has the media type {named!r:.200}, expected an image")


def resolve_manifest(
    body: bytes,
    hint: str,
    read: Callable[[Descriptor], bytes],
    *,
    os_name: str,
    architecture: str,
) -> tuple[bytes, dict[str, Any], str]:
    """Follow indexes to the manifest of a platform; return its bytes, content and media type.

    read(): returns a document after it was verified.
    """
    for _ in range(_MAX_NESTING + 1):
        document = gojson.loads(body, name="The manifest")
        media_type = document_type(document, hint)
        if media_type in MANIFESTS:
            check_manifest(document)
            return body, document, media_type
        child = select_child(document, os_name=os_name, architecture=architecture)
        body, hint = read(child), child.media_type
    raise ImageUnsuitable(f"Indexes are nested more than {_MAX_NESTING} deep")


def load_image(
    resolved: tuple[bytes, dict[str, Any], str],
    read: Callable[[Descriptor], bytes],
    *,
    names: tuple[str, ...],
) -> Image:
    """Return the image of what resolve_manifest() returned; read(): as there."""
    body, manifest, media_type = resolved
    config_body = read(config_of(manifest))
    return Image(
        manifest_bytes=body,
        config_bytes=config_body,
        manifest=manifest,
        config=gojson.loads(config_body, name="The configuration"),
        media_type=media_type,
        names=names,
    )


def select_child(index: Mapping[str, Any], *, os_name: str, architecture: str) -> Descriptor:
    """Return the entry for a platform; one that names none may be for any, as crane has it."""
    entries = index.get("manifests") or []
    if not isinstance(entries, list):
        raise ImageUnsuitable("The index: expected a list of manifests")
    children = [parse_descriptor(entry, name="An entry of the index") for entry in entries]
    wanted, unnamed, seen = f"{os_name}/{architecture}", [], []
    for child in children:
        platform, annotations = (child.members.get(name) for name in ("platform", "annotations"))
        if isinstance(annotations, dict) and _ATTESTATION in annotations:
            continue
        if child.media_type and child.media_type not in INDEXES + MANIFESTS:
            continue
        if not isinstance(platform, dict):
            unnamed.append(child)
            continue
        seen.append(f"{platform.get('os')}/{platform.get('architecture')}")
        if seen[-1] == wanted:
            return child
    if unnamed:
        return unnamed[0]
    found = ", ".join(sorted(set(seen))[:20]) or "nothing"
    raise ImageUnsuitable(f"The image is not there for {wanted}; it is for {found}")


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raise ImageUnsuitable for what is no image's manifest."""
    config = config_of(manifest)
    if config.media_type not in (OCI_CONFIG, DOCKER_CONFIG):
        raise ImageUnsuitable(
            f"The configuration has the media type {config.media_type!r:.200}: this is no image"
        )
    layers_of(manifest)


def config_of(manifest: Mapping[str, Any]) -> Descriptor:
    return parse_descriptor(manifest.get("config"), name="The configuration")


def layers_of(manifest: Mapping[str, Any]) -> list[Descriptor]:
    layers = manifest.get("layers") or []
    if not isinstance(layers, list):
        raise ImageUnsuitable("The manifest: expected a list of layers")
    return [parse_descriptor(layer, name=f"Layer {i}") for i, layer in enumerate(layers, 1)]


def build_manifest(
    manifest: Mapping[str, Any],
    *,
    family: str,
    config: Descriptor,
    layers: Sequence[Descriptor],
) -> dict[str, Any]:
    """Return a manifest with these, of a family; unknown members stay.

    What refers to another manifest (`subject`) does not hold any more. Docker has no annotations.
    """
    if len(layers) > MAX_LAYERS:
        raise ImageUnsuitable(f"The image would have {len(layers)} layers, of at most {MAX_LAYERS}")
    own_type = OCI_MANIFEST if family == OCI else DOCKER_MANIFEST
    dropped = {"subject"} | ({"annotations"} if family == DOCKER else set())
    return {
        "schemaVersion": 2,
        "mediaType": own_type,
        "config": descriptor_json(_converted(config, family)),
        "layers": [descriptor_json(_converted(layer, family)) for layer in layers],
    } | {
        name: value
        for name, value in manifest.items()
        if name not in dropped | {"schemaVersion", "mediaType", "config", "layers"}
    }


def _converted(descriptor: Descriptor, family: str) -> Descriptor:
    media_type = descriptor.media_type
    if family == OCI and media_type == _DOCKER_ZSTD:
        converted = f"{OCI_LAYER}+zstd"
    elif family == OCI:
        converted = media_type if media_type.startswith(_OCI) else _TO_OCI.get(media_type, "")
    elif media_type.startswith(_DOCKER) and media_type != _DOCKER_ZSTD:
        converted = media_type
    else:
        converted = _TO_DOCKER.get(media_type, "")
    if not converted:
        reason = "zstd is not possible there" if "zstd" in media_type else "it is unknown there"
        raise ImageUnsuitable(
            f"{media_type[:200]!r} has no counterpart in {family} images: {reason}"
        )
    members = dict(descriptor.members)
    if family == DOCKER and converted != media_type:
        members.pop("annotations", None)
    return Descriptor(
        media_type=converted,
        digest=descriptor.digest,
        size_bytes=descriptor.size_bytes,
        members=members,
    )
