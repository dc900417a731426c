"""The static binary where nothing else is: roots without an image, as PID 1, in want of a disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shim import __version__
from tests.e2e.platform import b64j, without_remarks
from tests.s3_servers import S3Server
from tests.support import UNPRIVILEGED_UID, free_port, needs_root, poll

pytestmark = needs_root

ROOT = Path(__file__).parents[1]
P = "GRAND_CHALLENGE_COMPONENT_"
BUDGET_BYTES = 10_500_000
BUSYBOX = "/bin/busybox"
NONE: Mapping[str, str] = {}


class Root:
    """A root directory for chroot, with the binary, and a PID namespace to run it in."""

    def __init__(self, path: Path, binary: Path) -> None:
        self.path = path
        for name in ("tmp", "proc"):
            (path / name).mkdir(parents=True)
        (path / "tmp").chmod(0o1777)
        path.chmod(0o755)
        try:
            os.link(binary, path / "shim")
        except OSError:  # another file system
            shutil.copy(binary, path / "shim")
        # Commands before the chroot, in the mount namespace of the root.
        self.prepare = "true"
        self.user = ""

    def add_shell(self) -> None:
        if not os.path.exists(BUSYBOX):
            pytest.skip("needs the Debian package busybox-static")
        for name in ("bin", "in", "etc"):
            (self.path / name).mkdir()
        shutil.copy(BUSYBOX, self.path / "bin/busybox")
        for name in ("sh", "env", "sleep", "rm", "cat", "ls", "ps"):
            (self.path / "bin" / name).symlink_to("busybox")

    def script(self, text: str) -> dict[str, str]:
        """Return variables that make a shell script the command."""
        return {P + "CMD_B64J": b64j(["/bin/sh", "-c", text]), P + "USE_LINKED_INPUT": "False"}

    def start(self, *arguments: str, environ: Mapping[str, str] = NONE) -> subprocess.Popen[str]:
        enter = f"chroot {self.user}"
        # These are not for the programs on the way into the root.
        foreign = [f"{name}={environ[name]}" for name in environ if name.startswith("LD_")]
        if foreign:
            enter = shlex.join([BUSYBOX, "env", *foreign, BUSYBOX, "chroot"])
            environ = {name: environ[name] for name in environ if not name.startswith("LD_")}
        script = f'mount -t proc proc "$0/proc" && {self.prepare} && exec {enter} "$0" "$@"'
        namespaces = ["unshare", "--pid", "--fork", "--mount", "--kill-child"]
        return subprocess.Popen(
            [*namespaces, "sh", "-c", script, self.path, "/shim", *arguments],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def run(self, *arguments: str, environ: Mapping[str, str] = NONE) -> tuple[int, str, str]:
        with self.start(*arguments, environ=environ) as process:
            stdout, stderr = process.communicate(timeout=30)
        return process.returncode, stdout, stderr

    def task(self, script: str, **environ: str) -> tuple[int, list[str], str]:
        """Run a script by `run`; return the code, its lines and stderr."""
        code, stdout, stderr = self.run(
            *("run", "--input", "/in", "--output", "/out"), environ=environ | self.script(script)
        )
        lines = [json.loads(line) for line in stdout.splitlines()]
        return (
            code,
            [line["log"] for line in lines if not line["internal"]],
            without_remarks(stderr),
        )

    def leftovers(self) -> list[str]:
        return sorted(os.listdir(self.path / "tmp"))

    @contextmanager
    def serving(
        self, environ: Mapping[str, str] = NONE
    ) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
        """Yield (process, PID 1 of the container seen from here, port) once /ping is 200."""
        port = free_port()
        with self.start("serve", "--port", str(port), environ=environ) as process:
            try:
                ping = ("GET", f"http://127.0.0.1:{port}/ping")
                poll(lambda: request(*ping) == 200, seconds=10)
                yield process, first_child(process.pid), port
            finally:
                if process.poll() is None:
                    os.kill(first_child(process.pid), signal.SIGKILL)


def first_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def request(method: str, url: str, body: bytes | None = None) -> int:
    """Return the status of an answer; 0 when there is none."""
    import http.client
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)
    try:
        connection.request(method, parts.path, body)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


@pytest.fixture
def empty_root(tmp_path: Path, binary: Path) -> Root:
    """A root with /tmp, /proc and the binary."""
    return Root(tmp_path / "root", binary)


@pytest.fixture
def root(empty_root: Root) -> Root:
    """A root with a shell that is linked with musl or anything but our glibc: statically."""
    empty_root.add_shell()
    return empty_root


def test_it_is_named_by_its_version_and_machine(binary: Path) -> None:
    assert f"sagemaker-shim-{__version__}-Linux-{os.uname().machine}" == binary.name
    assert 0o755 == binary.stat().st_mode & 0o777
    with tarfile.open(f"{binary}.tar.gz") as archive:
        assert [binary.name] == archive.getnames()
        packed = archive.extractfile(binary.name)
        assert packed and binary.read_bytes() == packed.read()
    subprocess.run(["sha256sum", "--quiet", "-c", "checksums.txt"], cwd=binary.parent, check=True)
    assert binary.name in (binary.parent / "checksums.txt").read_text()


def test_it_stays_small(binary: Path) -> None:
    assert BUDGET_BYTES >= binary.stat().st_size


# Every verb, what is refused, and what check says: the public paths of the modules that are changed
# while freezing; the end-to-end tests have those of serve.
VERBS = ("serve", "invoke", "run", "check", "patch", "unpatch", "verify")
COMMAND_LINES = {
    "nothing": [],
    "help": ["--help"],
    **{f"help of {verb}": [verb, "--help"] for verb in VERBS},
    "images that are missing": ["patch", "/nowhere", "/tmp/nowhere"],
    "an image that is missing": ["verify", "oci:/nowhere", "--binary", "/bin/true"],
    "unknown verb": ["fly"],
    "unknown option": ["serve", "--fly"],
    "ambiguous option": ["check", "--r", "--fi"],
    "two sources": ["invoke", "-t", "[]", "-f", "list.json"],
    "no source": ["invoke"],
    "no value": ["invoke", "-t"],
    "missing options": ["run"],
    "wrong choice": ["run", "--input", "/tmp", "--output", "/tmp", "--log-format", "xml"],
    "wrong port": ["serve", "--port", "70000"],
    "wrong duration": ["run", "--input", "/", "--output", "/tmp/o", "--timeout", "PT", "--", "x"],
    "wrong tasks": ["invoke", "-t", '[{"pk": 1, "timeout": "P1Y", "inputs": {}}]'],
    "wrong JSON": ["invoke", "-t", "[NaN"],
    "list that is missing": ["invoke", "-f", "/nowhere.json"],
    "wrong URI": ["invoke", "-f", "s3://B/x"],
    "check of no command": ["check", "--log-format", "json"],
    "check in text": ["check", "--log-format", "text", "--", "/bin/true"],
    "check of a list": ["check", "-t", '[{"pk": 1}]'],
}
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "plain": {},
    "wrong variables": {P + "MODEL": "http://[::1/x", P + "MAX_MEMORY_MB": "much"},
    "an address": {"AWS_S3_ENDPOINT_URL": "http://[::1]:1", "AWS_ACCESS_KEY_ID": "a"},
    "a language": {"LANGUAGE": "de", "LC_ALL": "de_DE.UTF-8", "LANG": "de_DE.UTF-8"},
}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("words", COMMAND_LINES)
def test_it_says_what_the_source_says(binary: Path, words: str, environment: str) -> None:
    def say(*program: object) -> tuple[int, list[str]]:
        done = subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "--mount-proc", *map(str, program)]
            + COMMAND_LINES[words],
            env={"PATH": os.environ["PATH"]} | ENVIRONMENTS[environment],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        # What differs from moment to moment, and the authorities that are carried.
        changing = r"\d+ certificates\b|, those carried by this program|\d+ MiB\b|\d+\.\d+ s\b"
        text = re.sub(changing, "", done.stdout + done.stderr)
        return done.returncode, text.splitlines()

    assert say(sys.executable, "-m", "shim") == say(binary)


@pytest.mark.timeout(240)
def test_two_builds_are_the_same(binary: Path, tmp_path: Path) -> None:
    python = next((ROOT / ".venv").glob("freeze-*")) / "bin/python"
    environ = {"PATH": os.environ["PATH"], "TZ": "Asia/Tokyo", "LANG": "C", "TMPDIR": str(tmp_path)}
    subprocess.run(
        [python, ROOT / ".ci/freeze.py", "binary", "--dist", tmp_path / "dist"],
        env=environ,
        check=True,
        capture_output=True,
        umask=0o077,
    )
    again = tmp_path / "dist" / binary.name
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (binary, again)]
    assert digests[0] == digests[1]


def test_an_empty_root_is_enough(empty_root: Root) -> None:
    code, stdout, stderr = empty_root.run("--version")
    pattern = (
        rf"sagemaker-shim {re.escape(__version__)} "
        r"\(Python 3\.\d+\.\d+, OpenSSL 3\..+, certificates of \d{4}-\d\d-\d\d\)\n"
    )
    assert re.fullmatch(pattern, stdout)
    assert (0, "") == (code, stderr)
    assert [] == empty_root.leftovers()


def test_it_carries_authorities_for_an_image_without(empty_root: Root) -> None:
    _, stdout, _ = empty_root.run("check", "--log-format", "json", "--", "/shim")
    found = re.search(r"authorities: (\d+) certificates", stdout)
    assert found and int(found[1]) > 100


def test_a_configuration_of_openssl_in_the_image_does_no_harm(empty_root: Root) -> None:
    (empty_root.path / "openssl.cnf").write_text(
        "openssl_conf = init\n[init]\nproviders = p\n[p]\nbase = b\n[b]\nactivate = 1\n"
    )
    _, stdout, _ = empty_root.run("check", environ={"OPENSSL_CONF": "/openssl.cnf"})
    assert re.search(r"\d{3} certificates", stdout)


def test_tls_from_an_empty_root(empty_root: Root, rclone_tls: S3Server) -> None:
    bucket = rclone_tls.make_bucket("tls-empty-root")
    shutil.copy(rclone_tls.environ["AWS_CA_BUNDLE"], empty_root.path / "ca.pem")
    environ = {**rclone_tls.environ, "AWS_CA_BUNDLE": "/ca.pem"}
    environ |= {P + "CMD_B64J": b64j(["/shim", "--version"]), P + "USE_LINKED_INPUT": "False"}
    task = {
        "pk": "t",
        "inputs": [],
        "output_bucket_name": bucket,
        "output_prefix": "out",
        "timeout": "PT1M",
    }
    code, stdout, stderr = empty_root.run("invoke", "-t", json.dumps([task]), environ=environ)
    assert 0 == code, stdout + stderr
    assert "certificates of" in stdout  # the command was this program in itself
    result = rclone_tls.boto3().get_object(
        Bucket=bucket, Key="out/.sagemaker_shim/inference_result.json"
    )
    assert 0 == json.loads(result["Body"].read())["return_code"]
    assert [] == empty_root.leftovers()


def test_the_command_has_the_environment_of_the_image(root: Root) -> None:
    image = {
        "LD_LIBRARY_PATH": "/cuda/lib:/b",
        "OPENSSL_CONF": "/image.cnf",
        "VIRTUAL_ENV": "/venv",
        "LANG": "C",
        "EMPTY": "",
    }
    code, lines, _ = root.task("env", **image)
    shell = {"PWD", "SHLVL", "OLDPWD", "_", "HOME", "PATH"}
    seen = dict(line.split("=", 1) for line in lines)
    assert 0 == code
    assert image == {name: value for name, value in seen.items() if name not in shell}


def test_a_variable_keeps_its_line_breaks(root: Root) -> None:
    script = """test "$TEXT" = "$(printf 'a\\r\\nb')" && echo same"""
    assert (0, ["same"], "") == root.task(script, TEXT="a\r\nb")


def test_a_library_path_is_not_made_up(root: Root) -> None:
    _, lines, _ = root.task("env")
    assert [] == [line for line in lines if line.startswith(("LD_", "OPENSSL_", "_", "STATICX"))]


# What the loader, the C library, PyInstaller, staticx and Python would take notice of.
STRANGE = {
    "LD_PRELOAD": "/none.so /lib/libfromelsewhere.so",
    "LD_AUDIT": "/none.so",
    "LD_DEBUG": "all",
    "LD_DEBUG_OUTPUT": "/tmp/debug",
    "LD_TRACE_LOADED_OBJECTS": "1",
    "LD_SHOW_AUXV": "1",
    "LD_PROFILE": "libc.so.6",
    "LD_BIND_NOT": "1",
    "LD_LIBRARY_PATH": "/evil",
    "LD_LIBRARY_PATH_ORIG": "/evil",
    "GLIBC_TUNABLES": "glibc.malloc.check=3",
    "GCONV_PATH": "/evil",
    "LOCPATH": "/evil",
    "MALLOC_CHECK_": "3",
    "LANG": "de_DE.UTF-8",
    "LC_ALL": "ja_JP.EUC-JP",
    "STATICX_BOOTLOADER_IDENTIFY": "1",
    "STATICX_KEEP_TEMPS": "1",
    "PYINSTALLER_RESET_ENVIRONMENT": "1",
    "PYINSTALLER_STRICT_UNPACK_MODE": "1",
    "_PYI_ARCHIVE_FILE": "/evil/archive",
    "_PYI_APPLICATION_HOME_DIR": "/evil",
    "_PYI_PARENT_PROCESS_LEVEL": "7",
    "_PYI_SPLASH_IPC": "1",
    "PYTHONHOME": "/evil",
    "PYTHONPATH": "/evil",
    "PYTHONVERBOSE": "1",
    "PYTHONINSPECT": "1",
    "SHIM_ENVIRONMENT": "0",
    "SHIM_DIRECTORY": "0",
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_variable_of_the_image_is_for_the_command_alone(root: Root, name: str) -> None:
    code, lines, stderr = root.task("env", **{name: STRANGE[name]})
    assert (0, "") == (code, stderr)
    assert f"{name}={STRANGE[name]}" in lines
    assert [] == root.leftovers()


# Leaves a file with what it sees of the environment of each process that loads it.
INTRUDER = """
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
__attribute__((constructor)) static void begin(void) {
    int fd = open("/intruded", O_WRONLY | O_CREAT | O_APPEND, 0644);
    const char *key = getenv("GRAND_CHALLENGE_COMPONENT_SIGNING_KEY_HEX");
    if (key)
        write(fd, key, strlen(key));
    close(fd);
}
unsigned int la_version(unsigned int version) { return version; }
"""


@pytest.mark.parametrize("way", ["LD_PRELOAD", "LD_AUDIT", "/etc/ld.so.preload"])
@pytest.mark.parametrize("compiler", ["gcc", "musl-gcc"])
def test_a_library_that_the_image_preloads_is_not_ours_to_load(
    root: Root, compiler: str, way: str
) -> None:
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}: the Debian packages gcc and musl-tools")
    command = [compiler, "-x", "c", "-", "-shared", "-fPIC", "-w", "-o", root.path / "intruder.so"]
    subprocess.run(command, input=INTRUDER, text=True, check=True)
    environ = {P + "SIGNING_KEY_HEX": "c0ffee"}
    if way.startswith("LD_"):
        environ[way] = "/intruder.so"
    else:
        (root.path / way[1:]).write_text("/intruder.so\n")
    code, lines, stderr = root.task("echo done", **environ)
    assert (0, ["done"], "") == (code, lines, stderr)
    assert not (root.path / "intruded").exists()


def test_the_loader_looks_at_no_file_of_the_image(binary: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive.tar"
    section = ["--only-section=.staticx.archive", "--set-section-flags=.staticx.archive=alloc"]
    subprocess.run(["objcopy", "-O", "binary", *section, binary, archive], check=True)
    with tarfile.open(archive) as members:
        (name,) = [name for name in members.getnames() if name.startswith("ld-linux")]
        packed = members.extractfile(name)
        assert packed
        size = int.from_bytes(packed.read(8), "little")
        loader = zlib.decompress(packed.read())
    assert size == len(loader)
    # That one is for setuid programs, of which this is none.
    assert [b"\0/etc/suid-debug"] == re.findall(rb"\0/etc/[^\0]+", loader)
    for path in (b"/proc/self/preload", b"/proc/self/cache"):
        assert 1 == loader.count(path) and not Path(path.decode()).exists()


def test_the_environment_is_to_be_seen_nowhere(root: Root) -> None:
    environ = {**root.script("true"), P + "SIGNING_KEY_HEX": "c0ffee"}
    with root.serving(environ) as (process, pid_1, _):
        seen = Path(f"/proc/{pid_1}/environ").read_bytes()
        os.kill(pid_1, signal.SIGTERM)
        process.communicate(timeout=10)
    assert b"SHIM_DIRECTORY" in seen
    assert [] == re.findall(rb"GRAND_CHALLENGE\w+|c0ffee", seen)


def test_nothing_of_ours_lies_in_tmp_while_a_task_runs(root: Root) -> None:
    """In a directory without a sticky bit others could put something else under its name."""
    (root.path / "tmp").chmod(0o777)
    code, lines, stderr = root.task("ls -A /tmp; ls -l /proc/1/exe")
    assert (0, 1, "") == (code, len(lines), stderr)
    assert lines[0].endswith("/sagemaker-shim (deleted)")
    assert [] == root.leftovers()


class Leftover:
    """A directory as a `serve` has it in its first second, and what else could have its name."""

    def __init__(self, root: Root, process: subprocess.Popen[str]) -> None:
        self.tmp = root.path / "tmp"
        self.process = process
        self.name = str(poll(lambda: "".join(root.leftovers())))
        self.path = self.tmp / self.name
        poll(lambda: os.path.lexists(self.path / ".staticx.interp"))
        os.kill(first_child(process.pid), signal.SIGSTOP)
        assert self.path.exists(), "stopped too late"

    def name_other(self) -> Path:
        """Return a path that a start would take for that of a leftover."""
        return self.tmp / f"{self.name[:-6]}abcdef"

    def kill(self) -> None:
        os.kill(first_child(self.process.pid), signal.SIGKILL)
        self.process.wait(timeout=10)


@pytest.fixture
def living(root: Root) -> Iterator[Leftover]:
    """A `serve` that is stopped while it still needs its directory."""
    port = str(free_port())
    with root.start("serve", "--port", port, environ=root.script("true")) as process:
        try:
            yield Leftover(root, process)
        finally:
            process.kill()


def test_a_start_removes_what_a_killed_one_left(root: Root, living: Leftover) -> None:
    living.kill()
    assert [living.name] == root.leftovers()
    assert 0 == root.task("true")[0]
    assert [] == root.leftovers()


def test_what_a_living_one_needs_is_left_alone(root: Root, living: Leftover) -> None:
    before = sorted(path.name for path in living.path.rglob("*"))
    assert 0 == root.task("true")[0]
    assert before == sorted(path.name for path in living.path.rglob("*"))


def a_link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def of_another_user(path: Path, victim: Path) -> None:
    path.mkdir(mode=0o700)
    (path / "lib").symlink_to(victim)
    os.chown(path, UNPRIVILEGED_UID, UNPRIVILEGED_UID)


def writable_for_others(path: Path, victim: Path) -> None:
    path.mkdir()
    path.chmod(0o777)
    (path / "lib").symlink_to(victim)


def renamed(path: Path, victim: Path) -> None:
    victim.rename(path)


@pytest.mark.parametrize("make", [a_link, of_another_user, writable_for_others, renamed])
def test_what_only_has_the_name_of_a_leftover_is_not_entered(
    root: Root, living: Leftover, make: Callable[[Path, Path], None]
) -> None:
    victim = root.path / "victim"
    victim.mkdir(mode=0o700)
    (victim / "precious").write_text("kept")
    other = living.name_other()
    make(other, victim)
    assert 0 == root.task("true")[0]
    assert "kept" == ((other if make is renamed else victim) / "precious").read_text()
    assert os.path.lexists(other)


def test_a_link_within_a_leftover_is_not_followed(root: Root, living: Leftover) -> None:
    living.kill()
    (root.path / "victim").mkdir()
    (root.path / "victim/precious").write_text("kept")
    entry = next(living.path.glob("lib*.so*"))
    entry.unlink()
    entry.symlink_to("/victim")
    assert 0 == root.task("true")[0]
    assert [] == root.leftovers()
    assert "kept" == (root.path / "victim/precious").read_text()


def test_it_needs_nothing_from_tmp_once_a_task_runs(root: Root, rclone_tls: S3Server) -> None:
    bucket = rclone_tls.make_bucket("tidy")
    shutil.copy(rclone_tls.environ["AWS_CA_BUNDLE"], root.path / "ca.pem")
    environ = {**rclone_tls.environ, "AWS_CA_BUNDLE": "/ca.pem"}
    environ |= root.script("rm -rf /tmp/* /tmp/.[a-z]*; echo x >/output/x")
    task = {"inputs": [], "output_bucket_name": bucket, "timeout": "PT1M"}
    tasks = [{**task, "pk": pk, "output_prefix": f"out/{pk}"} for pk in ("a", "b")]
    code, stdout, stderr = root.run("invoke", "-t", json.dumps(tasks), environ=environ)
    assert 0 == code, stdout + stderr
    keys = [item["Key"] for item in rclone_tls.boto3().list_objects_v2(Bucket=bucket)["Contents"]]
    assert {"out/a/x", "out/b/x"} <= set(keys)


def test_output_is_utf_8_whatever_the_locale(root: Root) -> None:
    code, lines, _ = root.task("printf 'gr\\303\\274n\\n'; exit 3", LANG="C", LC_ALL="POSIX")
    assert (1, ["grün"]) == (code, lines[:1])


def read_only(root: Root) -> None:
    (root.path / "out").mkdir()
    path = shlex.quote(str(root.path))
    root.prepare = (
        f"mount --bind {path} {path} && mount -t tmpfs -o mode=1777 tmpfs {path}/tmp && "
        f"mount -t tmpfs tmpfs {path}/out && mount -o remount,ro,bind {path} && "
        f"mount -t proc proc {path}/proc"
    )


def unprivileged(root: Root) -> None:
    root.user = f"--userspec={UNPRIVILEGED_UID}:{UNPRIVILEGED_UID}"


@pytest.mark.parametrize("change", [read_only, unprivileged])
def test_it_starts_all_the_same(root: Root, change: Callable[[Root], None]) -> None:
    change(root)
    code, stdout, stderr = root.run("check", "--", "/bin/env")
    assert "the user may execute '/bin/env'" in stdout, stderr
    assert [] == root.leftovers()


def missing(root: Root, directory: str) -> None:
    (root.path / directory).rmdir()


def is_a_file(root: Root, directory: str) -> None:
    (root.path / directory).rmdir()
    (root.path / directory).touch()


def mounted(options: str) -> Callable[[Root, str], None]:
    def mount(root: Root, directory: str) -> None:
        root.prepare += f" && mount -t tmpfs -o {options} tmpfs {root.path}/{directory}"

    return mount


OF_NO_USE = {
    "missing": (missing, "No such file or directory"),
    "file": (is_a_file, "Not a directory"),
    "read-only": (mounted("ro"), "Read-only file system"),
    "full": (mounted("size=4m"), "No space left on device"),
    "no-inodes": (mounted("nr_inodes=9"), "No space left on device"),
    "noexec": (mounted("noexec"), "mounted noexec"),
}


@pytest.mark.parametrize(("change", "_"), OF_NO_USE.values(), ids=OF_NO_USE)
@pytest.mark.parametrize("left", ["/tmp", "/var/tmp", "/dev/shm"])
def test_another_directory_serves_where_tmpdir_does_not(
    empty_root: Root, change: Callable[[Root, str], None], _: str, left: str
) -> None:
    for name in ("elsewhere", "var/tmp", "dev/shm"):
        (empty_root.path / name).mkdir(parents=True)
    for name in ("elsewhere", "tmp", "var/tmp", "dev/shm"):
        if f"/{name}" != left:
            change(empty_root, name)
    code, stdout, stderr = empty_root.run("--version", environ={"TMPDIR": "/elsewhere"})
    assert (0, "") == (code, stderr)
    assert "certificates of" in stdout
    assert [] == os.listdir(empty_root.path / left[1:])


@pytest.mark.parametrize("tmpdir", ["/elsewhere", "elsewhere/", "/link", "/tmp/deep/deeper"])
def test_tmpdir_is_taken_first(empty_root: Root, tmpdir: str) -> None:
    (empty_root.path / "tmp/deep/deeper").mkdir(parents=True)
    (empty_root.path / "elsewhere").mkdir()
    (empty_root.path / "link").symlink_to("elsewhere")
    port = str(free_port())
    with empty_root.start(
        "serve", "--port", port, environ={**root_command(), "TMPDIR": tmpdir}
    ) as process:
        place = empty_root.path / ("elsewhere" if "/deep" not in tmpdir else tmpdir[1:])
        poll(lambda: leftovers_in(place))
        poll(lambda: not leftovers_in(place))  # once it has loaded all
        os.kill(first_child(process.pid), signal.SIGTERM)
        process.communicate(timeout=10)
    assert 0 == process.returncode


def leftovers_in(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith("sagemaker-shim-")]


@pytest.mark.parametrize(("change", "reason"), OF_NO_USE.values(), ids=OF_NO_USE)
@pytest.mark.parametrize("tmpdir", ["/elsewhere", None])
def test_where_no_directory_serves_one_sentence_says_why(
    empty_root: Root, change: Callable[[Root, str], None], reason: str, tmpdir: str | None
) -> None:
    (empty_root.path / "opt/ml/output").mkdir(parents=True)
    directories = ["elsewhere"] * bool(tmpdir) + ["tmp", "var/tmp", "dev/shm"]
    for name in directories:
        (empty_root.path / name).mkdir(parents=True, exist_ok=True)
        change(empty_root, name)
    environ = {"TMPDIR": tmpdir} if tmpdir else {}
    code, stdout, stderr = empty_root.run("--version", environ=environ)
    assert (1, "") == (code, stdout)
    line = json.loads(stderr)
    assert ["log", "level", "source", "internal", "task"] == list(line)
    assert ("ERROR", "stderr", True) == (line["level"], line["source"], line["internal"])
    tried = "; ".join(f"/{name} ({reason})" for name in directories)
    assert line["log"].endswith(f"tried {'TMPDIR=' if tmpdir else ''}{tried}")
    assert line["log"].startswith("No temporary directory can hold the program: set TMPDIR")
    assert line["log"] == (empty_root.path / "opt/ml/output/failure").read_text()


def test_a_name_that_json_cannot_hold_is_shown_without_what_it_cannot(empty_root: Root) -> None:
    (empty_root.path / "tmp").rmdir()
    _, _, stderr = empty_root.run("--version", environ={"TMPDIR": '/"\\\n\udcff'})
    assert "tried TMPDIR=/???? (No such file or directory); /tmp" in json.loads(stderr)["log"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_to_pid_1_reaches_the_task(root: Root, signum: signal.Signals) -> None:
    environ = root.script("trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.1; done")
    with root.start("run", "--input", "/in", "--output", "/out", environ=environ) as process:
        assert process.stdout
        lines = []
        while '"log": "ready"' not in (lines or [""])[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr and process.stderr.read()
        os.kill(first_child(process.pid), signum)
        rest, _ = process.communicate(timeout=10)
    assert '"log": "bye"' in rest
    assert 128 + signum == process.returncode
    assert [] == root.leftovers()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGQUIT])
@pytest.mark.parametrize(("command", "codes"), [("serve", {0}), ("run", {143, 131})])
def test_a_signal_while_it_unpacks_is_heard(
    root: Root, command: str, codes: set[int], signum: signal.Signals
) -> None:
    """By PID 1 it would be lost if nobody kept it."""
    (root.path / "in").mkdir(exist_ok=True)
    lines = {
        "serve": ["serve", "--port", str(free_port())],
        "run": ["run", "--input", "/in", "--output", "/out"],
    }
    with root.start(*lines[command], environ=root.script("sleep 20")) as process:
        try:
            poll(root.leftovers, every=0.001)
            os.kill(first_child(process.pid), signum)
            process.communicate(timeout=15)
        finally:
            process.kill()
    assert process.returncode in codes
    assert [] == root.leftovers()


def test_no_zombies_are_left_by_tasks(root: Root, tmp_path: Path) -> None:
    store = {"AWS_S3_ENDPOINT_URL": "file:///store"}
    (root.path / "store/bucket").mkdir(parents=True)
    environ = store | root.script("(setsid sleep 0.05 &); (sleep 60 &); exit 0")
    with root.serving(environ) as (process, pid_1, port):
        task = {
            "pk": "t",
            "inputs": [],
            "output_bucket_name": "bucket",
            "output_prefix": "o",
            "timeout": "PT1M",
        }
        url = f"http://127.0.0.1:{port}/invocations"
        assert 200 == request("POST", url, json.dumps(task).encode())
        poll(lambda: len(states(pid_1)) == 1 and "Z" not in states(pid_1), seconds=5)
        os.kill(pid_1, signal.SIGTERM)
        process.communicate(timeout=10)
    assert 0 == process.returncode


def states(pid: int) -> list[str]:
    """Return the states of a process and of all below it."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [stat[0], *(state for child in children for state in states(int(child)))]


def test_ping_does_not_wait_for_a_dead_resolver(root: Root) -> None:
    (root.path / "etc/resolv.conf").write_text("nameserver 192.0.2.1\n")
    began = time.monotonic()
    with root.serving(root.script("true")):
        assert time.monotonic() - began < 3  # a look-up takes 10 s


def test_threads_that_are_alive_at_the_end_change_no_exit_code(empty_root: Root) -> None:
    """glibc would abort without libgcc_s, which a full image hides."""
    codes: list[Any] = []
    for _ in range(3):
        with empty_root.serving(root_command()) as (process, pid_1, _):
            os.kill(pid_1, signal.SIGTERM)
            process.communicate(timeout=10)
            codes.append(process.returncode)
    assert [0, 0, 0] == codes


def root_command() -> dict[str, str]:
    return {P + "CMD_B64J": b64j(["/shim", "--version"]), P + "USE_LINKED_INPUT": "False"}


# Prints where it runs, what it may load libraries from, and what one of those says.
PROGRAM = """
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
const char *answer(void);
int main(void) {
    const char *path = getenv("LD_LIBRARY_PATH");
    printf("%d %s %s\\n", (int) getuid(), path ? path : "-", answer());
    return 0;
}
"""
LIBRARY = 'const char *answer(void) { return "found"; }'


def compile_program(root: Root, compiler: str) -> dict[str, str]:
    """Put a program into a root with the libraries that it needs, one of them in /cuda only.

    Returns the variables with which it is the command.
    """
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}: the Debian packages gcc and musl-tools")
    cuda = root.path / "cuda"
    cuda.mkdir()
    library, program = cuda / "libanswer.so", root.path / "program"
    for source, options in (
        (LIBRARY, ["-shared", "-fPIC", "-o", library]),
        (PROGRAM, ["-o", program, "-L", cuda, "-lanswer"]),
    ):
        command = [compiler, "-x", "c", "-", *options]
        # The library has to follow what needs it.
        subprocess.run(command[:4] + options, input=source, text=True, check=True)
    return {
        P + "CMD_B64J": b64j(["/program"]),
        P + "USE_LINKED_INPUT": "False",
        "LD_LIBRARY_PATH": "/cuda",
    }


def copy_into(root: Root, *paths: str) -> None:
    """Copy files of this machine to the same places in a root, what links point to."""
    for path in paths:
        copy = root.path / path.lstrip("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)


def libraries_of(program: Path) -> list[str]:
    """Return the paths of the libraries that a dynamic executable loads."""
    listing = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
    return re.findall(r"(/\S+) \(0x", listing)


def run_program(root: Root, environ: Mapping[str, str]) -> tuple[int, list[str], str]:
    (root.path / "in").mkdir()
    code, stdout, stderr = root.run("run", "--input", "/in", "--output", "/out", environ=environ)
    lines = [json.loads(line) for line in stdout.splitlines()]
    return code, [line["log"] for line in lines if not line["internal"]], without_remarks(stderr)


def test_a_program_of_musl_runs(empty_root: Root) -> None:
    environ = compile_program(empty_root, "musl-gcc")
    copy_into(empty_root, f"/lib/ld-musl-{os.uname().machine}.so.1")
    assert (0, ["0 /cuda found"], "") == run_program(empty_root, environ)


def test_a_program_of_the_image_s_own_glibc_runs_as_its_user(empty_root: Root) -> None:
    """As in a distroless image: libraries and a user, but no shell."""
    environ = compile_program(empty_root, "gcc")
    copy_into(empty_root, *libraries_of(empty_root.path / "program"))
    (empty_root.path / "etc").mkdir()
    (empty_root.path / "etc/passwd").write_text("nonroot:x:65532:65532::/home/nonroot:/none\n")
    environ |= {P + "USER": "nonroot"}
    assert (0, ["65532 /cuda found"], "") == run_program(empty_root, environ)


def test_libraries_of_the_image_are_not_loaded(empty_root: Root) -> None:
    """Where a system has them lie others under the names of ours, as with an old glibc."""
    environ = compile_program(empty_root, "musl-gcc")
    machine = os.uname().machine
    musl = f"/lib/ld-musl-{machine}.so.1"
    copy_into(empty_root, musl)
    for directory in ("lib", "lib64", f"lib/{machine}-linux-gnu", f"usr/lib/{machine}-linux-gnu"):
        for name in ("libc.so.6", "libz.so.1", "libcrypto.so.3", "libssl.so.3", "libgcc_s.so.1"):
            other = empty_root.path / directory / name
            other.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(musl, other)
    assert (0, ["0 /cuda found"], "") == run_program(empty_root, environ)


def test_tls_with_the_authorities_of_the_image(empty_root: Root, rclone_tls: S3Server) -> None:
    environ = {**rclone_tls.environ, P + "CMD_B64J": b64j(["/shim"])}
    store = empty_root.path / "etc/ssl/certs/ca-certificates.crt"
    store.parent.mkdir(parents=True)
    shutil.copy(environ.pop("AWS_CA_BUNDLE"), store)
    listing = f"s3://{rclone_tls.make_bucket('tls-own-store')}/tasks.json"
    code, _, stderr = empty_root.run("invoke", "-f", listing, environ=environ)
    assert (2, True) == (code, "404" in stderr), stderr


@pytest.mark.parametrize("host", ["localhost", "bucket.test"])
def test_names_resolve_by_the_files_of_the_image(root: Root, rclone: S3Server, host: str) -> None:
    """The name of this machine even without one; there is no resolv.conf either."""
    if host != "localhost":
        (root.path / "etc/hosts").write_text(f"127.0.0.1 {host}\n")
    url = rclone.url.replace("127.0.0.1", host)
    environ = {**rclone.environ, "AWS_S3_ENDPOINT_URL": url, P + "CMD_B64J": b64j(["/shim"])}
    code, _, stderr = root.run("invoke", "-f", "s3://none-such/tasks.json", environ=environ)
    assert (2, True) == (code, "404" in stderr), stderr


def test_a_helper_has_the_environment_of_the_image(root: Root, rclone: S3Server) -> None:
    keys = {name: rclone.environ[f"AWS_{name}"] for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")}
    answer = {"Version": 1, "AccessKeyId": keys["ACCESS_KEY_ID"]}
    answer |= {"SecretAccessKey": keys["SECRET_ACCESS_KEY"]}
    (root.path / "helper").write_text(f"env >/seen; echo {shlex.quote(json.dumps(answer))}\n")
    (root.path / "config").write_text("[default]\ncredential_process = /bin/sh /helper\n")
    environ = {name: rclone.environ[name] for name in ("AWS_S3_ENDPOINT_URL", "AWS_DEFAULT_REGION")}
    environ |= {"AWS_CONFIG_FILE": "/config", "LD_LIBRARY_PATH": "/cuda/lib"}
    bucket = rclone.make_bucket("helped")
    task = {"pk": "t", "inputs": [], "output_bucket_name": bucket, "output_prefix": "o"}
    code, stdout, _ = root.run(
        *("invoke", "-t", json.dumps([{**task, "timeout": "PT1M"}])),
        environ=environ | root.script("true"),
    )
    assert 0 == code, stdout
    seen = dict(line.split("=", 1) for line in (root.path / "seen").read_text().splitlines())
    assert "/cuda/lib" == seen["LD_LIBRARY_PATH"]
    assert [] == [name for name in seen if name.startswith(("_PYI", "_MEI", "STATICX", "OPENSSL"))]


def test_building_says_what_is_missing(binary: Path, tmp_path: Path) -> None:
    python = next((ROOT / ".venv").glob("freeze-*")) / "bin/python"
    done = subprocess.run(
        [python.absolute(), ROOT / ".ci/freeze.py", "binary", "--dist", tmp_path],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert 1 == done.returncode
    assert re.search(r"cannot be frozen here without .*binutils.*patchelf", done.stderr)
    assert [] == os.listdir(tmp_path)


def test_what_was_made_from_other_sources_is_made_again(binary: Path, tmp_path: Path) -> None:
    def build() -> tuple[int, bytes]:
        command = [sys.executable, ROOT / ".ci/freeze.py", "zipapp", "--dist", tmp_path]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        path = Path(done.stdout.split()[-1])
        return path.stat().st_ino, path.read_bytes()

    first = build()
    assert first == build()
    (stamp,) = tmp_path.glob(".*.made-from")
    stamp.write_text("other sources")
    inode, data = build()
    assert inode != first[0] and data == first[1]
