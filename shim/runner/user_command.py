"""The image's command: started, its output relayed, and ended with all that it left behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shim.contract.command import child_environment, resolve_argv
from shim.contract.errors import UserSafeError
from shim.contract.settings import Settings
from shim.log.log import Log
from shim.process.stopping import Stop
from shim.process.users import image_user

TYPE_CHECKING = False  # process: 12 ms
if TYPE_CHECKING:
    from shim.log.relay import Relay
    from shim.process.launch import ProcessSpec
    from shim.process.process import Process

SHOWN_PIDS = 10
SURVIVORS_MESSAGE = "Processes of the task could not be ended"


def resolve_spec(settings: Settings, environ: Mapping[str, str]) -> ProcessSpec:
    """Say how the image's command is started: argv, user, environment and limits.

    Raises UserSafeError when the image has no command or its USER cannot be resolved.
    """
    from shim.process.launch import ProcessSpec  # 10 ms

    argv = resolve_argv(entrypoint=settings.entrypoint, cmd=settings.cmd)
    user = image_user(settings)
    return ProcessSpec(
        argv=argv,
        env=child_environment(environ, home=user.home),
        user=user,
        memory_limit_bytes=settings.max_memory_mb * 1024 * 1024 or None,
        no_new_privileges=settings.no_new_privileges,
    )


class UserCommand:
    """Starts the command as the settings say, as often as it is asked to."""

    def __init__(
        self,
        *,
        settings: Settings,
        environ: Mapping[str, str],
        log: Log,
        stop: Stop,
        before_start: Callable[[], object],
    ) -> None:
        """before_start(): what must be done before any of the user's code has run."""
        self._settings, self._environ, self._log, self._stop = settings, environ, log, stop
        self._before_start = before_start

    def find(self) -> None:
        """Raise UserSafeError where the image has no command."""
        resolve_argv(entrypoint=self._settings.entrypoint, cmd=self._settings.cmd)

    def start(self, task: str | None) -> tuple[Process, Relay]:
        """Start the command and relay what it writes."""
        from shim.log.relay import Relay  # 1 ms
        from shim.process.process import NO_ROOM_MESSAGE, start  # 12 ms

        spec = resolve_spec(self._settings, self._environ)
        self._before_start()
        self._log.info(f"Running {list(spec.argv)}")
        relay = Relay(self._log, task=task)
        try:
            process = start(spec)
        except UserSafeError as error:
            for note in getattr(error, "__notes__", ()):
                self._log.error(note, internal=False, task=task)
            raise
        self._stop.signal_command = process.send_signal
        for warning in process.warnings:
            self._log.warning(warning)
        relay.attach(process.stdout_fd, source="stdout")
        relay.attach(process.stderr_fd, source="stderr")
        try:
            relay.start()
        except RuntimeError as error:  # no room for another thread
            self.end(process, relay)
            raise UserSafeError(NO_ROOM_MESSAGE) from error
        return process, relay

    def end(self, process: Process, relay: Relay) -> bool:
        """End the command with everything that it started, and write all that it wrote.

        Returns whether nobody is left.
        """
        self._stop.signal_command = None
        leftovers = process.end(grace=self._settings.sigterm_grace)
        relay.finish()
        if leftovers.ended:
            self._log.info(f"Ended {leftovers.ended} processes that the command left behind")
        if not leftovers.is_over:
            shown = ", ".join(map(str, leftovers.alive[:SHOWN_PIDS])) or "unknown"
            self._log.error(
                f"{SURVIVORS_MESSAGE}: at least {len(leftovers.alive)}, with the pids {shown}"
            )
        return leftovers.is_over
