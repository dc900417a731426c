"""What root imports, and shows of sources, comes from no place where the user writes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.e2e.platform import b64j

ROOT = Path(__file__).parents[1]
P = "GRAND_CHALLENGE_COMPONENT_"
PRINT = "import sys; print(*sys.modules)"
# Leaves its name behind where it is imported.
INTRUDER = "import posix; posix.mkdir({path!r})"


@pytest.fixture(scope="session")
def zipapp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dist = tmp_path_factory.mktemp("zipapp")
    command = [sys.executable, ROOT / ".ci/freeze.py", "zipapp", "--dist", dist]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Path(done.stdout.split()[-1])


@pytest.fixture(params=["checkout", "installed", "zipapp"])
def form(request: pytest.FixtureRequest) -> tuple[list[str], dict[str, str]]:
    """A command that starts the shim, with the variables that it needs, in the test's directory."""
    if request.param == "zipapp":
        command = [sys.executable, str(request.getfixturevalue("zipapp"))]
        return command, {"PYTHONPATH": f":{request.getfixturevalue('tmp_path')}:."}
    # Of an installed package the interpreter knows by itself.
    path = f":{ROOT}:" if request.param == "checkout" else str(ROOT)
    return [sys.executable, "-m", "shim"], {"PYTHONPATH": path}


def plant(directory: Path, seen: Path, environ: Mapping[str, str], *, is_module: bool) -> None:
    """Put a module into a directory for each of the standard library.

    Left out are those that the interpreter meets by itself, before it runs what it is asked to.
    """
    (directory / "probe.py").touch()
    loaded = subprocess.run([sys.executable, "-c", PRINT], capture_output=True, check=True).stdout
    for name in sys.stdlib_module_names - set(loaded.decode().split()):
        (directory / f"{name}.py").write_text(INTRUDER.format(path=str(seen / name)))
    probe = ["-m", "probe"] if is_module else ["-c", ""]
    subprocess.run([sys.executable, *probe], env=environ, cwd=directory, check=True)
    for name in os.listdir(seen):
        (seen / name).rmdir()
        (directory / f"{name}.py").unlink()


def variables(directory: Path, command: list[str]) -> Mapping[str, str]:
    names = "INPUT_PATH OUTPUT_PATH LINKED_INPUT_PARENT MODEL_DEST GROUND_TRUTH_DEST"
    names += " WRITABLE_DIRECTORIES POST_CLEAN_DIRECTORIES"
    return {
        "PATH": os.environ["PATH"],
        "AWS_S3_ENDPOINT_URL": f"file://{directory}",
        P + "CMD_B64J": b64j(command),
        P + "USE_LINKED_INPUT": "False",
        **{P + name: str(directory / name) for name in names.split()},
    }


@pytest.mark.parametrize("arguments", ["--version", "run", "invoke", "check"])
def test_nothing_is_imported_from_the_working_directory(
    tmp_path: Path, form: tuple[list[str], dict[str, str]], arguments: str
) -> None:
    command, environ = form
    seen, platform = tmp_path / "seen", tmp_path / "platform"
    for name in ("seen", "platform", "platform/bucket", "in"):
        (tmp_path / name).mkdir()
    plant(tmp_path, seen, environ, is_module="-m" in command)
    task = '[{"pk":"t","inputs":[],"output_bucket_name":"bucket","output_prefix":"o"}]'
    lines = {
        "--version": ["--version"],
        "run": ["run", "--input", "in", "--output", "out"],
        "invoke": ["invoke", "-t", task],
        "check": ["check"],
    }
    done = subprocess.run(
        [*command, *lines[arguments]],
        env={**variables(platform, ["true"]), **environ},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert [] == os.listdir(seen), done.stderr
    assert arguments == "check" or done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("frozen", ["binary", "zipapp"])
def test_a_traceback_looks_for_no_source_in_the_working_directory(
    request: pytest.FixtureRequest, tmp_path: Path, frozen: str
) -> None:
    """A FIFO would keep root waiting, a link would have it log what the user cannot read."""
    path = request.getfixturevalue(frozen)
    command = [str(path)] if frozen == "binary" else [sys.executable, str(path)]
    sources = [path.relative_to(ROOT) for path in (ROOT / "shim").rglob("*.py")]
    for name in ["__main__.py", "argparse.py", *map(str, sources)]:
        for spelled in (name, f"<{name}>"):
            (tmp_path / spelled).parent.mkdir(parents=True, exist_ok=True)
            os.mkfifo(tmp_path / spelled)
    (tmp_path / "list").touch()
    os.truncate(tmp_path / "list", 200_000_000)  # more than it may have in memory
    done = subprocess.run(
        ["prlimit", f"--data={100_000_000}", *command, "invoke", "-f", "list"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert 1 == done.returncode
    assert "MemoryError" in done.stderr and "in _read" in done.stderr
