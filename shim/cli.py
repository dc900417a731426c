"""The command line: arguments and environment in, exit code out.

The only module that reads os.environ and sys.argv, installs signal handlers and decides what the
process exits with.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from shim import __version__
from shim.aws.errors import ProfileInvalid
from shim.contract.command import child_environment
from shim.contract.durations import format_duration
from shim.contract.errors import (
    InvalidFields,
    InvalidSettings,
    TaskStopped,
    UsageError,
    UserSafeError,
)
from shim.contract.settings import PREFIX, RESULT_VARIABLES, VARIABLES, Settings
from shim.contract.tasks import (
    InferenceTask,
    RuntimeSetupResult,
    parse_task_files,
    parse_tasks,
    result_key,
)
from shim.contract.uri import parse_s3_uri
from shim.files.exposure import find_exposure, never_exposed
from shim.files.locks import exclusive
from shim.files.workspace import Workspace
from shim.frozen import carried_bundle, describe, settle, take_environment
from shim.http.errors import RemoteError, SettingInvalid
from shim.log.log import Log
from shim.process.privacy import overwrite_environment
from shim.process.stopping import Stop
from shim.process.users import User, image_user, is_ourselves
from shim.runner.modes import ExecMode
from shim.runner.runtime import Runtime, leave_setup_result
from shim.runner.task import PlatformFailure, Runner
from shim.s3.store import LateStore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from io import FileIO
    from typing import NoReturn, Protocol

    from shim.log.log import Style
    from shim.runner.invoke_mode import InvokeMode
    from shim.s3.store import Store

    class HasFileno(Protocol):
        def fileno(self) -> int: ...


PROGRAM = "sagemaker-shim"
HELP_COLUMNS = 98
# What a user could mean for the command.
COMMAND_SIGNALS = {
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
}
# What would end us, but for the kernel's answers to mistakes of ours.
STOP_SIGNALS = {
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGABRT,
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGIO,
    signal.SIGPIPE,
    signal.SIGPWR,
    signal.SIGSTKFLT,
    signal.SIGXCPU,
    signal.SIGXFSZ,
}
# Whatever started us may have these ignored, as shells do for what they put in the background.
NEVER_IGNORED = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}
LOG_FORMATS = ("json", "text")
# Whose lines are read by people, where they go to a terminal.
INTERACTIVE_COMMANDS = ("run", "check")
SERVE_HOST = "0.0.0.0"
SERVE_PORT = 8080
# SageMaker shows the first characters of this file as the reason of a failed job.
FAILURE_FILE = Path("/opt/ml/output/failure")
FAILURE_CHARACTERS = 1024
# A list of 100,000 inputs has about 20 MB; Python needs some ten times that to hold it.
TASKS_LIMIT_BYTES = 256 * 1024 * 1024
PIECE_BYTES = 1024 * 1024
# Endpoints are killed 30 s after SIGTERM; a task in hand needs part of that to leave its result.
LEAVE_SECONDS = 12.0
ANSWER_SECONDS = 2.0
# After the start, for the first answers to /ping to be quick; a task does not wait for it.
QUIET_SECONDS = 1.0
# Nothing has been started for them.
WRONG_USAGE = (UsageError, InvalidSettings, SettingInvalid, ProfileInvalid)
NO_THREADS_MESSAGE = (
    "No thread can be started: the limit on processes (pids) is reached, or the container engine "
    "is too old for the C library of this program (Docker before 20.10.10 refuses clone3)"
)
EXPOSED_KEY_MESSAGE = (
    "The signing key cannot be kept from a command that runs under the uid of this program: start "
    "the container as root, and name another user in GRAND_CHALLENGE_COMPONENT_USER"
)
SETTINGS_MESSAGE = "The settings of the platform are not valid"


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


def parse_port(text: str) -> int:
    """Return the number of a TCP port."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 65535, found {text!r}")
    return int(text)


def build_parser() -> Parser:
    """Return the parser of the whole command line."""
    parser = Parser(
        prog=PROGRAM, description="Run a Grand Challenge algorithm on Amazon SageMaker, unchanged."
    )
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="say what this is and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="answer SageMaker on port 8080")
    serve.set_defaults(run=run_serve)
    serve.add_argument("--port", type=parse_port, default=SERVE_PORT, help=f"default: {SERVE_PORT}")
    serve.add_argument("--log-format", choices=LOG_FORMATS, help="default: json lines")

    invoke = commands.add_parser("invoke", help="run a list of tasks as a batch")
    invoke.set_defaults(run=run_invoke)
    _add_task_list(invoke)
    invoke.add_argument("--log-format", choices=LOG_FORMATS, help="default: json lines")

    run = commands.add_parser("run", help="run one task on local directories, without AWS")
    run.set_defaults(run=run_locally)
    run.add_argument("--input", type=Path, required=True, metavar="DIR", help="the task's inputs")
    run.add_argument("--output", type=Path, required=True, metavar="DIR", help="for its outputs")
    run.add_argument("--timeout", metavar="T", help="time limit: seconds, PT1H30M or 01:30:00")
    run.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        help="json lines as on the platform, or text (default: text on a terminal)",
    )
    run.add_argument(
        "cmd", nargs="*", metavar="CMD", help="the command, after --; default: the image's"
    )

    check = commands.add_parser("check", help="say what would go wrong, before it does")
    check.set_defaults(run=run_check)
    _add_task_list(check)
    check.add_argument(
        "--read-only",
        action="store_true",
        help="do not try to write, and remove again, a small object where outputs go",
    )
    check.add_argument("--log-format", choices=LOG_FORMATS, help="as in run")
    check.add_argument("cmd", nargs="*", metavar="CMD", help="as in run")
    for command in (serve, invoke, run, check):
        command.set_defaults(refuse=command.error)
    return parser


def _add_task_list(command: argparse.ArgumentParser) -> None:
    command.add_argument("-t", "--tasks", metavar="JSON", help="the list of tasks itself")
    command.add_argument(
        "-f",
        "--file",
        metavar="URI",
        help="where the list is: s3://BUCKET/KEY, s3://BUCKET/PREFIX/ (every *.json below it), "
        "a local path, or - for standard input",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    occupy_standard_streams()
    stop = Stop()
    arguments = argparse.Namespace()
    environ: dict[str, str] = {}
    try:
        environ = take_environment(os.environ)
        overwrite_environment()
        build_parser().parse_args(argv, arguments)
        if arguments.run is not run_locally:  # it enters namespaces, before there are threads
            take_signals(stop)
        return run_command(arguments, environ, stop)
    except SystemExit as done:  # of --help and --version
        return int(done.code or 0)
    except Exception as error:
        write_failure(str(error) or type(error).__name__)
        is_usage = isinstance(error, WRONG_USAGE)
        style = usage_style(arguments, environ) if is_usage else style_of(arguments)
        return exit_code(error, stop, Log(style=style))


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
        # By nohup HUP is ignored, by Python PIPE and XFSZ, which are errors of write(2) for us.
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


def style_of(arguments: argparse.Namespace) -> Style:
    """Return the form of the log lines: on the platform nobody reads them from a terminal."""
    style: Style | None = getattr(arguments, "log_format", None)
    is_read = getattr(arguments, "command", None) in INTERACTIVE_COMMANDS and _is_terminal()
    return style or ("text" if is_read else "json")


def usage_style(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Style:
    """Return the form of wrong usage: for people at a terminal, unless it is a job's."""
    style: Style | None = getattr(arguments, "log_format", None)
    is_job = any(name.startswith(PREFIX) for name in environ)
    return style or ("text" if _is_terminal() and not is_job else "json")


def _is_terminal() -> bool:
    return bool(sys.stdout and sys.stdout.isatty())


def exit_code(error: Exception, stop: Stop, log: Log) -> int:
    """Say what happened on stderr and return the exit code that stands for it."""
    if isinstance(error, WRONG_USAGE):
        if log.is_text:
            # Not by sys.stderr: a stream that is full or closed changes no exit code.
            log.write("stderr", f"{PROGRAM}: {error}\n".encode(errors="backslashreplace"))
        else:
            log.error(str(error))
        return 2
    if isinstance(error, TaskStopped) or (stop.requested and isinstance(error, RemoteError)):
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
        self.settings = settings or read_settings(environ, stop)
        self.log = Log(level=self.settings.log_level, style=style)
        # Nothing but log lines may reach the standard streams.
        for module, hook in ((threading, "excepthook"), (sys, "unraisablehook")):
            setattr(module, hook, self._log_unhandled)
        limit = self.settings.max_memory_mb
        self.log.info(
            f"Setting memory limit to {limit} MB" if limit else "Not setting a memory limit"
        )
        self.log.info(title)
        for warning in self.settings.warnings:
            self.log.warning(warning)
        # With a store of our own there is nobody whom a signature has to convince.
        if store is None and self.settings.signing_key and is_ourselves(self.settings.user):
            self.log.warning(EXPOSED_KEY_MESSAGE)
        self._late = LateStore(lambda: connect_store(self.settings, environ, self.log, stop))
        # It passes on whatever a store is asked for.
        self.store: Store = store or self._late
        if store is None and self.settings.names_objects:
            self._late.connect()
        mode = mode_of(self.settings)(
            settings=self.settings,
            environ=environ,
            log=self.log,
            stop=stop,
            clock=time.monotonic,
            # What a store reads to be connected, the user's code could write.
            before_start=self._late.connect if store is None else lambda: None,
        )
        self.runner = Runner(
            settings=self.settings,
            store=self.store,
            mode=mode,
            workspace=Workspace(
                input_path=self.settings.input_path,
                output_path=self.settings.output_path,
                linked_input_parent=(
                    self.settings.linked_input_parent if self.settings.use_linked_input else None
                ),
                log=self.log,
            ),
            log=self.log,
            stop=stop,
            keep_outputs_on_failure=store is not None,  # of somebody who can look at them
        )
        self._runtime = Runtime(
            settings=self.settings, store=self.store, mode=mode, log=self.log, stop=stop
        )

    def _log_unhandled(self, failure: threading.ExceptHookArgs | sys.UnraisableHookArgs) -> None:
        error = failure.exc_value or failure.exc_type()
        self.log.exception("An exception was not handled", error)

    def complete(self) -> None:
        """Do what the first answer to /ping need not wait for."""
        settle()
        self._late.connect()

    @contextmanager
    def ready(self) -> Iterator[bool]:
        """Make ready for tasks, say whether that succeeded, and clean up at the end."""
        try:
            yield self._runtime.setup()
        finally:
            self._runtime.teardown()
            self.store.close()


def mode_of(settings: Settings) -> type[ExecMode | InvokeMode]:
    """Return the class of the API method that is set."""
    if settings.api_method != "invoke":
        return ExecMode
    from shim.runner.invoke_mode import InvokeMode  # noqa: F811

    return InvokeMode


def run_invoke(arguments: argparse.Namespace, environ: Mapping[str, str], stop: Stop) -> int:
    """Run a list of tasks up to the first that fails."""
    text, file = arguments.tasks, arguments.file
    if not _names_tasks(arguments):
        raise UsageError("One of tasks or file should be set")
    is_remote = bool(file) and _is_remote(file)
    # What can be refused at once is refused before anything is written or contacted.
    tasks = None if is_remote else _parse(_read_local(text, file, stop))
    job = Job(environ=environ, stop=stop, title="Invoking the model", style=style_of(arguments))
    job.complete()
    if tasks is None:
        tasks = _parse(_read_remote(file, job.store, stop))
    with exclusive(job.settings, job.log), job.ready() as is_ready:
        if is_ready and job.runner.run_tasks(tasks):
            job.log.info("Model invocation complete")
    return 0


def run_serve(arguments: argparse.Namespace, environ: Mapping[str, str], stop: Stop) -> int:
    """Answer SageMaker until a signal comes or the container is unhealthy."""
    from shim.serve.protocol import build_server
    from shim.serve.service import Service, resolve_command_uid

    job = Job(
        environ=environ, stop=stop, title="Starting the model server", style=style_of(arguments)
    )
    uid = resolve_command_uid(job.settings.user)
    service = Service(runner=job.runner, log=job.log, command_uid=uid)
    try:
        server = build_server(
            address=(SERVE_HOST, arguments.port), application=service, log=job.log
        )
    except OSError as error:
        job.log.error(f"Cannot listen on port {arguments.port}: {error}")
        raise PlatformFailure(f"port {arguments.port}: {error}") from error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with exclusive(job.settings, job.log), job.ready() as is_ready:
            if is_ready:
                service.open()
                while not wait_readable(stop, service, seconds=QUIET_SECONDS):
                    job.complete()
                    service.notice_death()
                service.close(timeout_seconds=LEAVE_SECONDS)
    except (TaskStopped, RemoteError):
        if not stop.requested:
            raise
        job.log.info("Stopped while setting up")
    finally:
        server.drain(ANSWER_SECONDS)
        server.shutdown()
    job.log.info("Model server stopped")
    return 0


def run_locally(arguments: argparse.Namespace, environ: Mapping[str, str], stop: Stop) -> int:
    """Run one task on local directories as the platform would; 0 when it succeeded."""
    from shim.commands.rehearsal import (
        PATH_VARIABLES,
        Found,
        holds_something,
        plan_rehearsal,
        restoring,
        task_paths,
    )
    from shim.s3.directory import DirectoryStore

    with _scratch(Log(style=style_of(arguments))) as scratch:
        plan = plan_rehearsal(
            Settings.from_environ(environ),
            input_directory=arguments.input,
            output_directory=arguments.output,
            timeout=arguments.timeout,
            cmd=tuple(arguments.cmd),
            scratch=scratch,
        )
        take_signals(stop)
        store = DirectoryStore.from_buckets(plan.buckets)
        refuse_unwritable(store, plan.task, arguments.output)
        job = Job(
            environ={**environ, **plan.variables},
            stop=stop,
            title=f"Running a task from {arguments.input} to {arguments.output}",
            settings=plan.settings,
            store=store,
            style=style_of(arguments),
        )
        if holds_something(arguments.output):
            job.log.warning(f"{arguments.output} is not empty: what it holds stays in it")
        if plan.variables:
            job.log.warning(
                "Without root, the directories of the command are elsewhere: it finds its inputs "
                f"in ${PATH_VARIABLES[0]} and puts its outputs into ${PATH_VARIABLES[1]}"
            )
        found = [Found.look(path) for path in task_paths(plan.settings)]
        with exclusive(job.settings, job.log), restoring(found), job.ready() as is_ready:
            result = job.runner.run_task(plan.task) if is_ready else None
    if result is None:
        return 1
    took = "" if result.exec_duration is None else f" after {format_duration(result.exec_duration)}"
    job.log.info(
        f"Return code {result.return_code}{took}, {len(result.outputs)} outputs in "
        f"{arguments.output}, result in {arguments.output}/{result_key('/')[1:]}"
    )
    return int(result.return_code != 0)


def refuse_unwritable(store: Store, task: InferenceTask, output: Path) -> None:
    """Find out before the run whether its outputs and its result can be stored."""
    place = result_key(task.output_prefix).rpartition("/")[0]
    try:
        store.probe(task.output_bucket_name, f"{place}/")
    except RemoteError as error:
        raise UsageError(f"--output {output}: {error}") from error


@contextmanager
def _scratch(log: Log) -> Iterator[Path | None]:
    """Give a place for /input and /output to those who cannot make them."""
    if os.geteuid() == 0:
        yield None
        return
    from shutil import rmtree
    from tempfile import mkdtemp

    scratch = Path(mkdtemp(prefix="sagemaker-shim-"))
    try:
        yield scratch
    finally:
        # Outputs that could not be stored are kept, whatever name they had for the command.
        outputs = scratch / "output"
        if outputs.is_dir() and any(outputs.iterdir()):
            log.error(f"What could not be stored is in {outputs}")
        else:
            rmtree(scratch, ignore_errors=True)


def run_check(arguments: argparse.Namespace, environ: Mapping[str, str], stop: Stop) -> int:
    """Say what would go wrong; 0 when nothing certainly would."""
    from shim.check import preflight

    text, file = arguments.tasks, arguments.file
    is_list_given = _names_tasks(arguments)

    def connect(settings: Settings) -> Store:
        # The metadata of a machine that is none of Amazon's keep us waiting.
        limits = ("AWS_METADATA_SERVICE_TIMEOUT", "AWS_METADATA_SERVICE_NUM_ATTEMPTS")
        brief = {name: "1" for name in limits if environ.get(name, "1").isdecimal()}
        return connect_store(settings, {**environ, **brief}, Log(level="CRITICAL"), stop)

    def read_tasks(store: Store) -> tuple[InferenceTask, ...]:
        return _parse(
            _read_remote(file, store, stop)
            if file and _is_remote(file)
            else _read_local(text, file, stop)
        )

    log = Log(style=style_of(arguments))
    findings = []
    for finding in preflight.examine(
        environ,
        cmd=tuple(arguments.cmd),
        connect=connect,
        read_tasks=read_tasks if is_list_given else None,
        is_read_only=arguments.read_only,
    ):
        stop.check()
        preflight.tell(finding, log)
        findings.append(finding)
    preflight.tell_verdict(findings, log)
    return int(any(finding.level == preflight.ERROR for finding in findings))


def _names_tasks(arguments: argparse.Namespace) -> bool:
    """Tell whether a task list is given; UsageError when two are."""
    if arguments.tasks and arguments.file:
        raise UsageError("Only one of tasks or file should be set")
    return bool(arguments.tasks or arguments.file)


def _is_remote(file: str) -> bool:
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


def _read_local(text: str | None, file: str, stop: Stop) -> dict[str, bytes]:
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


def _read_remote(file: str, store: Store, stop: Stop) -> dict[str, bytes]:
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
        stop.check()  # a stop ends the request too
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> UsageError:
    return UsageError(f"The value provided for file is invalid:\n\n{error}")


def _parse(bodies: Mapping[str, bytes]) -> tuple[InferenceTask, ...]:
    """Parse one list, or several as one."""
    try:
        tasks = parse_tasks(bodies[""]) if "" in bodies else parse_task_files(bodies)
    except InvalidFields as error:
        raise UsageError(f"The tasks definition is invalid:\n\n{error}") from error
    if not tasks:
        raise UsageError("Empty task list provided")
    return tasks


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
        store = connect_store(settings, environ, log, stop)
        leave_setup_result(settings, store, result, log)


def connect_store(settings: Settings, environ: Mapping[str, str], log: Log, stop: Stop) -> Store:
    """Return the object storage that the environment names."""
    from shim.process.process import run_helper
    from shim.s3.client import connect

    user = _find_command_user(settings)

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
        cancelled=lambda: stop.requested,
        carried_bundle=carried_bundle(),
        exposure=never_exposed if has_our_rights else find_exposure,
    )


def _find_command_user(settings: Settings) -> User | None:
    """Return as whom the command runs, None when nobody knows; without root, it is ourselves."""
    if os.geteuid() != 0:
        return User()
    try:
        return image_user(settings.user, set_extra_groups=settings.set_extra_groups)
    except UserSafeError:
        return None


def wait_readable(*sources: HasFileno, seconds: float | None = None) -> bool:
    """Block until one of the descriptors can be read, or for so long; say whether one can."""
    poller = select.poll()
    for source in sources:
        poller.register(source.fileno(), select.POLLIN)
    return bool(poller.poll(None if seconds is None else seconds * 1000))
