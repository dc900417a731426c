"""Patch, unpatch and verify: the three use cases, over any source and sink.

Blobs first, then the manifest that needs them; what is there already is not written again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shim.contract.errors import UsageError
from shim.oci import gojson
from shim.oci.config import (
    BASE_LABEL,
    PatchOptions,
    State,
    cautions,
    check_config,
    check_platform,
    detect,
    diff_ids_of,
    inner_config,
    labels_of,
    patch_config,
    restore,
    top_is_labelled,
    write_config,
)
from shim.oci.errors import ImageUnsuitable
from shim.oci.layer import build_layer, is_shim_layer, read_machine
from shim.oci.model import Blob, Descriptor, Image, Sink, Source
from shim.oci.mutate import (
    DOCKER_MANIFEST,
    OCI,
    OCI_MANIFEST,
    build_manifest,
    config_of,
    is_foreign,
    is_plain,
    layer_type,
    layers_of,
)
from shim.oci.streams import decompressed, describe, document_blob, gzip_blob, pieces


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What DEST takes: family: oci or docker; plain: whether layers may stay uncompressed.

    complete: whether layers that are to be had elsewhere (foreign) must be in it.
    """

    family: str
    plain: bool = False
    complete: bool = False
    force: bool = False
    dry_run: bool = False
    workers: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What was done; reference is None after a dry run. sizes: bytes by what place() returned."""

    reference: str | None
    source_digest: str
    source_image_id: str
    digest: str
    image_id: str
    layer_digest: str | None
    diff_id: str | None
    user: str
    entrypoint: Sequence[str] | None
    cmd: Sequence[str] | None
    is_identical: bool | None
    sizes: dict[str, int]
    cautions: tuple[str, ...]
    config: dict[str, Any]
    manifest: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Base:
    """An image as it was before it was patched; layers: without ours."""

    image: Image
    config: dict[str, Any]
    image_id: str
    layers: list[Descriptor]


def patch(
    source: Source,
    sink: Sink,
    *,
    platform: tuple[str, str],
    target: Target,
    binary: Path,
    mode: int,
    options: PatchOptions,
    version: str,
    report: Callable[[str, int], None] = lambda done, size_bytes: None,
) -> Outcome:
    """Put the binary into an image in place of any earlier one, and write that.

    report(done, size_bytes): is called after each blob, with what place() returned.
    Raises ImageUnsuitable, UsageError where DEST is another image, and what source and sink raise.
    """
    image = _load(source, platform)
    check_platform(image.config, machine=read_machine(binary))
    base = _restore(source, image)
    blobs = _unify(source, base.layers, target)
    # A layer that goes beside uncompressed ones stays so as well: crane looks at the first alone.
    gzip = not (target.plain and all(is_plain(blob.descriptor.media_type) for blob in blobs))
    layer = build_layer(
        binary, mode=mode, media_type=layer_type(target.family, compressed=gzip), gzip=gzip
    )
    config = patch_config(
        base.config, options, diff_id=layer.diff_id, base_id=base.image_id, version=version
    )
    outcome = _write(image, config, [*blobs, layer.blob], sink, target, report)
    inner = inner_config(base.config)
    return replace(
        outcome,
        layer_digest=layer.blob.descriptor.digest,
        diff_id=layer.diff_id,
        user=inner.get("User") or "",
        entrypoint=inner.get("Entrypoint"),
        cmd=inner.get("Cmd"),
        cautions=tuple(cautions(base.config)),
    )


def unpatch(
    source: Source,
    sink: Sink,
    *,
    platform: tuple[str, str],
    target: Target,
    report: Callable[[str, int], None] = lambda done, size_bytes: None,
) -> Outcome:
    """Write an image as it was before it was patched; is_identical: whether each byte is known."""
    image = _load(source, platform)
    if detect(image.config) not in (State.OURS, State.UPSTREAM):
        raise ImageUnsuitable("The image is not patched: there is nothing to undo")
    base = _restore(source, image)
    outcome = _write(
        image, base.config, _unify(source, base.layers, target), sink, target, report
    )  # fmt: skip
    return replace(
        outcome, is_identical=outcome.image_id == labels_of(image.config).get(BASE_LABEL)
    )


def verify(
    source: Source, *, platform: tuple[str, str], binary: Path, mode: int, docker_only: bool
) -> list[str]:
    """Return what is wrong with a patched image, nothing when all is well.

    docker_only: whether the platform takes Docker's manifests alone, as SageMaker does.
    """
    image = _load(source, platform)
    found = []
    if docker_only and image.media_type != DOCKER_MANIFEST:
        found.append(f"The manifest is {image.media_type}, which SageMaker refuses")
    state = detect(image.config)
    if state not in (State.OURS, State.UPSTREAM):
        return [*found, f"The image is not patched: its state is {state.value}"]
    try:
        check_platform(image.config, machine=read_machine(binary))
        restore(image.config, drop_layer=False)
    except ImageUnsuitable as error:
        found.append(str(error))
    if inner_config(image.config).get("Cmd"):
        found.append("The image has a CMD, which the shim would take for its own arguments")
    layer = build_layer(binary, mode=mode, media_type="", gzip=False)
    if diff_ids_of(image.config)[-1:] != [layer.diff_id]:
        found.append(f"The top layer is not that of this binary: expected {layer.diff_id}")
    elif _top_diff_id(source, layers_of(image.manifest)[-1]) != layer.diff_id:
        found.append("The top layer is not what the configuration says")
    return found


def _load(source: Source, platform: tuple[str, str]) -> Image:
    image = source.load(*platform)
    check_config(image.config, layers=len(layers_of(image.manifest)))
    return image


def _image_id(body: bytes) -> str:
    return describe([body], "").digest


def _restore(source: Source, image: Image) -> _Base:
    """Undo an earlier patch in memory, or take the image as it is."""
    state, layers = detect(image.config), layers_of(image.manifest)
    drop = False
    if state is State.OURS:
        drop = top_is_labelled(image.config)
    elif state is State.UPSTREAM and layers:
        drop = is_shim_layer(_tar(source, layers[-1]))
    config = restore(image.config, drop_layer=drop)
    body = write_config(config, like=image.config_bytes)
    if state is State.PLAIN:
        body = image.config_bytes
    return _Base(
        image=image, config=config, image_id=_image_id(body), layers=layers[: len(layers) - drop]
    )


def _tar(source: Source, layer: Descriptor) -> Any:
    content = pieces(source.blob(layer).open(0))
    return content if is_plain(layer.media_type) else decompressed(content)


def _top_diff_id(source: Source, layer: Descriptor) -> str:
    return describe(_tar(source, layer), "").digest


def _unify(source: Source, layers: Sequence[Descriptor], target: Target) -> list[Blob]:
    """Return the blobs of the layers, all plain where DEST takes that, else all compressed."""
    if target.complete and any(is_foreign(layer.media_type) for layer in layers):
        raise ImageUnsuitable("The image has layers that are to be had elsewhere (foreign)")
    blobs = [source.blob(layer) for layer in layers]
    keep = target.plain and all(is_plain(layer.media_type) for layer in layers)
    made: dict[str, Blob] = {}
    # One pass over the source in its own order: a compressed archive cannot be read in another.
    for blob in sorted(blobs, key=lambda blob: blob.position):
        if is_plain(blob.descriptor.media_type) and not keep:
            if (digest := blob.descriptor.digest) not in made:
                made[digest] = gzip_blob(blob, layer_type(target.family, compressed=True))
    return [made.get(blob.descriptor.digest, blob) for blob in blobs]


def _write(
    image: Image,
    config: dict[str, Any],
    blobs: Sequence[Blob],
    sink: Sink,
    target: Target,
    report: Callable[[str, int], None],
) -> Outcome:
    """Write the image of these layers, unless it is there."""
    config_body = write_config(config, like=image.config_bytes)
    config_blob = document_blob(config_body, config_of(image.manifest).media_type)
    manifest = build_manifest(
        image.manifest,
        family=target.family,
        config=config_blob.descriptor,
        layers=[blob.descriptor for blob in blobs],
    )
    new = Image(
        manifest_bytes=gojson.dumps(manifest),
        config_bytes=config_body,
        manifest=manifest,
        config=config,
        media_type=OCI_MANIFEST if target.family == OCI else DOCKER_MANIFEST,
        names=image.names,
    )
    digest = _image_id(new.manifest_bytes)
    reference, sizes = None, dict[str, int]()
    if not target.dry_run:
        with sink:
            there = sink.current_digest()
            if there not in (None, digest) and not target.force:
                raise UsageError("DEST is another image: --force replaces it")
            if there != digest:
                local = [blob for blob in blobs if not is_foreign(blob.descriptor.media_type)]
                sizes = _place([*local, config_blob], sink, target.workers, report)
            reference = sink.commit(new)
    return Outcome(
        reference=reference,
        source_digest=_image_id(image.manifest_bytes),
        source_image_id=_image_id(image.config_bytes),
        digest=digest,
        image_id=config_blob.descriptor.digest,
        layer_digest=None,
        diff_id=None,
        user="",
        entrypoint=None,
        cmd=None,
        is_identical=None,
        sizes=sizes,
        cautions=(),
        config=config,
        manifest=manifest,
    )


def _place(
    blobs: Sequence[Blob], sink: Sink, workers: int, report: Callable[[str, int], None]
) -> dict[str, int]:
    """Place each blob once, several side by side, in the order of the source."""
    once = {blob.descriptor.digest: blob for blob in blobs}
    ordered = sorted(once.values(), key=lambda blob: blob.position)
    sizes: dict[str, int] = {}
    with ThreadPoolExecutor(workers) as pool:
        for blob, done in zip(ordered, pool.map(sink.place, ordered), strict=True):
            size_bytes = blob.descriptor.size_bytes
            sizes[done] = sizes.get(done, 0) + size_bytes
            report(done, size_bytes)
    return sizes
