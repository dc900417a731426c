"""One task on a laptop: no AWS, no network, no credentials."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.e2e.platform import ROOT, Finished, P, Platform
from tests.process.test_namespaces import is_allowed
from tests.support import UNPRIVILEGED_UID, free_port, needs_root, poll

EXAMPLE = ROOT / "tests/data/example"


@pytest.fixture
def laptop(platform: Platform) -> Platform:
    """A platform's directories without its bucket or credentials."""
    platform.environ = {
        name: value
        for name, value in platform.environ.items()
        if not name.startswith("AWS_") and "RUNTIME" not in name
    }
    (platform.root / "in/sub").mkdir(parents=True)
    (platform.root / "in/sub/a.txt").write_text("content")
    return platform


def rehearse(laptop: Platform, script: str, *options: str) -> Finished:
    shell = f"I={laptop.root}/input O={laptop.root}/output\n{script}"
    return laptop.run(
        "run", "--input", "in", "--output", "out", *options, "--", "/bin/sh", "-c", shell
    )


def test_a_directory_is_run_into_another(laptop: Platform) -> None:
    job = rehearse(laptop, "echo hello; tr a-z A-Z <$I/sub/a.txt >$O/b.txt")
    assert 0 == job.code, job.stderr
    assert "CONTENT" == (laptop.root / "out/b.txt").read_text()
    result = json.loads((laptop.root / "out/.sagemaker_shim/inference_result.json").read_text())
    assert (0, ["b.txt"]) == (
        result["return_code"],
        [output["relative_path"] for output in result["outputs"]],
    )
    assert ["hello"] == job.texts(internal=False)
    assert "Return code 0" in job.texts(internal=True)[-1]
    assert "content" == (laptop.root / "in/sub/a.txt").read_text()


def test_a_failing_command_exits_with_1_and_shows_its_code(laptop: Platform) -> None:
    job = rehearse(laptop, "echo oops >&2; exit 5")
    assert 1 == job.code
    assert "Return code 5" in job.texts(internal=True)[-1]


def test_text_lines_are_for_people(laptop: Platform) -> None:
    job = rehearse(laptop, "echo hello; echo oops >&2", "--log-format", "text")
    assert "hello" in job.stdout.splitlines()
    assert "oops" in job.stderr.splitlines()
    assert '{"log"' not in job.stdout + job.stderr


def test_the_time_limit_holds(laptop: Platform) -> None:
    job = rehearse(laptop, "sleep 60", "--timeout", "0.3")
    assert 1 == job.code
    assert "Time limit exceeded" in job.texts(level="ERROR", internal=False)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_streams_that_take_nothing_change_nothing(laptop: Platform, closed: str) -> None:
    laptop.wrapper = ("sh", "-c", f'exec "$0" "$@" {closed}')
    assert 0 == rehearse(laptop, "echo hello; echo oops >&2; cp -r $I/sub $O").code
    assert "content" == (laptop.root / "out/sub/a.txt").read_text()
    assert 1 == rehearse(laptop, "exit 5").code
    assert 2 == rehearse(laptop, "true", "--timeout", "soon").code


def test_the_locale_of_the_image_is_left_alone(laptop: Platform) -> None:
    laptop.environ = {
        name: value for name, value in laptop.environ.items() if not name.startswith(("LANG", "LC"))
    }
    assert [] == rehearse(laptop, "env | grep ^LC_").texts(internal=False)
    laptop.environ["LC_CTYPE"] = "C.UTF-8"
    assert ["LC_CTYPE=C.UTF-8"] == rehearse(laptop, "env | grep ^LC_").texts(internal=False)


def test_outputs_of_before_are_told_from_those_of_this_run(laptop: Platform) -> None:
    assert [] == rehearse(laptop, "touch $O/a").texts(level="WARNING")
    job = rehearse(laptop, "touch $O/b")
    assert ["out is not empty: what it holds stays in it"] == job.texts(level="WARNING")
    assert {"a", "b", ".sagemaker_shim"} == {path.name for path in (laptop.root / "out").iterdir()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--timeout", "soon"], ["--timeout", "soon", "PT1H30M"]),
        (["--input", "missing"], ["--input", "missing", "directory"]),
        (["--output", "in"], ["two directories"]),
    ],
    ids=["timeout", "input", "same"],
)
def test_what_is_wrong_is_said_before_anything_runs(
    laptop: Platform, options: list[str], words: list[str]
) -> None:
    job = rehearse(laptop, "echo never", *options)
    assert 2 == job.code
    assert all(word in job.stderr for word in words), job.stderr
    assert "" == job.stdout


def test_a_command_that_does_not_exist_is_said_so(laptop: Platform) -> None:
    job = laptop.run("run", "--input", "in", "--output", "out", "--", "no-such-command")
    assert 1 == job.code
    assert any("does not exist" in text for text in job.texts(level="ERROR", internal=False))


def test_what_somebody_filled_is_not_emptied(laptop: Platform) -> None:
    (laptop.root / "output").mkdir()
    (laptop.root / "output/dear").touch()
    (laptop.root / "opt/model").mkdir()
    (laptop.root / "opt/model/weights").touch()
    job = rehearse(laptop, "true")
    assert 2 == job.code
    assert "output is not empty" in job.stderr
    (laptop.root / "output/dear").unlink()
    assert 0 == rehearse(laptop, "true").code
    assert (laptop.root / "opt/model/weights").exists()


def test_the_images_own_command_is_the_default(laptop: Platform) -> None:
    laptop.script("echo mine")
    job = laptop.run("run", "--input", "in", "--output", "out")
    assert ["mine"] == job.texts(internal=False)


@needs_root
def test_without_root_the_directories_are_temporary(laptop: Platform) -> None:
    laptop.environ = {name: v for name, v in laptop.environ.items() if not name.startswith(P)}
    example = laptop.root / "example"
    shutil.copytree(EXAMPLE, example)
    laptop.leave_root()
    job = laptop.run(
        *("run", "--input", str(example / "input"), "--output", "out"),
        *("--", "/usr/bin/env", "python3", str(example / "algorithm.py")),
    )
    assert 0 == job.code, job.stdout + job.stderr
    assert {"area": 5} == json.loads((laptop.root / "out/results.json").read_text())


def test_the_readmes_first_command_works(laptop: Platform) -> None:
    """As printed, but for the output directory and the paths of the platform."""
    command = re.search(r"python3 -m shim run .*", (ROOT / "README.md").read_text())
    assert command
    _, _, _, *arguments = shlex.split(command[0])
    laptop.environ |= {
        "SHIM_INPUT_PATH": str(laptop.root / "input"),
        "SHIM_OUTPUT_PATH": str(laptop.root / "output"),
    }
    with laptop.start(*arguments[:1], *rebased(arguments[1:], laptop.root)) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert 0 == process.returncode, stderr
    output = laptop.root / arguments[arguments.index("--output") + 1].lstrip("/")
    assert {"area": 5} == json.loads((output / "results.json").read_text())


def rebased(arguments: list[str], root: Path) -> list[str]:
    """Lead relative paths to the checkout, and the output below `root`."""
    output = arguments.index("--output") + 1
    arguments[output] = str(root / arguments[output].lstrip("/"))
    return [
        str(ROOT / argument) if argument.startswith("tests/") else argument
        for argument in arguments
    ]


@pytest.mark.parametrize("name", ["output", "output/sub", "opt", "opt/data"])
def test_a_directory_that_the_run_empties_is_refused(laptop: Platform, name: str) -> None:
    job = rehearse(laptop, "echo 1 >$O/dear", "--output", str(laptop.root / name))
    assert 2 == job.code
    assert "makes and empties" in job.stderr


def test_a_linked_directory_of_inputs_is_not_left_out(laptop: Platform) -> None:
    (laptop.root / "elsewhere").mkdir()
    (laptop.root / "elsewhere/b").touch()
    (laptop.root / "in/link").symlink_to(laptop.root / "elsewhere")
    (laptop.root / "in/loop").symlink_to(laptop.root / "in")
    job = rehearse(laptop, "cd $I && find . -type f | sort")
    assert ["./link/b", "./sub/a.txt"] == job.texts(internal=False)


@pytest.mark.parametrize("command", ["run", "invoke", "serve"])
def test_second_process_in_one_root_is_refused_and_takes_nothing(
    laptop: Platform, command: str
) -> None:
    script = f"I={laptop.root}/input O={laptop.root}/output\nls -l /proc/$$/fd >fds; touch began"
    script += "\nuntil [ -e go ]; do sleep 0.05; done; cp $I/sub/a.txt $O"
    options = ["run", "--input", "in", "--output", "out", "--", "/bin/sh", "-c", script]
    arguments = {
        "run": ["run", "--input", "in", "--output", "out2", "--", "true"],
        "invoke": ["invoke", "-t", json.dumps([laptop.task()])],
        "serve": ["serve", "--port", str(free_port())],
    }[command]
    laptop.script("true")
    with laptop.start(*options) as first:
        poll(lambda: (laptop.root / "began").exists())
        assert "output" not in (laptop.root / "fds").read_text()
        laptop.environ["AWS_S3_ENDPOINT_URL"] = f"file://{laptop.root}"
        second = laptop.run(*arguments)
        (laptop.root / "go").touch()
        assert 0 == first.wait(30)
    assert 2 == second.code, second.stderr
    names = ("INPUT_PATH", "OUTPUT_PATH", "LINKED_INPUT_PARENT")
    assert all(P + name in second.stderr for name in names), second.stderr
    assert "is in use by process" in second.stderr
    assert "content" == (laptop.root / "out/a.txt").read_text()
    assert [] == [path for path in laptop.root.iterdir() if path.suffix == ".lock"]


def leave_root(laptop: Platform) -> None:
    """Run as somebody else, with the platform's own paths."""
    laptop.environ = {name: v for name, v in laptop.environ.items() if not name.startswith(P)}
    laptop.leave_root()


WITHOUT_ROOT = """
I=${SHIM_INPUT_PATH-/input} O=${SHIM_OUTPUT_PATH-/output}
tr a-z A-Z <$I/sub/a.txt >$O/b.txt; echo $I $O; ls / | grep -x -e input -e output; true
"""
FORBID = 'echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"'


@needs_root
def test_without_root_input_and_output_exist_for_the_command(laptop: Platform) -> None:
    if Path("/input").exists() or Path("/output").exists():
        pytest.skip("needs a machine without /input and /output")
    if not is_allowed():
        pytest.skip("needs user namespaces")
    leave_root(laptop)
    job = rehearse(laptop, WITHOUT_ROOT)
    assert 0 == job.code, job.stderr
    assert ["/input /output", "input", "output"] == job.texts(internal=False)
    assert "CONTENT" == (laptop.root / "out/b.txt").read_text()
    assert not Path("/input").exists() and not Path("/output").exists()
    assert [] == list((laptop.root / "tmp").iterdir())


@needs_root
def test_without_root_and_namespaces_the_command_is_told_where(laptop: Platform) -> None:
    leave_root(laptop)
    laptop.wrapper = (
        *("unshare", "--user", "--map-current-user", "--keep-caps"),
        *("sh", "-c", FORBID, "sh"),
    )
    job = rehearse(laptop, WITHOUT_ROOT)
    assert 0 == job.code, job.stderr
    (warning,) = job.texts(level="WARNING")
    assert "SHIM_INPUT_PATH" in warning and "SHIM_OUTPUT_PATH" in warning
    first = job.texts(internal=False)[0]
    assert re.fullmatch(rf"({laptop.root}/tmp/sagemaker-shim-\w+)/input \1/output", first)
    assert "CONTENT" == (laptop.root / "out/b.txt").read_text()
    assert [] == list((laptop.root / "tmp").iterdir())


def arrange(root: Path, kind: str) -> None:
    """Put something where a run makes its directories."""
    for name in ("input", "output"):
        if kind == "directory":
            (root / name).mkdir()
            (root / name).chmod(0o750)
            os.chown(root / name, 12, 34) if os.geteuid() == 0 else None
        elif kind == "link":
            (root / f"{name}-elsewhere").mkdir(mode=0o700)
            (root / name).symlink_to(f"{name}-elsewhere")
        elif kind == "dangling link":
            (root / name).symlink_to("nowhere")


def picture(root: Path) -> list[tuple[str, int, int, int, str]]:
    return [
        (path.name, status.st_mode, status.st_uid, status.st_gid, link)
        for path in sorted(root.iterdir())
        if path.name.startswith(("input", "output", "."))
        for status in [path.lstat()]
        for link in [os.readlink(path) if path.is_symlink() else ""]
    ]


@pytest.mark.parametrize("linked", ["True", "False"])
@pytest.mark.parametrize("kind", ["missing", "directory", "link", "dangling link"])
@pytest.mark.parametrize("script", ["touch $O/a", "touch $O/a; exit 3"])
@needs_root
def test_input_and_output_are_left_as_they_were_found(
    laptop: Platform, kind: str, linked: str, script: str
) -> None:
    laptop.set(USE_LINKED_INPUT=linked)
    arrange(laptop.root, kind)
    before = picture(laptop.root)
    job = rehearse(laptop, script)
    assert before == picture(laptop.root)
    assert not (laptop.root / "opt/linked/run-input").exists()
    if kind in ("missing", "directory"):
        assert int("exit" in script) == job.code
        assert ("exit" not in script) == (laptop.root / "out/a").exists()


@needs_root
def test_stopped_run_leaves_input_and_output_as_they_were_found(laptop: Platform) -> None:
    options = ["run", "--input", "in", "--output", "out", "--", "/bin/sh", "-c"]
    with laptop.start(*options, "touch began; sleep 60") as process:
        poll(lambda: (laptop.root / "began").exists())
        assert (laptop.root / "input").is_symlink()
        process.terminate()
        assert 143 == process.wait(30)
    assert [] == picture(laptop.root)


@pytest.mark.parametrize("name", ["input", "output", "output-elsewhere/x"])
@needs_root
def test_what_is_no_empty_directory_is_not_replaced(laptop: Platform, name: str) -> None:
    if "/" in name:
        arrange(laptop.root, "link")
    (laptop.root / name).write_text("dear")
    before = picture(laptop.root)
    job = rehearse(laptop, "true")
    assert (2, before) == (job.code, picture(laptop.root))
    assert "move" in job.stderr
    assert "dear" == (laptop.root / name).read_text()


@pytest.mark.parametrize("name", ["out/.sagemaker_shim", "file"])
def test_output_with_a_file_in_its_way_is_refused_before_the_run(
    laptop: Platform, name: str
) -> None:
    (laptop.root / name).parent.mkdir(exist_ok=True)
    (laptop.root / name).touch()
    output = "file/out" if name == "file" else "out"
    job = rehearse(laptop, "touch ran", "--output", output)
    assert (2, False) == (job.code, (laptop.root / "ran").exists())
    assert f"--output {output}: " in job.stderr


@needs_root
def test_output_that_can_be_written_and_not_listed_is_written(laptop: Platform) -> None:
    leave_root(laptop)
    (laptop.root / "out").mkdir()
    os.chown(laptop.root / "out", UNPRIVILEGED_UID, UNPRIVILEGED_UID)
    (laptop.root / "out").chmod(0o300)
    assert 0 == rehearse(laptop, WITHOUT_ROOT).code
    assert "CONTENT" == (laptop.root / "out/b.txt").read_text()


@pytest.mark.parametrize("mount", ["-o ro", "-o size=4k"])
@needs_root
def test_output_without_room_or_right_to_write_is_refused_before_the_run(
    laptop: Platform, mount: str
) -> None:
    (laptop.root / "out").mkdir()
    fill = "dd if=/dev/zero of=out/full bs=4k count=1 status=none" if "size" in mount else "true"
    script = f'mount -t tmpfs {mount} none out && {fill} && exec "$@"'
    laptop.wrapper = ("unshare", "--mount", "sh", "-c", script, "sh")
    job = rehearse(laptop, "touch ran")
    assert (2, False) == (job.code, (laptop.root / "ran").exists()), job.stderr
    assert re.search("Read-only file system|No space left on device", job.stderr)


@needs_root
def test_output_of_somebody_else_is_refused_before_the_run(laptop: Platform) -> None:
    leave_root(laptop)
    (laptop.root / "out").mkdir()
    job = rehearse(laptop, "touch ran")
    assert (2, False) == (job.code, (laptop.root / "ran").exists())
    assert "--output out: " in job.stderr and "Permission denied" in job.stderr
