from __future__ import annotations

import pytest

from shim.contract.errors import InvalidTasks, Problem


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (
            Problem(
                loc=(2, "inputs", 0, "bucket_name"),
                type="value_error",
                message="Value error, Invalid bucket name",
                input="x y",
            ),
            "[2].inputs[0].bucket_name: Invalid bucket name, found 'x y'",
        ),
        (
            Problem(loc=("pk",), type="string_type", message="Input should be a valid string"),
            "pk: Input should be a valid string, found None",
        ),
        (
            Problem(loc=("pk",), type="missing", message="Field required", input={"inputs": []}),
            "pk: Field required",
        ),
        (
            Problem(loc=(), type="json_invalid", message="Invalid JSON: not UTF-8"),
            "Invalid JSON: not UTF-8",
        ),
    ],
    ids=["validator", "type", "missing", "document"],
)
def test_a_problem_reads_as_path_then_sentence(problem: Problem, expected: str) -> None:
    assert expected == str(problem)


def test_a_problem_shortens_what_it_found() -> None:
    problem = Problem(loc=(0,), type="model_type", message="No", input=["x" * 10_000] * 10_000)
    assert len(str(problem)) < 1000


def test_the_exception_lists_every_problem_on_a_line_of_its_own() -> None:
    problems = [
        Problem(loc=(index,), type="missing", message="Field required") for index in range(2)
    ]
    assert "[0]: Field required\n[1]: Field required" == str(InvalidTasks(problems))
    assert tuple(problems) == InvalidTasks(problems).problems
