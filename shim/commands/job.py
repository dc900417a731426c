"""The parts of a process put together: settings, log, store, API method, runner."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial

from shim.contract.command import child_environment
from shim.contract.errors import InvalidSettings, UserSafeError
from shim.contract.settings import RESULT_VARIABLES, VARIABLES, Settings
from shim.contract.tasks import RuntimeSetupResult
from shim.files.exposure import find_exposure, never_exposed
from shim.files.workspace import Workspace
from shim.frozen import carried_bundle, load_everything
from shim.http.errors import RemoteError
from shim.log.log import Log, Style
from shim.process.stopping import Stop
from shim.process.users import User, image_user, is_ourselves
from shim.runner.modes import ExecMode, Mode
from shim.runner.runtime import Runtime, leave_setup_result
from shim.runner.task import Runner
from shim.runner.user_command import UserCommand

TYPE_CHECKING = False  # s3.store: 5 ms
if TYPE_CHECKING:
    from shim.s3.store import Store

EXPOSED_KEY_MESSAGE = (
    "The signing key cannot be kept from a command that runs under the uid of this program: start "
    "the container as root, and name another user in GRAND_CHALLENGE_COMPONENT_USER"
)
SETTINGS_MESSAGE = "The settings of the platform are not valid"


class Job:
    """The parts of one process, put together once the environment is known to be valid."""

    def __init__(
        self,
        *,
        environ: Mapping[str, str],
        stop: Stop,
        title: str,
        settings: Settings | None = None,
        store: Store | None = None,
        style: Style = "json",
    ) -> None:
        settings = self.settings = settings or read_settings(environ, stop)
        log = self.log = Log(level=settings.log_level, style=style)
        self._environ, self._stop = environ, stop
        self._store, self._connecting = store, threading.Lock()
        # Nothing but log lines may reach the standard streams.
        for module, hook in ((threading, "excepthook"), (sys, "unraisablehook")):
            setattr(module, hook, self._log_unhandled)
        limit = settings.max_memory_mb
        log.info(f"Setting memory limit to {limit} MB" if limit else "Not setting a memory limit")
        log.info(title)
        for warning in settings.warnings:
            log.warning(warning)
        # With a store of our own there is nobody whom a signature has to convince.
        if store is None and settings.signing_key and is_ourselves(settings.user):
            log.warning(EXPOSED_KEY_MESSAGE)
        if settings.names_objects:
            self.connect()
        build_mode: Callable[..., Mode] = ExecMode
        if settings.api_method == "invoke":
            from shim.runner.invoke_mode import InvokeMode as build_mode  # 20 ms
        # What a store reads to be connected, the user's code could write.
        command = UserCommand(
            settings=settings, environ=environ, log=log, stop=stop, before_start=self.connect
        )
        mode = build_mode(
            command=command, settings=settings, log=log, stop=stop, clock=time.monotonic
        )
        workspace = Workspace(
            input_path=settings.input_path,
            output_path=settings.output_path,
            linked_input_parent=settings.linked_input_parent if settings.use_linked_input else None,
            log=log,
        )
        self.runner = Runner(
            settings=settings,
            connect=self.connect,
            mode=mode,
            workspace=workspace,
            log=log,
            stop=stop,
            keep_outputs_on_failure=store is not None,  # of somebody who can look at them
        )
        self._runtime = Runtime(
            settings=settings, connect=self.connect, mode=mode, log=log, stop=stop
        )

    def _log_unhandled(self, failure: threading.ExceptHookArgs | sys.UnraisableHookArgs) -> None:
        error = failure.exc_value or failure.exc_type()
        self.log.exception("An exception was not handled", error)

    def connect(self) -> Store:
        """Return the store, connected by whoever needs it first."""
        with self._connecting:
            self._store = self._store or connect_store(
                self.settings, self._environ, self.log, self._stop
            )
            return self._store

    def prepare(self) -> None:
        """Do what the first answer to /ping need not wait for."""
        load_everything()
        self.connect()

    @contextmanager
    def ready(self) -> Iterator[bool]:
        """Make ready for tasks, say whether that succeeded, and clean up at the end."""
        try:
            yield self._runtime.setup()
        finally:
            self._runtime.teardown()


def read_settings(environ: Mapping[str, str], stop: Stop) -> Settings:
    """Read the environment; what is wrong with it is also left as the result of the set-up."""
    try:
        return Settings.from_environ(environ)
    except InvalidSettings:
        with suppress(InvalidSettings, RemoteError):
            _leave_refusal(environ, stop)
        raise


def _leave_refusal(environ: Mapping[str, str], stop: Stop) -> None:
    """Leave a result with the variables that this takes, if they are valid by themselves."""
    needed = {name: environ[name] for name in RESULT_VARIABLES if name in environ}
    # Whatever it is: who the command runs as decides which files count.
    user = environ.get(VARIABLES["user"].name, "")
    settings = replace(Settings.from_environ(needed), user=user)
    if settings.runtime_output_bucket_name is not None:
        log = Log(level=settings.log_level)
        result = RuntimeSetupResult(return_code=1, user_safe_error_message=SETTINGS_MESSAGE)
        connect = partial(connect_store, settings, environ, log, stop)
        leave_setup_result(settings, connect, result, log)


def connect_store(settings: Settings, environ: Mapping[str, str], log: Log, stop: Stop) -> Store:
    """Return the object storage that the environment names."""
    from shim.process.process import run_helper  # 12 ms
    from shim.s3.client import connect  # 36 ms, of which ssl is half

    user: User | None = None  # as whom the command runs; None when nobody knows
    with suppress(UserSafeError):
        # Without root, it is ourselves.
        user = image_user(settings) if os.geteuid() == 0 else User()

    def run_as_command(argv: list[str], timeout_seconds: float) -> bytes:
        if user is None:
            raise OSError("the image's user, as whom it would run, is not known")
        env = child_environment(environ, home=user.home)
        return run_helper(argv, env, timedelta(seconds=timeout_seconds), user=user)

    has_our_rights = user is not None and user.uid in (None, os.geteuid())
    return connect(
        environ,
        concurrency=settings.async_concurrency,
        max_connections=settings.boto_max_pool_connections,
        log=lambda level, message: log.lines([message], level=level, internal=True, task=None),
        run_helper=run_as_command,
        check=stop.check,
        carried_bundle=carried_bundle(),
        exposure=never_exposed if has_our_rights else find_exposure,
    )
