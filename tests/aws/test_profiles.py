from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import botocore.exceptions
import botocore.session
import pytest

from shim.aws.errors import ProfileInvalid
from shim.aws.profiles import MAX_FILE_BYTES, read_profile
from shim.files.exposure import never_exposed
from tests.support import UNPRIVILEGED_UID, needs_root

CONFIG = """\
# a comment
[default]
region = eu-west-1
s3 =
    addressing_style = path
    max_concurrent_requests=20

[profile work]
region: eu-west-2
Output = json
aws_access_key_id = from-config
services = mine

[profile "two words"]
region = eu-west-3

[other]
region = eu-north-1

[profile one two]
region = eu-south-1

[profile "unfinished]
region = eu-south-2

[services mine]
s3 =
  endpoint_url = http://minio:9000
sts =
  endpoint_url = http://sts
"""
CREDENTIALS = """\
[default]
aws_access_key_id = hidden-access
aws_secret_access_key = hidden=secret==
[work]
aws_access_key_id = from-credentials
[only here]
region = us-west-2
"""


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Two files, for botocore too."""
    (tmp_path / "config").write_text(CONFIG)
    (tmp_path / "credentials").write_text(CREDENTIALS)
    environ = {
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
    }
    for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return environ


def flatten(options: Mapping[str, Any]) -> dict[str, str]:
    flat = {}
    for name, value in options.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{nested}": text for nested, text in value.items()}
        else:
            flat[name] = value
    return flat


@pytest.mark.parametrize("name", ["default", "work", "two words", "only here"])
def test_reads_a_profile_as_botocore_does(name: str, environ: dict[str, str]) -> None:
    expected = flatten(botocore.session.Session(profile=name).get_scoped_config())
    settings = read_profile(environ | {"AWS_PROFILE": name}).settings
    own = {option: text for option, text in settings.items() if "services." not in option}
    assert expected == own


@pytest.mark.parametrize("name", ["missing", "other", "one two", "one", "mine", "unfinished"])
def test_knows_no_profile_that_botocore_does_not_know(name: str, environ: dict[str, str]) -> None:
    with pytest.raises(botocore.exceptions.ProfileNotFound) as theirs:
        botocore.session.Session(profile=name).get_scoped_config()
    with pytest.raises(ProfileInvalid) as ours:
        read_profile(environ | {"AWS_PROFILE": name})
    assert str(theirs.value) == str(ours.value)


def test_adds_the_services_section(environ: dict[str, str]) -> None:
    settings = read_profile(environ | {"AWS_PROFILE": "work"}).settings
    assert "http://minio:9000" == settings["services.s3.endpoint_url"]
    assert "http://sts" == settings["services.sts.endpoint_url"]


def test_keeps_what_stands_in_the_credentials_file_apart(environ: dict[str, str]) -> None:
    profile = read_profile(environ | {"AWS_PROFILE": "work"})
    assert {"aws_access_key_id": "from-credentials"} == profile.credentials
    assert "from-credentials" == profile.settings["aws_access_key_id"]


def test_the_older_variable_names_the_profile_first(environ: dict[str, str]) -> None:
    named = environ | {"AWS_PROFILE": "work", "AWS_DEFAULT_PROFILE": "two words"}
    assert "two words" == read_profile(named).name


def test_expands_home_and_variables(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "config").write_text("[default]\nregion = from-home\n")
    home = {"HOME": str(tmp_path)}
    assert "from-home" == read_profile(home).settings["region"]
    named = home | {"AWS_CONFIG_FILE": "~/config"}
    assert "eu-west-1" == read_profile(named).settings["region"]
    with_variable = home | {"AWS_CONFIG_FILE": "${HOME}/$NAME", "NAME": "config"}
    assert "eu-west-1" == read_profile(with_variable).settings["region"]


def test_no_file_is_an_empty_profile(tmp_path: Path) -> None:
    profile = read_profile({"HOME": str(tmp_path)})
    assert ("default", {}, {}) == (profile.name, profile.settings, profile.credentials)


@pytest.mark.parametrize(
    "content",
    [
        b"no section = hidden\n",
        b"[default]\nhidden\n",
        b"[default\nregion = hidden\n",
        b"[default]\n[default]\n",
        b"[default]\nregion = hidden\xff\n",
        b"[default]\ns3 =\n  hidden\n",
    ],
    ids=["no section", "no value", "open bracket", "twice", "not UTF-8", "nested without value"],
)
def test_names_the_file_that_cannot_be_parsed(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_bytes(content)
    with pytest.raises(ProfileInvalid) as invalid:
        read_profile({"AWS_CONFIG_FILE": str(path), "HOME": str(tmp_path)})
    assert f"Unable to parse config file: {path}" == str(invalid.value)


def test_refuses_an_endless_file(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_bytes(b"[default]\n" + b"#" * MAX_FILE_BYTES)
    with pytest.raises(ProfileInvalid, match="larger than"):
        read_profile({"AWS_CONFIG_FILE": str(path), "HOME": str(tmp_path)})


def test_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config")
    environ = {"AWS_CONFIG_FILE": str(tmp_path / "config"), "HOME": str(tmp_path)}
    assert {} == read_profile(environ).settings


def test_names_a_services_section_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text("[default]\nservices = gone\n")
    with pytest.raises(ProfileInvalid, match="'gone' services configuration does not exist"):
        read_profile({"AWS_CONFIG_FILE": str(path), "HOME": str(tmp_path)})


def test_shows_no_secret(environ: dict[str, str]) -> None:
    assert "hidden" not in repr(read_profile(environ))


@needs_root
@pytest.mark.parametrize("variable", ["AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "HOME"])
def test_a_file_that_others_could_have_written_is_ignored(variable: str, tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    for name in ("config", "credentials"):
        (tmp_path / ".aws" / name).write_text("[default]\nregion = hidden\n")
    named = tmp_path / ".aws" / ("credentials" if "SHARED" in variable else "config")
    os.chown(named if variable != "HOME" else tmp_path, UNPRIVILEGED_UID, 0)
    none = {"HOME": "/none"} if variable != "HOME" else {}
    profile = read_profile({variable: str(named if none else tmp_path), **none})
    assert {} == profile.settings
    assert f"{named} is ignored: " in profile.exposed[0]
    assert len(profile.exposed) == (1 if none else 2)
    assert "hidden" == read_profile({"HOME": str(tmp_path)}, never_exposed).settings["region"]


@needs_root
def test_a_profile_that_is_asked_for_and_ignored_is_named_with_the_reason(
    environ: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "config").chmod(0o666)
    with pytest.raises(
        ProfileInvalid, match=r"\(two words\) could not be found; .*config is ignor"
    ):
        read_profile(environ | {"AWS_PROFILE": "two words"})


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A directory that others can reach: pytest closes those above tmp_path at its next start."""
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o755)
        yield Path(path)


# Run as somebody else: root reads everything.
UNREADABLE = """
import os, sys
os.setgroups([]); os.setresgid(*[65534] * 3); os.setresuid(*[65534] * 3)
from datetime import UTC, datetime
from shim.aws.credentials import credential_provider
from shim.http.errors import RemoteError
from shim.aws.profiles import read_profile
environ = dict(item.split("=", 1) for item in sys.argv[1:])
profile = read_profile(environ)
provider = credential_provider(
    environ, profile=profile, region=None, fetch=None, run_helper=None,
    now=lambda: datetime.now(UTC), log=print)
try:
    provider.get()
except RemoteError as error:
    print(error)
"""


def find_as_another_user(*variables: str) -> str:
    root = Path(__file__).parents[2]
    argv = ["/usr/bin/python3", "-c", UNREADABLE, "AWS_EC2_METADATA_DISABLED=true", *variables]
    return subprocess.run(argv, cwd=root, capture_output=True, text=True, check=True).stdout


@needs_root
@pytest.mark.parametrize("what", ["home", "file"])
def test_an_unreadable_file_counts_as_absent_and_is_named_where_nothing_else_is(
    what: str, public_path: Path
) -> None:
    config = public_path / ".aws/config"
    config.parent.mkdir()
    config.write_text("[default]\nregion = eu-west-1\n")
    config.chmod(0o600)
    public_path.chmod(0o700 if what == "home" else 0o755)
    home = f"HOME={public_path}"
    expected = "INFO Credentials come from the environment; region: not set\n"
    found = find_as_another_user(home, "AWS_ACCESS_KEY_ID=A", "AWS_SECRET_ACCESS_KEY=s")
    assert expected == found
    reasons = [f"Unable to read {config}: Permission denied"]
    if what == "home":
        reasons.append(f"Unable to read {public_path}/.aws/credentials: Permission denied")
    assert "; ".join(["Unable to locate credentials", *reasons]) == find_as_another_user(home)[:-1]
