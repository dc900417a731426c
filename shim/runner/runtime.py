"""Make ready for the first task, and clean up after the last.

writable directories -> model and ground truth -> mode.setup -> runtime_setup_result.json
... tasks ...
mode.teardown -> post-clean directories
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from shim.contract.errors import ShimError, TaskStopped, UserSafeError
from shim.contract.settings import Settings
from shim.contract.tasks import RuntimeSetupResult, runtime_setup_key
from shim.contract.uri import S3Location
from shim.files.descriptors import closing_descriptor, open_directory
from shim.files.emptying import clean_directory
from shim.files.workspace import ensure_writable_directories
from shim.http.errors import RemoteError
from shim.log.log import Log
from shim.process.stopping import STOPPED_MESSAGE, Stop
from shim.process.users import image_user
from shim.runner.modes import Mode
from shim.runner.results import UNEXPECTED_MESSAGE, put_signed

TYPE_CHECKING = False  # s3.store: 5 ms
if TYPE_CHECKING:
    from shim.s3.store import Store


class _OtherFailed(ShimError):
    """Another archive could not be unpacked: its error is the one to raise."""


class Runtime:
    """What surrounds the tasks of one process."""

    def __init__(
        self, *, settings: Settings, connect: Callable[[], Store], mode: Mode, log: Log, stop: Stop
    ) -> None:
        self._settings = settings
        self._connect = connect
        self._mode = mode
        self._log = log
        self._stop = stop

    def setup(self) -> bool:
        """Make ready and leave the runtime set-up result; return whether tasks may run.

        False means a failure that has been handled: its result and its line tell the author. What
        else goes wrong is raised when a result with a general sentence has been left.
        """
        self._log.info("Setting up the runtime")
        try:
            self._setup()
        except UserSafeError as error:
            self._log.error(str(error), internal=False)
            self._leave(RuntimeSetupResult(return_code=1, user_safe_error_message=str(error)))
            return False
        except Exception as error:
            stopped = isinstance(error, TaskStopped)
            message = STOPPED_MESSAGE if stopped else UNEXPECTED_MESSAGE
            self._leave(RuntimeSetupResult(return_code=1, user_safe_error_message=message))
            raise
        self._leave(RuntimeSetupResult(return_code=0))
        return True

    def teardown(self) -> None:
        """End the mode and empty the post-clean directories; never raises."""
        self._log.info("Cleaning up the runtime")
        self._mode.teardown()
        for directory in self._settings.post_clean_directories:
            self._log.info(f"Cleaning {directory}")
            clean_directory(directory, self._log)

    def _setup(self) -> None:
        settings = self._settings
        ensure_writable_directories(settings.writable_directories, self._log)
        self._unpack_all(
            ("model", settings.model, settings.model_dest),
            ("ground truth", settings.ground_truth, settings.ground_truth_dest),
        )
        self._stop.check()
        self._mode.setup()

    def _unpack_all(self, *archives: tuple[str, S3Location | None, Path]) -> None:
        """Unpack what is named, all at once; of several errors, raise that of the first one.

        One whose directory lies in that of another waits for it: what comes later stays.
        """
        named = [(name, source, path) for name, source, path in archives if source is not None]
        failures: dict[str, BaseException] = {}

        def check() -> None:
            self._stop.check()
            if failures:
                raise _OtherFailed

        def unpack(name: str, source: S3Location, destination: Path) -> None:
            try:
                check()
                self._unpack(name, source, destination, check)
            except BaseException as error:  # noqa: B036 - is raised below
                failures[name] = error

        threads = [threading.Thread(target=unpack, args=archive) for archive in named]
        paths = [os.path.realpath(path) for *_, path in named]
        are_apart = len(named) > 1 and os.path.commonpath(paths) not in paths
        for thread, archive in zip(threads, named, strict=True):
            if not (are_apart and _start(thread)):
                unpack(*archive)
        for thread in threads:
            if thread.ident:
                thread.join()
        for error in (failures[name] for name, *_ in named if name in failures):
            if not isinstance(error, _OtherFailed):
                raise error

    def _unpack(
        self, name: str, source: S3Location, destination: Path, check: Callable[[], None]
    ) -> None:
        """Stream a tar from the bucket into a directory that the user's command owns."""
        from shim.files.archives import extract_tar  # 6 ms

        self._log.info(f"Unpacking the {name} from {source} to {destination}")
        settings = self._settings
        try:
            user = image_user(settings)
            with (
                closing_descriptor(open_directory(destination, mode=0o755, follow=True)) as there,
                self._connect().open(source.bucket, source.key) as stream,
            ):
                extract_tar(stream, there, user=user, warn=self._warn_author, check=check)
        except UserSafeError as error:
            self._log.error(f"Could not unpack the {name}: {error.__cause__ or error}")
            raise UserSafeError(f"Could not set up {name}: {error}") from error
        except RemoteError as error:
            self._log.error(f"Could not read the {name}: {error}")
            raise UserSafeError(
                f"Could not set up {name}: Tarfile could not be downloaded"
            ) from error
        except OSError as error:  # a link of the user's in a container that was started again, ...
            raise UserSafeError(
                f"Could not set up {name}: {destination} cannot be used: {error.strerror}"
            ) from error

    def _warn_author(self, message: str) -> None:
        self._log.warning(message, internal=False)

    def _leave(self, result: RuntimeSetupResult) -> None:
        leave_setup_result(self._settings, self._connect, result, self._log)


def _start(thread: threading.Thread) -> bool:
    try:
        thread.start()
    except RuntimeError:  # the system gives no more threads
        return False
    return True


def leave_setup_result(
    settings: Settings, connect: Callable[[], Store], result: RuntimeSetupResult, log: Log
) -> None:
    """Put the signed runtime set-up result where the platform looks for it, if it named a place."""
    bucket, prefix = settings.runtime_output_bucket_name, settings.runtime_output_prefix
    if bucket is None or prefix is None:
        log.info("No place is set for the runtime setup result: it is skipped")
        return
    key = runtime_setup_key(prefix)
    log.info(f"Uploading the runtime setup result to {key!r} in {bucket}")
    put_signed(connect(), bucket, key, result.to_json(), settings.signing_key)
