"""What tasks and the set-up leave behind: a sentence that both use, and the signed documents."""

from __future__ import annotations

from shim.contract.tasks import (
    SIGNATURE_METADATA,
    InferenceIO,
    InferenceResult,
    InferenceTask,
    sign,
)
from shim.runner.modes import Outcome

TYPE_CHECKING = False  # s3.store: 5 ms
if TYPE_CHECKING:
    from shim.s3.store import Store

UNEXPECTED_MESSAGE = "An unexpected error occurred"


def put_signed(store: Store, bucket: str, key: str, body: bytes, signing_key: bytes) -> None:
    """Put a result with its signature as metadata, retried harder than anything else."""
    metadata = {SIGNATURE_METADATA: sign(body, signing_key)}
    store.put(bucket, key, body, metadata=metadata, persistent=True)


def build_result(
    task: InferenceTask, outcome: Outcome, outputs: tuple[InferenceIO, ...]
) -> InferenceResult:
    """Return the result of a task that began."""
    return InferenceResult(
        pk=task.pk,
        return_code=outcome.return_code,
        user_safe_error_message=outcome.user_safe_error_message,
        user_process_last_stderr_lines=outcome.last_stderr_lines,
        exec_duration=outcome.exec_duration,
        invoke_duration=outcome.invoke_duration,
        outputs=outputs,
    )
