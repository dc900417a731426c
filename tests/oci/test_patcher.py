from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shim.contract.errors import UsageError
from shim.oci.archive import open_sink, open_source
from shim.oci.config import PatchOptions
from shim.oci.errors import ImageUnsuitable, StorageError
from shim.oci.patcher import Outcome, Target, patch, unpatch, verify
from shim.oci.reference import parse_destination, parse_location
from tests.oci import images
from tests.oci.images import Made, sha256, write_layout, write_tar

AMD64 = ("linux", "amd64")


def needs(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not shutil.which(tool), reason=f"{tool} is not installed")


def target_of(dest: str, **changed: Any) -> Target:
    location = parse_destination(dest)
    is_file = location.kind.endswith("archive") or dest.endswith((".tar", ".tar.gz", ".tgz"))
    return Target(**({"family": "oci", "plain": is_file, "complete": is_file} | changed))


def patched(
    source: object, dest: object, binary: Path, *, version: str = "1.0", **changed: Any
) -> Outcome:
    options = changed.pop("options", PatchOptions())
    with open_source(parse_location(str(source))) as opened:
        return patch(
            opened,
            open_sink(parse_destination(str(dest))),
            platform=AMD64,
            target=target_of(str(dest), **changed),
            binary=binary,
            mode=0o500,
            options=options,
            version=version,
        )


def unpatched(source: object, dest: object, **changed: Any) -> Outcome:
    with open_source(parse_location(str(source))) as opened:
        return unpatch(
            opened,
            open_sink(parse_destination(str(dest))),
            platform=AMD64,
            target=target_of(str(dest), **changed),
        )


def verified(source: object, binary: Path, *, docker_only: bool = False) -> list[str]:
    with open_source(parse_location(str(source))) as opened:
        return verify(
            opened, platform=AMD64, binary=binary, mode=0o500, docker_only=docker_only
        )  # fmt: skip


def digest(outcome: Outcome) -> str:
    return f"sha256:{sha256(outcome.image.manifest_bytes)}"


def image_id(outcome: Outcome) -> str:
    return f"sha256:{sha256(outcome.image.config_bytes)}"


def run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert 0 == done.returncode, done.stderr
    return done.stdout


def skopeo_config(location: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("skopeo", "inspect", "--config", location))
    return found


SHAPES: dict[str, Callable[[Made], dict[str, Any]]] = {
    "Docker 20.10": images.old_docker,
    "Docker 25": images.hybrid,
    "Docker 25, useless index": lambda made: images.hybrid(made, useless=True),
    "Docker 29": images.nested,
    "Docker 29, as pulled": lambda made: images.hybrid(made, docker=True),
    "crane": images.crane,
    "podman": images.podman,
    "repacked": lambda made: images.dotted(images.hybrid(made)),
}
ZIPPED = {"Docker 29", "Docker 29, as pulled"}


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def made_for(shape: str, **changed: Any) -> Made:
    same = images.layer("same")
    return Made(layers=[same, images.layer("b"), same], zipped=shape in ZIPPED, **changed)


@needs("skopeo")
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_patches_every_shape_of_docker_save(
    shape: str, suffix: str, tmp_path: Path, binary: Path
) -> None:
    made = made_for(shape)
    source = write_tar(tmp_path / f"in{suffix}", SHAPES[shape](made))
    outcome = patched(source, tmp_path / f"out{suffix}", binary)
    assert outcome.layer
    if suffix == ".tar.gz":  # skopeo 1.9.3 reads no docker-archive in gzip
        run("gunzip", tmp_path / "out.tar.gz")
    dest = tmp_path / "out.tar"
    for transport in ("docker-archive", "oci-archive"):
        config = skopeo_config(f"{transport}:{dest}")
        assert ["/sagemaker-shim"] == config["config"]["Entrypoint"]
        assert [*config["rootfs"]["diff_ids"][:-1], outcome.layer.diff_id] == config["rootfs"][
            "diff_ids"
        ]
        copy = tmp_path / transport
        # skopeo compares each layer with its digest.
        run("skopeo", "--insecure-policy", "copy", f"{transport}:{dest}", f"dir:{copy}")
        manifest = json.loads((copy / "manifest.json").read_text())
        assert image_id(outcome) == manifest["config"]["digest"]
    assert [] == verified(dest, binary)
    assert agreeing(dest) == ("gzip" if shape in ZIPPED | {"crane"} else "plain")
    names = json.loads(run("tar", "-xOf", dest, "manifest.json"))[0]["RepoTags"]
    assert [made.name] == names


def agreeing(path: Path) -> str:
    """Return how all layers are compressed, when both indexes say the same of the image."""
    entry = json.loads(run("tar", "-xOf", path, "manifest.json"))[0]
    (listed,) = json.loads(run("tar", "-xOf", path, "index.json"))["manifests"]
    blob = "blobs/" + listed["digest"].replace(":", "/")
    manifest = json.loads(run("tar", "-xOf", path, blob))
    digests = [manifest["config"], *manifest["layers"]]
    paths = ["blobs/" + found["digest"].replace(":", "/") for found in digests]
    assert [entry["Config"], *entry["Layers"]] == paths
    kinds = set()
    for layer in entry["Layers"]:
        data = subprocess.run(["tar", "-xOf", path, layer], capture_output=True, check=True).stdout
        kinds.add("gzip" if data.startswith(b"\x1f\x8b") else "plain")
    (kind,) = kinds
    assert {kind == "gzip"} == {"gzip" in layer["mediaType"] for layer in manifest["layers"]}
    return kind


def test_undoing_gives_back_the_configuration(shape: str, tmp_path: Path, binary: Path) -> None:
    made = made_for(shape)
    source = write_tar(tmp_path / "in.tar", SHAPES[shape](made))
    patched(source, tmp_path / "patched.tar", binary)
    outcome = unpatched(tmp_path / "patched.tar", tmp_path / "out.tar")
    assert outcome.is_identical
    assert f"sha256:{sha256(made.config)}" == image_id(outcome)
    config = f"blobs/sha256/{sha256(made.config)}"
    assert made.config.decode() == run("tar", "-xOf", tmp_path / "out.tar", config)


def test_patching_twice_and_a_newer_release(tmp_path: Path, binary: Path) -> None:
    source = write_tar(tmp_path / "in.tar", images.hybrid(Made(annotations={"a": "b"})))
    once = patched(source, tmp_path / "once.tar", binary)
    twice = patched(tmp_path / "once.tar", tmp_path / "twice.tar", binary)
    assert digest(once) == digest(twice)
    assert {"a": "b"} == twice.image.manifest["annotations"]
    assert (tmp_path / "once.tar").read_bytes() == (tmp_path / "twice.tar").read_bytes()
    newer = tmp_path / "newer"
    newer.write_bytes(binary.read_bytes() + b"!")
    upgraded = patched(tmp_path / "once.tar", tmp_path / "newer.tar", newer, version="2.0")
    assert 3 == len(upgraded.image.manifest["layers"])
    assert [] == verified(tmp_path / "newer.tar", newer)
    assert "not that of this binary" in verified(tmp_path / "newer.tar", binary)[0]


@needs("skopeo")
@needs("umoci")
def test_a_layout_is_patched_beside_the_other_images(tmp_path: Path, binary: Path) -> None:
    first, second = Made(name="x:one"), Made(name="x:two", layers=[images.layer("z")])
    root = write_layout(tmp_path / "layout", first, second)
    (root / "other").write_text("kept")
    patched(f"oci:{root}:one", f"oci:{root}:new", binary)
    assert ["new", "one", "two"] == sorted(run("umoci", "ls", "--layout", root).split())
    assert ["sh"] == skopeo_config(f"oci:{root}:one")["config"]["Cmd"]
    bundle = tmp_path / "bundle"
    run("umoci", "raw", "unpack", "--image", f"{root}:new", bundle)
    modes = {
        path.name: f"{path.stat().st_mode & 0o7777:o}"
        for path in bundle.iterdir()
        if path.name in ("input", "output", "tmp", "sagemaker-shim")
    }
    assert {"input": "755", "output": "777", "tmp": "1777", "sagemaker-shim": "500"} == modes
    assert binary.read_bytes() == (bundle / "sagemaker-shim").read_bytes()
    history = json.loads(run("umoci", "stat", "--json", "--image", f"{root}:new"))["history"]
    assert "sagemaker-shim patch 1.0" == history[-1]["created_by"]
    assert [] == verified(f"oci:{root}:new", binary)
    with pytest.raises(UsageError, match="several images, name one of: one, two"):
        patched(write_layout(tmp_path / "two", first, second), tmp_path / "o.tar", binary)


@needs("umoci")
def test_patches_what_umoci_makes(tmp_path: Path, binary: Path) -> None:
    root = tmp_path / "layout"
    run("umoci", "init", "--layout", root)
    run("umoci", "new", "--image", f"{root}:base")
    (tmp_path / "file").write_text("x")
    run("umoci", "insert", "--image", f"{root}:base", tmp_path / "file", "/file")
    run("umoci", "config", "--image", f"{root}:base", "--config.cmd", "sh")
    before = json.loads(run("umoci", "stat", "--json", "--image", f"{root}:base"))
    patched(f"oci:{root}:base", f"oci:{tmp_path}/new:a", binary)
    outcome = unpatched(f"oci:{tmp_path}/new:a", f"oci:{tmp_path}/old:a")
    assert outcome.is_identical
    assert before == json.loads(run("umoci", "stat", "--json", "--image", f"{tmp_path}/old:a"))


@pytest.mark.parametrize("dest", ["out.tar", "oci:layout:x"])
def test_a_destination_that_is_another_image_needs_force(
    dest: str, tmp_path: Path, binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = write_tar(tmp_path / "a.tar", images.old_docker(Made()))
    second = write_tar(tmp_path / "b.tar", images.old_docker(Made(layers=[images.layer("z")])))
    outcome = patched(first, dest, binary)
    before = content(tmp_path)
    again = patched(first, dest, binary)
    assert (outcome.reference, {}) == (again.reference, again.sizes)
    assert before == content(tmp_path)
    with pytest.raises(UsageError, match="--force"):
        patched(second, dest, binary)
    assert before == content(tmp_path)
    replaced = patched(second, dest, binary, force=True)
    assert digest(outcome) != digest(replaced)
    assert [] == verified(dest, binary)


def content(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dest", ["out.tar", "out.tar.gz", "oci:layout:x"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_run_that_fails_leaves_the_destination_as_it_was(
    dest: str, existing: bool, tmp_path: Path, binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if existing:
        patched(write_tar(tmp_path / "a.tar", images.old_docker(Made())), dest, binary)
    made = Made(layers=[images.layer("z"), images.layer("y", content=b"Y" * 90)])
    files = images.hybrid(made)
    path = f"blobs/sha256/{sha256(made.layers[1])}"
    files[path] = bytes(files[path]).replace(b"Y", b"X")  # type: ignore[arg-type]
    source = write_tar(tmp_path / "bad.tar", files)
    before = content(tmp_path), sorted(tmp_path.rglob("*"))
    with pytest.raises(StorageError, match="not that of sha256:"):
        patched(source, dest, binary, force=True)
    assert before == (content(tmp_path), sorted(tmp_path.rglob("*")))


def test_a_dry_run_writes_nothing(tmp_path: Path, binary: Path) -> None:
    source = write_tar(tmp_path / "in.tar", images.crane(Made()))
    before = content(tmp_path)
    outcome = patched(source, tmp_path / "out.tar", binary, dry_run=True)
    assert before == content(tmp_path)
    assert outcome.reference is None
    written = patched(source, tmp_path / "out.tar", binary)
    assert (digest(written), written.image.config) == (digest(outcome), outcome.image.config)


def test_an_archive_of_several_images_wants_a_name(tmp_path: Path, binary: Path) -> None:
    files = images.old_docker(Made(name="example.test/a:1"))
    other = images.old_docker(Made(name="b", layers=[images.layer("z")]))
    entries = [json.loads(found.pop("manifest.json"))[0] for found in (files, other)]
    files |= other | {"manifest.json": json.dumps(entries).encode()}
    source = write_tar(tmp_path / "in.tar", files)
    with pytest.raises(UsageError, match="example.test/a:1, docker.io/library/b:latest"):
        patched(source, tmp_path / "out.tar", binary)
    patched(f"docker-archive:{source}:b", tmp_path / "out.tar", binary)
    assert ["b:latest"] == json.loads(run("tar", "-xOf", tmp_path / "out.tar", "manifest.json"))[0][
        "RepoTags"
    ]
    with pytest.raises(StorageError, match="there is no image 'docker.io/library/c:latest'"):
        patched(f"docker-archive:{source}:c", tmp_path / "no.tar", binary)


BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "a layer is missing": lambda files: [
        files.pop(name) for name in [*files] if name.endswith("layer.tar")
    ],
    "manifest.json is no JSON": lambda files: files.update({"manifest.json": b"{"}),
    "manifest.json is null": lambda files: files.update({"manifest.json": b"null"}),
    "manifest.json is a list of texts": lambda files: files.update({"manifest.json": b'["a"]'}),
    "no image": lambda files: files.update({"manifest.json": b"[]"}),
    "layers are a text": lambda files: files.update(
        {"manifest.json": files["manifest.json"].replace(b'"Layers": [', b'"Layers": "x", "y": [')}
    ),
    "Config is missing": lambda files: files.update(
        {"manifest.json": files["manifest.json"].replace(b'"Config"', b'"Konfig"')}
    ),
    "a layer too few": lambda files: files.update(
        {"manifest.json": b'[{"Config":"%s","Layers":[]}]' % next(
            name for name in files if len(name) == 69
        ).encode()}
    ),
    "links in a loop": lambda files: files.update({
        name: f"../{name}" for name in files if name.endswith("layer.tar")
    }),
    "links out of it": lambda files: files.update({
        name: "/etc/passwd" for name in files if name.endswith("layer.tar")
    }),
    "layers in xz": lambda files: files.update({
        name: b"\xfd7zXZ..." for name in files if name.endswith("layer.tar")
    }),
}  # fmt: skip


@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_broken_archives_are_refused_with_a_sentence(
    spoil: Callable[[dict[str, Any]], object], suffix: str, tmp_path: Path, binary: Path
) -> None:
    files = images.old_docker(Made())
    spoil(files)
    source = write_tar(tmp_path / f"in{suffix}", files)
    with pytest.raises((ImageUnsuitable, StorageError)):
        patched(source, tmp_path / "out.tar", binary)
    assert not (tmp_path / "out.tar").exists()


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_archives_that_end_too_early_are_refused(suffix: str, tmp_path: Path, binary: Path) -> None:
    files = images.old_docker(Made(layers=[images.layer("r", content=binary.read_bytes())]))
    whole = write_tar(tmp_path / f"in{suffix}", dict(reversed(files.items()))).read_bytes()
    source = tmp_path / f"cut{suffix}"
    refused = 0
    for length in range(0, len(whole), len(whole) // 17):
        source.write_bytes(whole[:length])
        try:
            patched(source, tmp_path / "out.tar", binary, force=True)
        except (ImageUnsuitable, StorageError):
            refused += 1
        else:  # what is cut off is padding
            assert [] == verified(tmp_path / "out.tar", binary)
    assert refused > 10


def test_a_member_that_is_there_twice_is_refused(tmp_path: Path, binary: Path) -> None:
    files = images.old_docker(Made())
    source = write_tar(tmp_path / "in.tar", files | {"./manifest.json": files["manifest.json"]})
    with pytest.raises(StorageError, match="'manifest.json' is there twice"):
        patched(source, tmp_path / "out.tar", binary)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"outer": {"architecture": "arm64"}}, "for linux/arm64, but the binary"),
        ({"outer": {"os": "windows"}}, "for windows/amd64"),
        ({"inner": {}}, "neither ENTRYPOINT nor CMD"),
        ({"inner": {"Entrypoint": ["/sagemaker-shim"]}}, "does not say what"),
        ({"outer": {"rootfs": {"type": "layers", "diff_ids": []}}}, "2 layers, but 0"),
    ],
)
def test_images_that_cannot_be_patched(
    changed: dict[str, Any], message: str, tmp_path: Path, binary: Path
) -> None:
    source = write_layout(tmp_path / "layout", Made(**changed))
    with pytest.raises(ImageUnsuitable, match=message):
        patched(source, tmp_path / "out.tar", binary)


def test_what_is_not_patched_cannot_be_undone_or_verified(tmp_path: Path, binary: Path) -> None:
    source = write_layout(tmp_path / "layout", Made())
    with pytest.raises(ImageUnsuitable, match="not patched"):
        unpatched(source, tmp_path / "out.tar")
    (sentence,) = verified(source, binary)
    assert "not patched" in sentence
    patched(source, tmp_path / "out.tar", binary)
    (sentence,) = verified(tmp_path / "out.tar", binary, docker_only=True)
    assert "SageMaker refuses" in sentence


def test_plain_layers_are_compressed_where_they_must_be(tmp_path: Path, binary: Path) -> None:
    source = write_tar(tmp_path / "in.tar.gz", images.old_docker(Made()))
    outcome = patched(source, f"oci:{tmp_path}/layout:x", binary, family="docker")
    types = {layer["mediaType"] for layer in outcome.image.manifest["layers"]}
    assert {"application/vnd.docker.image.rootfs.diff.tar.gzip"} == types


def test_the_layer_of_the_existing_tool_is_replaced(tmp_path: Path, binary: Path) -> None:
    theirs = images.layer("/input", "/output", "/tmp", "sagemaker-shim")
    env = [
        "PATH=/bin",
        "GRAND_CHALLENGE_COMPONENT_CMD_B64J=WyJzaCJd",
        "GRAND_CHALLENGE_COMPONENT_ENTRYPOINT_B64J=bnVsbA==",
        "GRAND_CHALLENGE_COMPONENT_USER=1000",
    ]
    inner = {"Env": env, "Entrypoint": ["/sagemaker-shim"], "User": "0"}
    for zipped in (False, True):
        made = Made(layers=[images.layer("a"), theirs], inner=inner, zipped=zipped)
        source = write_layout(tmp_path / f"{zipped}", made)
        outcome = patched(source, tmp_path / f"{zipped}.tar", binary)
        assert 2 == len(outcome.image.manifest["layers"])
        assert {"Env": ["PATH=/bin"], "User": "1000", "Cmd": ["sh"]} == outcome.base["config"]


@needs("podman")
@pytest.mark.parametrize("shape", ["Docker 20.10", "Docker 29", "crane"])
def test_podman_loads_the_patched_image(shape: str, tmp_path: Path, binary: Path) -> None:
    """It prefers index.json: what is patched in manifest.json alone would be lost."""
    source = write_tar(tmp_path / "in.tar", SHAPES[shape](made_for(shape)))
    outcome = patched(source, tmp_path / "out.tar.gz", binary)
    with tempfile.TemporaryDirectory(prefix="pod") as directory:  # no longer than 50 characters
        podman = ["podman", "--root", f"{directory}/a", "--runroot", f"{directory}/b"]
        podman += ["--storage-driver", "vfs"]
        run(*podman, "load", "-i", tmp_path / "out.tar.gz")
        (loaded,) = json.loads(run(*podman, "inspect", "example.test/some/base:1.0"))
    assert image_id(outcome) == f"sha256:{loaded['Id']}"
    assert ["/sagemaker-shim"] == loaded["Config"]["Entrypoint"]


# ru_maxrss would be that of the process that started it.
MEASURE = """
import sys
from tests.oci.test_patcher import *
patched(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.parametrize("dest", ["out.tar", "out.tar.gz", "oci:layout"])
def test_no_layer_is_held_in_memory(dest: str, tmp_path: Path, binary: Path) -> None:
    made = Made(layers=[images.layer("zeros", content=bytes(200 << 20))])
    source = write_tar(tmp_path / "in.tar", images.old_docker(made))
    del made
    kind, colon, path = dest.rpartition(":")
    kibibytes = run(
        sys.executable, "-c", MEASURE, source, f"{kind}{colon}{tmp_path / path}", binary
    )
    assert int(kibibytes) < 60 << 10  # pytest included


def test_says_when_the_original_cannot_be_restored(tmp_path: Path, binary: Path) -> None:
    class Indented(Made):
        @property
        def config(self) -> bytes:
            return json.dumps(json.loads(super().config), indent=1).encode()

    source = write_tar(tmp_path / "in.tar", images.old_docker(Indented()))
    patched(source, tmp_path / "patched.tar", binary)
    outcome = unpatched(tmp_path / "patched.tar", tmp_path / "out.tar")
    assert outcome.is_identical is False
    assert json.loads(Indented().config) == outcome.image.config


def test_verify_reads_the_layer_itself(tmp_path: Path, binary: Path) -> None:
    patched(write_layout(tmp_path / "in", Made()), f"oci:{tmp_path}/out:x", binary)
    (listed,) = json.loads((tmp_path / "out/index.json").read_text())["manifests"]
    path = tmp_path / "out/blobs" / listed["digest"].replace(":", "/")
    manifest = json.loads(path.read_text())
    manifest["layers"][-1] = manifest["layers"][0]
    body = json.dumps(manifest).encode()
    (path.parent / sha256(body)).write_bytes(body)
    changed = images.index(images.entry(listed["mediaType"], body))
    (tmp_path / "out/index.json").write_bytes(changed)
    assert ["The top layer is not what the configuration says"] == verified(
        f"oci:{tmp_path}/out", binary
    )
