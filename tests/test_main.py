"""How the program starts: the Python it needs, the locale it does not, the signals it waits for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYENV = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
VERSIONS = ("2.7", "3.6", "3.7", "3.8", "3.9", "3.10")


def find_python(version: str) -> str:
    """Return an interpreter of an old version, or skip the test."""
    for candidate in (*PYENV.glob(f"versions/{version}.*/bin/python"), shutil.which(f"python{version}")):
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        if candidate and subprocess.run([candidate, "-c", code], capture_output=True).stdout == f"{version}\n".encode():
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


def run(argv: list[str], *arguments: str | bytes, **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*argv, *arguments], capture_output=True, timeout=60, **options)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_older_python_is_refused_in_a_sentence(form: Form, version: str) -> None:
    done = run(form(find_python(version)), "--version", cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"})
    assert (2, b"") == (done.returncode, done.stdout)
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"sagemaker-shim: needs Python 3.11 or newer, found {version}.")


def test_the_console_script_is_the_program_itself() -> None:
    assert "sagemaker-shim = shim.__main__:main\n" in (ROOT / "setup.cfg").read_text()


@pytest.fixture(scope="module")
def locales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a LOCPATH with locales whose encodings are other than UTF-8."""
    directory = tmp_path_factory.mktemp("locales")
    for name, source, charmap in (("de_DE.ISO-8859-1", "de_DE", "ISO-8859-1"), ("ja_JP.EUC-JP", "ja_JP", "EUC-JP")):
        try:
            subprocess.run(["localedef", "-i", source, "-f", charmap, directory / name], capture_output=True)
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
NAMES = (b"caf\xe9", "café".encode(), "名前".encode(), b"\xff\xfe", b"\x8f\xa2\xaf \xa1\xc1", "\U0001f600".encode())
ECHO = """
import json, os, sys
output = os.environb[b"SHIM_OUTPUT_PATH"]
environ = os.environb[b"\\xe9\\xff"].hex()
names = sorted(name.hex() for name in os.listdir(os.environb[b"SHIM_INPUT_PATH"]))
locale = {name: value for name, value in os.environ.items() if name.startswith("LC_") or name == "LANG"}
with open(output + b"/out", "w") as file:
    json.dump([[os.fsencode(word).hex() for word in sys.argv[1:]], environ, names, locale], file)
for name in names:
    with open(output + b"/" + bytes.fromhex(name), "wb") as file:
        file.write(bytes.fromhex(name))
"""


@pytest.mark.parametrize("locale", LOCALES)
def test_names_arguments_and_variables_are_bytes_in_any_locale(form: Form, locale: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    variables = LOCALES[locale]
    if any("ISO" in text or "EUC" in text for text in variables.values()):
        variables = {**variables, "LOCPATH": str(request.getfixturevalue("locales"))}
    source, destination = tmp_path / "eingäbe", tmp_path / "ausgäbe"
    source.mkdir()
    for name in NAMES:
        Path(os.fsdecode(os.fsencode(source) + b"/" + name)).write_bytes(name)
    environ: dict[bytes, bytes] = {
        b"PATH": os.fsencode(os.environ["PATH"]),
        b"PYTHONPATH": os.fsencode(ROOT),
        b"\xe9\xff": b"\xe9 \xff",
        **{os.fsencode(name): os.fsencode(value) for name, value in variables.items()},
    }
    echo = tmp_path / "echo.py"
    echo.write_text(ECHO)
    done = run(
        form(sys.executable, "-W", "error::EncodingWarning"), "run", "--input", str(source), "--output", str(destination), "--",
        sys.executable, "-X", "utf8", str(echo), *NAMES,
        cwd=tmp_path, env=environ, user=os.geteuid() and None,
    )
    assert 0 == done.returncode, done.stderr
