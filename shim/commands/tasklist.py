"""Where a task list comes from: an argument, standard input, a file, or objects of a store."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
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


def read(arguments: argparse.Namespace, stop: Stop, store: Store) -> tuple[InferenceTask, ...]:
    """Return the tasks, wherever they are."""
    tasks = read_local(arguments, stop)
    return read_remote(arguments.file, store) if tasks is None else tasks


def read_local(arguments: argparse.Namespace, stop: Stop) -> tuple[InferenceTask, ...] | None:
    """Return the tasks given on the command line, on standard input or in a local file.

    None where they are in an object. UsageError, here and below, for what is no list of tasks.
    """
    file = arguments.file
    if arguments.tasks:
        return _parse({"": os.fsencode(arguments.tasks)})
    if file.startswith(("s3://", "https://")):
        return None
    scheme, separator, _ = file.partition("://")
    if separator and scheme.isalnum():
        raise UsageError(
            "The value provided for file is invalid: expected s3://BUCKET/KEY, "
            f"https://BUCKET/KEY, a local path or - for standard input, found {scheme}://"
        )
    try:
        with open(0 if file == "-" else file, "rb", buffering=0, closefd=file != "-") as stream:
            return _parse({"": _read(stream, stop)})
    except OSError as error:
        raise _unreadable(error) from error


def _read(stream: FileIO, stop: Stop) -> bytes:
    """Return what a stream holds; a stop ends the wait for more."""
    body = bytearray()
    while len(body) <= TASKS_LIMIT_BYTES:
        wait_readable(stop, stream)
        stop.check()
        piece = stream.read(PIECE_BYTES)
        if not piece:
            return bytes(body)
        body += piece
    raise UsageError(f"The task list has more than {TASKS_LIMIT_BYTES} bytes")


def read_remote(file: str, store: Store) -> tuple[InferenceTask, ...]:
    """Return the tasks in an object, or in every `*.json` below a prefix, in the order of keys."""
    try:
        location = parse_s3_uri(file)
        bucket, key = location.bucket, location.key
        if key and not key.endswith("/"):
            bodies = {"": store.get(bucket, key, max_bytes=TASKS_LIMIT_BYTES)}
        else:
            bodies = {
                summary.key: store.get(bucket, summary.key, max_bytes=TASKS_LIMIT_BYTES)
                for summary in store.list(bucket, key)
                if summary.key.endswith(".json")
            }
    except (ValueError, RemoteError) as error:
        raise _unreadable(error) from error
    return _parse(bodies)


def _unreadable(error: Exception) -> UsageError:
    return UsageError(f"The value provided for file is invalid:\n\n{error}")


def _parse(bodies: Mapping[str, bytes]) -> tuple[InferenceTask, ...]:
    """Parse one list, which has no name, or several as one."""
    try:
        tasks = parse_tasks(bodies[""]) if "" in bodies else parse_task_files(bodies)
    except InvalidFields as error:
        raise UsageError(f"The tasks definition is invalid:\n\n{error}") from error
    if not tasks:
        raise UsageError("Empty task list provided")
    return tasks
