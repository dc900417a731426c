"""Plan one task on local directories, so that it runs as on the platform and harms nobody's files.

The input directory is read as a prefix of a bucket, the output directory is written as one:

    DIR/...            -> /input/...            --input DIR
    /output/...        -> OUT/...               --output OUT
    the signed result  -> OUT/.sagemaker_shim/inference_result.json

Root gets the platform's own paths, and finds them again as they were before. Nobody else can make
/input and /output: both lie below a temporary directory then. Where namespaces are allowed, they
are shown under the platform's names; elsewhere SHIM_INPUT_PATH and SHIM_OUTPUT_PATH name them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from shim.contract.durations import parse_duration
from shim.contract.errors import UsageError
from shim.contract.settings import Settings
from shim.contract.tasks import InferenceIO, InferenceTask
from shim.log.log import Log
from shim.process.namespaces import show

PK = "run"
PATH_VARIABLES = ("SHIM_INPUT_PATH", "SHIM_OUTPUT_PATH")
INPUT_BUCKET = "input"
OUTPUT_BUCKET = "output"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """A task, the settings to run it with, and what stands for its buckets.

    - variables: those that tell the command where its directories are, if it must be told
    """

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
    """Plan a task of everything in a directory; without root, move to where it can run.

    - cmd: replaces the image's entrypoint and command unless it is empty
    - scratch: an empty directory for /input and /output, or None to use the platform's paths

    Raises UsageError for a directory that does not exist, or that the run would empty.
    """
    source, destination = _directories(settings, input_directory, output_directory)
    if cmd:
        settings = replace(settings, entrypoint=None, cmd=cmd)
    settings = replace(settings, runtime_output_bucket_name=None, runtime_output_prefix=None)
    settings, variables = _confine(settings, scratch) if scratch else (_refuse_filled(settings), {})
    key = f"{source.name}/"
    task = InferenceTask(
        pk=PK,
        inputs=(InferenceIO(relative_path=".", bucket_name=INPUT_BUCKET, bucket_key=key),),
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


def _directories(settings: Settings, source: Path, destination: Path) -> tuple[Path, Path]:
    """Resolve both; UsageError where the run itself makes, fills and empties one of them."""
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
    own = (
        settings.input_path,
        settings.output_path,
        settings.linked_input_parent,
        *settings.post_clean_directories,
    )
    for directory in (source, destination):
        for path in own:
            if directory.is_relative_to(path) or path.is_relative_to(directory):
                raise UsageError(
                    f"{directory}: expected a directory that has nothing to do with {path}, "
                    "which a run makes and empties"
                )
    return source, destination


def _parse_timeout(text: str | None) -> timedelta | None:
    if text is None:
        return None
    try:
        with suppress(ValueError):
            return parse_duration(float(text))
        return parse_duration(text)
    except ValueError as error:
        raise UsageError(f"--timeout {text}: {error}") from error


def _confine(settings: Settings, scratch: Path) -> tuple[Settings, dict[str, str]]:
    """Keep to one directory, as without root there is no other choice.

    Return the variables, too, that tell the command so; none where it need not know.
    """
    names = settings.input_path, settings.output_path
    directories = scratch / "input", scratch / "output"
    for path in (*directories, scratch / "root"):
        path.mkdir()
    is_shown = show(dict(zip(names, directories, strict=True)), root=scratch / "root")
    input_path, output_path = names if is_shown else directories
    variables = {} if is_shown else dict(zip(PATH_VARIABLES, map(str, directories), strict=True))
    settings = replace(
        settings,
        input_path=input_path,
        output_path=output_path,
        use_linked_input=False,
        writable_directories=(),
        post_clean_directories=(),
    )
    return settings, variables


def _refuse_filled(settings: Settings) -> Settings:
    """Refuse to empty what somebody filled: outside a container it may be dear to them."""
    for path in (settings.input_path, settings.output_path):
        is_replaced = path == settings.input_path and path.is_symlink()
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is no directory, and a task makes one there: move it away")
        if not is_replaced and holds_something(path):
            raise UsageError(
                f"{path} is not empty, and a task begins by emptying it: move its contents away"
            )
    cleaned = [path for path in settings.post_clean_directories if not holds_something(path)]
    return replace(settings, post_clean_directories=tuple(cleaned))


@contextmanager
def scratch_directory(log: Log) -> Iterator[Path | None]:
    """Give a place for /input and /output to those who cannot make them."""
    if os.geteuid() == 0:
        yield None
        return
    from shutil import rmtree  # 6 ms, with the compressors
    from tempfile import mkdtemp  # 1 ms

    scratch = Path(mkdtemp(prefix="sagemaker-shim-"))
    try:
        yield scratch
    finally:
        # Outputs that could not be stored are kept, whatever name they had for the command.
        outputs = scratch / "output"
        if holds_something(outputs):
            log.error(f"What could not be stored is in {outputs}")
        else:
            rmtree(scratch, ignore_errors=True)


def look_around(settings: Settings) -> list[Found]:
    """Return what is where the run's task makes something, or makes it anew."""
    linked = settings.linked_input_parent / f"{PK}-input"
    return [Found.look(path) for path in (settings.input_path, settings.output_path, linked)]


@contextmanager
def restoring(found: Sequence[Found]) -> Iterator[None]:
    """Make everything as it was found, as far as that is possible."""
    try:
        yield
    finally:
        for item in found:
            with suppress(OSError):
                item.restore()


@dataclass(frozen=True, slots=True)
class Found:
    """What lies at a path that a run makes and changes: nothing, a link or a directory.

    - kind: the type of file, 0 for nothing
    - target: of a link
    """

    path: Path
    kind: int = 0
    status: os.stat_result | None = None
    target: str = ""

    @staticmethod
    def look(path: Path) -> Found:
        """Return what is there."""
        try:
            status = path.lstat()
        except FileNotFoundError:
            return Found(path)
        target = os.readlink(path) if stat.S_ISLNK(status.st_mode) else ""
        return Found(path, stat.S_IFMT(status.st_mode), status, target)

    def restore(self) -> None:
        """Remove what is something else by now, and make again what was there."""
        now = Found.look(self.path)
        if (now.kind, now.target) != (self.kind, self.target):
            if now.kind:
                self.path.rmdir() if now.kind == stat.S_IFDIR else self.path.unlink()
            if self.kind == stat.S_IFLNK:
                self.path.symlink_to(self.target)
            elif self.kind == stat.S_IFDIR:
                self.path.mkdir()
        if self.kind == stat.S_IFDIR and self.status is not None:
            directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            os.fchown(directory, self.status.st_uid, self.status.st_gid)
            os.fchmod(directory, stat.S_IMODE(self.status.st_mode))
            os.close(directory)


def holds_something(path: Path) -> bool:
    """Tell whether a directory is there and not empty, as far as we may see."""
    with suppress(PermissionError):
        return path.is_dir() and any(path.iterdir())
    return False
