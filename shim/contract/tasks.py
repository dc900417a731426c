"""Tasks and results: the documents that the platform sends and gets.

    {output_prefix}.sagemaker_shim/inference_result.json
    {runtime_output_prefix}.sagemaker_shim/runtime_setup_result.json

both compact JSON with the members in the order of the classes below, signed with `sign`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import PurePosixPath

from shim import __version__
from shim.contract.durations import format_duration
from shim.contract.errors import InvalidFields, InvalidTasks, NotText, Problem
from shim.contract.fields import (
    boolean,
    decode_json,
    decode_json_within,
    duration,
    items,
    members,
    refusal,
    text,
)
from shim.contract.uri import is_bucket_name

TYPE_CHECKING = False  # typing: 3 ms
if TYPE_CHECKING:
    from typing import Any

_MAX_PATH_BYTES = 4096  # PATH_MAX
# `{pk}-input` names a directory, and names have at most 255 bytes.
_MAX_PK_BYTES = 249
# A body of 6 MiB, the most that SageMaker sends, has no room for a task with more.
_MAX_TASK_VALUES = 500_000
SIGNATURE_METADATA = "signature_hmac_sha256"

_UNSAFE_PK = (
    "The pk names a directory: it cannot be blank, . or .., nor hold / or NUL, "
    "nor have more than 249 bytes"
)
_UNSAFE_PATH = (
    "The path must be relative and name something inside the input directory, without .., "
    "in at most 4,096 bytes"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceIO:
    """One file, or everything below one prefix, and where it lies in the bucket."""

    relative_path: str
    bucket_name: str
    bucket_key: str
    decompress: bool = False

    @property
    def is_prefix(self) -> bool:
        return self.bucket_key.endswith("/")


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceTask:
    """One run of the algorithm. `output_prefix` ends in "/"; no timeout means no limit."""

    pk: str
    inputs: tuple[InferenceIO, ...]
    output_bucket_name: str
    output_prefix: str
    timeout: timedelta | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceResult:
    """What became of a task."""

    pk: str
    return_code: int
    user_safe_error_message: str = ""
    user_process_last_stderr_lines: tuple[str, ...] = ()
    exec_duration: timedelta | None = None
    invoke_duration: timedelta | None = None
    outputs: tuple[InferenceIO, ...] = ()
    sagemaker_shim_version: str = __version__

    def to_json(self) -> bytes:
        return _to_json(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeSetupResult:
    """What became of the set-up before the first task."""

    return_code: int
    user_safe_error_message: str = ""
    sagemaker_shim_version: str = __version__

    def to_json(self) -> bytes:
        return _to_json(self)


def _to_json(value: object) -> bytes:
    text = json.dumps(value, default=_encode, ensure_ascii=False, separators=(",", ":"))
    # A file name that is not UTF-8 must not cost the result: its odd bytes become "?".
    return text.encode(errors="replace")


def _encode(value: Any) -> object:
    if isinstance(value, timedelta):
        return format_duration(value)
    return {field.name: getattr(value, field.name) for field in fields(value)}


def result_key(output_prefix: str) -> str:
    """Return where the result of a task lies."""
    return f"{ended_prefix(output_prefix)}.sagemaker_shim/inference_result.json"


def runtime_setup_key(prefix: str) -> str:
    """Return where the result of the set-up lies."""
    return f"{ended_prefix(prefix)}.sagemaker_shim/runtime_setup_result.json"


def sign(body: bytes, key: bytes) -> str:
    """Return the hex HMAC-SHA256 that goes into the object's metadata as SIGNATURE_METADATA."""
    import hmac  # 2 ms, with OpenSSL

    return hmac.digest(key, body, "sha256").hex()


def parse_task(body: bytes) -> InferenceTask:
    """Parse one task, as `serve` gets it. Raises NotText, else InvalidTasks with every problem."""
    try:
        return _task(decode_json_within(body, max_values=_MAX_TASK_VALUES))
    except NotText:
        raise
    except InvalidFields as error:
        raise InvalidTasks(error.problems) from error


def parse_tasks(body: bytes) -> tuple[InferenceTask, ...]:
    """Parse a list of tasks, as `invoke` gets it. Raises InvalidTasks with every problem."""
    try:
        return items(decode_json(body), _task, check=_duplicates)
    except InvalidFields as error:
        raise InvalidTasks(error.problems) from error


def parse_task_files(bodies: Mapping[str, bytes]) -> tuple[InferenceTask, ...]:
    """Parse lists of tasks as one list; each problem's path begins with the name of its file."""
    values: list[object] = []
    places: list[tuple[str | int, ...]] = []
    problems: list[Problem] = []
    for name, body in bodies.items():
        try:
            listed = items(decode_json(body), lambda value: value)
        except InvalidFields as error:
            problems.extend(replace(found, loc=(name, *found.loc)) for found in error.problems)
        else:
            places += ((name, index) for index in range(len(listed)))
            values += listed
    try:
        tasks = items(values, _task, check=_duplicates)
    except InvalidFields as error:
        for problem in error.problems:
            position, *rest = problem.loc
            problems.append(replace(problem, loc=(*places[int(position)], *rest)))
    if problems:
        raise InvalidTasks(problems)
    return tasks


def ended_prefix(prefix: str) -> str:
    """Return the prefix with the slash at its end that makes it one."""
    return prefix if prefix.endswith("/") else f"{prefix}/"


def is_safe_relative_path(path: str) -> bool:
    """Tell whether the path names something below a directory, and not that directory itself."""
    pure = PurePosixPath(path)
    return (
        bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts and "\0" not in path
    )


def _task(value: object) -> InferenceTask:
    return members(
        value,
        InferenceTask,
        {
            "pk": _pk,
            "inputs": _inputs,
            "output_bucket_name": _bucket_name,
            "output_prefix": _output_prefix,
            "timeout": _timeout,
        },
        defaults={"timeout": None},
    )


def _pk(value: object) -> str:
    pk = text(value)
    if pk in ("", ".", "..") or "/" in pk or "\0" in pk or len(pk.encode()) > _MAX_PK_BYTES:
        raise refusal(value, _UNSAFE_PK)
    return pk


def _inputs(value: object) -> tuple[InferenceIO, ...]:
    return items(value, _input, check=_overlaps)


def _input(value: object) -> InferenceIO:
    parsed = members(
        value,
        InferenceIO,
        {
            "relative_path": _relative_path,
            "bucket_name": _bucket_name,
            "bucket_key": _bucket_key,
            "decompress": boolean,
        },
        defaults={"decompress": False},
    )
    if parsed.relative_path == "." and not parsed.is_prefix:
        raise refusal(".", _UNSAFE_PATH, loc=("relative_path",))
    return parsed


def _relative_path(value: object) -> str:
    if not isinstance(value, str):
        raise refusal(value, "Input is not a valid path", type="path_type")
    path = text(value)
    if len(path.encode()) > _MAX_PATH_BYTES:
        raise refusal(value, _UNSAFE_PATH)
    if value == "" or not (is_safe_relative_path(path) or str(PurePosixPath(path)) == "."):
        raise refusal(value, _UNSAFE_PATH)
    return str(PurePosixPath(path))


def _bucket_name(value: object) -> str:
    name = text(value)
    if not is_bucket_name(name):
        raise refusal(value, "Invalid bucket name")
    return name


def _bucket_key(value: object) -> str:
    key = text(value)
    if not key:
        raise refusal(value, "Key cannot be blank")
    return key


def _output_prefix(value: object) -> str:
    prefix = text(value)
    if not prefix:
        raise refusal(value, "Prefix cannot be blank")
    return ended_prefix(prefix)


def _timeout(value: object) -> timedelta | None:
    return None if value is None else duration(value)


def _duplicates(tasks: Mapping[int, InferenceTask]) -> Iterator[InvalidFields]:
    """No two tasks may share the directory of their inputs, or the prefix of their outputs."""
    seen: set[tuple[str, str]] = set()
    for index, task in tasks.items():
        for name, value in (("pk", task.pk), ("output_prefix", task.output_prefix)):
            if (name, value) in seen:
                yield refusal(value, f"Another task has the same {name}", loc=(index, name))
            seen.add((name, value))


def _overlaps(inputs: Mapping[int, InferenceIO]) -> Iterator[InvalidFields]:
    """A plain file has its path for itself; archives and prefixes only share directories."""
    files: dict[str, int] = {}
    for index, io in inputs.items():
        if not io.decompress and not io.is_prefix:
            files.setdefault(io.relative_path, index)
    for index, io in inputs.items():
        others = (files.get(place, index) for place in _places(io))
        other = next((other for other in others if other != index), None)
        if other is not None:
            uri = f"s3://{inputs[other].bucket_name}/{inputs[other].bucket_key}"
            message = f"The path is, or lies inside, the file of inputs[{other}], {uri}"
            yield refusal(io.relative_path, message, loc=(index, "relative_path"))


def _places(io: InferenceIO) -> Iterator[str]:
    """Yield the path of an input and the directories above it."""
    path = io.relative_path
    if not io.decompress:  # an archive is unpacked beside its path, which it leaves free
        yield path
    while path := path.rpartition("/")[0]:
        yield path
