"""Whether others than root and us could have written a file, on real files of several owners."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shim.files.exposure import ADVICE, find_exposure, never_exposed
from tests.e2e.test_supervision import needs_namespaces
from tests.support import UNPRIVILEGED_UID, needs_root


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file in a directory, both ours."""
    (tmp_path / "directory").mkdir(mode=0o755)
    path = tmp_path / "directory/file"
    path.write_text("content")
    path.chmod(0o644)
    return path


def test_a_file_of_ours_is_not_exposed(file: Path) -> None:
    assert "" == find_exposure(str(file))


@pytest.mark.parametrize("what", ["file", "directory"])
@pytest.mark.parametrize("mode", [0o664, 0o646, 0o777, 0o775])
def test_what_others_can_write_is_exposed(file: Path, what: str, mode: int) -> None:
    path = file if what == "file" else file.parent
    path.chmod(mode)
    assert f"{path} is writable for others than root: {ADVICE}" == find_exposure(str(file))


@needs_root
@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_belongs_to_others_is_exposed(file: Path, what: str) -> None:
    path = file if what == "file" else file.parent
    os.chown(path, UNPRIVILEGED_UID, 0)
    path.chmod(0o700)
    assert f"{path} belongs to uid {UNPRIVILEGED_UID}: {ADVICE}" == find_exposure(str(file))


def test_the_sticky_bit_protects_what_is_ours(file: Path) -> None:
    file.parent.chmod(0o1777)
    assert "" == find_exposure(str(file))


@needs_root
def test_the_sticky_bit_protects_nothing_of_others(file: Path) -> None:
    file.parent.chmod(0o1777)
    os.chown(file, UNPRIVILEGED_UID, UNPRIVILEGED_UID)
    assert "belongs to uid" in find_exposure(str(file))


def test_the_target_of_a_link_counts_and_the_way_to_it(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    for target in (str(file), "directory/file", "directory/../directory/file"):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        file.parent.chmod(0o755)
        assert "" == find_exposure(str(link))
        file.parent.chmod(0o777)
        assert f"{file.parent} is writable" in find_exposure(str(link))


@needs_root
def test_a_link_of_others_is_exposed_whatever_it_leads_to(file: Path) -> None:
    file.parent.chmod(0o1777)
    link = file.parent / "link"
    link.symlink_to("/etc/passwd")
    os.lchown(link, UNPRIVILEGED_UID, UNPRIVILEGED_UID)
    assert f"{link} belongs to uid {UNPRIVILEGED_UID}: {ADVICE}" == find_exposure(str(link))


def test_links_in_a_circle_end(file: Path) -> None:
    (file.parent / "a").symlink_to("b")
    (file.parent / "b").symlink_to("a")
    assert "too many links" in find_exposure(str(file.parent / "a"))


def test_a_relative_path_is_that_of_the_working_directory(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    assert "" == find_exposure("file")
    file.parent.chmod(0o777)
    assert f"{file.parent} is writable" in find_exposure("file")


def test_a_missing_file_is_an_error(file: Path) -> None:
    with pytest.raises(FileNotFoundError):
        find_exposure(f"{file}.none")


@needs_root
@pytest.mark.parametrize("mode", [0o640, 0o600])
def test_a_token_as_kubernetes_projects_it_is_not_exposed(tmp_path: Path, mode: int) -> None:
    """The mount's directory is for everybody, with the sticky bit; what lies in it is root's."""
    volume = tmp_path / "serviceaccount"
    volume.mkdir()
    volume.chmod(0o1777)

    def project(name: str, text: str) -> None:
        (volume / name).mkdir(mode=0o755)
        (volume / name / "token").write_text(text)
        (volume / name / "token").chmod(mode)
        os.chown(volume / name / "token", 0, 1000)  # the pod's fsGroup
        (volume / "..data_tmp").symlink_to(name)
        (volume / "..data_tmp").rename(volume / "..data")

    project("..2026_11_25", "one")
    (volume / "token").symlink_to("..data/token")
    assert "" == find_exposure(str(volume / "token"))
    project("..2026_11_26", "two")
    assert "" == find_exposure(str(volume / "token"))
    assert "two" == (volume / "token").read_text()


@needs_root
@needs_namespaces
def test_a_read_only_mount_protects_the_files_of_others(file: Path) -> None:
    """A laptop's ~/.aws, mounted into a container, belongs to somebody there."""
    for path in (file.parent, file):
        os.chown(path, UNPRIVILEGED_UID, UNPRIVILEGED_UID)
    program = (
        "import sys; from shim.files.exposure import *; print(repr(find_exposure(sys.argv[1])))"
    )
    bind = f"mount --bind {file.parent} {file.parent} && mount -o remount,bind,ro {file.parent}"
    found = [
        subprocess.run(
            ["unshare", "--mount", "sh", "-c", f'{prepare} && exec "$0" "$@"']
            + [sys.executable, "-c", program, str(file)],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        ).stdout
        for prepare in ("true", bind)
    ]
    assert "belongs to uid" in found[0]
    assert "''\n" == found[1]


def test_where_the_command_has_our_rights_nothing_is_exposed(file: Path) -> None:
    file.chmod(0o666)
    assert "" == never_exposed(str(file))
