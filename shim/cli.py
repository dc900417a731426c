"""The command line: arguments and environment in, exit code out.

The only module that reads os.environ and sys.argv, installs signal handlers and decides what the
process exits with.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from shim import __version__
from shim.aws.errors import ProfileInvalid
from shim.commands import check, invoke, run, serve
from shim.contract.errors import InvalidSettings, TaskStopped, UsageError
from shim.contract.settings import PREFIX
from shim.frozen import describe, take_environment
from shim.http.errors import RemoteError, SettingInvalid
from shim.log.log import Log, Style
from shim.process.privacy import overwrite_environment
from shim.process.stopping import Stop
from shim.runner.task import PlatformFailure

TYPE_CHECKING = False  # typing: 3 ms
if TYPE_CHECKING:
    from typing import NoReturn

PROGRAM = "sagemaker-shim"
HELP_COLUMNS = 98
# What is done before there is a job.
LATE = {
    "patch": "put this program into an image",
    "unpatch": "make an image what it was before",
    "verify": "say whether an image is patched with this program",
}
# What a user could mean for the command.
_REAL_TIME = range(signal.SIGRTMIN, signal.SIGRTMAX + 1)
COMMAND_SIGNALS = {signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, *_REAL_TIME}
# What would end us. The kernel's answers to mistakes of ours, such as SEGV, end us all the same: of
# those it heeds no mask. Of PIPE and XFSZ a failed write tells.
_ENDING = "TERM INT HUP QUIT ABRT ALRM VTALRM PROF IO PWR STKFLT XCPU SEGV BUS FPE ILL TRAP SYS"
STOP_SIGNALS = {signal.Signals[f"SIG{name}"] for name in _ENDING.split()}
# Whatever started us may have these ignored, as shells do for what they put in the background.
NEVER_IGNORED = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}
# Whose lines are read by people, where they go to a terminal.
INTERACTIVE_COMMANDS = ("run", "check")
# SageMaker shows the first characters of this file as the reason of a failed job.
FAILURE_FILE = Path("/opt/ml/output/failure")
FAILURE_CHARACTERS = 1024
# Nothing has been started for them.
WRONG_USAGE = (UsageError, InvalidSettings, SettingInvalid, ProfileInvalid)
NO_THREADS_MESSAGE = (
    "No thread can be started: the limit on processes (pids) is reached, or the container engine "
    "is too old for the C library of this program (Docker before 20.10.10 refuses clone3)"
)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of leaving the process."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Refuse what is not known with the usage of the command that it was meant for."""
        words = sys.argv[1:] if args is None else list(args)
        self._refuse_unknown_option(words)
        arguments, others = super().parse_known_args(words, namespace)
        if others:
            self.error(f"unrecognized arguments: {' '.join(others)}")
        return arguments, others

    def _refuse_unknown_option(self, words: Sequence[str]) -> None:
        """Name the cause before argparse names what is missing for it."""
        takes_command = bool(self._get_positional_actions())
        rest, is_command = iter(words), False
        for word in rest:
            if word == "--" or (not word.startswith("-") and self._subparsers):
                return
            if word == "-" or not word.startswith("-"):
                is_command = takes_command
                continue
            name = word.partition("=")[0] if word.startswith("--") else word[:2]
            action = self._option_string_actions.get(name)
            if action is None:
                advice = ": put -- before the command" if is_command else ""
                self.error(f"unrecognized arguments: {name}{advice}")
            if action.nargs is None and name == word:
                next(rest, None)  # its value

    def _get_formatter(self) -> argparse.HelpFormatter:
        # Without a width it asks shutil for that of the terminal, which loads all compressors.
        return argparse.HelpFormatter(prog=self.prog, width=HELP_COLUMNS)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n{' '.join(self.format_usage().split())}")


class ShowVersion(argparse.Action):
    """Print the versions of the program and of its parts, and leave."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"{PROGRAM} {__version__} ({describe()})")
        parser.exit()


def build_parser(verb: str = "") -> Parser:
    """Return the parser of the whole command line; verb: whose options are to be known.

    Of those in LATE nothing is imported before they are called for.
    """
    parser = Parser(
        prog=PROGRAM, description="Run a Grand Challenge algorithm on Amazon SageMaker, unchanged."
    )
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="say what this is and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for module in (serve, invoke, run, check):
        command = commands.add_parser(module.__name__.rpartition(".")[2], help=module.HELP)
        module.add_options(command)
        command.set_defaults(run=module.run, refuse=command.error)
    for name, text in LATE.items():
        command = commands.add_parser(name, help=text)
        if name == verb:
            from shim.commands.patch import add_options  # 70 ms, with shim.oci

            add_options(name, command)
        command.set_defaults(refuse=command.error)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    occupy_standard_streams()
    stop = Stop()
    arguments = argparse.Namespace(command="", log_format=None)
    environ: dict[str, str] = {}
    try:
        environ = take_environment(os.environ)
        overwrite_environment()
        words = sys.argv[1:] if argv is None else argv
        build_parser(*words[:1]).parse_args(words, arguments)
        is_read = arguments.command in INTERACTIVE_COMMANDS
        arguments.style, arguments.take_signals = style_of(arguments, is_read=is_read), take_signals
        if arguments.run is not run.run:  # it enters namespaces, before there are threads
            take_signals(stop)
        return run_command(arguments, environ, stop)
    except SystemExit as done:  # of --help and --version
        return int(done.code or 0)
    except Exception as error:
        write_failure(str(error) or type(error).__name__)
        is_read = arguments.command in INTERACTIVE_COMMANDS
        if isinstance(error, WRONG_USAGE):  # on the platform nobody reads it from a terminal
            is_read = not any(name.startswith(PREFIX) for name in environ)
        return exit_code(error, stop, Log(style=style_of(arguments, is_read=is_read)))


def run_command(arguments: argparse.Namespace, environ: Mapping[str, str], stop: Stop) -> int:
    """Run the command that was chosen; UsageError shows how it is called."""
    try:
        code: int = arguments.run(arguments, environ, stop)
    except UsageError as error:
        arguments.refuse(str(error))
    return code


def take_signals(stop: Stop) -> None:
    """Have each signal stop the task or reach the command, from a thread that waits for them.

    They stay blocked everywhere: no handler is late because the main thread waits for something
    else, and none is missing when the interpreter ends.
    """
    signals = {
        signum
        for signum in STOP_SIGNALS | COMMAND_SIGNALS
        # By nohup HUP is ignored.
        if signum in NEVER_IGNORED or signal.getsignal(signum) != signal.SIG_IGN
    }

    def wait() -> None:
        while True:
            signum = signal.sigwait(signals)
            if signum in STOP_SIGNALS:
                stop.request(signum)
            elif signal_command := stop.signal_command:
                signal_command(signum)

    signal.pthread_sigmask(signal.SIG_SETMASK, signals)
    # Inherited as ignored, it would take the return codes of children from us.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        threading.Thread(target=wait, name="signals", daemon=True).start()
    except RuntimeError as error:
        Log().error(NO_THREADS_MESSAGE)
        raise PlatformFailure(NO_THREADS_MESSAGE) from error


def leave(code: int) -> NoReturn:
    """End the process at once: nothing is left that the interpreter's own end would wait for."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # none, full, closed
            stream.flush()
    os._exit(code)


def occupy_standard_streams() -> None:
    """Keep the numbers of standard streams that are closed from whatever is opened next."""
    while (placeholder := os.open("/", os.O_PATH)) <= 2:
        pass
    os.close(placeholder)


def style_of(arguments: argparse.Namespace, *, is_read: bool) -> Style:
    """Return the form of the log lines; is_read: by people, where they go to a terminal."""
    style: Style | None = arguments.log_format
    is_terminal = bool(sys.stdout and sys.stdout.isatty())
    return style or ("text" if is_read and is_terminal else "json")


def exit_code(error: Exception, stop: Stop, log: Log) -> int:
    """Say what happened on stderr and return the exit code that stands for it."""
    if isinstance(error, WRONG_USAGE):
        if log.is_text:
            # Not by sys.stderr: a stream that is full or closed changes no exit code.
            log.write("stderr", f"{PROGRAM}: {error}\n".encode(errors="backslashreplace"))
        else:
            log.error(str(error))
        return 2
    if isinstance(error, TaskStopped):
        return 128 + (stop.signum or 0)
    if isinstance(error, RemoteError):
        log.error(str(error))
    elif not isinstance(error, PlatformFailure):  # which has been logged where it happened
        log.exception("Stopping due to an unexpected error", error)
    return 1


def write_failure(reason: str, path: Path = FAILURE_FILE) -> None:
    """Leave the reason of a failed job where SageMaker looks for it, if that place exists."""
    with suppress(OSError):
        # The user's command may have put something else under this name.
        path.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(path, flags, 0o644), "wb") as file:
            file.write(reason[:FAILURE_CHARACTERS].encode(errors="backslashreplace"))
