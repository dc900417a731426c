"""Where a task list comes from: an argument, standard input, a file, or objects of a store."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from io import FileIO

from shim.contract.errors import InvalidFields, UsageError
from shim.contract.tasks import InferenceTask, parse_task_files, parse_tasks
from shim.contract.uri import parse_s3_uri
from shim.http.errors import RemoteError
from shim.process.stopping import Stop, wait_readable

TYPE_CHECKING = False  # s3.store: 5 ms
if TYPE_CHECKING:
    from shim.s3.store import Store

# A list of 100,000 inputs has about 20 MB; Python needs some ten times that to hold it.
TASKS_LIMIT_BYTES = 256 * 1024 * 1024
PIECE_BYTES = 1024 * 1024


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("-t", "--tasks", metavar="JSON", help="the list of tasks itself")
    command.add_argument(
        "-f",
        "--file",
        metavar="URI",
        help="where the list is: s3://BUCKET/KEY, s3://BUCKET/PREFIX/ (every *.json below it), "
        "a local path, or - for standard input",
    )


def is_given(arguments: argparse.Namespace) -> bool:
    """Tell whether a task list is given; UsageError when two are."""
    if arguments.tasks and arguments.file:
        raise UsageError("Only one of tasks or file should be set")
    return bool(arguments.tasks or arguments.file)


def is_remote(file: str) -> bool:
    """Tell whether a task list is an object; UsageError when it is of another kind of URI."""
    if file.startswith(("s3://", "https://")):
        return True
    scheme, separator, _ = file.partition("://")
    if separator and scheme.isalnum():
        raise UsageError(
            "The value provided for file is invalid: expected s3://BUCKET/KEY, "
            f"https://BUCKET/KEY, a local path or - for standard input, found {scheme}://"
        )
    return False


def read_local(text: str | None, file: str, stop: Stop) -> dict[str, bytes]:
    """Return the task list given on the command line, on standard input or in a local file."""
    if text:
        return {"": os.fsencode(text)}
    try:
        with open(0 if file == "-" else file, "rb", buffering=0, closefd=file != "-") as stream:
            body = b"".join(_read_pieces(stream, stop))
    except OSError as error:
        raise _unreadable(error) from error
    return {"": body}


def _read_pieces(stream: FileIO, stop: Stop) -> Iterator[bytes]:
    """Yield what a stream holds; a stop ends the wait for more."""
    size = 0
    while True:
        wait_readable(stop, stream)
        stop.check()
        piece = stream.read(PIECE_BYTES)
        if not piece:
            return
        size += len(piece)
        if size > TASKS_LIMIT_BYTES:
            raise UsageError(f"The task list has more than {TASKS_LIMIT_BYTES} bytes")
        yield piece


def read_remote(file: str, store: Store) -> dict[str, bytes]:
    """Return the task list, or every `*.json` below a prefix by its key."""
    try:
        location = parse_s3_uri(file)
        bucket, key = location.bucket, location.key
        if key and not key.endswith("/"):
            return {"": store.get(bucket, key, max_bytes=TASKS_LIMIT_BYTES)}
        return {
            summary.key: store.get(bucket, summary.key, max_bytes=TASKS_LIMIT_BYTES)
            for summary in store.list(bucket, key)
            if summary.key.endswith(".json")
        }
    except (ValueError, RemoteError) as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> UsageError:
    return UsageError(f"The value provided for file is invalid:\n\n{error}")


def parse(bodies: Mapping[str, bytes]) -> tuple[InferenceTask, ...]:
    """Parse one list, or several as one."""
    try:
        tasks = parse_tasks(bodies[""]) if "" in bodies else parse_task_files(bodies)
    except InvalidFields as error:
        raise UsageError(f"The tasks definition is invalid:\n\n{error}") from error
    if not tasks:
        raise UsageError("Empty task list provided")
    return tasks
