"""Tasks and results, with the pydantic models that define the interface as the judge."""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
import random
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError, field_validator

from shim import __version__
from shim.contract.errors import InvalidTasks, NotText
from shim.contract.tasks import (
    SIGNATURE_METADATA,
    InferenceIO,
    InferenceResult,
    InferenceTask,
    RuntimeSetupResult,
    is_safe_relative_path,
    parse_task,
    parse_task_files,
    parse_tasks,
    result_key,
    runtime_setup_key,
    sign,
)
from shim.contract.uri import is_bucket_name


class IOModel(BaseModel):
    relative_path: Path
    bucket_name: str
    bucket_key: str
    decompress: bool = False

    @field_validator("bucket_name")
    @classmethod
    def check_bucket_name(cls, name: str) -> str:
        if not is_bucket_name(name):
            raise ValueError("Invalid bucket name")
        return name


class TaskModel(BaseModel):
    pk: str
    inputs: list[IOModel]
    output_bucket_name: str
    output_prefix: str
    timeout: timedelta | None = None

    @field_validator("output_bucket_name")
    @classmethod
    def check_bucket_name(cls, name: str) -> str:
        return IOModel.check_bucket_name(name)

    @field_validator("output_prefix")
    @classmethod
    def check_prefix(cls, prefix: str) -> str:
        if not prefix:
            raise ValueError("Prefix cannot be blank")
        return prefix if prefix.endswith("/") else f"{prefix}/"


class ResultModel(BaseModel):
    pk: str
    return_code: int
    user_safe_error_message: str = ""
    user_process_last_stderr_lines: list[str] = []
    exec_duration: timedelta | None
    invoke_duration: timedelta | None
    outputs: list[IOModel]
    sagemaker_shim_version: str = __version__


class SetupModel(BaseModel):
    return_code: int
    user_safe_error_message: str = ""
    sagemaker_shim_version: str = __version__


TASKS: TypeAdapter[list[TaskModel]] = TypeAdapter(list[TaskModel])


def an_input(**changes: object) -> dict[str, Any]:
    return {"relative_path": "a", "bucket_name": "bucket", "bucket_key": "k/a", **changes}


def a_task(pk: str = "1", **changes: object) -> dict[str, Any]:
    return {
        "pk": pk,
        "inputs": [],
        "output_bucket_name": "bucket",
        "output_prefix": f"results/{pk}",
        **changes,
    }


def parsed(*tasks: object) -> tuple[InferenceTask, ...]:
    return parse_tasks(json.dumps(tasks).encode())


def messages(*tasks: object) -> list[str]:
    with pytest.raises(InvalidTasks) as caught:
        parsed(*tasks)
    return str(caught.value).splitlines()


def test_reads_a_whole_task() -> None:
    body = json.dumps(
        a_task(
            inputs=[
                an_input(bucket_key="/a//../\u00e9 +%", decompress="Yes", extra=1),
                an_input(relative_path="./b//c/", bucket_key="prefix/"),
                an_input(relative_path=".", bucket_key="prefix/"),
            ],
            output_prefix="/out//x",
            timeout="PT1H",
            unknown={"ignored": True},
        )
    ).encode()
    assert InferenceTask(
        pk="1",
        inputs=(
            InferenceIO(
                relative_path="a",
                bucket_name="bucket",
                bucket_key="/a//../\u00e9 +%",
                decompress=True,
            ),
            InferenceIO(relative_path="b/c", bucket_name="bucket", bucket_key="prefix/"),
            InferenceIO(relative_path=".", bucket_name="bucket", bucket_key="prefix/"),
        ),
        output_bucket_name="bucket",
        output_prefix="/out//x/",
        timeout=timedelta(hours=1),
    ) == parse_task(body)


@pytest.mark.parametrize("task", [a_task(), a_task(timeout=None)], ids=["absent", "null"])
def test_a_task_without_timeout_has_no_limit(task: dict[str, Any]) -> None:
    assert parsed(task)[0].timeout is None


def test_an_empty_list_is_a_list() -> None:
    assert () == parse_tasks(b"[]")


@pytest.mark.parametrize("pk", ["", ".", "..", "a/b", "/", "a\0b"])
def test_a_pk_that_names_no_directory_is_refused(pk: str) -> None:
    (message,) = messages(a_task(pk, output_prefix="p"))
    assert message.startswith("[0].pk: The pk names a directory: ")


@pytest.mark.parametrize(
    "path", ["", ".", "./", "/", "/etc", "//a", "..", "a/..", "a/../b", "../a", "a\0b"]
)
def test_a_path_outside_of_the_input_directory_is_refused(path: str) -> None:
    (message,) = messages(a_task(inputs=[an_input(), an_input(relative_path=path)]))
    assert message.startswith("[0].inputs[1].relative_path: The path must be relative ")


@pytest.mark.parametrize("path", ["", "/", "/etc", "..", "./../a"])
def test_a_prefix_too_stays_in_the_input_directory(path: str) -> None:
    (message,) = messages(a_task(inputs=[an_input(relative_path=path, bucket_key="prefix/")]))
    assert message.startswith("[0].inputs[0].relative_path: The path must be relative ")


PLAIN: dict[str, Any] = {}
PREFIX: dict[str, Any] = {"bucket_key": "p/"}
ARCHIVE: dict[str, Any] = {"decompress": True}


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        (("a", PLAIN), ("b", PLAIN), []),
        (("a", PLAIN), ("a", PLAIN), [1]),
        (("a", PLAIN), ("./a/", PLAIN), [1]),
        (("a", PLAIN), ("a/b", PLAIN), [1]),
        (("a/b/c", PLAIN), ("a", PLAIN), [0]),
        (("a", PLAIN), ("ab", PLAIN), []),
        (("a", PLAIN), ("a", PREFIX), [1]),
        (("a", PREFIX), ("a/b", PLAIN), []),
        (("a", PREFIX), ("a", PREFIX), []),
        (("a", PLAIN), ("a", ARCHIVE), []),
        (("a", PLAIN), ("a/b", ARCHIVE), [1]),
        (("a", ARCHIVE), ("a", ARCHIVE), []),
        (("a", ARCHIVE), ("a/b", PLAIN), []),
        ((".", PREFIX), ("a", PLAIN), []),
    ],
)
def test_no_input_lies_inside_the_file_of_another(
    first: tuple[str, dict[str, Any]], second: tuple[str, dict[str, Any]], refused: list[int]
) -> None:
    task = a_task(inputs=[an_input(relative_path=path, **more) for path, more in (first, second)])
    if not refused:
        assert 2 == len(parsed(task)[0].inputs)
        return
    (message,) = messages(task)
    assert message.startswith(
        f"[0].inputs[{refused[0]}].relative_path: The path is, or lies inside, the file of "
        f"inputs[{1 - refused[0]}], s3://bucket/"
    )


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("bucket_name", "b b", "Invalid bucket name, found 'b b'"),
        ("bucket_name", "", "Invalid bucket name, found ''"),
        ("bucket_name", "a" * 256, "Invalid bucket name, found 'aaa"),
        ("bucket_name", "bucket\n", "Invalid bucket name, found 'bucket\\n'"),
        ("bucket_key", "", "Key cannot be blank, found ''"),
        ("bucket_key", 1, "Input should be a valid string, found 1"),
        ("bucket_key", "\ud800", "Input should be a valid string, unable to parse raw data"),
        ("relative_path", 1, "Input is not a valid path, found 1"),
        ("relative_path", "\udfff", "Input should be a valid string, unable to parse raw data"),
        ("decompress", None, "Input should be a valid boolean, found None"),
    ],
)
def test_each_member_of_an_input_is_checked(field: str, value: object, sentence: str) -> None:
    (message,) = messages(a_task(inputs=[an_input(**{field: value})]))
    assert message.startswith(f"[0].inputs[0].{field}: {sentence}")


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("pk", 1, "Input should be a valid string, found 1"),
        ("pk", "\ud800", "Input should be a valid string, unable to parse raw data"),
        ("inputs", None, "Input should be a valid array, found None"),
        ("inputs", {}, "Input should be a valid array, found {}"),
        ("output_bucket_name", "a/b", "Invalid bucket name, found 'a/b'"),
        ("output_prefix", "", "Prefix cannot be blank, found ''"),
        ("output_prefix", None, "Input should be a valid string, found None"),
        ("timeout", "10s", "Input should be a valid duration, expected seconds as a number"),
        ("timeout", True, "Input should be a valid duration, neither a number nor a text"),
    ],
)
def test_each_member_of_a_task_is_checked(field: str, value: object, sentence: str) -> None:
    (message,) = messages(a_task(**{field: value}) if field != "pk" else a_task() | {"pk": value})
    assert message.startswith(f"[0].{field}: {sentence}")


@pytest.mark.parametrize(
    "bucket",
    [
        "a",
        "a" * 255,
        "A_b.c-9",
        "arn:aws:s3:eu-west-1:123456789012:accesspoint/name",
        "arn:aws:s3-outposts:eu-west-1:123456789012:outpost/op-1/accesspoint/name",
    ],
)
def test_buckets_and_access_points_are_accepted(bucket: str) -> None:
    task = a_task(output_bucket_name=bucket, inputs=[an_input(bucket_name=bucket)])
    assert bucket == parsed(task)[0].output_bucket_name


def test_every_problem_of_every_task_is_listed() -> None:
    assert [
        "[0].pk: Field required",
        "[1]: Input should be an object, found 'x'",
        "[2].inputs[0].bucket_name: Invalid bucket name, found 'x y'",
        "[2].inputs[0].bucket_key: Field required",
        "[2].inputs[2]: Input should be an object, found None",
        "[2].output_prefix: Prefix cannot be blank, found ''",
        "[4].pk: Another task has the same pk, found 'same'",
        "[5].output_prefix: Another task has the same output_prefix, found 'results/same/'",
    ] == messages(
        {key: value for key, value in a_task().items() if key != "pk"},
        "x",
        a_task(
            output_prefix="",
            inputs=[
                {"relative_path": "a", "bucket_name": "x y"},
                an_input(),
                None,
            ],
        ),
        a_task("same"),
        a_task("same", output_prefix="other"),
        a_task("different", output_prefix="results/same/"),
    )


@pytest.mark.parametrize("body", [b"{}", b'"x"', b"null"])
def test_the_list_is_a_list(body: bytes) -> None:
    with pytest.raises(InvalidTasks, match="^Input should be a valid array, found "):
        parse_tasks(body)


@pytest.mark.parametrize("body", [b"", b"[", b"NaN", b"[" * 100_000, b'["\xff"]'])
def test_a_list_that_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidTasks, match="^Invalid JSON: "):
        parse_tasks(body)


def test_a_served_task_that_is_no_text_is_no_invalid_task() -> None:
    with pytest.raises(NotText):
        parse_task(b'{"pk": "\xff"}')


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-le"])
def test_tasks_are_read_in_every_encoding_that_json_knows(encoding: str) -> None:
    task = a_task("\u00e9")
    assert "\u00e9" == parse_task(json.dumps(task).encode(encoding)).pk
    assert "\u00e9" == parse_tasks(json.dumps([task]).encode(encoding))[0].pk


def test_a_served_task_is_refused_in_the_words_of_fastapi() -> None:
    body = a_task(inputs=[an_input(bucket_name="x y", bucket_key=1)], output_prefix="")
    with pytest.raises(InvalidTasks) as ours:
        parse_task(json.dumps(body).encode())
    with pytest.raises(ValidationError) as theirs:
        TaskModel.model_validate_json(json.dumps(body))
    assert [
        (error["loc"], error["type"], error["msg"], error["input"])
        for error in theirs.value.errors()
    ] == [(p.loc, p.type, p.message, p.input) for p in ours.value.problems]


def test_a_task_of_the_largest_body_is_read() -> None:
    inputs = [
        {"relative_path": f"d/{i}", "bucket_name": "b", "bucket_key": f"k/{i}"}
        for i in range(60_000)
    ]
    body = json.dumps(a_task(inputs=inputs), separators=(",", ":")).encode()
    assert 60_000 == len(parse_task(body).inputs)


def test_a_list_may_hold_more_tasks_than_one_task_may_hold_values() -> None:
    body = json.dumps([{**a_task(str(i)), "inputs": []} for i in range(101_000)]).encode()
    assert 101_000 == len(parse_tasks(body))


def test_no_more_than_100_problems_of_a_list_are_listed() -> None:
    found = messages(*[{}] * 200)
    assert 101 == len(found)
    assert ("[0].pk: Field required", "[24].output_prefix: Field required") == (found[0], found[99])
    assert "No more than 100 problems are listed" == found[100]


def test_a_path_that_no_file_system_takes_is_refused() -> None:
    assert parsed(a_task(inputs=[an_input(relative_path="a/" * 2000)]))
    (message,) = messages(a_task(inputs=[an_input(relative_path="a/" * 3_000_000)]))
    assert message.startswith("[0].inputs[0].relative_path: The path must be relative ")


def test_files_are_read_as_one_list() -> None:
    files = {name: json.dumps([a_task(name)]).encode() for name in ("a", "b")}
    assert ["a", "b"] == [task.pk for task in parse_task_files({**files, "c": b"[]"})]


def test_problems_of_files_name_the_file() -> None:
    with pytest.raises(InvalidTasks) as caught:
        parse_task_files(
            {
                "p/a.json": json.dumps([a_task("1"), a_task("2")]).encode(),
                "p/b.json": json.dumps([a_task("3", timeout="x"), a_task("2")]).encode(),
                "p/c.json": b"{}",
                "p/d.json": b"\xff",
            }
        )
    assert [
        "p/c.json: Input should be a valid array, found {}",
        "p/d.json: Invalid JSON: not UTF-8, invalid start byte at byte 0",
        "p/b.json[0].timeout: Input should be a valid duration, expected seconds as a number, "
        "PT1H30M, 01:30:00 or 1 day, 01:30:00, found 'x'",
        "p/b.json[1].pk: Another task has the same pk, found '2'",
        "p/b.json[1].output_prefix: Another task has the same output_prefix, found 'results/2/'",
    ] == str(caught.value).splitlines()


VALUES: list[object] = [
    "", "a", "a/b", "./a//b/", ".", "..", "/a", "b b", "bucket", "é", "0", "true", "Yes", "PT1M",
    "1:20:30", "1 day", "10s", None, True, False, 0, 1, 2, -1.5, 10**20, [], {}, ["a"],
]  # fmt: skip


def mutated(rng: random.Random) -> list[Any]:
    """Return a list of tasks of which members are replaced or taken away."""
    tasks = [a_task(str(pk), timeout=60) for pk in range(rng.randrange(1, 3))]
    inputs = [an_input(decompress=False) for _ in tasks]
    for task, item in zip(tasks, inputs, strict=True):
        task["inputs"] = [item]
    for _ in range(rng.randrange(4)):
        target = rng.choice([*tasks, *inputs])
        name = rng.choice([*target, "extra"])
        if rng.random() < 0.2:
            target.pop(name, None)
        else:
            target[name] = copy.copy(rng.choice(VALUES))
    return tasks


def by_pydantic(tasks: list[Any]) -> list[Any] | None:
    try:
        models = TASKS.validate_json(json.dumps(tasks))
    except ValidationError:
        return None
    return [
        {
            **model.model_dump(),
            "inputs": [
                {**item.model_dump(), "relative_path": str(item.relative_path)}
                for item in model.inputs
            ],
        }
        for model in models
    ]


def is_refused_by_us_alone(tasks: list[Any]) -> bool:
    """Tell whether a task breaks one of the rules that the pydantic models do not have."""
    inputs = [item for task in tasks for item in task["inputs"]]
    pks, prefixes = [t["pk"] for t in tasks], [t["output_prefix"] for t in tasks]
    return (
        any(pk in ("", ".", "..") or "/" in pk for pk in pks)
        or len({*pks}) < len(pks)
        or len({*prefixes}) < len(prefixes)
        or any(not item["bucket_key"] for item in inputs)
        or any(not is_safe_relative_path(item["relative_path"]) for item in inputs)
    )


@pytest.mark.parametrize("seed", range(4))
def test_reads_tasks_as_pydantic_does_except_for_the_rules_that_are_ours(seed: int) -> None:
    rng = random.Random(seed)
    outcomes = {"accepted": 0, "refused": 0, "refused by us alone": 0}
    for _ in range(1000):
        tasks = mutated(rng)
        expected = by_pydantic(tasks)
        try:
            actual = parsed(*tasks)
        except InvalidTasks:
            assert expected is None or is_refused_by_us_alone(expected), tasks
            outcomes["refused" if expected is None else "refused by us alone"] += 1
        else:
            as_dicts = [
                {**asdict(task), "inputs": [asdict(item) for item in task.inputs]}
                for task in actual
            ]
            assert expected == as_dicts, tasks
            assert not is_refused_by_us_alone(as_dicts), tasks
            outcomes["accepted"] += 1
    assert min(outcomes.values()) > 5


# pydantic's own JSON writer is the oracle for text; it cannot write what UTF-8 cannot hold.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
IOS = st.builds(
    InferenceIO,
    relative_path=TEXTS.filter(lambda path: str(Path(path)) == path),
    bucket_name=st.just("bucket"),
    bucket_key=TEXTS,
)
DURATIONS = st.none() | st.timedeltas()


@settings(max_examples=500, deadline=None)
@given(
    st.builds(
        InferenceResult,
        pk=TEXTS,
        return_code=st.integers(-64, 255),
        user_safe_error_message=TEXTS,
        user_process_last_stderr_lines=st.lists(TEXTS, max_size=3).map(tuple),
        exec_duration=DURATIONS,
        invoke_duration=DURATIONS,
        outputs=st.lists(IOS, max_size=2).map(tuple),
    )
)
def test_writes_results_as_pydantic_does(result: InferenceResult) -> None:
    model = ResultModel(
        pk=result.pk,
        return_code=result.return_code,
        user_safe_error_message=result.user_safe_error_message,
        user_process_last_stderr_lines=list(result.user_process_last_stderr_lines),
        exec_duration=result.exec_duration,
        invoke_duration=result.invoke_duration,
        outputs=[
            IOModel(
                relative_path=Path(item.relative_path),
                bucket_name=item.bucket_name,
                bucket_key=item.bucket_key,
            )
            for item in result.outputs
        ],
    )
    assert model.model_dump_json().encode() == result.to_json()


def test_writes_a_result_to_the_byte() -> None:
    result = InferenceResult(
        pk="1",
        return_code=0,
        user_safe_error_message='\u00e9 \u2028\x7f\x1f"\\/\b',
        user_process_last_stderr_lines=("a\n",),
        exec_duration=timedelta(days=400, seconds=61.5),
        outputs=(InferenceIO(relative_path="a/b", bucket_name="b", bucket_key="k/a/b"),),
        sagemaker_shim_version="1.2.3",
    )
    assert (
        '{"pk":"1","return_code":0,"user_safe_error_message":"\u00e9 \u2028\x7f\\u001f\\"\\\\/\\b",'
        '"user_process_last_stderr_lines":["a\\n"],"exec_duration":"P1Y35DT1M1.5S",'
        '"invoke_duration":null,"outputs":[{"relative_path":"a/b","bucket_name":"b",'
        '"bucket_key":"k/a/b","decompress":false}],"sagemaker_shim_version":"1.2.3"}'
    ).encode() == result.to_json()


def test_a_result_is_written_whatever_its_texts_hold() -> None:
    result = InferenceResult(pk="1", return_code=1, user_safe_error_message="odd \udcff name")
    assert "odd ? name" == json.loads(result.to_json())["user_safe_error_message"]


@pytest.mark.parametrize("message", ["", "Could not set up model: é"])
def test_writes_the_setup_result_as_pydantic_does(message: str) -> None:
    model = SetupModel(return_code=1, user_safe_error_message=message)
    result = RuntimeSetupResult(return_code=1, user_safe_error_message=message)
    assert model.model_dump_json().encode() == result.to_json()


@pytest.mark.parametrize(
    ("prefix", "expected"), [("p", "p/"), ("p/", "p/"), ("/p//", "/p//"), ("/", "/")]
)
def test_results_lie_below_their_prefix(prefix: str, expected: str) -> None:
    assert f"{expected}.sagemaker_shim/inference_result.json" == result_key(prefix)
    assert f"{expected}.sagemaker_shim/runtime_setup_result.json" == runtime_setup_key(prefix)


@pytest.mark.parametrize("key", [b"", b"\x00\xff" * 40])
def test_signs_with_hmac_sha256_also_with_the_empty_key(key: bytes) -> None:
    assert hmac.digest(key, b"body", hashlib.sha256).hex() == sign(b"body", key)
    assert "signature_hmac_sha256" == SIGNATURE_METADATA
