"""What would go wrong is said, by a separate process, and nothing is changed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.platform import Finished, P, Platform
from tests.support import free_port


def check(platform: Platform, *arguments: str) -> Finished:
    return platform.run("check", "--log-format", "text", *arguments, seconds=30)


def findings(job: Finished, level: str) -> list[str]:
    """Return what was found at a level, without what differs from machine to machine."""
    return [
        line.split(maxsplit=1)[1]
        for line in job.stdout.splitlines()
        if line.split()[0] == level and "shared memory" not in line
    ]


def listing(platform: Platform) -> list[tuple[str, int]]:
    # The static binary unpacks itself in the temporary directory, and leaves nothing.
    times = {path: path.lstat().st_mtime_ns for path in platform.root.rglob("*")}
    times[platform.root / "tmp"] = 0
    return sorted((str(path), time) for path, time in times.items())


@pytest.fixture
def list_of_tasks(platform: Platform) -> list[dict[str, Any]]:
    """Two tasks, whose inputs exist."""
    platform.put("in/a")
    return [platform.task(pk, inputs=[("a", "in/a")]) for pk in ("t", "u")]


def test_a_job_that_would_succeed_has_no_errors_and_changes_nothing(
    platform: Platform, list_of_tasks: list[dict[str, Any]]
) -> None:
    platform.put("tasks.json", json.dumps(list_of_tasks).encode())
    platform.command("touch", f"{platform.root}/touched")
    before, keys = listing(platform), platform.keys()
    job = check(platform, "-f", f"s3://{platform.bucket}/tasks.json")
    assert (0, "", []) == (job.code, job.stderr, findings(job, "error"))
    assert (before, keys) == (listing(platform), platform.keys())
    good = findings(job, "ok")
    assert "credentials   Credentials come from the environment; region: eu-central-1" in good
    assert "tasks         2 in the list, which is valid" in good
    assert f"buckets       are there: {platform.bucket}" in good
    places = [f"s3://{platform.bucket}/{p}/.sagemaker_shim/" for p in ("runtime", "out/t", "out/u")]
    assert [f"outputs       can be written below {place!r}" for place in places] == [
        finding for finding in good if finding.startswith("outputs")
    ]
    assert re.fullmatch(r"0 errors, \d warnings?", job.stdout.splitlines()[-1])
    assert "inputs        2 of 2 can be read" in good
    finished = platform.invoke(*list_of_tasks)
    assert (0, 0) == (finished.code, platform.result("u")["return_code"])


def test_everything_that_is_wrong_is_said_at_once(platform: Platform) -> None:
    platform.set(USER="no-such-user", MODEL=f"s3://{platform.bucket}/none.tar")
    (platform.root / "output").write_text("a file")
    tasks = [platform.task(inputs=[("a", "in/none")])]
    (platform.root / "tasks.json").write_text(json.dumps(tasks))
    job = check(platform, "-f", "tasks.json", "--", "none")
    assert 1 == job.code
    assert ["user", "output", "model", "inputs"] == [
        line.split()[0] for line in findings(job, "error")
    ]


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        pytest.param("none.json", "[Errno 2] No such file or directory", id="missing file"),
        pytest.param("s3://{bucket}/none.json", "An error occurred (404)", id="missing object"),
        pytest.param("bad.json", "[0].pk: Field required", id="invalid"),
    ],
)
def test_task_list_that_cannot_be_used_is_told(
    platform: Platform, location: str, expected: str
) -> None:
    (platform.root / "bad.json").write_text('[{"inputs": []}]')
    job = check(platform, "-f", location.format(bucket=platform.bucket), "--", "true")
    assert 1 == job.code
    tasks = [line.split(maxsplit=1)[1] for line in findings(job, "error")]
    assert expected in "".join(tasks)


def test_wrong_keys_are_told(platform: Platform, list_of_tasks: list[dict[str, Any]]) -> None:
    platform.environ["AWS_SECRET_ACCESS_KEY"] = "another"
    job = platform.run("check", "-f", "-", "--", "true", stdin=json.dumps(list_of_tasks))
    assert 1 == job.code
    errors = job.texts(level="ERROR", internal=True, source="stderr")
    assert 3 == len([error for error in errors if error.startswith("outputs: An error occurred")])
    assert 2 == len([error for error in errors if error.startswith("inputs: An error occurred")])
    assert any(text.startswith("buckets: ") for text in job.texts(level="WARNING", internal=True))
    assert "another" not in job.stdout + job.stderr


def test_problems_of_variables_are_told_alone(platform: Platform) -> None:
    platform.set(API_METHOD="run", SIGNING_KEY_HEX="xyz")
    job = check(platform)
    assert 1 == job.code
    assert [f"{P}SIGNING_KEY_HEX", f"{P}API_METHOD"] == [
        line.split()[1].rstrip(":") for line in findings(job, "error")
    ]
    assert [] == platform.keys()


def test_machine_without_credentials_is_not_asked_for_long(platform: Platform) -> None:
    platform.environ = {
        name: value for name, value in platform.environ.items() if "RUNTIME" not in name
    }
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        del platform.environ[name]
    platform.environ |= {
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "AWS_METADATA_SERVICE_NUM_ATTEMPTS": "1000000",
    }
    job = check(platform, "--", "true")
    assert 0 == job.code
    assert ["credentials   Unable to locate credentials: the run could reach no bucket"] == (
        findings(job, "warning")
    )


def test_a_directory_as_endpoint_must_exist_and_needs_no_credentials(
    platform: Platform, tmp_path: Path
) -> None:
    platform.environ = {
        name: value for name, value in platform.environ.items() if not name.startswith("AWS_")
    }
    platform.environ["AWS_S3_ENDPOINT_URL"] = url = f"file://{tmp_path}/store"
    job = check(platform, "--", "true")
    (finding,) = findings(job, "error")
    assert f"storage       could not be checked: The endpoint {url} is not a directory" in finding
    (tmp_path / "store").mkdir()
    job = check(platform, "--", "true")
    assert (0, []) == (job.code, findings(job, "error"))
    assert "storage       a directory: needs no network and no credentials" in findings(job, "ok")


def test_read_only_check_writes_nothing(
    platform: Platform, list_of_tasks: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "store" / platform.bucket).mkdir(parents=True)
    platform.environ["AWS_S3_ENDPOINT_URL"] = f"file://{tmp_path}/store"
    before = listing(platform)
    options = ("-t", json.dumps([platform.task()]), "--read-only", "--", "true")
    job = check(platform, *options)
    assert (0, before) == (job.code, listing(platform))
    assert "outputs       writing is not tried" in findings(job, "ok")


def test_one_task_list_is_given_as_to_invoke(platform: Platform) -> None:
    tasks = json.dumps([platform.task()])
    assert "1 in the list" in check(platform, "--tasks", tasks, "--", "true").stdout
    both = check(platform, "-t", tasks, "-f", "x")
    assert (2, True) == (both.code, "Only one of tasks or file should be set" in both.stderr)
    uri = check(platform, "-f", "ftp://u:secret@host/x", "--", "true")
    assert (1, True) == (uri.code, "found ftp://" in uri.stdout)
    assert "secret" not in uri.stdout + uri.stderr


def test_unknown_option_is_a_usage_error(platform: Platform) -> None:
    job = platform.run("check", "--fast")
    assert (2, "") == (job.code, job.stdout)
