"""`check`: what would go wrong, before it does."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial

from shim.commands import tasklist
from shim.commands.job import connect_store
from shim.log.log import LOG_FORMATS, Log
from shim.process.stopping import Stop

HELP = "say what would go wrong, before it does"


def add_options(command: argparse.ArgumentParser) -> None:
    """Add what this verb takes."""
    tasklist.add_options(command)
    command.add_argument(
        "--read-only",
        action="store_true",
        help="do not try to write, and remove again, a small object where outputs go",
    )
    command.add_argument("--log-format", choices=LOG_FORMATS, help="as in run")
    command.add_argument("cmd", nargs="*", metavar="CMD", help="as in run")


def run(arguments: argparse.Namespace, environ: Mapping[str, str], stop: Stop) -> int:
    """Say what would go wrong; 0 when nothing certainly would."""
    from shim.check import preflight  # 57 ms

    # The metadata of a machine that is none of Amazon's keep us waiting.
    limits = ("AWS_METADATA_SERVICE_TIMEOUT", "AWS_METADATA_SERVICE_NUM_ATTEMPTS")
    brief = {name: "1" for name in limits if environ.get(name, "1").isdecimal()}
    silent = Log(level="CRITICAL")
    is_given = tasklist.is_given(arguments)
    log, findings = Log(style=arguments.style), []
    for finding in preflight.examine(
        environ,
        cmd=tuple(arguments.cmd),
        connect=partial(connect_store, environ={**environ, **brief}, log=silent, stop=stop),
        read_tasks=partial(tasklist.read, arguments, stop) if is_given else None,
        is_read_only=arguments.read_only,
    ):
        stop.check()
        preflight.write_finding(finding, log)
        findings.append(finding)
    preflight.write_verdict(findings, log)
    return int(any(finding.level == preflight.ERROR for finding in findings))
