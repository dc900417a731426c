"""`invoke`: a list of tasks, one at a time, up to the first that fails."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from shim.commands import tasklist
from shim.commands.job import Job
from shim.contract.errors import UsageError
from shim.files.locks import exclusive
from shim.log.log import LOG_FORMATS
from shim.process.stopping import Stop

HELP = "run a list of tasks as a batch"


def add_options(command: argparse.ArgumentParser) -> None:
    """Add what this verb takes."""
    tasklist.add_options(command)
    command.add_argument("--log-format", choices=LOG_FORMATS, help="default: json lines")


def run(arguments: argparse.Namespace, environ: Mapping[str, str], stop: Stop) -> int:
    """Run a list of tasks up to the first that fails."""
    if not tasklist.is_given(arguments):
        raise UsageError("One of tasks or file should be set")
    # What can be refused at once is refused before anything is written or contacted.
    tasks = tasklist.read_local(arguments, stop)
    job = Job(environ=environ, stop=stop, title="Invoking the model", style=arguments.style)
    job.prepare()
    if tasks is None:
        tasks = tasklist.read_remote(arguments.file, job.connect())
    with exclusive(job.settings, job.log), job.ready() as is_ready:
        if is_ready and job.runner.run_tasks(tasks):
            job.log.info("Model invocation complete")
    return 0
