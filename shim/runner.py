"""Run one task: reset, download, run, upload, clean, sign.

    reset /input and /output -> download -> mode.run -> upload (only when it returned 0)
        -> clean -> {output_prefix}.sagemaker_shim/inference_result.json

Rule 1: a task that began leaves a signed result, whatever happens to it.
Rule 2: its author reads sentences; what happened inside goes to internal lines.
Rule 3: tasks run one at a time, in order; the first that fails ends the list.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from shim.errors import ShimError, TaskStopped, UserSafeError
from shim.logs import Log
from shim.modes import Mode, Outcome
from shim.s3.errors import S3ClientError
from shim.settings import Settings
from shim.stopping import Stop
from shim.tasks import (
    SIGNATURE_METADATA,
    InferenceIO,
    InferenceResult,
    InferenceTask,
    is_safe_relative_path,
    result_key,
    sign,
)
from shim.users import resolve_user
from shim.workspace import Workspace, closing_descriptor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.s3.store import Store
    from shim.s3.transfer import Download, Transfers, Upload

STOPPED_MESSAGE = "The task was stopped before it finished"
UNEXPECTED_MESSAGE = "An unexpected error occurred"
DOWNLOAD_MESSAGE = "The inputs of the task could not be downloaded"
UPLOAD_MESSAGE = "The outputs of the task could not be uploaded"


class PlatformFailure(ShimError):
    """A failure that is not the algorithm's; str() may be read by its author, the cause not."""


class Runner:
    """Run tasks against a store, in a workspace, by a mode."""

    def __init__(
        self,
        *,
        settings: Settings,
        store: Store,
        mode: Mode,
        workspace: Workspace,
        log: Log,
        stop: Stop,
    ) -> None:
        self._settings = settings
        self._store = store
        self._mode = mode
        self._workspace = workspace
        self._log = log
        self._stop = stop
        self._is_healthy = True

    @property
    def is_healthy(self) -> bool:
        """Whether another task may follow; does not block."""
        return self._is_healthy and self._mode.is_alive()

    def run_tasks(self, tasks: Iterable[InferenceTask]) -> bool:
        """Run tasks in order up to the first that fails; return whether all succeeded.

        Raises what run_task raises.
        """
        for task in tasks:
            self._stop.check()
            return_code = 1
            try:
                return_code = self.run_task(task).return_code
            finally:
                if return_code != 0:
                    self._log.error(f"Stopping due to failure of task {task.pk}")
            if return_code != 0:
                return False
        return True

    def run_task(self, task: InferenceTask) -> InferenceResult:
        """Run one task and return the result that was left for it.

        Raises, when the result has been left: TaskStopped after a stop, PlatformFailure after a
        failure that is not the algorithm's.
        """
        self._log.info(f"Running task {task.pk}")
        outcome = Outcome(return_code=1)
        outputs: tuple[InferenceIO, ...] = ()
        failure: Exception | None = None
        try:
            self._prepare(task)
            outcome = self._mode.run(task)
            if outcome.stopped:
                raise TaskStopped(STOPPED_MESSAGE)
            if outcome.return_code == 0:
                outputs = self._upload_outputs(task)
        except Exception as error:
            failure = error
            outcome = replace(outcome, return_code=1, user_safe_error_message=self._explain(error))
            self._log.error(outcome.user_safe_error_message, internal=False, task=task.pk)
        is_clean = self._workspace.clean()
        self._is_healthy = self._is_healthy and is_clean and outcome.is_healthy
        result = _build_result(task, outcome, outputs)
        self._leave(task, result)
        self._log.info(f"Task {task.pk} complete, return code {result.return_code}")
        if failure is None or isinstance(failure, UserSafeError):
            return result
        if isinstance(failure, TaskStopped | PlatformFailure):
            raise failure
        raise PlatformFailure(UNEXPECTED_MESSAGE) from failure

    def _explain(self, error: Exception) -> str:
        """Return what the author is told; tell the platform the rest."""
        if isinstance(error, UserSafeError):
            return str(error)
        if isinstance(error, TaskStopped):
            return STOPPED_MESSAGE
        if isinstance(error, PlatformFailure):
            self._log.error(f"{error}: {error.__cause__}")
            return str(error)
        self._log.exception("The task failed unexpectedly", error)
        return UNEXPECTED_MESSAGE

    def _prepare(self, task: InferenceTask) -> None:
        try:
            self._workspace.reset(task.pk)
        except UserSafeError:
            self._is_healthy = False
            raise
        self._guard(DOWNLOAD_MESSAGE, lambda: self._download_inputs(task))

    def _guard(self, message: str, transfer: Callable[[], None]) -> None:
        """Do a transfer; what goes wrong with S3 or the disk is the platform's failure."""
        try:
            transfer()
        except (S3ClientError, OSError) as error:
            self._stop.check()  # a stop cancels transfers
            raise PlatformFailure(message) from error
        self._stop.check()

    def _download_inputs(self, task: InferenceTask) -> None:
        from shim.archives import extract_zip

        archives: list[tuple[Path, Path]] = []
        self._transfers().download_all(self._downloads(task, archives))
        for archive, directory in archives:
            with (
                closing_descriptor(os.open(directory, os.O_RDONLY | os.O_DIRECTORY)) as parent,
                open(archive, "rb", buffering=0) as file,
            ):
                extract_zip(file, parent, lambda names: None, check=self._stop.check)
            archive.unlink()

    def _downloads(
        self, task: InferenceTask, archives: list[tuple[Path, Path]]
    ) -> Iterator[Download]:
        """Yield a download for each object; a zip goes to a temporary name, noted in `archives`."""
        from shim.s3.transfer import Download

        for item in task.inputs:
            for key, relative_path in self._objects(item):
                path = self._workspace.input_file(relative_path)
                if item.decompress:
                    directory = path.parent
                    path = self._workspace.input_file(f".{len(archives)}.zip.sagemaker_shim")
                    archives.append((path, directory))
                self._log.debug(f"Downloading {key!r} from {item.bucket_name} to {path}")
                yield Download(bucket=item.bucket_name, key=key, path=path)

    def _objects(self, item: InferenceIO) -> Iterator[tuple[str, str]]:
        """Yield (key, relative path) of the object or of everything below the prefix."""
        if not item.is_prefix:
            yield item.bucket_key, item.relative_path
            return
        for summary in self._store.list(item.bucket_name, item.bucket_key):
            rest = summary.key.removeprefix(item.bucket_key)
            if not rest or rest.endswith("/"):
                continue  # a marker of a directory
            if not is_safe_relative_path(rest):
                raise PlatformFailure(DOWNLOAD_MESSAGE) from ValueError(
                    f"the key {summary.key!r} below the prefix {item.bucket_key!r} names no file"
                )
            yield summary.key, posixpath.normpath(posixpath.join(item.relative_path, rest))

    def _upload_outputs(self, task: InferenceTask) -> tuple[InferenceIO, ...]:
        outputs: list[InferenceIO] = []
        self._guard(
            UPLOAD_MESSAGE, lambda: self._transfers().upload_all(self._uploads(task, outputs))
        )
        return tuple(sorted(outputs, key=lambda output: output.relative_path))

    def _uploads(self, task: InferenceTask, outputs: list[InferenceIO]) -> Iterator[Upload]:
        """Yield an upload for each output file, noting it in `outputs`."""
        from shim.s3.transfer import Upload

        for file in self._workspace.walk_outputs(resolve_user(self._settings.user)):
            key = task.output_prefix + file.relative_path
            try:
                fd = file.open()
            except FileNotFoundError as error:  # a server of the user's may still be at work
                self._log.warning(f"Skipping the output {file.relative_path!r}: {error}")
                continue
            self._log.debug(f"Uploading {file.relative_path!r} to {task.output_bucket_name}")
            yield Upload(bucket=task.output_bucket_name, key=key, open=partial(int, fd))
            outputs.append(
                InferenceIO(
                    relative_path=file.relative_path,
                    bucket_name=task.output_bucket_name,
                    bucket_key=key,
                )
            )

    def _leave(self, task: InferenceTask, result: InferenceResult) -> None:
        key = result_key(task.output_prefix)
        self._log.info(f"Uploading the result to {key!r} in {task.output_bucket_name}")
        put_signed(
            self._store, task.output_bucket_name, key, result.to_json(), self._settings.signing_key
        )

    def _transfers(self) -> Transfers:
        from shim.s3.transfer import Transfers

        return Transfers(
            self._store,
            concurrency=self._settings.async_concurrency,
            cancelled=lambda: self._stop.requested,
        )


def put_signed(store: Store, bucket: str, key: str, body: bytes, signing_key: bytes) -> None:
    """Put a result with its signature as metadata, retried harder than anything else."""
    metadata = {SIGNATURE_METADATA: sign(body, signing_key)}
    store.put(bucket, key, body, metadata=metadata, persistent=True)


def _build_result(
    task: InferenceTask, outcome: Outcome, outputs: tuple[InferenceIO, ...]
) -> InferenceResult:
    return InferenceResult(
        pk=task.pk,
        return_code=outcome.return_code,
        user_safe_error_message=outcome.user_safe_error_message,
        user_process_last_stderr_lines=outcome.last_stderr_lines,
        exec_duration=outcome.exec_duration,
        invoke_duration=outcome.invoke_duration,
        outputs=outputs,
    )
