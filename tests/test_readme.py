"""What the README says in tables is what the code does."""

from __future__ import annotations

import dataclasses
import re
import signal
from pathlib import Path

from shim.cli import COMMAND_SIGNALS, STOP_SIGNALS, build_parser
from shim.commands.patch import EXIT_CODES
from shim.contract.settings import PREFIX, VARIABLES
from shim.contract.tasks import InferenceResult, parse_tasks
from shim.log.log import encode, split
from tests.test_architecture import BUDGETS

README = (Path(__file__).parents[1] / "README.md").read_text()


OUTSIDE = ", " + re.search(r"^\(\*\) (.+)$", README, flags=re.MULTILINE)[1]  # type: ignore[index]


def table(heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its head."""
    text = re.split(rf"^#+ {re.escape(heading)}$", README, flags=re.MULTILINE)[1]
    lines = re.search(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert lines
    rows = [line.strip("|").split("|") for line in lines[0].splitlines()[2:]]
    return [[cell.strip() for cell in row] for row in rows]


def words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def variable_rows() -> list[list[str]]:
    return [
        [
            f"`{variable.name.replace(PREFIX, 'P_')}`",
            "unset" if variable.default is None else f"`{variable.default}`",
            f"{variable.meaning}; {variable.form.accepted.replace(OUTSIDE, ' (*)')}",
        ]
        for variable in VARIABLES.values()
    ]


def test_every_variable_is_listed_with_its_default_and_form() -> None:
    expected = [[cell.replace("``", "empty") for cell in row] for row in variable_rows()]
    assert expected == table("Variables")


def test_every_command_is_listed() -> None:
    listed = {words(row[0])[0].split()[0] for row in table("Commands")}
    actions = [action for action in build_parser()._actions if action.choices]
    assert listed == set(actions[0].choices or ())


def test_the_members_of_the_result_are_listed_in_order() -> None:
    listed = [word for row in table("The result") for word in words(row[0])]
    assert [field.name for field in dataclasses.fields(InferenceResult)] == listed


def test_the_members_of_a_log_line_are_listed_in_order() -> None:
    line = encode(split("x"), level="INFO", source="stdout", internal=True, task=None)
    listed = [word for row in table("Log lines") for word in words(row[0])]
    assert re.findall(r'"(\w+)":', line.decode()) == listed


def test_the_example_task_list_is_valid() -> None:
    example = re.search(r"```json\n(\[.*?\])\n```", README, flags=re.DOTALL)
    assert example
    (task,) = parse_tasks(example[1].encode())
    assert ("case-1", 1800) == (task.pk, task.timeout.total_seconds() if task.timeout else 0)


def test_every_room_is_listed_in_the_order_of_imports() -> None:
    rooms = re.findall(r"^\| `(\w+)` \| .+ \|$", README.split("| room |")[1], flags=re.MULTILINE)
    assert list(BUDGETS) == rooms


def test_every_signal_is_listed() -> None:
    stop, command = [
        {getattr(signal, f"SIG{word}") for word in words(row[0])} for row in table("Signals")
    ]
    real_time = {*range(signal.SIGRTMIN, signal.SIGRTMAX + 1)}
    assert (STOP_SIGNALS, COMMAND_SIGNALS) == (stop, command | real_time)


def test_every_exit_code_is_listed() -> None:
    of_patch = sorted({str(code) for code in EXIT_CODES.values()})
    assert ["0", "1", "2", *of_patch, "128+n"] == [row[0] for row in table("Exit codes")]
