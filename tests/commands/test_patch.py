"""`patch`, `unpatch`, `verify` as commands; a patched image is unpacked by umoci and started."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from shim import __version__
from tests.oci.images import Made, hybrid, sha256, write_binary, write_layout, write_tar
from tests.oci.registries import HTPASSWD, LOGIN, needs_registry, serving
from tests.support import free_port, needs_root, poll
from tests.test_binary import BUSYBOX, first_child, request

ROOT = Path(__file__).parents[2]
P = "GRAND_CHALLENGE_COMPONENT_"
needs_umoci = pytest.mark.skipif(not shutil.which("umoci"), reason="needs the Debian package umoci")


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """What could be the binary, as far as its header goes."""
    return write_binary(tmp_path / "fake")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_layout(tmp_path / "base", Made())


def run(*words: object, program: tuple[object, ...] = (sys.executable, "-m", "shim")) -> Any:
    command = [str(word) for word in (*program, *words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def inner_config(layout: Path) -> dict[str, Any]:
    """Read the configuration of the only image in a layout."""

    def read(digest: str) -> Any:
        return json.loads((layout / "blobs" / digest.replace(":", "/")).read_bytes())

    (entry,) = json.loads((layout / "index.json").read_bytes())["manifests"]
    found: dict[str, Any] = read(read(entry["digest"])["config"]["digest"])["config"]
    return found


def test_stdout_is_the_reference_alone(base: Path, fake: Path, tmp_path: Path) -> None:
    done = run("patch", base, f"oci:{tmp_path}/out:new", "--binary", fake)
    assert 0 == done.returncode, done.stderr
    name, digest = done.stdout.split("@")
    assert f"oci:{tmp_path}/out:new" == name
    entries = json.loads((tmp_path / "out/index.json").read_bytes())["manifests"]
    assert [entry["digest"] for entry in entries] == [digest.strip()]
    assert "written: " in done.stderr


def test_the_image_says_what_platforms_look_for(base: Path, fake: Path, tmp_path: Path) -> None:
    options = ["--binary", fake, "--env", "A=b=c", "--label", "x=y", "--user", "0:0"]
    assert 0 == run("patch", base, tmp_path / "out", *options).returncode
    config = inner_config(tmp_path / "out")
    assert ["/sagemaker-shim"] == config["Entrypoint"]
    assert "Cmd" not in config
    assert "0:0" == config["User"]
    assert [
        "PATH=/bin",
        f"{P}CMD_B64J=WyJzaCJd",
        f"{P}ENTRYPOINT_B64J=bnVsbA==",
        f"{P}USER=1000",
        "A=b=c",
    ] == config["Env"]
    assert "y" == config["Labels"]["x"]


def test_what_is_recorded_can_be_said(base: Path, fake: Path, tmp_path: Path) -> None:
    words = ["--entrypoint", '["/a", "b"]', "--cmd", "[]"]
    done = run("patch", base, tmp_path / "out", "--binary", fake, "--json", *words)
    assert 0 == done.returncode, done.stderr
    env = inner_config(tmp_path / "out")["Env"]
    assert f"{P}ENTRYPOINT_B64J=WyIvYSIsICJiIl0=" in env
    assert f"{P}CMD_B64J=W10=" in env
    document = json.loads(done.stdout)
    assert __version__ == document["version"]
    assert {"User": "1000", "Entrypoint": None, "Cmd": ["sh"]} == document["original"]
    assert document["source"]["digest"] != document["destination"]["digest"]


def test_a_dry_run_prints_the_documents_and_writes_nothing(
    base: Path, fake: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = run("patch", base, tmp_path / "out", "--binary", fake, "--dry-run")
    assert before == sorted(tmp_path.rglob("*"))
    dry = json.loads(done.stdout)
    assert None is dry["reference"]
    assert ["/sagemaker-shim"] == dry["config"]["config"]["Entrypoint"]
    wet = run("patch", base, tmp_path / "out", "--binary", fake, "--json")
    assert dry["destination"] == json.loads(wet.stdout)["destination"]


@pytest.mark.parametrize("kind", ["layout", "archive", "packed"])
def test_undone_it_is_what_it_was(kind: str, fake: Path, tmp_path: Path) -> None:
    suffix = {"layout": "", "archive": ".tar", "packed": ".tar.gz"}[kind]
    write = write_layout if kind == "layout" else lambda path, made: write_tar(path, hybrid(made))
    made = Made()
    source = write(tmp_path / f"base{suffix if kind != 'packed' else '.tar'}", made)
    patched, undone = tmp_path / f"patched{suffix}", tmp_path / f"undone{suffix}"
    assert 0 == run("patch", source, patched, "--binary", fake).returncode
    done = run("unpatch", patched, undone, "--json")
    assert 0 == done.returncode, done.stderr
    assert "byte for byte" in done.stderr
    image_id = json.loads(done.stdout)["destination"]["image_id"]
    assert f"sha256:{sha256(made.config)}" == image_id


def test_verify_says_yes_and_why_not(base: Path, fake: Path, tmp_path: Path) -> None:
    run("patch", base, tmp_path / "out", "--binary", fake)
    done = run("verify", tmp_path / "out", "--binary", fake)
    assert (0, "") == (done.returncode, done.stdout)
    fake.write_bytes(fake.read_bytes() + b"another release")
    done = run("verify", tmp_path / "out", "--binary", fake)
    assert 1 == done.returncode
    assert "not that of this binary" in done.stderr
    done = run("verify", base, "--binary", fake)
    assert 1 == done.returncode
    assert "is not patched" in done.stderr


# Words -> exit code, what is said.
REFUSED: dict[str, tuple[list[str], int, str]] = {
    "an architecture": (["patch", "arm", "out"], 3, "linux/arm64, but the binary for linux/amd64"),
    "no command": (["patch", "idle", "out"], 3, "neither ENTRYPOINT nor CMD"),
    "nothing to undo": (["unpatch", "base", "out"], 3, "not patched"),
    "no image": (["patch", "nowhere", "out"], 5, "nowhere"),
    "no archive": (["patch", "docker-archive:fake", "out"], 5, "fake"),
    "a password": (["patch", "user:pass@example.test/a", "out"], 2, "example.test/a"),
    "no registry": (["patch", "127.0.0.1:1/a", "out"], 4, "127.0.0.1:1"),
    "a login": (["patch", "127.0.0.1:1/a", "out", "--creds", "SECRET"], 2, "USER:PASSWORD"),
    "a format": (["patch", "base", "out", "--format", "docker"], 2, "only registries"),
    "a digest for DEST": (["patch", "base", f"oci:out:a@sha256:{'0' * 64}"], 2, "name a tag"),
    "another image": (["patch", "base", "idle"], 2, "--force"),
    "a mode": (["patch", "base", "out", "--mode", "0999"], 2, "octal"),
    "a command": (["patch", "base", "out", "--cmd", "sh"], 2, "list of strings"),
    "a variable": (["patch", "base", "out", "--env", "SECRET"], 2, "NAME=VALUE"),
    "a platform": (["patch", "base", "out", "--platform", "amd64"], 2, "OS/ARCH"),
    "no DEST": (["patch", "base"], 2, "DEST"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_have_a_code_and_a_sentence(case: str, fake: Path, tmp_path: Path) -> None:
    write_layout(tmp_path / "base", Made())
    write_layout(tmp_path / "arm", Made(outer={"architecture": "arm64"}, name="a:1"))
    write_layout(tmp_path / "idle", Made(inner={}, name="x:latest"))
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    words, code, said = REFUSED[case]
    paths = {"base", "arm", "idle", "out", "nowhere"}
    words = [f"{tmp_path}/{word}" if word in paths else word for word in words]
    words = [
        word.replace(":fake", f":{fake}").replace("oci:", f"oci:{tmp_path}/") for word in words
    ]
    binary = [] if words[0] == "unpatch" else ["--binary", fake]
    done = run(*words, *binary)
    assert (code, "") == (done.returncode, done.stdout), done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "pass@" not in done.stderr
    assert "SECRET" not in done.stderr
    after = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert before == after


def test_a_checkout_asks_for_the_binary(base: Path, tmp_path: Path) -> None:
    done = run("patch", base, tmp_path / "out")
    assert 2 == done.returncode
    assert "--binary" in done.stderr


def test_stopped_it_leaves_nothing(fake: Path, tmp_path: Path) -> None:
    big = io.BytesIO()
    with tarfile.open(fileobj=big, mode="w") as tar:
        info = tarfile.TarInfo("big")
        info.size = 300 << 20
        tar.addfile(info, io.BytesIO(os.urandom(1 << 20) * 300))
    source = write_layout(tmp_path / "base", Made(layers=[big.getvalue()]))
    (tmp_path / "out").mkdir()
    words = [sys.executable, "-m", "shim", "patch", source, tmp_path / "out/a.tar.gz"]
    with subprocess.Popen([*words, "--binary", fake], cwd=ROOT) as process:
        poll(lambda: [*(tmp_path / "out").iterdir()])
        process.send_signal(signal.SIGTERM)
        assert 128 + signal.SIGTERM == process.wait(30)
    assert [] == [*(tmp_path / "out").iterdir()]


LOADED = "import sys, shim.cli; print(*[m for m in sys.modules if 'oci' in m or 'patch' in m])"


def test_nothing_of_it_is_loaded_for_other_verbs() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], cwd=ROOT, capture_output=True, text=True)
    assert "" == done.stdout.strip()


def busybox_layer() -> bytes:
    """A shell for everybody, and two users."""
    file = io.BytesIO()
    users = b"root:x:0:0::/:/bin/sh\nalg:x:1234:1234::/home/alg:/bin/sh\n"
    users += b"evil:x:0:0::/:/bin/sh\n"
    contents = {
        "bin/busybox": (Path(BUSYBOX).read_bytes(), 0o755),
        "etc/passwd": (users, 0o644),
        "etc/group": (b"root:x:0:\nalg:x:1234:\n", 0o644),
    }
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("bin", "etc", "proc"):
            info = tarfile.TarInfo(name)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info)
        for name, (content, mode) in contents.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("bin/sh")
        link.type, link.linkname = tarfile.SYMTYPE, "busybox"
        tar.addfile(link)
    return file.getvalue()


SCRIPT = 'echo "uid $(/bin/busybox id -u)"; echo done > /output/result.txt'


def list_early(pid: int) -> list[str]:
    """Read what the frozen program imports before the user's command starts."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    (library,) = {line.split()[-1] for line in maps if "/libpython" in line}
    listed = Path(library).with_name("modules.txt")
    return listed.read_text().splitlines()


def is_late(name: str) -> bool:
    return name.startswith("shim.oci") or name == "shim.commands.patch"


@needs_root
@needs_umoci
@pytest.mark.skipif(not os.path.exists(BUSYBOX), reason="needs the Debian package busybox-static")
def test_the_binary_puts_itself_into_an_image_that_runs(binary: Path, tmp_path: Path) -> None:
    """Of an image that names another user for the shim, twice: its own user counts."""
    evil = [f"{P}USER=evil", f"{P}USER=evil", "grand_challenge_component_USER=evil"]
    inner = {"User": "alg", "Cmd": ["/bin/sh", "-c", SCRIPT], "Env": [*evil, "PATH=/bin"]}
    made = Made(layers=[busybox_layer()], inner=inner, name="example.test/a:1", zipped=True)
    base = write_layout(tmp_path / "base", made)
    done = run("patch", base, tmp_path / "out", program=(binary,))
    assert 0 == done.returncode, done.stderr
    assert 0 == run("verify", tmp_path / "out", program=(binary,)).returncode
    image = f"{tmp_path}/out:latest"
    subprocess.run(["umoci", "unpack", "--image", image, tmp_path / "bundle"], check=True)
    root = tmp_path / "bundle/rootfs"
    assert sha256(binary.read_bytes()) == sha256((root / "sagemaker-shim").read_bytes())
    assert 0o1777 == (root / "tmp").stat().st_mode & 0o7777
    config = json.loads((tmp_path / "bundle/config.json").read_bytes())["process"]
    assert (["/sagemaker-shim"], 0) == (config["args"], config["user"]["uid"])
    environ = dict(item.split("=", 1) for item in config["env"])
    (root / "tmp/in").mkdir()
    namespaces = ["unshare", "--pid", "--fork", "--mount", "--kill-child"]
    script = 'mount -t proc proc "$0/proc" && exec chroot "$0" "$@"'
    start = [*namespaces, "sh", "-c", script, str(root), *config["args"]]
    local = ["run", "--input", "/tmp/in", "--output", "/tmp/out", "--log-format", "json"]
    environ |= {"PATH": f"/usr/sbin:/usr/bin:{environ['PATH']}", P + "USE_LINKED_INPUT": "False"}
    done = subprocess.run([*start, *local], env=environ, capture_output=True, text=True, timeout=60)
    assert 0 == done.returncode, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert ["uid 1234"] == [line["log"] for line in lines if not line["internal"]]
    assert "done\n" == (root / "tmp/out/result.txt").read_text()
    port = free_port()
    with subprocess.Popen([*start, "serve", "--port", str(port)], env=environ) as process:
        try:
            poll(lambda: request("GET", f"http://127.0.0.1:{port}/ping") == 200)
            early = list_early(first_child(process.pid))
            assert "shim.serve.protocol" in early
            assert [] == [name for name in early if is_late(name)]
        finally:
            os.kill(first_child(process.pid), signal.SIGKILL)


@needs_registry
def test_from_registry_to_registry_with_the_logins_of_a_file(fake: Path, tmp_path: Path) -> None:
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    auth = f"auth:\n  htpasswd:\n    realm: x\n    path: {tmp_path}/htpasswd\n"
    base = write_layout(tmp_path / "base", Made(zipped=True))
    with serving(tmp_path / "registry", rest=auth) as host:
        login = ["--creds", "alice:pw"]
        done = run("patch", base, f"{host}/a:1", "--binary", fake, *login)
        assert 0 == done.returncode, done.stderr
        done = run("unpatch", f"{host}/a:1", f"{host}/b:1", "--platform", "linux/amd64")
        assert 4 == done.returncode
        assert "401" in done.stderr
        entry = {"auths": {host: {"auth": LOGIN.basic.removeprefix("Basic ")}}}
        (tmp_path / "config.json").write_text(json.dumps(entry))
        environ = {**os.environ, "DOCKER_CONFIG": str(tmp_path)}
        words = [sys.executable, "-m", "shim", "verify", f"{host}/a:1", "--binary", fake]
        done = subprocess.run([*map(str, words)], cwd=ROOT, env=environ, capture_output=True)
        assert 0 == done.returncode, done.stderr
        done = run("verify", f"{host}/a:1", "--binary", fake, "--creds", "alice:wrongpw")
        assert 4 == done.returncode
        assert "wrongpw" not in done.stdout + done.stderr
