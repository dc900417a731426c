"""Patch, unpatch and verify: the three use cases, over any source and sink.

Blobs first, then the manifest that needs them; what is there already is not written again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shim.contract.errors import UsageError
from shim.oci import config as configs
from shim.oci import gojson, mutate
from shim.oci.config import PatchOptions, State
from shim.oci.errors import ImageUnsuitable
from shim.oci.layer import Layer, build_layer, is_shim_layer, read_machine
from shim.oci.model import Blob, Descriptor, Image, Sink, Source
from shim.oci.streams import decompressed, describe, document_blob, gzip_blob, pieces


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What DEST takes: family: oci or docker; plain: whether layers may stay uncompressed.

    complete: whether layers that are to be had elsewhere (foreign) would have to be in it.
    workers: how many blobs travel side by side; dry_run: nothing is written.
    """

    family: str
    plain: bool = False
    complete: bool = False
    force: bool = False
    dry_run: bool = False
    workers: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What was read, what it was before any patch, and what was written.

    reference: None after a dry run. sizes: bytes by what place() returned.
    is_identical: whether base is, byte for byte, the configuration that was patched first; None
    where that is not recorded.
    """

    reference: str | None
    source: Image
    base: dict[str, Any]
    image: Image
    layer: Layer | None
    sizes: dict[str, int]
    is_identical: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Base:
    """An image as it was before it was patched; layers: without ours."""

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
) -> Outcome:
    """Put the binary into an image, in place of any earlier one.

    Raises ImageUnsuitable, UsageError where DEST is another image, and what source and sink raise.
    """
    image = _load(source, platform)
    configs.check_platform(image.config, machine=read_machine(binary))
    base = _restore(source, image)
    blobs = _unify(source, image, base.layers, target, added=1)
    # A layer that goes beside uncompressed ones stays so as well: crane looks at the first alone.
    gzip = not (target.plain and all(mutate.is_plain(blob.descriptor) for blob in blobs))
    media_type = mutate.layer_type(target.family, compressed=gzip)
    layer = build_layer(binary, mode=mode, media_type=media_type, gzip=gzip)
    config = configs.patch_config(
        base.config, options, diff_id=layer.diff_id, base_id=base.image_id, version=version
    )
    return _write(image, base, config, [*blobs, layer.blob], layer, sink, target)


def unpatch(
    source: Source,
    sink: Sink,
    *,
    platform: tuple[str, str],
    target: Target,
) -> Outcome:
    """Write an image as it was before it was patched. Raises what patch() raises."""
    image = _load(source, platform)
    if configs.detect(image.config) not in (State.OURS, State.UPSTREAM):
        raise ImageUnsuitable("The image is not patched: there is nothing to undo")
    base = _restore(source, image)
    blobs = _unify(source, image, base.layers, target, added=0)
    return _write(image, base, base.config, blobs, None, sink, target)


def verify(
    source: Source, *, platform: tuple[str, str], binary: Path, mode: int, docker_only: bool
) -> list[str]:
    """Return what is wrong with a patched image, nothing when all is well.

    docker_only: whether the platform takes Docker's manifests alone, as SageMaker does.
    """
    image, found = _load(source, platform), []
    if docker_only and image.media_type != mutate.DOCKER_MANIFEST:
        found.append(f"The manifest is {image.media_type}, which SageMaker refuses")
    state = configs.detect(image.config)
    if state not in (State.OURS, State.UPSTREAM):
        return [*found, f"The image is not patched: its state is {state.value}"]
    try:
        configs.check_platform(image.config, machine=read_machine(binary))
        configs.restore(image.config, drop_layer=False)
    except ImageUnsuitable as error:
        found.append(str(error))
    if configs.inner_config(image.config).get("Cmd"):
        found.append("The image has a CMD, which the shim would take for its own arguments")
    expected = build_layer(binary, mode=mode, media_type="", gzip=False).diff_id
    if configs.diff_ids_of(image.config)[-1:] != [expected]:
        found.append(f"The top layer is not that of this binary: expected {expected}")
    elif describe(_tar(source, mutate.layers_of(image.manifest)[-1]), "").digest != expected:
        found.append("The top layer is not what the configuration says")
    return found


def _load(source: Source, platform: tuple[str, str]) -> Image:
    image = source.load(*platform)
    configs.check_config(image.config, layers=len(mutate.layers_of(image.manifest)))
    return image


def _restore(source: Source, image: Image) -> _Base:
    """Undo an earlier patch in memory, or take the image as it is."""
    state, layers = configs.detect(image.config), mutate.layers_of(image.manifest)
    drop = state is State.OURS and configs.top_is_labelled(image.config)
    if state is State.UPSTREAM and layers:
        drop = is_shim_layer(_tar(source, layers[-1]))
    config = configs.restore(image.config, drop_layer=drop)
    body = image.config_bytes
    if state is not State.PLAIN:
        body = configs.write_config(config, like=body)
    image_id = describe([body], "").digest
    return _Base(config=config, image_id=image_id, layers=layers[: len(layers) - drop])


def _tar(source: Source, layer: Descriptor) -> Iterator[bytes]:
    content = pieces(source.blob(layer).open(0))
    return content if mutate.is_plain(layer) else decompressed(content)


def _unify(
    source: Source, image: Image, layers: Sequence[Descriptor], target: Target, *, added: int
) -> list[Blob]:
    """Return the blobs of the layers, all plain where DEST takes that, else all compressed.

    added: how many layers come on top. What DEST's manifest cannot say is refused before the work.
    """
    ours = describe([], mutate.layer_type(target.family, compressed=True))
    mutate.build_manifest(
        image.manifest,
        family=target.family,
        config=mutate.config_of(image.manifest),
        layers=[*layers, *[ours] * added],
    )
    if target.complete and any(map(mutate.is_foreign, layers)):
        raise ImageUnsuitable("The image has layers that are to be had elsewhere (foreign)")
    blobs = [source.blob(layer) for layer in layers]
    if target.plain and all(map(mutate.is_plain, layers)):
        return blobs
    media_type = mutate.layer_type(target.family, compressed=True)
    # One pass over the source in its own order: a compressed archive cannot be read in another.
    plain = {b.descriptor.digest: b for b in blobs if mutate.is_plain(b.descriptor)}
    ordered = sorted(plain.values(), key=lambda blob: blob.position)
    made = {blob.descriptor.digest: gzip_blob(blob, media_type) for blob in ordered}
    return [made.get(blob.descriptor.digest, blob) for blob in blobs]


def _write(
    source: Image,
    base: _Base,
    config: dict[str, Any],
    blobs: Sequence[Blob],
    layer: Layer | None,
    sink: Sink,
    target: Target,
) -> Outcome:
    """Write the image of these layers, unless it is there."""
    config_body = configs.write_config(config, like=source.config_bytes)
    config_blob = document_blob(config_body, mutate.config_of(source.manifest).media_type)
    manifest = mutate.build_manifest(
        source.manifest,
        family=target.family,
        config=config_blob.descriptor,
        layers=[blob.descriptor for blob in blobs],
    )
    image = Image(
        manifest_bytes=gojson.dumps(manifest),
        config_bytes=config_body,
        manifest=manifest,
        config=config,
        media_type=manifest["mediaType"],
        names=source.names,
    )
    reference, sizes = None, dict[str, int]()
    if not target.dry_run:
        with sink:
            digest, there = describe([image.manifest_bytes], "").digest, sink.current_digest()
            if there not in (None, digest) and not target.force:
                raise UsageError("DEST is another image: --force replaces it")
            if there != digest:
                local = [blob for blob in blobs if not mutate.is_foreign(blob.descriptor)]
                sizes = _place([*local, config_blob], sink, target.workers)
                sink.commit(image)
            reference = sink.reference(digest)
    recorded = configs.labels_of(source.config).get(configs.BASE_LABEL)
    return Outcome(
        reference=reference,
        source=source,
        base=base.config,
        image=image,
        layer=layer,
        sizes=sizes,
        is_identical=None if recorded is None else recorded == base.image_id,
    )


def _place(blobs: Sequence[Blob], sink: Sink, workers: int) -> dict[str, int]:
    """Place each blob once, several side by side, in the order of the source."""
    once = {blob.descriptor.digest: blob for blob in blobs}
    ordered = sorted(once.values(), key=lambda blob: blob.position)
    sizes: dict[str, int] = {}
    with ThreadPoolExecutor(workers) as pool:
        for blob, done in zip(ordered, pool.map(sink.place, ordered), strict=True):
            size_bytes = blob.descriptor.size_bytes
            sizes[done] = sizes.get(done, 0) + size_bytes
    return sizes
