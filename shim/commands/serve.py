"""`serve`: answer SageMaker until a signal comes or the container is unhealthy."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Mapping

from shim.commands.job import Job
from shim.contract.errors import TaskStopped
from shim.files.locks import exclusive
from shim.log.log import LOG_FORMATS
from shim.process.stopping import Stop, wait_readable
from shim.runner.task import PlatformFailure

SERVE_HOST = "0.0.0.0"
SERVE_PORT = 8080
# Endpoints are killed 30 s after SIGTERM; a task in hand needs part of that to leave its result.
LEAVE_SECONDS = 12.0
ANSWER_SECONDS = 2.0
# After the start, for the first answers to /ping to be quick; a task does not wait for it.
QUIET_SECONDS = 1.0
WATCH_SECONDS = 1.0
HELP = "answer SageMaker on port 8080"


def add_options(command: argparse.ArgumentParser) -> None:
    """Add what this verb takes."""
    command.add_argument(
        "--port", type=parse_port, default=SERVE_PORT, help=f"default: {SERVE_PORT}"
    )
    command.add_argument("--log-format", choices=LOG_FORMATS, help="default: json lines")


def parse_port(text: str) -> int:
    """Return the number of a TCP port."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 65535, found {text!r}")
    return int(text)


def run(arguments: argparse.Namespace, environ: Mapping[str, str], stop: Stop) -> int:
    """Answer SageMaker until a signal comes or the container is unhealthy."""
    from shim.serve.protocol import Server  # 49 ms
    from shim.serve.service import Service, resolve_command_uid  # 4 ms

    job = Job(environ=environ, stop=stop, title="Starting the model server", style=arguments.style)
    uid = resolve_command_uid(job.settings.user)
    service = Service(runner=job.runner, log=job.log, command_uid=uid)
    try:
        server = Server((SERVE_HOST, arguments.port), application=service, log=job.log)
    except OSError as error:
        job.log.error(f"Cannot listen on port {arguments.port}: {error}")
        raise PlatformFailure(f"port {arguments.port}: {error}") from error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with exclusive(job.settings, job.log), job.ready() as is_ready:
            if is_ready:
                service.open()
                if not wait_readable(stop, service, seconds=QUIET_SECONDS):
                    job.prepare()
                while not wait_readable(stop, service, seconds=WATCH_SECONDS):
                    service.notice_death()
                service.close(timeout_seconds=LEAVE_SECONDS)
    except TaskStopped:
        job.log.info("Stopped while setting up")
    finally:
        server.drain(ANSWER_SECONDS)
        server.shutdown()
    job.log.info("Model server stopped")
    return 0
