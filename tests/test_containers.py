"""The static binary in real containers: podman with runc, images made here, no registry."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest

from shim import __version__
from tests.e2e.platform import without_remarks
from tests.support import needs_root, poll

pytestmark = needs_root

ROOT = Path(__file__).parents[1]
BUSYBOX = "/bin/busybox"
OUT_OF_MEMORY = 137
RUN = ("run", "--input", "/in", "--output", "/out", "--")
Podman = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    """A function that runs podman on a storage of its own."""
    if not shutil.which("podman") or not shutil.which("runc"):
        pytest.skip("needs the Debian packages podman and runc")
    store = mkdtemp(prefix="podman-")  # podman takes no path of more than 50 characters
    options = f"--storage-driver vfs --root {store}/root --runroot {store}/run --runtime runc"
    options += f" --tmpdir {store}/tmp --cgroup-manager cgroupfs --events-backend none"

    def run(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = ["podman", *options.split(), *map(str, arguments)]
        # Podman's monitor leaves a file where it was started when memory ran out.
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=store)
        assert done.returncode == 0 or not check, done.stderr
        return done

    yield run
    run("rm", "--all", "--force", "--time", 0)
    run("rmi", "--all", "--force")
    shutil.rmtree(store)


@pytest.fixture(scope="module")
def image(podman: Podman, binary: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image with nothing but a shell, and over it the layer of the README's Dockerfile."""
    if not os.path.exists(BUSYBOX):
        pytest.skip("needs the Debian package busybox-static")
    context = tmp_path_factory.mktemp("context")
    for name in ("tmp", "bin", "in", "etc"):
        (context / "base" / name).mkdir(parents=True)
    (context / "base/tmp").chmod(0o1777)
    (context / "base/etc/passwd").write_text("algo:x:1001:1001::/:/bin/sh\n")
    shutil.copy(BUSYBOX, context / "base/bin/busybox")
    for name in ("sh", "id", "dd", "sleep", "ls"):
        (context / "base/bin" / name).symlink_to("busybox")
    subprocess.run(["tar", "-C", context / "base", "-cf", context / "base.tar", "."], check=True)
    (context / "Dockerfile").write_text(dockerfile())
    shutil.copy(binary, context / binary.name)
    (context / binary.name).chmod(0o600)  # as a download leaves it
    try:
        podman("import", "--change", "USER=algo", context / "base.tar", "localhost/your-image")
        podman("build", "--isolation", "chroot", "--tag", "localhost/with-shim", context)
        podman("run", *limits(), "localhost/with-shim", "--version")
    except AssertionError as error:
        pytest.skip(f"no container can be run here: {error}")
    return "localhost/with-shim"


def dockerfile() -> str:
    """Return the one that the README shows, for this version."""
    _, _, rest = (ROOT / "README.md").read_text().partition("```dockerfile\n")
    text = rest.partition("```")[0]
    assert 3 == len(text.splitlines())
    machine = os.uname().machine
    return (
        text.replace("your-image", "localhost/your-image")
        .replace("VERSION", __version__)
        .replace("x86_64", machine)
    )


def limits() -> list[str]:
    """Return options that ask for no more than is ours to give: podman's own defaults do."""
    kinds = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
    most = {name: resource.getrlimit(kind)[1] for name, kind in kinds.items()}
    values = {name: min(4096, value if value > 0 else 4096) for name, value in most.items()}
    return ["--network", "host", *(f"--ulimit={name}={n}:{n}" for name, n in values.items())]


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what the user's command wrote; podman may have put warnings of its own between."""
    texts = without_remarks(done.stdout + done.stderr).splitlines()
    records = [json.loads(text) for text in texts if text.startswith("{")]
    return [record["log"] for record in records if not record["internal"]]


def test_three_lines_of_a_dockerfile_are_enough(podman: Podman, image: str) -> None:
    done = podman("run", "--rm", *limits(), image, "--version")
    assert done.stdout.startswith(f"sagemaker-shim {__version__} (Python 3.")


def test_the_command_runs_as_the_user_who_is_named(podman: Podman, image: str) -> None:
    user = ["--user", "0", "--env", "GRAND_CHALLENGE_COMPONENT_USER=algo"]
    done = podman("run", "--rm", *limits(), *user, image, *RUN, "/bin/id", "-u")
    assert ["1001"] == lines(done)


@pytest.mark.parametrize("options", [(), ("--pid", "host")], ids=["its own", "the host's"])
def test_a_task_is_ended_without_others_of_its_user(
    podman: Podman, image: str, options: tuple[str, ...]
) -> None:
    """Where the container shares the host's processes, those of the same user are not a task's."""
    user = ["--user", "0", "--env", "GRAND_CHALLENGE_COMPONENT_USER=algo"]
    script = "/bin/busybox setsid sleep 600 & exit 0"
    with subprocess.Popen(["sleep", "600"], user=1001) as other:
        done = podman(
            "run", "--rm", *options, *limits(), *user, image, *RUN, "/bin/sh", "-c", script
        )
        assert other.poll() is None
        other.kill()
    assert "Ended 1 processes" in done.stdout


def test_a_read_only_container_of_a_user_is_told_what_it_lacks(podman: Podman, image: str) -> None:
    done = podman(
        *("run", "--rm", "--read-only", *limits(), image, "check", "--", "/bin/id"), check=False
    )
    assert 1 == done.returncode
    assert "start the container as root" in done.stderr
    assert "/input cannot be made empty: / is on a read-only file system" in done.stderr


def test_too_little_memory_is_told_from_other_ends(podman: Podman, image: str) -> None:
    memory = ["--user", "0", "--memory", "200m", "--memory-swap", "200m"]
    look = podman("run", "--rm", *limits(), *memory, image, "check", "--", "/bin/dd")
    if "of the 200 MiB" not in look.stdout:
        pytest.skip("needs the right to limit a container's memory")
    command = ["/bin/dd", "if=/dev/zero", "of=/dev/null", "bs=900M", "count=1"]
    done = podman("run", "--rm", *limits(), *memory, image, *RUN, *command, check=False)
    assert 1 == done.returncode
    assert f"return code {OUT_OF_MEMORY}" in done.stdout
    assert "needed more memory than is available" in lines(done)[-1]


def test_stopping_the_container_stops_the_task_in_order(podman: Podman, image: str) -> None:
    script = "trap 'echo asked; exit 0' TERM; echo begun; while :; do sleep 0.1; done"
    container = podman(
        *("run", "--detach", "--user", "0", *limits(), image, *RUN, "/bin/sh", "-c", script)
    ).stdout.strip()
    poll(lambda: "begun" in podman("logs", container).stdout, seconds=20, every=0.2)
    podman("stop", "--time", 20, container)
    assert ["begun", "asked"] == lines(podman("logs", container))[:2]
    assert "143" == podman("wait", container).stdout.strip()
