"""A task list from S3 to S3 through a user's command, in a separate process."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.platform import NO_INPUTS, NO_OUTPUT, P, Platform, b64j, finish
from tests.support import UNPRIVILEGED_UID, needs_root, poll

GENERAL = "An unexpected error occurred"


def make_zip(**files: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def make_tar(**files: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def test_a_task_runs_from_bucket_to_bucket(platform: Platform) -> None:
    platform.put("in/image.mha", b"pixels")
    platform.script("mkdir $O/images; tr a-z A-Z <$I/sub/image.mha >$O/images/out.mha; echo done")
    job = platform.invoke(platform.task(inputs=[("sub/image.mha", "in/image.mha")]))
    assert 0 == job.code, job.stderr
    assert b"PIXELS" == platform.get("out/t/images/out.mha")
    result = platform.result()
    assert list(result) == [
        "pk",
        "return_code",
        "user_safe_error_message",
        "user_process_last_stderr_lines",
        "exec_duration",
        "invoke_duration",
        "outputs",
        "sagemaker_shim_version",
    ]
    assert ("t", 0, "", [], None) == (
        result["pk"],
        result["return_code"],
        result["user_safe_error_message"],
        result["user_process_last_stderr_lines"],
        result["invoke_duration"],
    )
    assert result["exec_duration"].startswith("PT0.")
    assert result["outputs"] == [
        {
            "relative_path": "images/out.mha",
            "bucket_name": platform.bucket,
            "bucket_key": "out/t/images/out.mha",
            "decompress": False,
        }
    ]
    assert 0 == platform.setup_result()["return_code"]
    assert ["done"] == job.texts(internal=False, task="t", source="stdout", level="INFO")


def test_a_task_may_run_on_every_processor_after_its_inputs_came(platform: Platform) -> None:
    for n in range(30):
        platform.put(f"in/{n}", b"small")
    platform.script("grep Cpus_allowed_list /proc/self/status")
    job = platform.invoke(platform.task(inputs=[(str(n), f"in/{n}") for n in range(30)]))
    (allowed,) = job.texts(internal=False)
    assert allowed in Path("/proc/self/status").read_text().splitlines()


def test_internal_lines_come_in_the_order_that_platforms_know(platform: Platform) -> None:
    platform.script("true")
    texts = platform.invoke(platform.task()).texts(internal=True)
    assert ["Not setting a memory limit", "Invoking the model"] == texts[:2]
    assert "Model invocation complete" in texts


def test_a_memory_limit_is_announced(platform: Platform) -> None:
    platform.set(MAX_MEMORY_MB=512)
    platform.script("ulimit -d")
    job = platform.invoke(platform.task())
    assert "Setting memory limit to 512 MB" == job.texts(internal=True)[0]
    assert [str(512 * 1024)] == job.texts(internal=False)


def test_stderr_lines_are_warnings_and_go_into_the_result(platform: Platform) -> None:
    platform.script("for i in $(seq 150); do echo line $i >&2; done; exit 3")
    job = platform.invoke(platform.task())
    result = platform.result()
    assert (0, 3, "") == (job.code, result["return_code"], result["user_safe_error_message"])
    assert [f"line {i}\n" for i in range(51, 151)] == result["user_process_last_stderr_lines"]
    assert 150 == len(job.texts(internal=False, level="WARNING", source="stderr", task="t"))


def test_the_first_failure_stops_the_list(platform: Platform) -> None:
    platform.script('test "$(cat $I/n)" != 2')
    for number in ("1", "2", "3"):
        platform.put(f"in/{number}", number.encode())
    job = platform.invoke(
        *(platform.task(pk=n, inputs=[("n", f"in/{n}")]) for n in ("1", "2", "3"))
    )
    assert 0 == job.code
    assert "Stopping due to failure of task 2" in job.texts(level="ERROR", internal=True)
    assert (0, 1) == (platform.result("1")["return_code"], platform.result("2")["return_code"])
    assert [] == platform.keys("out/3/")
    assert [] == platform.result("2")["outputs"]


def test_nothing_of_one_task_is_seen_by_the_next(platform: Platform) -> None:
    platform.put("in/a")
    platform.script("ls $I $O; touch $O/left; echo err >&2")
    job = platform.invoke(
        platform.task(pk="1", inputs=[("first", "in/a")]),
        platform.task(pk="2", inputs=[("second", "in/a")]),
    )
    assert ["err\n"] == platform.result("2")["user_process_last_stderr_lines"]
    seen = job.texts(internal=False, task="2", source="stdout")
    assert "second" in seen and "first" not in seen and "left" not in seen


def test_a_zip_is_unpacked_into_the_parent_of_its_path(platform: Platform) -> None:
    platform.put("in/z.zip", make_zip(**{"top/a.txt": "A", "top/b/c.txt": "C"}))
    platform.script("cd $I && find . -type f | sort && cat d/a.txt")
    task = platform.task(inputs=[("d/z.zip", "in/z.zip")])
    task["inputs"][0]["decompress"] = True
    job = platform.invoke(task)
    assert ["./d/a.txt", "./d/b/c.txt", "A"] == job.texts(internal=False)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"no zip", "Input zip file could not be extracted"),
        (make_zip(**{"../up": "x", "in": "y"}), "Zip file contains invalid paths"),
    ],
    ids=["broken", "escaping"],
)
def test_a_bad_zip_is_the_authors_failure(platform: Platform, body: bytes, message: str) -> None:
    platform.put("in/z.zip", body)
    platform.script("true")
    task = platform.task(inputs=[("z.zip", "in/z.zip")])
    task["inputs"][0]["decompress"] = True
    job = platform.invoke(task)
    assert (0, 1) == (job.code, platform.result()["return_code"])
    assert message == platform.result()["user_safe_error_message"]
    assert message == job.texts(level="ERROR", internal=False, task="t")[-1]
    assert platform.result()["exec_duration"] is None


def test_a_prefix_input_is_everything_below_it(platform: Platform) -> None:
    for name in ("a", "b/c", "b/d/e"):
        platform.put(f"case/{name}", name.encode())
    platform.script("cd $I && find . -type f | sort")
    job = platform.invoke(platform.task(inputs=[("in", "case/")]))
    assert ["./in/a", "./in/b/c", "./in/b/d/e"] == job.texts(internal=False)


def test_the_linked_input_is_a_link_to_the_tasks_own_directory(platform: Platform) -> None:
    platform.put("in/a")
    platform.script("readlink $I")
    job = platform.invoke(platform.task(pk="x", inputs=[("a", "in/a")]))
    assert [f"{platform.root}/opt/linked/x-input"] == job.texts(internal=False)


def test_without_a_linked_input_the_directory_is_plain(platform: Platform) -> None:
    platform.set(USE_LINKED_INPUT="false")
    platform.put("in/a")
    platform.script("test ! -L $I && ls $I")
    job = platform.invoke(platform.task(inputs=[("a", "in/a")]))
    assert ["a"] == job.texts(internal=False)


@needs_root
def test_the_command_runs_as_the_images_user(platform: Platform) -> None:
    platform.set(USER=f"{UNPRIVILEGED_UID}:{UNPRIVILEGED_UID}")
    platform.put("in/a")
    platform.script("id -u; id -G; cat $I/a; echo; touch $O/mine; touch $I/b || echo refused")
    job = platform.invoke(platform.task(inputs=[("a", "in/a")]))
    uid = str(UNPRIVILEGED_UID)
    assert [uid, uid, "content", "refused"] == job.texts(internal=False, source="stdout")
    assert ["mine"] == [output["relative_path"] for output in platform.result()["outputs"]]


@needs_root
def test_no_secret_reaches_the_command(platform: Platform) -> None:
    platform.environ["Grand_Challenge_OTHER"] = "secret"
    platform.set(USER=str(UNPRIVILEGED_UID))
    platform.script("env; cat /proc/$PPID/environ | tr '\\0' '\\n'")
    job = platform.invoke(platform.task())
    text = "\n".join(job.texts(internal=False)).lower()
    assert "path=" in text
    assert "grand_challenge" not in text


def test_hidden_and_odd_outputs_are_uploaded_and_nothing_else(platform: Platform) -> None:
    platform.script(
        "cd $O; echo 1 >.hidden; mkdir -p d .sagemaker_shim; echo 2 >'d/a b+c%20é'; mkfifo pipe;"
        " ln -s /etc/passwd leak; ln -s d/'a b+c%20é' inside; echo x >.sagemaker_shim/evil"
    )
    job = platform.invoke(platform.task())
    paths = [output["relative_path"] for output in platform.result()["outputs"]]
    assert [".hidden", "d/a b+c%20é", "inside"] == paths
    assert b"2\n" == platform.get("out/t/d/a b+c%20é") == platform.get("out/t/inside")
    assert [".sagemaker_shim/inference_result.json"] == [
        key.removeprefix("out/t/") for key in platform.keys("out/t/.sagemaker_shim/")
    ]
    warnings = "\n".join(job.texts(level="WARNING", internal=False, task="t"))
    assert all(name in warnings for name in ("pipe", "leak", ".sagemaker_shim"))


def test_a_task_without_inputs_and_outputs_is_told_so_once_each(platform: Platform) -> None:
    platform.put("in/a")
    platform.script("test -e $I/a && touch $O/x; true")
    job = platform.invoke(platform.task("1"), platform.task("2", inputs=[("a", "in/a")]))
    assert [(NO_INPUTS, "1"), (NO_OUTPUT, "1")] == job.remarks


def test_two_objects_for_one_file_are_the_authors_failure(platform: Platform) -> None:
    """The keys differ, the file is one; rclone stores objects as files, and would make them one."""
    platform.put("p/d/x")
    platform.put("in/z.zip", make_zip(x="from the zip"))
    platform.script("echo never")
    task = platform.task(inputs=[("d/z", "in/z.zip"), (".", "p/")])
    task["inputs"][0]["decompress"] = True
    job = platform.invoke(task)
    message = (
        f"Two inputs need one place, 'd/x': s3://{platform.bucket}/in/z.zip and "
        f"s3://{platform.bucket}/p/d/x"
    )
    assert (0, 1, message) == (
        job.code,
        platform.result()["return_code"],
        platform.result()["user_safe_error_message"],
    )
    assert [message] == job.texts(level="ERROR", internal=False, task="t")
    assert "never" not in job.texts()


def test_a_key_that_is_too_long_with_its_prefix_costs_one_output(platform: Platform) -> None:
    """The path has 1,017 bytes, the prefix 9."""
    part = "n" * 203
    platform.script(f"cd $O; echo 1 >a; mkdir -p {'/'.join([part] * 4)}; cd {part}; cd {part}\n"
                    f"cd {part}; cd {part}; echo 2 >{'m' * 201}; echo 3 >ok")  # fmt: skip
    job = platform.invoke(platform.task(output_prefix="out/t/abc"))
    outputs = json.loads(
        platform.get("out/t/abc/.sagemaker_shim/inference_result.json")
    )["outputs"]  # fmt: skip
    assert ["a", "/".join([part] * 4 + ["ok"])] == [item["relative_path"] for item in outputs]
    (warning,) = job.texts(level="WARNING", internal=False, task="t")
    assert "its key would be longer than 1024 bytes" in warning


@pytest.mark.parametrize("size", [1, 17 << 20], ids=["small", "in parts"])
def test_names_that_xml_cannot_hold_are_uploaded(platform: Platform, size: int) -> None:
    platform.command(
        "python3",
        "-c",
        f"for name in ('\\x01', '\\x1b[0m', 'new\\nline', '\\ufffe'):\n"
        f"    open('{platform.root}/output/' + name, 'wb').truncate({size})",
    )
    job = platform.invoke(platform.task())
    assert (0, 0) == (job.code, platform.result()["return_code"]), job.stderr
    outputs = {output["relative_path"] for output in platform.result()["outputs"]}
    assert {"\x01", "\x1b[0m", "new\nline", "\ufffe"} == outputs
    assert size == len(platform.get("out/t/\x01"))


@needs_root
@pytest.mark.parametrize("umask", ["077", "027"])
def test_inputs_and_models_can_be_read_whatever_the_umask(platform: Platform, umask: str) -> None:
    platform.set(USER=str(UNPRIVILEGED_UID), MODEL=f"s3://{platform.bucket}/model.tar.gz")
    platform.put("model.tar.gz", make_tar(**{"weights/a": "W"}))
    platform.put("in/a", b"I")
    platform.put("in/z", make_zip(**{"d/z": "Z", "d/e/z": ""}))
    platform.wrapper = ["sh", "-c", f'umask {umask} && exec "$@"', "sh"]
    platform.script(f"cd $I && cat e/f/a e/z {platform.root}/opt/model/weights/a; echo; umask")
    task = platform.task(inputs=[("e/f/a", "in/a"), ("e/zip", "in/z")])
    task["inputs"][1]["decompress"] = True
    assert ["IZW", f"0{umask}"] == platform.invoke(task).texts(internal=False)


@needs_root
@pytest.mark.parametrize("given", [True, False])
def test_outputs_are_read_with_the_groups_that_the_command_had(
    platform: Platform, given: bool
) -> None:
    """A member of the group could have read the file; without its groups the command could not."""
    for name, line in (("passwd", "member:x:4321:4321::/:/bin/sh"), ("group", "g:x:5432:member")):
        (platform.root / name).write_text(
            f"root:x:0:{'0:root:/:/bin/sh' * (name == 'passwd')}\n{line}\n"
        )
    (held := platform.root / "held").mkdir()
    held.chmod(0o777)
    (held / "f").write_text("of the group")
    (held / "f").chmod(0o640)
    os.chown(held / "f", 0, 5432)
    mounts = " && ".join(f"mount --bind {platform.root}/{n} /etc/{n}" for n in ("passwd", "group"))
    platform.wrapper = ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh"]
    platform.set(USER="member", SET_EXTRA_GROUPS=given)
    platform.script(f"cat {held}/f; mv {held}/f $O/f; echo x >$O/own")
    job = platform.invoke(platform.task())
    if "unshare" in job.stderr:
        pytest.skip("needs the right to make mount namespaces")
    outputs = [output["relative_path"] for output in platform.result()["outputs"]]
    assert (["f", "own"] if given else ["own"]) == outputs
    assert given == ("of the group" in job.stdout)


def test_the_time_limit_ends_the_task(platform: Platform) -> None:
    platform.script("echo begun; touch $O/half; sleep 60")
    job = platform.invoke(platform.task(timeout=0.5))
    result = platform.result()
    assert (0, 1, "Time limit exceeded", []) == (
        job.code,
        result["return_code"],
        result["user_safe_error_message"],
        result["outputs"],
    )
    assert "Time limit exceeded" == job.texts(level="ERROR", internal=False, task="t")[-1]


def test_a_time_limit_of_zero_starts_nothing(platform: Platform) -> None:
    platform.script("echo never")
    job = platform.invoke(platform.task(timeout=0))
    assert "Time limit exceeded" == platform.result()["user_safe_error_message"]
    assert platform.result()["exec_duration"] is None
    assert "never" not in job.texts(internal=False)


def test_no_time_limit_is_needed(platform: Platform) -> None:
    platform.script("true")
    task = platform.task()
    del task["timeout"]
    platform.invoke(task)
    assert 0 == platform.result()["return_code"]


def test_a_signal_that_ended_the_command_is_negative(platform: Platform) -> None:
    platform.script("kill -SEGV $$")
    platform.invoke(platform.task())
    assert -signal.SIGSEGV == platform.result()["return_code"]


@pytest.mark.parametrize(
    ("script", "return_code", "expected"),
    [
        ("kill -SEGV $$", -11, ["The algorithm was ended by signal 11 (SIGSEGV)"]),
        ("kill -KILL $$", -9, ["The algorithm was ended by signal 9 (SIGKILL)"]),
        ("kill -TERM $$", -15, ["The algorithm was ended by signal 15 (SIGTERM)"]),
        ("kill -34 $$", -34, ["The algorithm was ended by signal 34 (SIGRTMIN)"]),
        ("kill -35 $$", -35, ["The algorithm was ended by signal 35"]),
        ("sh -c 'kill -ABRT $$'", 134, ["What the algorithm ran was ended by signal 6 (SIGABRT)"]),
        ("exit 143", 143, []),
        ("exit 128", 128, []),
        ("exit 255", 255, []),
    ],
)
def test_the_signal_that_ended_the_command_is_named(
    platform: Platform, script: str, return_code: int, expected: list[str]
) -> None:
    platform.script(script)
    job = platform.invoke(platform.task())
    result = platform.result()
    assert (return_code, "") == (result["return_code"], result["user_safe_error_message"])
    assert expected == job.texts(level="ERROR", internal=False, task="t")


@needs_root
def test_setuid_programs_give_nothing_unless_the_platform_allows_it(platform: Platform) -> None:
    if os.statvfs(platform.root).f_flag & os.ST_NOSUID:
        pytest.skip("needs a file system without nosuid")
    shutil.copy("/bin/cat", platform.root / "cat")
    (platform.root / "cat").chmod(0o4755)
    secret = platform.root / "secret"
    secret.write_text("secret")
    secret.chmod(0o600)
    platform.set(USER=str(UNPRIVILEGED_UID))
    platform.script(f"{platform.root}/cat {secret}")
    assert [] == platform.invoke(platform.task()).texts(level="INFO", internal=False)
    assert 1 == platform.result()["return_code"]
    platform.set(NO_NEW_PRIVILEGES="False")
    job = platform.invoke(platform.task())
    assert (0, ["secret"]) == (job.code, job.texts(level="INFO", internal=False))


@needs_root
def test_a_full_shared_memory_is_named(platform: Platform) -> None:
    write = "with open('/dev/shm/x','wb') as f: f.truncate(1 << 26)\nimport mmap\n"
    write += "with open('/dev/shm/x','r+b') as f:\n m = mmap.mmap(f.fileno(), 0)\n"
    write += " for i in range(0, 1 << 26, 4096): m[i] = 1\n"
    (platform.root / "fill.py").write_text(write)
    platform.script(f"exec /usr/bin/env python3 {platform.root}/fill.py")
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    platform.wrapper = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    job = platform.invoke(platform.task())
    if "unshare" in job.stderr:
        pytest.skip("needs the right to make mount namespaces")
    assert -signal.SIGBUS == platform.result()["return_code"]
    assert "/dev/shm holds at most 1 MiB" in "".join(job.texts(level="ERROR", internal=False))


def on_small_disks(platform: Platform, **options: str) -> None:
    """Mount tmpfs with options at the directories of a job, in a namespace of its own."""
    mounts = []
    for name, option in options.items():
        (platform.root / name).mkdir(exist_ok=True)
        mounts.append(f"mount -t tmpfs -o mode=0777,{option} none {platform.root}/{name}")
    platform.wrapper = ["unshare", "--mount", "sh", "-c", f'{" && ".join(mounts)} && exec "$@"']
    platform.wrapper += ["sh"]
    if platform.run("--version").code:
        pytest.skip("needs the right to make mount namespaces")


FILL = {
    "bytes": "head -c 100m /dev/zero >{}/fill",
    "inodes": "python3 -c \"for n in range(10**6): open('{}/%s' % n, 'w')\"",
}


@needs_root
@pytest.mark.parametrize(
    ("option", "what"), [("size=3m", FILL["bytes"]), ("nr_inodes=400", FILL["inodes"])], ids=FILL
)
def test_a_task_that_fills_every_disk_is_followed_by_another(
    platform: Platform, option: str, what: str
) -> None:
    """All that it wrote to its output is uploaded; nothing of it is in the way of the next."""
    on_small_disks(platform, input=option, output=option, tmp=option)
    platform.put("in/a", b"I")
    fill = "; ".join(what.format(place) for place in ("$O", "$I", f"{platform.root}/tmp"))
    platform.script(f"test -e $I/second || {{ {fill}; }} 2>$I/err; ls $O >&2; exit 0")
    job = platform.invoke(
        platform.task("1", inputs=[("first", "in/a")]),
        platform.task("2", inputs=[("second", "in/a")]),
    )
    assert (0, 0, 0) == (
        job.code,
        platform.result("1")["return_code"],
        platform.result("2")["return_code"],
    )
    assert len(platform.result("1")["outputs"]) >= (1 if "size" in option else 300)
    assert [] == platform.result("2")["outputs"]
    assert [] == platform.result("2")["user_process_last_stderr_lines"]


@needs_root
@pytest.mark.parametrize("is_zip", [False, True])
@pytest.mark.parametrize("option", ["size=1m", "nr_inodes=2"])
def test_inputs_that_do_not_fit_leave_a_signed_result(
    platform: Platform, option: str, is_zip: bool
) -> None:
    on_small_disks(platform, input=option)
    if is_zip:
        platform.put("in/z", make_zip(a=" " * 3_000_000, **{"d/b": "", "e/c": ""}))
    else:
        platform.put("in/z", bytes(3_000_000))
    platform.script("echo never")
    task = platform.task(inputs=[("z/z" if is_zip else "d/e/z", "in/z")])
    task["inputs"][0]["decompress"] = is_zip
    job = platform.invoke(task)
    found = job.code, platform.result()["return_code"], platform.result()["user_safe_error_message"]
    assert found == (
        (0, 1, "Contents of zip file too large")
        if is_zip and "size" in option
        else (1, 1, "The inputs of the task could not be downloaded")
    )
    assert "never" not in job.texts()


NOT_FOUND = "The command defined by the containers ENTRYPOINT and CMD instructions does not exist"
NOT_PERMITTED = (
    "The user defined in the containers USER instruction does not have permission to execute "
    "the command defined by the containers ENTRYPOINT and CMD instructions"
)


def test_a_command_that_does_not_exist_is_said_so(platform: Platform) -> None:
    platform.command("/no/such/command")
    job = platform.invoke(platform.task())
    result = platform.result()
    assert (0, 1, NOT_FOUND) == (job.code, result["return_code"], result["user_safe_error_message"])
    assert result["exec_duration"] is None
    assert ["The command '/no/such/command' does not exist", NOT_FOUND] == job.texts(
        level="ERROR", internal=False, task="t"
    )


def test_a_command_that_may_not_be_run_is_said_so(platform: Platform) -> None:
    (platform.root / "file").write_text("#!/bin/sh\n")
    platform.command(f"{platform.root}/file")
    job = platform.invoke(platform.task())
    assert f"The file '{platform.root}/file' is not executable" in "".join(job.texts(task="t"))
    assert NOT_PERMITTED == platform.result()["user_safe_error_message"]


def test_a_user_that_does_not_exist_is_said_so(platform: Platform) -> None:
    platform.set(USER="nosuchuser")
    platform.script("true")
    platform.invoke(platform.task())
    assert (
        "The user defined in the containers USER instruction does not exist"
        == platform.result()["user_safe_error_message"]
    )


@pytest.mark.parametrize("nothing", [None, []], ids=["null", "empty"])
def test_an_image_without_a_command_fails_at_setup(platform: Platform, nothing: object) -> None:
    platform.set(ENTRYPOINT_B64J=b64j(nothing), CMD_B64J=b64j(nothing))
    job = platform.invoke(platform.task())
    setup = platform.setup_result()
    assert (0, 1) == (job.code, setup["return_code"])
    assert setup["user_safe_error_message"] in job.texts(level="ERROR", internal=False)
    assert [] == platform.keys("out/")


def test_a_missing_input_leaves_a_result_and_exits_with_1(platform: Platform) -> None:
    platform.script("echo never")
    job = platform.invoke(platform.task(inputs=[("a", "in/missing")]))
    result = platform.result()
    assert (1, 1, [], None) == (
        job.code,
        result["return_code"],
        result["outputs"],
        result["exec_duration"],
    )
    assert "could not be downloaded" in result["user_safe_error_message"]
    assert "never" not in job.texts(internal=False)
    errors = "\n".join(job.texts(level="ERROR", internal=True))
    assert "An error occurred (404) when calling the HeadObject operation: Not Found" in errors
    assert "in/missing" in errors


def test_a_stop_leaves_a_result_and_exits_with_the_signal(platform: Platform) -> None:
    platform.script("touch $O/begun; trap '' TERM; sleep 60; sleep 60")
    process = platform.start("invoke", "-t", json.dumps([platform.task(), platform.task("2")]))
    poll((platform.root / "output/begun").exists)
    process.send_signal(signal.SIGTERM)
    job = finish(process, seconds=20)
    result = platform.result()
    assert (128 + signal.SIGTERM, 1, "The task was stopped before it finished") == (
        job.code,
        result["return_code"],
        result["user_safe_error_message"],
    )
    assert [] == platform.keys("out/2/")
    assert [] == list((platform.root / "output").iterdir())


def test_model_and_ground_truth_are_unpacked_before_the_first_task(platform: Platform) -> None:
    platform.put("model.tar.gz", make_tar(**{"weights/a": "W"}))
    platform.put("truth.tar.gz", make_tar(b="T"))
    platform.set(
        MODEL=f"s3://{platform.bucket}/model.tar.gz",
        GROUND_TRUTH=f"s3://{platform.bucket}/truth.tar.gz",
    )
    platform.script(f"cd {platform.root}/opt; cat model/weights/a ground_truth/b; echo")
    job = platform.invoke(platform.task())
    assert ["WT"] == job.texts(internal=False)
    assert [] == list((platform.root / "opt/model").iterdir())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"no tar", "Could not set up model: Tarfile could not be extracted"),
        (make_tar(**{"../up": "x"}), "Could not set up model: Tarfile could not be extracted"),
        (None, "Could not set up model: Tarfile could not be downloaded"),
    ],
    ids=["broken", "escaping", "missing"],
)
def test_a_bad_model_is_a_setup_failure_with_a_message(
    platform: Platform, body: bytes | None, message: str
) -> None:
    if body is not None:
        platform.put("model.tar.gz", body)
    platform.set(MODEL=f"s3://{platform.bucket}/model.tar.gz")
    platform.script("true")
    job = platform.invoke(platform.task())
    setup = platform.setup_result()
    assert (0, 1, message) == (job.code, setup["return_code"], setup["user_safe_error_message"])
    assert message in job.texts(level="ERROR", internal=False, task=None)
    assert [] == platform.keys("out/")


def test_a_runtime_result_without_a_place_is_skipped(platform: Platform) -> None:
    del platform.environ[f"{P}RUNTIME_OUTPUT_PREFIX"]
    del platform.environ[f"{P}RUNTIME_OUTPUT_BUCKET_NAME"]
    platform.script("true")
    job = platform.invoke(platform.task())
    assert 0 == platform.result()["return_code"]
    assert any("skipped" in text for text in job.texts(internal=True))


@pytest.mark.parametrize("source", ["s3", "https", "local", "stdin", "prefix"])
def test_the_list_is_read_from(platform: Platform, source: str) -> None:
    platform.script("true")
    tasks = [platform.task("1"), platform.task("2")]
    text = json.dumps(tasks)
    platform.put("lists/tasks.json", text.encode())
    (platform.root / "tasks.json").write_text(text)
    platform.put("many/1.json", json.dumps(tasks[:1]).encode())
    platform.put("many/2.json", json.dumps(tasks[1:]).encode())
    platform.put("many/readme.txt", b"no JSON")
    file = {
        "s3": f"s3://{platform.bucket}/lists/tasks.json",
        "https": f"https://{platform.bucket}/lists/tasks.json",
        "local": str(platform.root / "tasks.json"),
        "stdin": "-",
        "prefix": f"s3://{platform.bucket}/many/",
    }[source]
    job = platform.run("invoke", "-f", file, stdin=text)
    assert 0 == job.code, job.stderr
    assert [0, 0] == [platform.result(pk)["return_code"] for pk in ("1", "2")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "One of tasks or file should be set"),
        (["-t", "[]", "-f", "x"], "Only one of tasks or file should be set"),
        (["-t", "[]"], "Empty task list provided"),
        (["-t", "[{}]"], "The tasks definition is invalid"),
        (["-t", "[{}"], "The tasks definition is invalid"),
        (["-f", "/no/such/file"], "The value provided for file is invalid"),
        (["-f", "s3://bucket/missing.json"], "The value provided for file is invalid"),
        (["-f", "s3:///missing"], "The value provided for file is invalid"),
        (["--no-such-option"], "unrecognized arguments"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_usage_errors_exit_with_2(platform: Platform, arguments: list[str], message: str) -> None:
    platform.script("true")
    arguments = [
        argument.replace("s3://bucket", f"s3://{platform.bucket}") for argument in arguments
    ]
    job = platform.run("invoke", *arguments)
    assert 2 == job.code
    assert message in job.stderr
    assert "Traceback" not in job.stderr
    assert [] == platform.keys("runtime/") + platform.keys("out/")


def test_every_problem_of_a_list_is_told_with_its_path(platform: Platform) -> None:
    bad = platform.task(pk="../evil", timeout="10s", inputs=[("/abs", "k")])
    bad["inputs"][0]["bucket_name"] = "no bucket!"
    job = platform.run("invoke", "-t", json.dumps([platform.task(), bad]))
    assert 2 == job.code
    for path in (
        "[1].pk: ",
        "[1].timeout: ",
        "[1].inputs[0].relative_path: ",
        "[1].inputs[0].bucket_name: Invalid bucket name",
    ):
        assert path in job.stderr


def test_every_bad_variable_is_told_at_once(platform: Platform) -> None:
    platform.set(ASYNC_CONCURRENCY=0, SIGNING_KEY_HEX="xyz-secret", MAX_MEMORY_MB="much")
    job = platform.invoke(platform.task())
    assert 2 == job.code
    for name in ("ASYNC_CONCURRENCY", "SIGNING_KEY_HEX", "MAX_MEMORY_MB"):
        assert P + name in job.stderr
    assert "xyz-secret" not in job.stderr + job.stdout
    assert "Traceback" not in job.stderr


def test_a_bad_variable_leaves_a_setup_result_where_one_can_be_written(platform: Platform) -> None:
    platform.set(MAX_MEMORY_MB="much")
    job = platform.invoke(platform.task())
    assert (2, 1) == (job.code, platform.setup_result()["return_code"])


def test_a_long_line_is_passed_on_in_pieces(platform: Platform) -> None:
    platform.script("head -c 1000000 /dev/zero | tr '\\0' x; printf '\\377\\n'")
    job = platform.invoke(platform.task())
    assert max(map(len, job.stdout.splitlines(keepends=True))) <= 16383
    assert "x" * 1000000 + "\ufffd" == "".join(job.texts(internal=False, source="stdout"))


def test_a_child_that_holds_the_pipe_does_not_hold_the_task(platform: Platform) -> None:
    platform.script("(setsid sleep 60 &) ; echo out")
    job = platform.invoke(platform.task())
    assert (0, 0) == (job.code, platform.result()["return_code"])
    assert ["out"] == job.texts(internal=False)


def test_log_level_hides_internal_lines_only(platform: Platform) -> None:
    platform.environ["LOG_LEVEL"] = "ERROR"
    platform.script("echo shown")
    job = platform.invoke(platform.task())
    assert ["shown"] == job.texts()


def test_version_and_help_print_only_themselves(platform: Platform) -> None:
    version = platform.run("--version")
    assert (0, "", True) == (
        version.code,
        version.stderr,
        version.stdout.startswith("sagemaker-shim "),
    )
    help_text = platform.run("--help")
    assert (0, "") == (help_text.code, help_text.stderr)
    assert all(name in help_text.stdout for name in ("serve", "invoke", "run"))


def test_a_result_that_cannot_be_left_exits_with_1(platform: Platform) -> None:
    platform.script("true")
    job = platform.invoke(platform.task(output_bucket_name="no-such-bucket"))
    assert 1 == job.code
    assert any("no-such-bucket" in text for text in job.texts(level="ERROR", internal=True))


def test_everything_the_shim_writes_is_json(platform: Platform) -> None:
    platform.environ["LOG_LEVEL"] = "DEBUG"
    platform.put("in/a")
    platform.script("echo out; echo err >&2; exit 1")
    job: Any = platform.invoke(platform.task(inputs=[("a", "in/a")]))
    for line in job.lines:
        assert ["log", "level", "source", "internal", "task"] == list(line)
