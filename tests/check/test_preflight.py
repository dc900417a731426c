"""What `check` finds, and that it agrees with what the run does."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shim.check import preflight
from shim.check.preflight import ERROR, OK, WARNING, Finding, Situation, examine, write_finding
from shim.contract.errors import UserSafeError
from shim.contract.settings import Settings
from shim.contract.tasks import parse_tasks
from shim.files.workspace import Workspace
from shim.http.trust import IMAGE_BUNDLES
from shim.log.log import Log
from shim.process.process import MemoryEvents, start
from shim.runner.user_command import resolve_spec
from shim.s3.client import connect
from shim.s3.directory import DirectoryStore
from shim.s3.errors import ServiceError
from tests.e2e.platform import P, b64j
from tests.fakes.s3_double import Exchange, S3Double
from tests.files.test_workspace import RecordingLog, in_mount_namespace
from tests.process.test_executables import CASES
from tests.support import UNPRIVILEGED_UID, free_port, needs_root

MACHINE = os.uname().machine
Build = Callable[..., Situation]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Return what builds a situation below tmp_path from variables of the component."""

    def situation(
        *, cmd: list[str] | None = None, environ: Mapping[str, str] | None = None, **variables: str
    ) -> Situation:
        for directory in (tmp_path, *tmp_path.parents):
            if directory.stat().st_mode & 0o005 != 0o005:
                directory.chmod(0o755)
        variables = {
            "INPUT_PATH": str(tmp_path / "input"),
            "OUTPUT_PATH": str(tmp_path / "output"),
            "LINKED_INPUT_PARENT": str(tmp_path / "opt/linked"),
            "WRITABLE_DIRECTORIES": f"{tmp_path}/opt/data",
            **variables,
        }
        environ = {
            "PATH": os.environ["PATH"],
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            **(environ or {}),
            **{P + name: value for name, value in variables.items()},
        }
        if cmd is not None:
            environ[f"{P}CMD_B64J"] = b64j(cmd)
        return Situation(
            settings=Settings.from_environ(environ),
            environ=environ,
            connect=lambda _: DirectoryStore(tmp_path / "s3"),
        )

    return situation


def found(findings: Iterator[Finding]) -> list[tuple[str, str]]:
    return [(finding.level, finding.message) for finding in findings]


def levels(findings: Iterator[Finding]) -> list[str]:
    return [finding.level for finding in findings]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        pytest.param({}, [(OK, "0 are set, all valid")], id="none"),
        pytest.param({f"{P}USER": "x"}, [(OK, "1 are set, all valid")], id="one"),
        pytest.param(
            {f"{P}INPUT": "/x", f"{P}API_METHOD": "run", f"{P}MAX_MEMORY_MB": "1 GB"},
            [
                (WARNING, f"'{P}INPUT' is not known: check how it is spelt"),
                (ERROR, f"{P}MAX_MEMORY_MB: expected a whole number from 0 to 4398046511104, "),
                (ERROR, f"{P}API_METHOD: expected exec or invoke, found a text of 3 characters"),
            ],
            id="every problem",
        ),
        pytest.param(
            {"LOG_LEVEL": "LOUD"},
            [(WARNING, "LOG_LEVEL: expected one of DEBUG"), (OK, "1 are set, all valid")],
            id="what the run warns of",
        ),
    ],
)
def test_variables(environ: dict[str, str], expected: list[tuple[str, str]]) -> None:
    actual = found(preflight.check_variables(environ))
    assert len(expected) == len(actual)
    for (level, message), (actual_level, actual_message) in zip(expected, actual, strict=True):
        assert (level, message) == (actual_level, actual_message[: len(message)])


def test_nothing_is_checked_before_the_variables_are_valid() -> None:
    environ = {f"{P}SIGNING_KEY_HEX": "secret"}
    actual = list(examine(environ, cmd=(), connect=pytest.fail, read_tasks=None))
    assert [ERROR, WARNING] == levels(iter(actual))
    assert "secret" not in str(actual)


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", (OK, f"none is set: the command runs as uid {os.geteuid()}")),
        ("root", (OK, "'root' is uid 0, gid 0, groups 0, home '/root'")),
        ("1234:5678", (OK, "'1234:5678' is uid 1234, gid 5678, groups 5678, home '/'")),
        (
            "no-such-user",
            (
                ERROR,
                "The user defined in the containers USER instruction does not exist, "
                "found 'no-such-user': create it in the image, or name another",
            ),
        ),
        (
            "0:no-such-group",
            (
                ERROR,
                "The group defined in the containers USER instruction does not exist, "
                "found '0:no-such-group': create it in the image, or name another",
            ),
        ),
    ],
)
def test_user(build: Build, user: str, expected: tuple[str, str]) -> None:
    assert [expected] == found(preflight.check_user(build(USER=user)))


def test_argv(build: Build) -> None:
    assert [(OK, "['a', 'b c']")] == found(preflight.check_argv(build(cmd=["a", "b c"])))
    assert [ERROR] == levels(preflight.check_argv(build()))


@needs_root
def test_privileges(build: Build) -> None:
    assert [(OK, "the shim runs as root")] == found(preflight.check_privileges(build()))


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        *[pytest.param(case.values[0], 0o755, id=str(case.id)) for case in CASES],
        pytest.param(b"#!/bin/sh\nexit 3\n", 0o755, id="good script"),
        pytest.param(b"#!/bin/sh\nexit 3\n", 0o644, id="not executable"),
        pytest.param(Path("/bin/true").read_bytes(), 0o755, id="good program"),
    ],
)
@pytest.mark.parametrize("way", ["path", "PATH"])
def test_command_is_judged_as_the_run_judges_it(
    build: Build, tmp_path: Path, content: bytes, mode: int, way: str
) -> None:
    command = tmp_path / "command"
    command.write_bytes(content)
    command.chmod(mode)
    name = str(command) if way == "path" else "command"
    situation = build(cmd=[name, "argument"], environ={"PATH": f"/none:{tmp_path}:/bin"})
    try:
        process = start(resolve_spec(situation.settings, situation.environ))
        expected = OK, f"the user may execute {name!r}, a program for this machine ({MACHINE})"
    except UserSafeError as error:
        expected = ERROR, str(error)
    else:
        process.end()
        os.close(process.stdout_fd)
        os.close(process.stderr_fd)
    assert [expected] == found(preflight.check_command(situation))


@needs_root
@pytest.mark.parametrize(
    ("name", "mode", "user", "expected"),
    [
        pytest.param("command", 0o700, "", OK, id="root may"),
        pytest.param("command", 0o700, str(UNPRIVILEGED_UID), ERROR, id="only root may"),
        pytest.param("command", 0o755, str(UNPRIVILEGED_UID), OK, id="everybody may"),
        pytest.param("none", 0o755, "", ERROR, id="not found"),
    ],
)
def test_command_is_judged_for_its_user(
    build: Build, tmp_path: Path, name: str, mode: int, user: str, expected: str
) -> None:
    (tmp_path / "command").write_text("#!/bin/sh\n")
    (tmp_path / "command").chmod(mode)
    situation = build(cmd=[name], USER=user, environ={"PATH": str(tmp_path)})
    assert [expected] == levels(preflight.check_command(situation))


def test_command_without_argv_or_user_is_said_by_other_checks(build: Build) -> None:
    assert [] == found(preflight.check_command(build()))
    assert [] == found(preflight.check_command(build(cmd=["true"], USER="no-such-user")))


def smallest_program(marker: Path) -> bytes:
    """Return a program of one page that makes a file: creat(marker, 0777); exit(0)."""
    code = b"\xb8\x55\0\0\0\x48\x8d\x3d\x12\0\0\0\xbe\xff\x01\0\0\x0f\x05"
    code += b"\xb8\x3c\0\0\0\x31\xff\x0f\x05".ljust(11, b"\x90") + bytes(marker) + b"\0"
    size = 120 + len(code)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(b"\x7fELF\2\1\1", 2, 62, 1, 0x400078, 64, 0, 0, 64, 56, 1, 0, 0, 0),
    )
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, 0x400000, 0, size, size, 4096) + code


@pytest.mark.parametrize("kind", ["script", "interpreter with arguments", "smallest program"])
def test_nothing_of_the_command_is_run(build: Build, tmp_path: Path, kind: str) -> None:
    if kind == "smallest program" and MACHINE != "x86_64":
        pytest.skip("holds instructions of x86_64")
    marker, command = tmp_path / "marker", tmp_path / "command"
    command.write_bytes(
        {
            "script": f"#!/bin/sh\n: > {marker}\n".encode(),
            "interpreter with arguments": f"#!/usr/bin/env -S touch {marker}\n".encode(),
            "smallest program": smallest_program(marker),
        }[kind]
    )
    command.chmod(0o755)
    situation = build(cmd=[str(command)])
    assert [OK] == levels(preflight.check_command(situation))
    assert not marker.exists()
    process = start(resolve_spec(situation.settings, situation.environ))
    process.await_end(deadline=None)
    process.end()
    os.close(process.stdout_fd)
    os.close(process.stderr_fd)
    assert marker.exists()


def test_command_with_a_large_environment_can_be_tried(build: Build) -> None:
    environ = {f"VARIABLE_{number}": "x" * 1000 for number in range(300)}
    assert [OK] == levels(preflight.check_command(build(cmd=["true"], environ=environ)))


def arrange(root: Path, kind: str) -> None:
    """Put something in the places of /input, /output and the parent of linked inputs."""
    path = root / kind.partition(" ")[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    match kind.partition(" ")[2]:
        case "directory":
            path.mkdir()
        case "full":
            (path / "sub").mkdir(parents=True)
        case "file":
            path.write_text("")
        case "link":
            (root / "elsewhere").mkdir()
            (root / "elsewhere/kept").write_text("")
            path.symlink_to(root / "elsewhere")
        case "dangling":
            path.symlink_to(root / "none")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("nothing", [OK, OK]),
        ("input directory", [OK, OK]),
        ("input full", [WARNING, OK]),
        ("input file", [OK, OK]),
        ("input link", [OK, OK]),
        ("input dangling", [OK, OK]),
        ("opt file", [ERROR, OK]),
        ("opt/linked file", [ERROR, OK]),
        ("opt/linked link", [OK, OK]),
        ("output directory", [OK, OK]),
        ("output full", [OK, WARNING]),
        ("output file", [OK, ERROR]),
        ("output link", [OK, OK]),
        ("output dangling", [OK, OK]),
    ],
)
def test_directories_are_judged_as_the_reset_judges_them(
    build: Build, tmp_path: Path, kind: str, expected: list[str]
) -> None:
    arrange(tmp_path, kind)
    assert expected == judge(build())
    assert (ERROR not in expected) == resets(build())


def judge(situation: Situation) -> list[str]:
    return levels(preflight.check_input(situation)) + levels(preflight.check_output(situation))


def resets(situation: Situation) -> bool:
    """Tell whether a task can begin and take an input."""
    settings = situation.settings
    try:
        workspace = Workspace(
            input_path=settings.input_path,
            output_path=settings.output_path,
            linked_input_parent=settings.linked_input_parent if settings.use_linked_input else None,
            log=RecordingLog(),  # type: ignore[arg-type]
        )
        workspace.reset("pk")
        os.close(workspace.open_input("directory"))
    except (UserSafeError, OSError):
        return False
    return True


MOUNTED = """
from tests.check.test_preflight import *
def build(**variables):
    names = {"INPUT_PATH": "input", "OUTPUT_PATH": "output", "LINKED_INPUT_PARENT": "opt"}
    return Situation(
        settings=Settings.from_environ({P + k: str(root / v) for k, v in names.items()}),
        environ={}, connect=None)
for name in ("input/a b", "output", "opt"):
    (root / name).mkdir(parents=True)
"""


@pytest.mark.parametrize(
    ("mounts", "expected"),
    [
        pytest.param('mount("-t", "tmpfs", "none", root / "input")', [OK, OK], id="input"),
        pytest.param('mount("-t", "tmpfs", "none", root / "output")', [WARNING, OK], id="output"),
        pytest.param(
            'mount("-t", "tmpfs", "none", root / "input/a b")', [ERROR, OK], id="in the input"
        ),
        pytest.param(
            'mount("--bind", root, root); mount("-o", "remount,bind,ro", root)',
            [ERROR, ERROR],
            id="read-only root",
        ),
        pytest.param(
            'mount("--bind", root, root); mount("-o", "remount,bind,ro", root)\n'
            'mount("-t", "tmpfs", "none", root / "input")\n'
            'mount("-t", "tmpfs", "none", root / "output")',
            [OK, OK],
            id="read-only root with mounts",
        ),
        pytest.param(
            'mount("-t", "tmpfs", "-o", "ro", "none", root / "input")',
            [ERROR, OK],
            id="read-only input",
        ),
    ],
)
def test_mounts_are_judged_as_the_reset_judges_them(
    tmp_path: Path, mounts: str, expected: list[str]
) -> None:
    script = f"{MOUNTED}\n{mounts}\nprint(judge(build()), resets(build()))"
    actual = in_mount_namespace(script, tmp_path)
    assert f"{expected} {ERROR not in expected}" == actual


@needs_root
def test_output_that_the_user_cannot_write_is_told(build: Build, tmp_path: Path) -> None:
    (tmp_path / "output").mkdir(mode=0o755)
    situation = build(USER=str(UNPRIVILEGED_UID))
    (_, good), (level, message) = found(preflight.check_output(situation))
    assert (WARNING, f"not writable for uid {UNPRIVILEGED_UID}") == (
        level,
        message[message.index("not") : message.index(":")],
    )
    (tmp_path / "output").chmod(0o777)
    assert [OK] == levels(preflight.check_output(situation))


@pytest.mark.parametrize(
    ("mode", "group", "user", "expected"),
    [
        (0o700, 0, "", True),
        (0o700, 0, "0", True),
        (0o700, 0, "1234:5678", False),
        (0o707, 0, "1234:5678", True),
        (0o770, 5678, "1234:5678", True),
        (0o707, 5678, "1234:5678", False),
    ],
)
@needs_root
def test_permission_bits_are_read_as_the_kernel_reads_them(
    build: Build, tmp_path: Path, mode: int, group: int, user: str, expected: bool
) -> None:
    path = tmp_path / "directory"
    path.mkdir()
    os.chown(path, 0, group)
    path.chmod(mode)
    situation = build(USER=user, environ={"TMPDIR": str(path)})
    assert [OK if expected else WARNING] == levels(preflight.check_temporary(situation))
    process = start(
        replace(
            resolve_spec(replace(situation.settings, cmd=("true",)), situation.environ),
            argv=("sh", "-c", f"test -w {path} -a -x {path}"),
        )
    )
    process.await_end(deadline=None)
    assert (0 if expected else 1) == process.poll()
    process.end()
    os.close(process.stdout_fd)
    os.close(process.stderr_fd)


def test_temporary_directory_that_is_missing_is_told_unless_it_is_made(
    build: Build, tmp_path: Path
) -> None:
    environ = {"TMPDIR": str(tmp_path / "tmp")}
    assert [WARNING] == levels(preflight.check_temporary(build(environ=environ)))
    made = build(environ=environ, WRITABLE_DIRECTORIES=str(tmp_path / "tmp"))
    assert [] == levels(preflight.check_temporary(made))


def test_writable_directories(build: Build, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    names = [str(tmp_path / name) for name in ("new/a", "file/a", "link", "real")]
    assert [
        (
            WARNING,
            f"{names[1]} cannot be made writable: {tmp_path}/file is not a directory; "
            "remove it from the image",
        ),
        (OK, f"can be made or are there: {names[0]}, {names[2]}, {names[3]}"),
    ] == found(preflight.check_writable(build(WRITABLE_DIRECTORIES=":".join(names))))


def test_destination_of_the_model_must_be_writable(build: Build, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    situation = build(MODEL="s3://b/model.tar", MODEL_DEST=f"{tmp_path}/file/model")
    assert [ERROR, OK] == levels(preflight.check_writable(situation))


@needs_root
def test_shared_memory(build: Build, tmp_path: Path) -> None:
    assert [WARNING] == levels(preflight.check_shared_memory(build(), tmp_path / "none"))
    script = """
from tests.check.test_preflight import *
for size in ("1m", "62m", "64000k", "64m", "1g"):
    mount("-t", "tmpfs", "-o", f"size={size}", "none", root)
    print(*found(preflight.check_shared_memory(None, root))[0])
"""
    assert [
        (WARNING, "1"),
        (WARNING, "62"),
        (OK, "62"),
        (OK, "64"),
        (OK, "1024"),
    ] == [
        (line.split()[0], line.split()[3])
        for line in in_mount_namespace(script, tmp_path).splitlines()
    ]


@pytest.mark.parametrize(
    ("limit", "wanted", "expected"),
    [
        ("max", "0", (OK, None)),
        ("max", "100", (OK, None)),
        (str(200 << 20), "0", (OK, "200 MiB")),
        (str(200 << 20), "200", (OK, "200 MiB")),
        (str(200 << 20), "201", (WARNING, "200 MiB")),
        ("max", str(1 << 40), (WARNING, None)),
    ],
)
def test_memory(
    build: Build, tmp_path: Path, limit: str, wanted: str, expected: tuple[str, str | None]
) -> None:
    (tmp_path / "cgroup").write_text("0::/x\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    cgroup = MemoryEvents(cgroup=tmp_path / "cgroup", root=tmp_path)
    ((level, message),) = found(preflight.check_memory(build(MAX_MEMORY_MB=wanted), cgroup))
    there = expected[1] or f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') >> 20} MiB"
    assert (expected[0], True) == (level, f"{there} that are there" in message)


KEYS = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI"}
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
not one
-----END CERTIFICATE-----
"""


def reach(build: Build, environ: Mapping[str, str], **more: str) -> list[tuple[str, str, str]]:
    """Return what is found about storage that is S3."""
    situation = build(environ=environ, **more)
    situation = replace(
        situation,
        connect=lambda _: connect(
            situation.environ,
            concurrency=1,
            max_connections=1,
            log=lambda *_: None,
            run_helper=pytest.fail,
        ),
    )
    return [
        (finding.subject, finding.level, finding.message)
        for finding in preflight.check_storage(situation)
    ]


def test_credentials_are_found_where_the_run_finds_them(build: Build) -> None:
    expected = "Credentials come from the environment; region: eu-west-1"
    actual = reach(build, {**KEYS, "AWS_DEFAULT_REGION": "eu-west-1"})
    assert ("credentials", OK, expected) == actual[1]
    assert "wJalrXUtnFEMI" not in str(actual)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        pytest.param({}, WARNING, id="no bucket is named"),
        pytest.param({"RUNTIME_OUTPUT_BUCKET_NAME": "b"}, ERROR, id="a bucket is named"),
    ],
)
def test_missing_credentials_are_an_error_where_a_bucket_is_named(
    build: Build, variables: dict[str, str], expected: str
) -> None:
    message = "Unable to locate credentials: the run could reach no bucket"
    assert ("credentials", expected, message) == reach(build, {}, **variables)[-1]


@pytest.mark.parametrize(
    ("text", "endpoint", "expected"),
    [
        pytest.param(None, "", ERROR, id="missing"),
        pytest.param("", "", ERROR, id="empty"),
        pytest.param(CERTIFICATE, "", ERROR, id="damaged"),
        pytest.param(None, "http://127.0.0.1:1", WARNING, id="not needed"),
    ],
)
def test_bundle_that_cannot_be_read_is_told(
    build: Build, tmp_path: Path, text: str | None, endpoint: str, expected: str
) -> None:
    bundle = tmp_path / "bundle"
    if text is not None:
        bundle.write_text(text)
    environ = {"AWS_CA_BUNDLE": str(bundle), "AWS_ENDPOINT_URL": endpoint}
    subject, level, message = reach(build, environ, RUNTIME_OUTPUT_BUCKET_NAME="b")[0]
    assert ("authorities", expected, True) == (subject, level, str(bundle) in message)


def test_certificates_are_counted(build: Build, tmp_path: Path) -> None:
    import ssl

    path = ssl.get_default_verify_paths().cafile
    if path is None:
        pytest.skip("needs a system with a CA bundle")
    certificates = [
        certificate + "-----END CERTIFICATE-----\n"
        for certificate in Path(path).read_text().split("-----END CERTIFICATE-----\n")[:3]
    ]
    (tmp_path / "bundle").write_text("".join(certificates))
    expected = "authorities", OK, f"3 certificates, read from {tmp_path}/bundle"
    assert expected == reach(build, {"AWS_CA_BUNDLE": f"{tmp_path}/bundle"})[0]


def test_profile_that_does_not_exist_is_told(build: Build, tmp_path: Path) -> None:
    def refuse(_: Settings) -> Any:
        return connect({**situation.environ, "AWS_PROFILE": "none"}, **options)

    options: Any = {"concurrency": 1, "max_connections": 1, "log": print, "run_helper": print}
    situation = build()
    findings = examine(situation.environ, cmd=("true",), connect=refuse, read_tasks=None)
    expected = "could not be checked: The config profile (none) could not be found"
    assert Finding(ERROR, "storage", expected) == list(findings)[-1]


def test_server_that_does_not_answer_ends_the_check_of_objects(build: Build) -> None:
    environ = {
        **KEYS,
        "AWS_S3_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}",
        "AWS_MAX_ATTEMPTS": "1",
    }
    situation = build(environ=environ, MODEL="s3://b/model.tar", GROUND_TRUTH="s3://b/truth.tar")
    options: Any = {"concurrency": 1, "max_connections": 1, "log": print, "run_helper": print}
    findings = examine(
        situation.environ,
        cmd=("true",),
        connect=lambda _: connect(situation.environ, **options),
        read_tasks=None,
    )
    *_, credentials, last = findings
    assert ("credentials", OK) == (credentials.subject, credentials.level)
    assert ("storage", ERROR) == (last.subject, last.level)
    assert "Could not connect to the endpoint" in last.message


def task(inputs: list[str]) -> bytes:
    return json.dumps(
        [
            {
                "pk": "t",
                "inputs": [
                    {"relative_path": f"{index}", "bucket_name": "b", "bucket_key": key}
                    for index, key in enumerate(inputs)
                ],
                "output_bucket_name": "b",
                "output_prefix": "out/",
            }
        ]
    ).encode()


def objects(situation: Situation, tasks: bytes | None = None) -> list[tuple[str, str, str]]:
    """Return what is found about objects in a directory store."""
    if tasks is not None:
        situation = replace(situation, read_tasks=lambda _: parse_tasks(tasks))
    findings = list(preflight.check_storage(situation))
    assert "storage" == findings[0].subject
    return [(finding.subject, finding.level, finding.message) for finding in findings[1:]]


def missing(build: Build, key: str) -> str:
    """Return what is said of an object that the run could not read either."""
    with pytest.raises(ServiceError) as caught:
        build().connect(build().settings).head("b", key)
    return f"{caught.value}: check the key, and that the credentials may read it"


def test_archives_are_looked_for(build: Build, tmp_path: Path) -> None:
    (tmp_path / "s3/b").mkdir(parents=True)
    (tmp_path / "s3/b/model.tar").write_bytes(b"12345")
    situation = build(MODEL="s3://b/model.tar", GROUND_TRUTH="s3://b/none.tar")
    assert [
        ("buckets", OK, "are there: b"),
        ("model", OK, "s3://b/model.tar has 5 bytes"),
        ("ground truth", ERROR, missing(build, "none.tar")),
    ] == objects(situation)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        pytest.param({}, [], id="neither"),
        pytest.param(
            {"RUNTIME_OUTPUT_BUCKET_NAME": "b", "RUNTIME_OUTPUT_PREFIX": "p"},
            [
                ("buckets", OK, "are there: b"),
                ("outputs", OK, "can be written below 's3://b/p/.sagemaker_shim/'"),
                ("set-up result", OK, "goes below 's3://b/p'"),
            ],
            id="both",
        ),
        pytest.param(
            {"RUNTIME_OUTPUT_BUCKET_NAME": "b"},
            [
                (
                    "set-up result",
                    WARNING,
                    "goes nowhere: set both its bucket and its prefix, or neither",
                )
            ],
            id="one",
        ),
    ],
)
def test_place_of_the_setup_result(
    build: Build, variables: dict[str, str], expected: list[tuple[str, str, str]]
) -> None:
    assert expected == objects(build(**variables))


def test_inputs_are_looked_for_and_outputs_are_tried(build: Build, tmp_path: Path) -> None:
    (tmp_path / "s3/b/in").mkdir(parents=True)
    (tmp_path / "s3/b/in/a").write_bytes(b"")
    assert [
        ("tasks", OK, "1 in the list, which is valid"),
        ("buckets", OK, "are there: b"),
        ("outputs", OK, "can be written below 's3://b/out/.sagemaker_shim/'"),
        ("inputs", ERROR, missing(build, "in/none")),
        ("inputs", WARNING, "nothing lies below 's3://b/other/': check the prefix"),
        ("inputs", OK, "2 of 4 can be read"),
    ] == objects(build(), task(["in/a", "in/none", "in/", "other/"]))
    assert ["b", "b/in", "b/in/a"] == [
        str(path.relative_to(tmp_path / "s3")) for path in sorted((tmp_path / "s3").rglob("*"))
    ]


@pytest.fixture
def double() -> Iterator[S3Double]:
    with S3Double(credentials={KEYS["AWS_ACCESS_KEY_ID"]: KEYS["AWS_SECRET_ACCESS_KEY"]}) as double:
        double.buckets["b"] = {}
        yield double


def reach_double(build: Build, double: S3Double, **more: Any) -> list[tuple[str, str, str]]:
    """Return what is found about buckets and outputs of a strict imitation of S3."""
    environ = {**KEYS, "AWS_S3_ENDPOINT_URL": double.url, "AWS_DEFAULT_REGION": double.region}
    options: Any = {"concurrency": 1, "max_connections": 1, "log": print, "run_helper": print}
    situation = replace(
        build(),
        connect=lambda _: connect(environ, **options),
        read_tasks=lambda _: parse_tasks(task([])),
        **more,
    )
    return [
        (finding.subject, finding.level, finding.message)
        for finding in preflight.check_storage(situation)
        if finding.subject in ("buckets", "outputs")
    ]


def refuse_all(status: int, operation: str) -> Callable[[Exchange], None]:
    def fault(exchange: Exchange) -> None:
        if exchange.operation == operation:
            exchange.body()
            exchange.refuse(status, "AccessDenied" if status == 403 else "NoSuchBucket", "No")
        else:
            exchange.answer()

    return fault


@pytest.mark.parametrize(
    ("status", "operation", "expected"),
    [
        pytest.param(200, "", [("buckets", OK), ("outputs", OK)], id="all is well"),
        pytest.param(403, "HeadBucket", [("buckets", WARNING), ("outputs", OK)], id="not listed"),
        pytest.param(404, "HeadBucket", [("buckets", ERROR), ("outputs", OK)], id="no bucket"),
        pytest.param(403, "PutObject", [("buckets", OK), ("outputs", ERROR)], id="not written"),
        pytest.param(403, "DeleteObject", [("buckets", OK), ("outputs", WARNING)], id="kept"),
    ],
)
def test_buckets_are_looked_at_and_written_to(
    build: Build,
    double: S3Double,
    status: int,
    operation: str,
    expected: list[tuple[str, str]],
) -> None:
    double.faults = [refuse_all(status, operation)] * 10 if operation else []
    actual = reach_double(build, double)
    assert expected == [finding[:2] for finding in actual]
    assert all(operation in message for _, level, message in actual if level != OK)
    left = list(double.buckets["b"])
    assert (operation == "DeleteObject") == bool(left)
    assert all(key.startswith("out/.sagemaker_shim/") for key in left)


def test_nothing_is_written_where_that_is_not_wanted(build: Build, double: S3Double) -> None:
    assert [OK, OK] == [level for _, level, _ in reach_double(build, double, is_read_only=True)]
    assert ["HeadBucket"] == double.operations()


def test_output_that_cannot_be_written_in_a_directory_is_told(build: Build, tmp_path: Path) -> None:
    (tmp_path / "s3/b").mkdir(parents=True)
    (tmp_path / "s3/b/out").touch()
    assert ("outputs", ERROR) in [found[:2] for found in objects(build(), task([]))]


def test_certificates_that_the_program_carries_are_named_so(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = next(path for path in IMAGE_BUNDLES if os.path.isfile(path))
    monkeypatch.setattr(preflight, "carried_bundle", lambda: bundle)
    message = reach(build, {"AWS_CA_BUNDLE": bundle})[0][2]
    assert message.endswith("certificates, read from those carried by this program")


def test_faults_of_scripts_are_errors_of_the_command(build: Build, tmp_path: Path) -> None:
    situation = build(cmd=["python3", f"{tmp_path}/none.py"])
    (good, fault) = found(preflight.check_command(situation))
    assert (OK, ERROR) == (good[0], fault[0])
    assert f"python3 is given '{tmp_path}/none.py', which does not exist" in fault[1]


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ([], "0 errors, 0 warnings"),
        ([OK, ERROR, WARNING], "1 error, 1 warning"),
        ([ERROR, WARNING, ERROR, WARNING, WARNING], "2 errors, 3 warnings"),
    ],
)
def test_verdict_is_the_last_line(
    found: list[str], verdict: str, capfd: pytest.CaptureFixture[str]
) -> None:
    findings = [Finding(level, "x", "y") for level in found]
    preflight.write_verdict(findings, Log(style="text"))
    assert f"{verdict}\n" == capfd.readouterr().out
    preflight.write_verdict(findings, Log())
    assert [("INFO", verdict, True)] == parsed(capfd.readouterr().out)


def test_only_the_first_inputs_are_looked_for(build: Build, tmp_path: Path) -> None:
    (tmp_path / "s3/b").mkdir(parents=True)
    (tmp_path / "s3/b/a").write_bytes(b"")
    last = objects(build(), task(["a"] * 100 + ["none"] * 20))[-1]
    assert ("inputs", OK, "100 of 100 can be read; the other 20 are not looked at") == last


def test_examine_changes_nothing(build: Build, tmp_path: Path) -> None:
    arrange(tmp_path, "input full")
    arrange(tmp_path, "output link")
    (tmp_path / "s3/b").mkdir(parents=True)

    def listing() -> list[tuple[str, int, int]]:
        found = [(str(path), path.lstat()) for path in sorted(tmp_path.rglob("*"))]
        return [(path, status.st_ino, status.st_ctime_ns) for path, status in found]

    situation = build(cmd=["none"], MODEL="s3://b/model.tar")
    before = listing()
    findings = list(
        examine(
            situation.environ,
            cmd=("touch", f"{tmp_path}/touched"),
            connect=situation.connect,
            read_tasks=lambda _: parse_tasks(task(["a"])),
            is_read_only=True,
        )
    )
    assert f"['touch', '{tmp_path}/touched']" in [finding.message for finding in findings]
    assert before == listing()


def test_findings_are_lines_for_people_or_the_shims_own(
    capfd: pytest.CaptureFixture[str],
) -> None:
    findings = [
        Finding(OK, "a", "fine"),
        Finding(WARNING, "b", "two\nlines \udcff"),
        Finding(ERROR, "c", "bad"),
    ]
    for finding in findings:
        write_finding(finding, Log(style="text"))
    assert [
        "ok       a             fine",
        "warning  b             two lines \\udcff",
        "error    c             bad",
    ] == capfd.readouterr().out.splitlines()
    for finding in findings:
        write_finding(finding, Log())
    out, err = capfd.readouterr()
    assert [("INFO", "a: fine", True)] == parsed(out)
    assert [("WARNING", "b: two lines \udcff", True), ("ERROR", "c: bad", True)] == parsed(err)


def parsed(text: str) -> list[tuple[str, str, bool]]:
    lines = map(json.loads, text.splitlines())
    return [(line["level"], line["log"], line["internal"]) for line in lines]
