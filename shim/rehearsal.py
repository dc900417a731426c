"""Plan one task on local directories, so that it runs as on the platform and harms nobody's files.

The input directory is read as a prefix of a bucket, the output directory is written as one:

    DIR/...            -> /input/...            --input DIR
    /output/...        -> OUT/...               --output OUT
    the signed result  -> OUT/.sagemaker_shim/inference_result.json

Root gets the platform's own paths. Nobody else can make /input and /output: both lie below a
temporary directory then, and the command is told where by SHIM_INPUT_PATH and SHIM_OUTPUT_PATH.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from shim.durations import parse_duration
from shim.errors import UsageError
from shim.settings import Settings
from shim.tasks import InferenceIO, InferenceTask

PK = "run"
INPUT_BUCKET = "input"
OUTPUT_BUCKET = "output"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """A task, the settings to run it with, and what stands for its buckets."""

    task: InferenceTask
    settings: Settings
    buckets: Mapping[str, Path]
    variables: Mapping[str, str]


def plan_rehearsal(
    settings: Settings,
    *,
    input_directory: Path,
    output_directory: Path,
    timeout: str | None,
    cmd: tuple[str, ...],
    scratch: Path | None,
) -> Rehearsal:
    """Plan a task of everything in a directory.

    - cmd: replaces the image's entrypoint and command unless it is empty
    - scratch: an empty directory for /input and /output, or None to use the platform's paths

    Raises UsageError for a directory that does not exist, or that the run would empty.
    """
    source, destination = _directories(input_directory, output_directory)
    _keep_apart(settings, source, destination)
    if cmd:
        settings = replace(settings, entrypoint=None, cmd=cmd)
    settings = replace(settings, runtime_output_bucket_name=None, runtime_output_prefix=None)
    variables: dict[str, str] = {}
    if scratch is None:
        settings = _spare(settings)
    else:
        settings = _confine(settings, scratch)
        variables["SHIM_INPUT_PATH"] = str(settings.input_path)
        variables["SHIM_OUTPUT_PATH"] = str(settings.output_path)
    task = InferenceTask(
        pk=PK,
        inputs=(
            InferenceIO(relative_path=".", bucket_name=INPUT_BUCKET, bucket_key=f"{source.name}/"),
        ),
        output_bucket_name=OUTPUT_BUCKET,
        output_prefix=f"{destination.name}/",
        timeout=_parse_timeout(timeout),
    )
    return Rehearsal(
        task=task,
        settings=settings,
        buckets={INPUT_BUCKET: source.parent, OUTPUT_BUCKET: destination.parent},
        variables=variables,
    )


def _directories(source: Path, destination: Path) -> tuple[Path, Path]:
    try:
        if not source.is_dir():
            raise UsageError(f"--input {source}: expected a directory that holds the task's inputs")
        if destination.exists() and not destination.is_dir():
            raise UsageError(
                f"--output {destination}: expected a directory, or a name for a new one"
            )
        source, destination = source.resolve(), destination.resolve()
    except OSError as error:
        raise UsageError(f"--input or --output: {error}") from error
    if source == destination or not source.name or not destination.name:
        raise UsageError("--input and --output must be two directories, neither of them /")
    return source, destination


def _keep_apart(settings: Settings, *directories: Path) -> None:
    """Refuse directories that the run itself makes, fills and empties."""
    own = (
        settings.input_path,
        settings.output_path,
        settings.linked_input_parent,
        *settings.post_clean_directories,
    )
    for directory in directories:
        for path in own:
            if path == directory or path in directory.parents or directory in path.parents:
                raise UsageError(
                    f"{directory}: expected a directory that has nothing to do with {path}, "
                    "which a run makes and empties"
                )


def _parse_timeout(text: str | None) -> timedelta | None:
    if text is None:
        return None
    try:
        try:
            return parse_duration(float(text))
        except ValueError:
            return parse_duration(text)
    except ValueError as error:
        raise UsageError(f"--timeout {text}: {error}") from error


def _confine(settings: Settings, scratch: Path) -> Settings:
    """Keep to one directory, as without root there is no other choice."""
    return replace(
        settings,
        input_path=scratch / "input",
        output_path=scratch / "output",
        use_linked_input=False,
        writable_directories=(),
        post_clean_directories=(),
    )


def _spare(settings: Settings) -> Settings:
    """Refuse to empty what somebody filled: outside a container it may be dear to them."""
    for path in (settings.input_path, settings.output_path):
        if not path.is_symlink() and _holds_something(path):
            raise UsageError(
                f"{path} is not empty, and a task begins by emptying it: move its contents away"
            )
    return replace(
        settings,
        post_clean_directories=tuple(
            path for path in settings.post_clean_directories if not _holds_something(path)
        ),
    )


def _holds_something(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())
