"""How the program starts: the Python it needs, the locale it does not, the signals it waits for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYENV = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
VERSIONS = ("2.7", "3.6", "3.7", "3.8", "3.9", "3.10")


def find_python(version: str) -> str:
    """Return an interpreter of an old version, or skip the test."""
    for candidate in (
        *PYENV.glob(f"versions/{version}.*/bin/python"),
        shutil.which(f"python{version}"),
    ):
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        if (
            candidate
            and subprocess.run([candidate, "-c", code], capture_output=True).stdout
            == f"{version}\n".encode()
        ):
            return str(candidate)
    pytest.skip(f"needs a Python {version}, on PATH or of pyenv")


@pytest.fixture(scope="module")
def zipapp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an archive that runs as that of build.sh does."""
    path = tmp_path_factory.mktemp("zipapp") / "shim.pyz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__main__.py", "import shim.__main__\n")
        for module in (ROOT / "shim").rglob("*.py"):
            archive.write(module, module.relative_to(ROOT))
    return path


Form = Callable[..., list[str]]


@pytest.fixture(params=["module", "zipapp", "console script"])
def form(request: pytest.FixtureRequest, zipapp: Path, tmp_path: Path) -> Form:
    """Return what makes a command line of an interpreter and its options."""
    script = tmp_path / "sagemaker-shim"
    # What pip makes of the entry point in setup.cfg.
    module, _, function = "shim.__main__:main".partition(":")
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    tail = {"module": ["-m", "shim"], "zipapp": [str(zipapp)], "console script": [str(script)]}
    return lambda python, *options: [python, *options, *tail[request.param]]


def is_utf8(name: bytes) -> bool:
    return name.decode(errors="replace").encode() == name


def run(argv: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(argv, capture_output=True, timeout=60, **options)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_older_python_is_refused_in_a_sentence(form: Form, version: str) -> None:
    done = run(
        [*form(find_python(version)), "--version"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert (2, b"") == (done.returncode, done.stdout)
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"sagemaker-shim: needs Python 3.11 or newer, found {version}.")


def test_the_console_script_is_the_program_itself() -> None:
    assert "sagemaker-shim = shim.__main__:main\n" in (ROOT / "setup.cfg").read_text()


# What the filters of old container engines say to clone3: not ENOSYS, after which a C library tries
# clone, but EPERM.
OLD_ENGINE = """
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(int argc, char **argv) {
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone3, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {4, filter};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
    return execvp(argv[1], argv + 1);
}
"""


@pytest.mark.parametrize("arguments", [["serve"], ["invoke", "-f", "-"], ["check"]], ids=" ".join)
def test_an_engine_that_refuses_threads_is_told_in_a_sentence(
    tmp_path: Path, arguments: list[str]
) -> None:
    source, program = tmp_path / "filter.c", tmp_path / "filter"
    source.write_text(OLD_ENGINE)
    if not shutil.which("gcc") or subprocess.run(["gcc", source, "-o", program]).returncode:
        pytest.skip("needs the Debian packages gcc, libc6-dev and linux-libc-dev")
    thread = "import threading; threading.Thread(target=int).start()"
    if run([str(program), sys.executable, "-c", thread]).returncode == 0:
        pytest.skip("needs a C library that starts threads by clone3, such as glibc 2.34")
    done = run([str(program), sys.executable, "-m", "shim", *arguments], cwd=ROOT)
    assert (1, b"") == (done.returncode, done.stdout)
    (line,) = done.stderr.splitlines()
    text = json.loads(line)["log"]
    assert text.startswith("No thread can be started") and "container engine is too old" in text


@pytest.fixture(scope="module")
def locales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a LOCPATH with locales whose encodings are other than UTF-8."""
    directory = tmp_path_factory.mktemp("locales")
    for name, source, charmap in (
        ("de_DE.ISO-8859-1", "de_DE", "ISO-8859-1"),
        ("ja_JP.EUC-JP", "ja_JP", "EUC-JP"),
    ):
        try:
            subprocess.run(
                ["localedef", "-i", source, "-f", charmap, directory / name], capture_output=True
            )
        except FileNotFoundError:
            pytest.skip("needs localedef, of the Debian package libc-bin")
        if not (directory / name / "LC_CTYPE").exists():
            pytest.skip("needs the sources of locales, of the Debian package locales")
    return directory


LOCALES: dict[str, Mapping[str, str]] = {
    "ISO-8859-1": {"LC_ALL": "de_DE.ISO-8859-1"},
    "EUC-JP": {"LC_ALL": "ja_JP.EUC-JP"},
    "C without UTF-8 mode": {"LC_ALL": "C", "PYTHONUTF8": "0"},
    "C, not coerced": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "POSIX": {"LANG": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "LC_CTYPE alone": {"LC_CTYPE": "de_DE.ISO-8859-1"},
    "UTF-8": {"LC_ALL": "C.UTF-8"},
    "odd streams": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1:strict"},
    "none": {},
}
NAMES = (
    b"caf\xe9",
    "café".encode(),
    "名前".encode(),
    b"\xff\xfe",
    b"\x8f\xa2\xaf \xa1\xc1",
    "\U0001f600".encode(),
)
ECHO = """
import json, os, sys
source, output, *words = map(os.fsencode, sys.argv[1:])
source = os.environb.get(b"SHIM_INPUT_PATH", source)
output = os.environb.get(b"SHIM_OUTPUT_PATH", output)
names = os.listdir(source)
with open("/proc/self/environ", errors="replace") as file:  # Python adds some to os.environ
    started_with = [entry.split("=", 1) for entry in file.read().split("\\0") if entry]
print(json.dumps({
    "words": [word.hex() for word in words],
    "names": sorted(name.hex() for name in names),
    "variable": os.environb[b"\\xe9\\xff"].hex(),
    "locale": {name: text for name, text in started_with if name[:3] in ("LC_", "LAN")},
}))
for name in names:
    os.link(source + b"/" + name, output + b"/" + name)
"""
P = "GRAND_CHALLENGE_COMPONENT_"


@pytest.mark.parametrize("locale", LOCALES)
def test_names_arguments_and_variables_are_bytes_in_any_locale(
    form: Form, locale: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    variables = dict(LOCALES[locale])
    if any("ISO" in text or "EUC" in text for text in variables.values()):
        variables["LOCPATH"] = str(request.getfixturevalue("locales"))
    source, destination, root = tmp_path / "eingäbe", tmp_path / "ausgäbe", tmp_path / "würzel"
    for directory in (source, root):
        directory.mkdir()
    for name in NAMES:
        (source / os.fsdecode(name)).write_bytes(name)
    echo = tmp_path / "echo.py"
    echo.write_text(ECHO)
    environ = {
        b"PATH": os.fsencode(os.environ["PATH"]),
        b"PYTHONPATH": os.fsencode(ROOT),
        b"\xe9\xff": b"\xe9 \xff",
        **{
            os.fsencode(f"{P}{name}_PATH"): os.fsencode(root / name) for name in ("INPUT", "OUTPUT")
        },
        os.fsencode(f"{P}LINKED_INPUT_PARENT"): os.fsencode(root / "linked"),
        os.fsencode(f"{P}WRITABLE_DIRECTORIES"): b"",
        os.fsencode(f"{P}POST_CLEAN_DIRECTORIES"): b"",
        **{os.fsencode(name): os.fsencode(value) for name, value in variables.items()},
    }
    arguments = ["run", "--input", source, "--output", destination, "--log-format", "json", "--"]
    command = [sys.executable, "-X", "utf8", echo, root / "INPUT", root / "OUTPUT", *NAMES]
    done = run([*form(sys.executable), *arguments, *command], cwd=tmp_path, env=environ)
    assert 0 == done.returncode, done.stderr.decode()
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    (seen,) = (json.loads(line["log"]) for line in lines if not line["internal"])
    assert {
        "words": [name.hex() for name in NAMES],
        "names": sorted(name.hex() for name in NAMES),
        "variable": b"\xe9 \xff".hex(),
        "locale": {name: text for name, text in variables.items() if name[:3] in ("LC_", "LAN")},
    } == seen
    copied = {path.read_bytes() for path in destination.iterdir() if path.is_file()}
    assert {name for name in NAMES if is_utf8(name)} <= copied  # as S3 takes them


@pytest.mark.parametrize("options", [["-I"], ["-X", "utf8=0"], ["-O", "-u"]], ids=" ".join)
def test_the_interpreters_options_are_kept_in_any_locale(zipapp: Path, options: list[str]) -> None:
    code = "import sys; print(sys.flags.utf8_mode, sys.flags.isolated, sys.flags.optimize)"
    with zipfile.ZipFile(zipapp) as archive, zipfile.ZipFile(f"{zipapp}.flags", "w") as changed:
        main = archive.read("shim/__main__.py").decode().partition("from shim.cli")[0]
        changed.writestr("__main__.py", main + code)
    done = run(
        [sys.executable, *options, f"{zipapp}.flags"],
        env={"LC_ALL": "C", "PYTHONUTF8": "1" if "-X" in options else "0"},
    )
    isolated, optimize = int("-I" in options), int("-O" in options)
    assert f"1 {isolated} {optimize}\n" == done.stdout.decode(), done.stderr
