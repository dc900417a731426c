from __future__ import annotations

import base64
import dataclasses
import json
from datetime import timedelta
from pathlib import Path

import pytest

from shim.contract.errors import InvalidSettings
from shim.contract.settings import PREFIX, RESULT_VARIABLES, VARIABLES, Settings
from shim.contract.uri import S3Location


def encoded(value: object) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


def parse(name: str, text: str) -> Settings:
    return Settings.from_environ({f"{PREFIX}{name}": text})


def test_defaults_are_those_of_the_contract() -> None:
    assert Settings(
        cmd=None,
        entrypoint=None,
        user="",
        set_extra_groups=True,
        input_path=Path("/input"),
        output_path=Path("/output"),
        use_linked_input=True,
        linked_input_parent=Path("/opt/ml/input/data"),
        model=None,
        model_dest=Path("/opt/ml/model"),
        ground_truth=None,
        ground_truth_dest=Path("/opt/ml/input/data/ground_truth"),
        writable_directories=(
            Path("/opt/ml/output/data"),
            Path("/opt/ml/model"),
            Path("/opt/ml/input/data/ground_truth"),
            Path("/opt/ml/checkpoints"),
            Path("/tmp"),
        ),
        post_clean_directories=(
            Path("/opt/ml/output/data"),
            Path("/opt/ml/model"),
            Path("/opt/ml/input/data/ground_truth"),
        ),
        signing_key=b"",
        runtime_output_bucket_name=None,
        runtime_output_prefix=None,
        max_memory_mb=0,
        async_concurrency=50,
        boto_max_pool_connections=120,
        api_method="exec",
        start_and_health_timeout=timedelta(seconds=300),
        health_check_call_timeout=timedelta(seconds=10),
        user_webserver_port=4743,
        sigterm_grace=timedelta(seconds=5),
        no_new_privileges=True,
        endpoint_url="",
        log_level="INFO",
        warnings=(),
    ) == Settings.from_environ({})


@pytest.mark.parametrize(
    ("name", "text", "field", "expected"),
    [
        ("CMD_B64J", encoded(None), "cmd", None),
        ("CMD_B64J", encoded("a b"), "cmd", "a b"),
        ("CMD_B64J", encoded(["a", "\u00e9"]), "cmd", ("a", "\u00e9")),
        ("CMD_B64J", encoded([]), "cmd", ()),
        ("ENTRYPOINT_B64J", encoded(["x" * 99])[:76] + "\n" + encoded(["x" * 99])[76:],
         "entrypoint", ("x" * 99,)),
        ("USER", "alice:users", "user", "alice:users"),
        ("SET_EXTRA_GROUPS", "tRUE", "set_extra_groups", True),
        ("SET_EXTRA_GROUPS", "", "set_extra_groups", False),
        ("SET_EXTRA_GROUPS", "1", "set_extra_groups", False),
        ("USE_LINKED_INPUT", "False", "use_linked_input", False),
        ("INPUT_PATH", "/a/b/", "input_path", Path("/a/b")),
        ("INPUT_PATH", "//a/./b/../c", "input_path", Path("/a/c")),
        ("MODEL_DEST", "/data/etc/usr", "model_dest", Path("/data/etc/usr")),
        ("MODEL_DEST", "/etcetera", "model_dest", Path("/etcetera")),
        ("MODEL_DEST", "/home/root", "model_dest", Path("/home/root")),
        ("MODEL", "s3://b//k", "model", S3Location(bucket="b", key="/k")),
        ("GROUND_TRUTH", "https://b/k", "ground_truth", S3Location(bucket="b", key="k")),
        ("WRITABLE_DIRECTORIES", ":/a::/b:", "writable_directories", (Path("/a"), Path("/b"))),
        ("POST_CLEAN_DIRECTORIES", "", "post_clean_directories", ()),
        ("SIGNING_KEY_HEX", "00fF", "signing_key", b"\x00\xff"),
        ("RUNTIME_OUTPUT_BUCKET_NAME", "b", "runtime_output_bucket_name", "b"),
        ("RUNTIME_OUTPUT_PREFIX", "/p", "runtime_output_prefix", "/p"),
        ("MAX_MEMORY_MB", "1024", "max_memory_mb", 1024),
        ("API_METHOD", "Invoke", "api_method", "invoke"),
        ("USER_WEBSERVER_PORT", "65535", "user_webserver_port", 65535),
        ("SIGTERM_GRACE_SECONDS", "0", "sigterm_grace", timedelta(0)),
        ("UNKNOWN", "\udcff", "user", ""),
    ],
)  # fmt: skip
def test_reads_each_variable(name: str, text: str, field: str, expected: object) -> None:
    assert expected == getattr(parse(name, text), field)


@pytest.mark.parametrize(
    "url", ["http://localhost:9000", "https://s3.example", "file:///tmp/store"]
)
def test_reads_the_endpoint(url: str) -> None:
    assert url == Settings.from_environ({"AWS_S3_ENDPOINT_URL": url}).endpoint_url


def test_an_empty_endpoint_counts_as_unset() -> None:
    assert "" == Settings.from_environ({"AWS_S3_ENDPOINT_URL": ""}).endpoint_url


@pytest.mark.parametrize(
    ("inputs", "outputs", "is_accepted"),
    [
        ("/a", "/a/", False),
        ("/a", "/a/b", False),
        ("/a/b", "/a", False),
        ("/a/../b", "/b", False),
        ("/a", "/ab", True),
        ("/a/b", "/a/c", True),
    ],
)
def test_inputs_and_outputs_lie_apart(inputs: str, outputs: str, is_accepted: bool) -> None:
    variables = {PREFIX + "INPUT_PATH": inputs, PREFIX + "OUTPUT_PATH": outputs}
    if is_accepted:
        Settings.from_environ(variables)
        return
    with pytest.raises(InvalidSettings, match="OUTPUT_PATH: expected a directory that neither"):
        Settings.from_environ(variables)


PATH = (
    "an absolute path, not / and not in /etc, /usr, /bin, /sbin, /lib*, /root, /boot, /dev, /proc "
    "or /sys"
)
COMMAND = "base64 of JSON: null, a string or a list of strings"
SECONDS = "a whole number of seconds from 0 to 31536000"


@pytest.mark.parametrize(
    ("name", "text", "accepted"),
    [
        ("CMD_B64J", "", COMMAND),
        ("CMD_B64J", "!", COMMAND),
        ("CMD_B64J", encoded("ab").rstrip("="), COMMAND),
        ("CMD_B64J", base64.b64encode(b"{").decode(), COMMAND),
        ("CMD_B64J", base64.b64encode(b'"\xff"').decode(), COMMAND),
        ("CMD_B64J", "W10=\u00e9", COMMAND),
        ("ENTRYPOINT_B64J", encoded(1), COMMAND),
        ("ENTRYPOINT_B64J", encoded(False), COMMAND),
        ("ENTRYPOINT_B64J", encoded({}), COMMAND),
        ("ENTRYPOINT_B64J", encoded(["a", 1]), COMMAND),
        ("ENTRYPOINT_B64J", encoded(["a", None]), COMMAND),
        ("ENTRYPOINT_B64J", encoded("a\0b"), COMMAND),
        ("ENTRYPOINT_B64J", encoded(["a\0b"]), COMMAND),
        ("ENTRYPOINT_B64J", encoded(["\ud800"]), COMMAND),
        ("ENTRYPOINT_B64J", encoded("\udfff"), COMMAND),
        ("ENTRYPOINT_B64J", base64.b64encode(b"[" * 9999).decode(), COMMAND),
        ("USER", "\udcff", "text in UTF-8"),
        ("INPUT_PATH", "", PATH),
        ("INPUT_PATH", "input", PATH),
        ("INPUT_PATH", "/", PATH),
        ("OUTPUT_PATH", "//", PATH),
        ("OUTPUT_PATH", "/output/..", PATH),
        ("OUTPUT_PATH", "/a\udcff", PATH),
        ("OUTPUT_PATH", "/a\0b", PATH),
        ("LINKED_INPUT_PARENT", "", PATH),
        ("MODEL_DEST", "~", PATH),
        ("GROUND_TRUTH_DEST", ".", PATH),
        (
            "WRITABLE_DIRECTORIES",
            "/a:b",
            f"{PATH}, or several with colons between them",
        ),
        (
            "POST_CLEAN_DIRECTORIES",
            "/a:/",
            f"{PATH}, or several with colons between them",
        ),
        ("MODEL", "", "s3://bucket/key or https://bucket/key"),
        ("MODEL", "s3://bucket", "s3://bucket/key or https://bucket/key"),
        ("MODEL", "s3://bucket/prefix/", "s3://bucket/key or https://bucket/key"),
        ("GROUND_TRUTH", "/local.tar", "s3://bucket/key or https://bucket/key"),
        ("SIGNING_KEY_HEX", "abc", "pairs of hexadecimal digits"),
        ("SIGNING_KEY_HEX", "secret", "pairs of hexadecimal digits"),
        (
            "RUNTIME_OUTPUT_BUCKET_NAME",
            "",
            "the name of a bucket or the ARN of an access point",
        ),
        ("RUNTIME_OUTPUT_PREFIX", "", "a prefix that is not blank"),
        ("MAX_MEMORY_MB", "", "a whole number from 0 to 4398046511104"),
        ("MAX_MEMORY_MB", "-1", "a whole number from 0 to 4398046511104"),
        ("MAX_MEMORY_MB", "1.5", "a whole number from 0 to 4398046511104"),
        ("MAX_MEMORY_MB", "9" * 5000, "a whole number from 0 to 4398046511104"),
        ("ASYNC_CONCURRENCY", "0", "a whole number from 1 to 2147483647"),
        ("BOTO_MAX_POOL_CONNECTIONS", "0", "a whole number from 1 to 2147483647"),
        ("API_METHOD", "", "exec or invoke"),
        ("USER_WEBSERVER_PORT", "65536", "a whole number from 1 to 65535"),
        ("START_AND_HEALTH_TIMEOUT_SECONDS", "5s", SECONDS),
        ("HEALTH_CHECK_CALL_TIMEOUT_SECONDS", "-1", SECONDS),
        ("SIGTERM_GRACE_SECONDS", "1e3", SECONDS),
    ],
    ids=lambda text: text[:20].encode(errors="backslashreplace").decode(),
)
def test_a_bad_value_names_variable_shape_and_accepted_form(
    name: str, text: str, accepted: str
) -> None:
    with pytest.raises(InvalidSettings) as caught:
        parse(name, text)
    message = str(caught.value)
    assert message.startswith(f"{PREFIX}{name}: expected {accepted}, found ")
    assert 1 == len(caught.value.problems)


PATHS = [name for name, variable in VARIABLES.items() if PATH in variable.form.accepted]
SYSTEM = "/ /etc /usr /bin /sbin /lib /lib32 /lib64 /libx32 /root /boot /dev /proc /sys".split()


def test_every_setting_that_is_a_path_has_the_same_form() -> None:
    types = Settings.__annotations__
    assert PATHS == [name for name in VARIABLES if "Path" in types[name]]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("directory", SYSTEM)
@pytest.mark.parametrize(
    "spelling",
    ["{0}", "{0}/", "/{0}", "/.{0}", "/tmp/..{0}", "/..{0}//", "/x/./../{0}/.", "{0}/x/y"],
)
def test_no_path_names_what_the_system_consists_of(
    name: str, directory: str, spelling: str
) -> None:
    text = spelling.format(directory)
    if directory == "/" and text.endswith("/x/y"):
        return
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environ({VARIABLES[name].name: text})
    assert str(caught.value).startswith(f"{VARIABLES[name].name}: expected {PATH}")


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("", "an empty text"),
        ("x", "a text of 1 character"),
        ("secret", "a text of 6 characters"),
        ("\u00e9\udcff", "3 bytes that are not UTF-8"),
    ],
)
def test_the_shape_is_told_and_never_the_value(text: str, shape: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        parse("MAX_MEMORY_MB", text)
    message = str(caught.value)
    assert (
        f"{PREFIX}MAX_MEMORY_MB: expected a whole number from 0 to 4398046511104, found {shape}"
        == message
    )
    assert "secret" not in repr(caught.value.problems)


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environ(
            {
                f"{PREFIX}SIGNING_KEY_HEX": "x",
                f"{PREFIX}ASYNC_CONCURRENCY": "x",
                "AWS_S3_ENDPOINT_URL": "localhost",
                f"{PREFIX}\udcff": "x",
            }
        )
    assert [
        f"{PREFIX}\\udcff: expected a name in UTF-8, found 27 bytes that are not UTF-8",
        f"{PREFIX}SIGNING_KEY_HEX: expected pairs of hexadecimal digits, "
        "found a text of 1 character",
        f"{PREFIX}ASYNC_CONCURRENCY: expected a whole number from 1 to 2147483647, "
        "found a text of 1 character",
        "AWS_S3_ENDPOINT_URL: expected http://host, https://host or file:///directory, "
        "found a text of 9 characters",
    ] == str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("text", "expected", "warnings"),
    [
        ("debug", "DEBUG", ()),
        ("CRITICAL", "CRITICAL", ()),
        (
            "verbose",
            "INFO",
            (
                "LOG_LEVEL: expected one of DEBUG, INFO, WARNING, ERROR, CRITICAL, "
                "found a text of 7 characters: taking INFO",
            ),
        ),
    ],
)
def test_an_unknown_log_level_is_info_with_a_warning(
    text: str, expected: str, warnings: tuple[str, ...]
) -> None:
    settings = Settings.from_environ({"LOG_LEVEL": text})
    assert (expected, warnings) == (settings.log_level, settings.warnings)


def test_the_signing_key_is_not_shown() -> None:
    assert "abc" not in repr(parse("SIGNING_KEY_HEX", b"abc".hex()))


def test_the_table_has_every_setting_once() -> None:
    names = {field.name for field in dataclasses.fields(Settings)} - {"warnings"}
    assert names == VARIABLES.keys()
    assert len(names) == len({variable.name for variable in VARIABLES.values()})


def test_the_result_of_a_failed_set_up_needs_only_these() -> None:
    assert {
        f"{PREFIX}SIGNING_KEY_HEX",
        f"{PREFIX}RUNTIME_OUTPUT_BUCKET_NAME",
        f"{PREFIX}RUNTIME_OUTPUT_PREFIX",
        "LOG_LEVEL",
    } == set(RESULT_VARIABLES)
