"""The environment variables: read once, validated together, never replaced by a silent default."""

from __future__ import annotations

import binascii
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path

from shim.contract.errors import InvalidFields, InvalidSettings, Problem
from shim.contract.fields import decode_json
from shim.contract.uri import S3Location, is_bucket_name, parse_s3_uri

TYPE_CHECKING = False  # typing: 3 ms
if TYPE_CHECKING:
    from typing import Any

PREFIX = "GRAND_CHALLENGE_COMPONENT_"
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_PLATFORM_DIRECTORIES = "/opt/ml/output/data:/opt/ml/model:/opt/ml/input/data/ground_truth"

# Large enough for any wish, small enough for the types on the way: C's int, time_t and rlim_t.
_MAX_INTEGER = 2**31 - 1
_MAX_SECONDS = 365 * 24 * 60 * 60
_MAX_MEMORY_MB = 2**42


@dataclass(frozen=True, slots=True)
class Form:
    """How a variable's text is read: `parse` raises ValueError unless it is `accepted`."""

    parse: Callable[[str], Any]
    accepted: str


def _texts(accepted: str, is_accepted: Callable[[str], object]) -> Form:
    def parse(text: str) -> str:
        text.encode()
        if not is_accepted(text):
            raise ValueError
        return text

    return Form(parse, accepted)


def _integers(minimum: int, maximum: int) -> Form:
    def parse(text: str) -> int:
        if not minimum <= int(text) <= maximum:
            raise ValueError
        return int(text)

    return Form(parse, f"a whole number from {minimum} to {maximum}")


def _parse_path(text: str) -> Path:
    """Return an absolute path as it is spelled without `//`, `.` and `..`, which is what is judged.

    Links are not looked at here, but where the directory is opened.
    """
    names = os.path.normpath(_TEXT.parse(text)).strip("/").split("/")
    if not os.path.isabs(text) or "\0" in text or _SYSTEM_NAME.fullmatch(names[0]):
        raise ValueError
    return Path("/", *names)


def _lists(form: Form) -> Form:
    return Form(
        lambda text: tuple(form.parse(part) for part in text.split(":") if part),
        f"{form.accepted}, or several with colons between them",
    )


def _parse_command(text: str) -> str | tuple[str, ...] | None:
    value = decode_json(binascii.a2b_base64("".join(text.split()), strict_mode=True))
    if value is None:
        return None
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError
    if "\0" in _TEXT.parse("".join(words)):
        raise ValueError
    return value if isinstance(value, str) else tuple(words)


def _parse_archive(text: str) -> S3Location:
    location = parse_s3_uri(_TEXT.parse(text))
    if not location.key or location.key.endswith("/"):
        raise ValueError
    return location


def _parse_method(text: str) -> str:
    if text.lower() not in ("exec", "invoke"):
        raise ValueError
    return text.lower()


def _parse_level(text: str) -> str:
    return text.upper() if text.upper() in LOG_LEVELS else "INFO"


def _parse_seconds(text: str) -> timedelta:
    return timedelta(seconds=_integers(0, _MAX_SECONDS).parse(text))


_TEXT = _texts("text in UTF-8", lambda text: True)
_FLAG = Form(lambda text: text.lower() == "true", "True or anything else")
_COMMAND = Form(_parse_command, "base64 of JSON: null, a string or a list of strings")
# What is made, emptied or given away as root is nothing that the system consists of.
_SYSTEM_NAME = re.compile("|etc|usr|bin|sbin|lib.*|root|boot|dev|proc|sys", re.DOTALL)
_PATH = Form(
    _parse_path,
    "an absolute path, not / and not in /etc, /usr, /bin, /sbin, /lib*, /root, /boot, /dev, /proc "
    "or /sys",
)
_ARCHIVE = Form(_parse_archive, "s3://bucket/key or https://bucket/key")
_BUCKET_NAME = _texts("the name of a bucket or the ARN of an access point", is_bucket_name)
_OUTPUT_PREFIX = _texts("a prefix that is not blank", bool)
_HEX = Form(bytes.fromhex, "pairs of hexadecimal digits")
_METHOD = Form(_parse_method, "exec or invoke")
_SECONDS = Form(_parse_seconds, f"a whole number of seconds from 0 to {_MAX_SECONDS}")
_ENDPOINT = re.compile(r"https?://[^\s/?#@]+(?:/[^\s?#]*)?|file:///.*")
# No more than the scheme, or nothing: what follows it is for the S3 client to read.
_URL = _texts(
    "http://host, https://host or file:///directory",
    lambda text: not text or _ENDPOINT.fullmatch(text) is not None,
)
_LEVEL = Form(_parse_level, f"one of {', '.join(LOG_LEVELS)}")


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable. `default` is its text when unset; None leaves the setting None."""

    name: str
    default: str | None
    form: Form
    meaning: str


def _variable(
    name: str,
    default: str | None,
    form: Form,
    meaning: str,
    *,
    prefix: str = PREFIX,
    repr: bool = True,
) -> Any:
    variable = Variable(f"{prefix}{name}", default, form, meaning)
    return field(metadata={"variable": variable}, repr=repr)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the platform and the packager of the image decided."""

    cmd: str | tuple[str, ...] | None = _variable("CMD_B64J", None, _COMMAND, "the image's CMD")
    entrypoint: str | tuple[str, ...] | None = _variable(
        "ENTRYPOINT_B64J", None, _COMMAND, "the image's ENTRYPOINT"
    )
    user: str = _variable("USER", "", _TEXT, "the image's USER: `user`, `user:group`, `:group`")
    set_extra_groups: bool = _variable(
        "SET_EXTRA_GROUPS", "True", _FLAG, "`True` gives the process the user's other groups too"
    )
    input_path: Path = _variable(
        "INPUT_PATH", "/input", _PATH, "where the process reads its inputs"
    )
    output_path: Path = _variable(
        "OUTPUT_PATH", "/output", _PATH, "where the process writes its outputs"
    )
    use_linked_input: bool = _variable(
        "USE_LINKED_INPUT", "True", _FLAG, "`True` makes the input path a link to another directory"
    )
    linked_input_parent: Path = _variable(
        "LINKED_INPUT_PARENT", "/opt/ml/input/data/", _PATH, "where that one lies, as `{pk}-input`"
    )
    model: S3Location | None = _variable(
        "MODEL", None, _ARCHIVE, "a tar (plain, gz, bz2, xz) unpacked before the first task"
    )
    model_dest: Path = _variable(
        "MODEL_DEST", "/opt/ml/model/", _PATH, "where the model is unpacked"
    )
    ground_truth: S3Location | None = _variable("GROUND_TRUTH", None, _ARCHIVE, "another such tar")
    ground_truth_dest: Path = _variable(
        "GROUND_TRUTH_DEST",
        "/opt/ml/input/data/ground_truth/",
        _PATH,
        "where the ground truth is unpacked",
    )
    writable_directories: tuple[Path, ...] = _variable(
        "WRITABLE_DIRECTORIES",
        f"{_PLATFORM_DIRECTORIES}:/opt/ml/checkpoints:/tmp",
        _lists(_PATH),
        "made where missing, and writable for everybody",
    )
    post_clean_directories: tuple[Path, ...] = _variable(
        "POST_CLEAN_DIRECTORIES",
        _PLATFORM_DIRECTORIES,
        _lists(_PATH),
        "emptied at the end",
    )
    signing_key: bytes = _variable(
        "SIGNING_KEY_HEX", "", _HEX, "the key of the results' HMAC-SHA256", repr=False
    )
    runtime_output_bucket_name: str | None = _variable(
        "RUNTIME_OUTPUT_BUCKET_NAME", None, _BUCKET_NAME, "the bucket of the set-up's result"
    )
    runtime_output_prefix: str | None = _variable(
        "RUNTIME_OUTPUT_PREFIX", None, _OUTPUT_PREFIX, "the prefix of the set-up's result"
    )
    max_memory_mb: int = _variable(
        "MAX_MEMORY_MB", "0", _integers(0, _MAX_MEMORY_MB), "RLIMIT_DATA in MiB; 0 sets no limit"
    )
    async_concurrency: int = _variable(
        "ASYNC_CONCURRENCY", "50", _integers(1, _MAX_INTEGER), "most requests to S3 at a time"
    )
    boto_max_pool_connections: int = _variable(
        "BOTO_MAX_POOL_CONNECTIONS",
        "120",
        _integers(1, _MAX_INTEGER),
        "most pooled connections",
    )
    api_method: str = _variable(
        "API_METHOD", "exec", _METHOD, "start the command for each task, or call its server"
    )
    start_and_health_timeout: timedelta = _variable(
        "START_AND_HEALTH_TIMEOUT_SECONDS", "300", _SECONDS, "for the server to become healthy"
    )
    health_check_call_timeout: timedelta = _variable(
        "HEALTH_CHECK_CALL_TIMEOUT_SECONDS", "10", _SECONDS, "for one answer about its health"
    )
    user_webserver_port: int = _variable(
        "USER_WEBSERVER_PORT", "4743", _integers(1, 65535), "where the server listens"
    )
    sigterm_grace: timedelta = _variable(
        "SIGTERM_GRACE_SECONDS", "5", _SECONDS, "from SIGTERM to SIGKILL"
    )
    no_new_privileges: bool = _variable(
        "NO_NEW_PRIVILEGES", "True", _FLAG, "`True` keeps setuid programs from helping the process"
    )
    endpoint_url: str = _variable(
        "AWS_S3_ENDPOINT_URL",
        "",
        _URL,
        "the endpoint of S3, or a directory in its place",
        prefix="",
    )
    log_level: str = _variable(
        "LOG_LEVEL", "INFO", _LEVEL, "the least level of the shim's own lines", prefix=""
    )
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """Parse every variable of VARIABLES. Raises InvalidSettings with all problems."""
        values: dict[str, Any] = {}
        problems = list(_misnamed(environ))
        for name, variable in VARIABLES.items():
            text = environ.get(variable.name, variable.default)
            try:
                values[name] = None if text is None else variable.form.parse(text)
            except (ValueError, InvalidFields):
                problems.append(_problem(variable.name, variable.form.accepted, _shape(text or "")))
        if _is_nested(values.get("input_path"), values.get("output_path")):
            accepted = "a directory that neither holds that of the inputs nor lies in it"
            problems.append(_problem(VARIABLES["output_path"].name, accepted, "one that does"))
        if problems:
            raise InvalidSettings(problems)
        return cls(**values, warnings=tuple(_warnings(environ)))

    @property
    def names_objects(self) -> bool:
        """Tell whether the set-up needs a bucket."""
        return any((self.model, self.ground_truth, self.runtime_output_bucket_name))


# By the name of their field.
VARIABLES: dict[str, Variable] = {
    field.name: field.metadata["variable"] for field in fields(Settings) if field.metadata
}

# What it takes to say in the bucket that the other variables are not valid.
RESULT_VARIABLES = tuple(
    VARIABLES[name].name
    for name in ("signing_key", "runtime_output_bucket_name", "runtime_output_prefix", "log_level")
)


def _is_nested(first: Path | None, second: Path | None) -> bool:
    """Tell whether emptying one directory empties the other: they are the same, or one holds it."""
    if first is None or second is None:
        return False
    names = {os.path.normpath(path) for path in (first, second)}
    return os.path.commonpath(names) in names


def _misnamed(environ: Mapping[str, str]) -> Iterator[Problem]:
    for name in environ:
        if name.startswith(PREFIX) and not _is_utf8(name):
            yield _problem(name, "a name in UTF-8", _shape(name))


def _warnings(environ: Mapping[str, str]) -> Iterator[str]:
    level = environ.get("LOG_LEVEL", "INFO")
    if level.upper() not in LOG_LEVELS:
        yield f"LOG_LEVEL: expected {_LEVEL.accepted}, found {_shape(level)}: taking INFO"


def _problem(name: str, accepted: str, found: str) -> Problem:
    # The text itself stays out of it: it may be a secret, or one in the wrong place.
    printable = name.encode(errors="backslashreplace").decode()
    message = f"expected {accepted}, found {found}"
    return Problem(loc=(printable,), type="setting_invalid", message=message)


def _shape(text: str) -> str:
    if not text:
        return "an empty text"
    if not _is_utf8(text):
        return f"{len(os.fsencode(text))} bytes that are not UTF-8"
    return f"a text of {len(text)} character{'s' * (len(text) > 1)}"


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
