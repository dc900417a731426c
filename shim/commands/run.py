"""`run`: one task on local directories, as the platform would run it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from shim.commands.job import Job
from shim.contract.durations import format_duration
from shim.contract.errors import UsageError
from shim.contract.settings import Settings
from shim.contract.tasks import result_key
from shim.files.locks import exclusive
from shim.http.errors import RemoteError
from shim.log.log import LOG_FORMATS, Log
from shim.process.stopping import Stop

HELP = "run one task on local directories, without AWS"


def add_options(command: argparse.ArgumentParser) -> None:
    """Add what this verb takes."""
    command.add_argument(
        "--input", type=Path, required=True, metavar="DIR", help="the task's inputs"
    )
    command.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="for its outputs"
    )
    command.add_argument("--timeout", metavar="T", help="time limit: seconds, PT1H30M or 01:30:00")
    command.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        help="json lines as on the platform, or text (default: text on a terminal)",
    )
    command.add_argument(
        "cmd", nargs="*", metavar="CMD", help="the command, after --; default: the image's"
    )


def run(arguments: argparse.Namespace, environ: Mapping[str, str], stop: Stop) -> int:
    """Run one task on local directories as the platform would; 0 when it succeeded."""
    from shim.commands import rehearsal  # 3 ms
    from shim.s3.directory import DirectoryStore  # 6 ms

    with rehearsal.scratch_directory(Log(style=arguments.style)) as scratch:
        plan = rehearsal.plan_rehearsal(
            Settings.from_environ(environ),
            input_directory=arguments.input,
            output_directory=arguments.output,
            timeout=arguments.timeout,
            cmd=tuple(arguments.cmd),
            scratch=scratch,
        )
        arguments.take_signals(stop)
        store = DirectoryStore.from_buckets(plan.buckets)
        place = result_key(plan.task.output_prefix).rpartition("/")[0]
        try:  # what is found only after the run would be too late
            store.probe(plan.task.output_bucket_name, f"{place}/")
        except RemoteError as error:
            raise UsageError(f"--output {arguments.output}: {error}") from error
        job = Job(
            environ={**environ, **plan.variables},
            stop=stop,
            title=f"Running a task from {arguments.input} to {arguments.output}",
            settings=plan.settings,
            store=store,
            style=arguments.style,
        )
        if rehearsal.holds_something(arguments.output):
            job.log.warning(f"{arguments.output} is not empty: what it holds stays in it")
        if plan.variables:
            inputs, outputs = plan.variables
            job.log.warning(
                "Without root, the directories of the command are elsewhere: it finds its inputs "
                f"in ${inputs} and puts its outputs into ${outputs}"
            )
        found = rehearsal.look_around(plan.settings)
        with exclusive(job.settings, job.log), rehearsal.restoring(found), job.ready() as is_ready:
            result = job.runner.run_task(plan.task) if is_ready else None
    if result is None:
        return 1
    took = "" if result.exec_duration is None else f" after {format_duration(result.exec_duration)}"
    job.log.info(
        f"Return code {result.return_code}{took}, {len(result.outputs)} outputs in "
        f"{arguments.output}, result in {arguments.output}/{result_key('/')[1:]}"
    )
    return int(result.return_code != 0)
