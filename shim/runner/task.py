"""Run one task: reset, download, run, upload, clean, sign.

    reset /input and /output -> download -> mode.run -> upload (only when it returned 0)
        -> clean -> {output_prefix}.sagemaker_shim/inference_result.json

Rule 1: a task that began leaves a signed result, whatever happens to it.
Rule 2: its author reads sentences; what happened inside goes to internal lines.
Rule 3: tasks run one at a time, in order; the first that fails ends the list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from shim.contract.errors import ShimError, TaskStopped, UserSafeError
from shim.contract.settings import Settings
from shim.contract.tasks import InferenceIO, InferenceResult, InferenceTask, result_key
from shim.files.workspace import Workspace
from shim.http.errors import RemoteError
from shim.log.log import Log
from shim.process.stopping import STOPPED_MESSAGE, Stop
from shim.process.users import image_user
from shim.runner.modes import Mode, Outcome
from shim.runner.results import UNEXPECTED_MESSAGE, build_result, put_signed
from shim.s3.errors import FileChanged

TYPE_CHECKING = False  # s3.store: 5 ms
if TYPE_CHECKING:
    from shim.s3.store import Store
    from shim.s3.transfer import Transfers

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
        connect: Callable[[], Store],
        mode: Mode,
        workspace: Workspace,
        log: Log,
        stop: Stop,
        keep_outputs_on_failure: bool = False,
    ) -> None:
        """keep_outputs_on_failure: leave in place what could not be uploaded."""
        self._settings = settings
        self._connect = connect
        self._mode = mode
        self._workspace = workspace
        self._log = log
        self._stop = stop
        self._keep_outputs_on_failure = keep_outputs_on_failure
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
        keep_outputs = False
        try:
            self._prepare(task)
            outcome = self._mode.run(task)
            if outcome.stopped:
                raise TaskStopped(STOPPED_MESSAGE)
            if outcome.return_code == 0:
                outputs = self._upload_outputs(task)
        except Exception as error:
            failure = error
            # It had succeeded, so that only the upload can have failed.
            keep_outputs = self._keep_outputs_on_failure and outcome.return_code == 0
            outcome = replace(outcome, return_code=1, user_safe_error_message=self._explain(error))
            self._log.error(outcome.user_safe_error_message, internal=False, task=task.pk)
        is_clean = self._clean(task, keep_outputs=keep_outputs)
        self._is_healthy = self._is_healthy and is_clean and outcome.is_healthy
        result = build_result(task, outcome, outputs)
        self._leave(task, result)
        self._log.info(f"Task {task.pk} complete, return code {result.return_code}")
        if failure is None or isinstance(failure, UserSafeError):
            return result
        if isinstance(failure, TaskStopped | PlatformFailure):
            raise failure
        raise PlatformFailure(UNEXPECTED_MESSAGE) from failure

    def _clean(self, task: InferenceTask, *, keep_outputs: bool) -> bool:
        if keep_outputs:
            place = self._settings.output_path
            self._warn_author(task, f"What the command wrote is left in {place}")
        return self._workspace.clean(keep_outputs=keep_outputs)

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
        except FileChanged as error:
            raise UserSafeError(str(error)) from error
        except (RemoteError, OSError) as error:
            raise PlatformFailure(message) from error
        self._stop.check()

    def _download_inputs(self, task: InferenceTask) -> None:
        from shim.runner.inputs import Inputs  # 18 ms, with archives

        inputs = Inputs(task, store=self._connect(), workspace=self._workspace, log=self._log)
        if not inputs.bring(self._transfers()):
            self._warn_author(task, "The task has no inputs")

    def _upload_outputs(self, task: InferenceTask) -> tuple[InferenceIO, ...]:
        from shim.runner.uploads import Uploads  # 8 ms

        user = image_user(self._settings)
        outputs = self._workspace.outputs(user, prefix=task.output_prefix)
        uploads = Uploads(task, outputs, log=self._log)
        self._guard(UPLOAD_MESSAGE, lambda: self._transfers().upload_all(uploads))
        if not uploads.uploaded:
            self._warn_author(task, "The command succeeded and wrote no output")
        return tuple(uploads.uploaded[path] for path in sorted(uploads.uploaded))

    def _warn_author(self, task: InferenceTask, message: str) -> None:
        self._log.warning(message, internal=False, task=task.pk)

    def _leave(self, task: InferenceTask, result: InferenceResult) -> None:
        key = result_key(task.output_prefix)
        self._log.info(f"Uploading the result to {key!r} in {task.output_bucket_name}")
        put_signed(
            self._connect(),
            task.output_bucket_name,
            key,
            result.to_json(),
            self._settings.signing_key,
        )

    def _transfers(self) -> Transfers:
        from shim.s3.transfer import Transfers  # 9 ms

        return Transfers(
            self._connect(),
            concurrency=self._settings.async_concurrency,
            check=self._stop.check,
        )
