"""Directories under other names, for processes that are not root."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.platform import ROOT
from tests.support import UNPRIVILEGED_UID, needs_root

SCRIPT = """
import os, shutil, sys
from pathlib import Path
from shim.process.namespaces import show
base = Path(sys.argv[1])
names = [Path(name) for name in sys.argv[2:]]
before = os.getcwd()
for directory in ("0", "1", "root"):
    (base / directory).mkdir()
(base / "0/seen").touch()
is_shown = show({name: base / str(index) for index, name in enumerate(names)}, root=base / "root")
assert os.getcwd() == before
print(is_shown, (names[0] / "seen").exists(), os.geteuid() == os.stat(base / "0").st_uid)
if is_shown:
    assert 0 == os.system(f"touch {names[1]}/made && test -e {names[0]}/seen")
    print(os.listdir(base / "1"), *sorted(set(os.listdir("/")) - set(sys.stdin.read().split("|"))))
    print(open("/proc/self/mountinfo").read().count(str(base / "root")))
shutil.rmtree(base)
"""


def run(base: Path, *names: Path | str, wrapper: tuple[str, ...] = ()) -> list[str]:
    """Run the script as somebody else than root."""
    checkout = base.parent / "checkout"
    shutil.copytree(ROOT / "shim", checkout / "shim", dirs_exist_ok=True)
    base.mkdir(mode=0o777)
    base.chmod(0o777)
    for directory in base.parents:
        if directory.stat().st_mode & 0o005 != 0o005:
            directory.chmod(0o755)
    base.parent.chmod(0o777)
    done = subprocess.run(
        [*wrapper, "/usr/bin/python3", "-c", SCRIPT, str(base), *map(str, names)],
        input="|".join(path.name for path in Path("/").iterdir()),
        user=UNPRIVILEGED_UID,
        group=UNPRIVILEGED_UID,
        extra_groups=[],
        env={"PYTHONPATH": str(checkout), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        cwd=base.parent,
        text=True,
        capture_output=True,
    )
    assert 0 == done.returncode, done.stderr
    return done.stdout.splitlines()


def is_allowed() -> bool:
    """Tell whether somebody else than root may have namespaces here."""
    command = ["unshare", "--user", "--mount", "true"]
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(
            command,
            user=UNPRIVILEGED_UID,
            group=UNPRIVILEGED_UID,
            extra_groups=[],
            capture_output=True,
        ).returncode
    )


needs_python = pytest.mark.skipif(
    not Path("/usr/bin/python3").exists(), reason="needs a python3 that everybody can run"
)


@needs_root
@needs_python
def test_names_that_do_not_exist_are_made_in_a_root_of_its_own(tmp_path: Path) -> None:
    if not is_allowed():
        pytest.skip("needs user namespaces")
    names = "/shown-input", "/shown-output"
    first, *others = run(tmp_path / "base", *names)
    assert "True True True" == first
    assert ["['made'] shown-input shown-output", "0"] == others
    assert not any(Path(name).exists() for name in names)


@needs_root
@needs_python
def test_names_that_exist_lead_elsewhere_and_only_here(tmp_path: Path) -> None:
    if not is_allowed():
        pytest.skip("needs user namespaces")
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
    first, *others = run(tmp_path / "base", tmp_path / "input", tmp_path / "output")
    assert ["['made']", "0"] == others
    assert [] == [*(tmp_path / "input").iterdir(), *(tmp_path / "output").iterdir()]


@needs_root
@needs_python
def test_nothing_changes_where_it_is_not_possible(tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    missing = tmp_path / "deep/output"
    assert ["False False True"] == run(tmp_path / "base", tmp_path / "input", missing)
    assert not missing.parent.exists()


@needs_root
@needs_python
def test_nothing_changes_where_namespaces_are_not_allowed(tmp_path: Path) -> None:
    forbid = 'echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"'
    wrapper = ("unshare", "--user", "--map-current-user", "--keep-caps", "sh", "-c", forbid, "sh")
    assert ["False False True"] == run(tmp_path / "base", "/input", "/output", wrapper=wrapper)
