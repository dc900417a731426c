"""Between its own downloads and uploads the shim runs broken and hostile code: what that may do."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from shim.cli import COMMAND_SIGNALS, NO_THREADS_MESSAGE, STOP_SIGNALS
from tests.e2e.platform import SIGNING_KEY, Finished, P, Platform, finish
from tests.e2e.test_serve import serving
from tests.support import (
    STORM,
    UNPRIVILEGED_UID,
    can_unshare,
    free_port,
    needs_root,
    poll,
    signal_set,
)

STOPPED = "The task was stopped before it finished"


needs_namespaces = pytest.mark.skipif(
    not can_unshare(), reason="needs util-linux's unshare and the right to make PID namespaces"
)
AS_PID_1 = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]


@pytest.fixture(params=["ordinary", pytest.param("pid-1", marks=needs_namespaces)])
def supervised(platform: Platform, request: pytest.FixtureRequest) -> Platform:
    """A platform whose shim is an ordinary process, then one where it is PID 1."""
    if request.param == "pid-1":
        platform.wrapper = AS_PID_1
    return platform


def marked(mark: str) -> Iterator[int]:
    """Yield the processes that have a mark in their arguments."""
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (directory / "cmdline").read_bytes():
                yield int(directory.name)


LEFT_BEHIND = {
    "background": "sleep {mark} &",
    "daemon": "setsid sleep {mark} & ",
    "double-fork": "(setsid sh -c '(sleep {mark} &) ; sleep {mark} &' &)",
    "deaf": "(trap '' TERM HUP INT; setsid sh -c 'trap \"\" TERM; sleep {mark}' &)",
    "holding-the-pipe": "(setsid sh -c 'sleep {mark}; echo late' &)",
}


@pytest.mark.parametrize("script", LEFT_BEHIND.values(), ids=LEFT_BEHIND)
def test_nothing_of_a_task_survives_it(supervised: Platform, script: str) -> None:
    mark = f"600.{os.getpid()}{time.monotonic_ns() % 10**6}"
    supervised.script(script.format(mark=mark) + "\nsleep 0.2; echo x >$O/x")
    job = supervised.invoke(supervised.task())
    assert (0, 0) == (job.code, supervised.result()["return_code"])
    assert [] == list(marked(mark))
    assert any("left behind" in text for text in job.texts(internal=True))


def test_a_writer_does_not_reach_the_next_task(supervised: Platform) -> None:
    supervised.put("in/1", b"1")
    supervised.put("in/2", b"2")
    supervised.script(
        "if grep -q 1 $I/n; then"
        " setsid sh -c 'trap \"\" TERM; while :; do echo leak >'$O'/leak; done' & sleep 0.2;"
        " else sleep 0.3; ls $O; fi"
    )
    job = supervised.invoke(
        supervised.task("1", inputs=[("n", "in/1")]), supervised.task("2", inputs=[("n", "in/2")])
    )
    assert 0 == job.code
    assert [] == supervised.result("2")["outputs"]
    assert [] == job.texts(internal=False, task="2")


def test_a_thousand_orphans_are_reaped(supervised: Platform) -> None:
    supervised.script("for i in $(seq 1000); do (true &) ; done; echo done")
    job = supervised.invoke(supervised.task())
    assert (0, ["done"]) == (job.code, job.texts(internal=False))


@needs_root
def test_a_fork_bomb_under_a_limit_is_ended(supervised: Platform) -> None:
    supervised.set(USER="54321")
    # `ulimit -u` counts the processes of the user, who has none but these.
    supervised.command("/bin/bash", "-c", "ulimit -u 100; b() { b | b & }; b 2>/dev/null; sleep 60")
    job = supervised.invoke(supervised.task(timeout=1))
    assert (0, "Time limit exceeded") == (
        job.code,
        supervised.result()["user_safe_error_message"],
    )
    owned = [d for d in Path("/proc").glob("[0-9]*") if d.exists() and d.stat().st_uid == 54321]
    assert [] == owned


BELOW_INIT = [*AS_PID_1, "sh", "-c", '"$@"; exit $?', "init"]


@needs_root
@needs_namespaces
@pytest.mark.parametrize("wrapper", [AS_PID_1, BELOW_INIT], ids=["pid-1", "below-an-init"])
def test_a_storm_of_forks_does_not_reach_the_next_task(
    platform: Platform, wrapper: list[str]
) -> None:
    uid = 54322
    platform.wrapper = wrapper
    platform.set(USER=uid)
    storm = platform.root / "storm.py"
    storm.write_text(STORM)
    platform.put("in/1", b"1")
    platform.put("in/2", b"2")
    platform.script(
        f"if grep -q 1 $I/n; then exec /usr/bin/python3 -ISE {storm}; fi;"
        f" stat -c %u /proc/[0-9]* 2>/dev/null | grep -c '^{uid}$'"
    )
    job = platform.invoke(
        platform.task("1", inputs=[("n", "in/1")]), platform.task("2", inputs=[("n", "in/2")])
    )
    assert (0, 0, 0) == (
        job.code,
        platform.result("1")["return_code"],
        platform.result("2")["return_code"],
    )
    (living,) = job.texts(internal=False, task="2")
    assert int(living) < 10  # the shell, and what it counts with
    assert [] == list(marked(str(storm)))


@pytest.fixture
def survivor(platform: Platform) -> Iterator[str]:
    """A platform whose task leaves a process that its shim cannot end: a root's, of a user's shim.

    The fixture's value is the process's mark.
    """
    mark = f"survivor-{os.getpid()}-{time.monotonic_ns()}"
    program = "import os, time; os.setresuid(0, 0, 0); print(1, flush=True); time.sleep(600)"
    python = platform.root / "python"
    platform.script(
        f"setsid {python} -ISEc {program!r} {mark} >$O/ready &"
        " until test -s $O/ready; do sleep 0.05; done; exit 0"
    )
    platform.set(NO_NEW_PRIVILEGES=False, WRITABLE_DIRECTORIES="")
    platform.leave_root()
    shutil.copy("/usr/bin/python3", python)
    python.chmod(0o4755)
    yield mark
    for pid in marked(mark):
        os.kill(pid, signal.SIGKILL)


SURVIVORS = "Processes of the task could not be ended"


@needs_root
def test_who_cannot_be_ended_fails_the_task(platform: Platform, survivor: str) -> None:
    job = platform.invoke(platform.task("1"), platform.task("2"))
    assert 1 == len(list(marked(survivor)))
    result = platform.result("1")
    assert (0, 1, SURVIVORS) == (
        job.code,
        result["return_code"],
        result["user_safe_error_message"],
    )
    assert ["out/1/.sagemaker_shim/inference_result.json"] == platform.keys("out/")
    assert SURVIVORS in job.texts(internal=False, level="ERROR")
    (pid,) = marked(survivor)
    assert f"{SURVIVORS}: at least 1, with the pids {pid}" in job.texts(internal=True)


@needs_root
def test_who_cannot_be_ended_ends_the_server(platform: Platform, survivor: str) -> None:
    with serving(platform) as server:
        status, result = server.invoke(platform.task())
        assert (200, SURVIVORS) == (status, result["user_safe_error_message"])
        poll(lambda: server.process.poll() is not None, seconds=20)
        assert 0 == finish(server.process).code


@pytest.fixture
def crowded(platform: Platform, request: pytest.FixtureRequest) -> Iterator[Platform]:
    """A platform whose shim may have but a few processes and threads, with all that it starts."""
    limit = request.param
    cgroup = Path("/sys/fs/cgroup/pids", f"shim-test-{os.getpid()}-{limit}")
    try:
        cgroup.mkdir()
        (cgroup / "pids.max").write_text(str(limit))
    except OSError:
        pytest.skip("needs the cgroup v1 of pids, and the right to use it")
    platform.wrapper = ["sh", "-c", f'echo $$ >{cgroup}/cgroup.procs; exec "$@"', "sh"]
    yield platform
    poll(lambda: not (cgroup / "cgroup.procs").read_text())
    cgroup.rmdir()


@needs_root
@pytest.mark.parametrize("crowded", [1], indirect=True)
def test_without_room_for_a_thread_it_says_so(crowded: Platform) -> None:
    job = crowded.invoke(crowded.task())
    assert (1, [NO_THREADS_MESSAGE]) == (job.code, job.texts())


@needs_root
@pytest.mark.parametrize("crowded", range(2, 8), indirect=True)
def test_a_task_without_room_for_processes_runs_or_says_so(crowded: Platform) -> None:
    crowded.put("in/x")
    crowded.set(USER=str(UNPRIVILEGED_UID))
    crowded.command("/bin/true")
    job = crowded.invoke(crowded.task(inputs=[("x", "in/x")]))
    result = crowded.result()
    message = result["user_safe_error_message"]
    assert (0, True) == (job.code, "no room for another process" in message or not message)
    assert (result["return_code"] == 0) == (message == "")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_task_in_order(supervised: Platform, signum: signal.Signals) -> None:
    supervised.script("trap 'echo asked; exit 0' TERM; touch $O/begun; sleep 60 & wait")
    process = supervised.start("invoke", "-t", json.dumps([supervised.task()]))
    poll((supervised.root / "output/begun").exists)
    os.kill(shim_pid(process), signum)
    job = finish(process, seconds=20)
    assert (128 + signum, STOPPED) == (job.code, supervised.result()["user_safe_error_message"])
    assert "asked" in job.texts(internal=False)


def test_a_second_signal_cuts_the_grace(supervised: Platform) -> None:
    supervised.set(SIGTERM_GRACE_SECONDS=60)
    supervised.script("trap 'touch $O/asked' TERM; touch $O/begun; while :; do sleep 0.1; done")
    process = supervised.start("invoke", "-t", json.dumps([supervised.task()]))
    output = supervised.root / "output"
    poll((output / "begun").exists)
    os.kill(shim_pid(process), signal.SIGTERM)
    poll((output / "asked").exists)
    os.kill(shim_pid(process), signal.SIGTERM)
    assert 128 + signal.SIGTERM == finish(process, seconds=20).code
    assert STOPPED == supervised.result()["user_safe_error_message"]


def test_a_signal_ends_a_download_that_hangs(supervised: Platform) -> None:
    """A port that accepts and never answers stands for a bucket that hangs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        supervised.environ["AWS_S3_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
        process = supervised.start("invoke", "-f", f"s3://{supervised.bucket}/tasks.json")
        connection, _ = server.accept()
        with connection:
            os.kill(shim_pid(process), signal.SIGTERM)
            began = time.monotonic()
            assert 128 + signal.SIGTERM == finish(process, seconds=25).code
            assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "signum",
    sorted(STOP_SIGNALS - {signal.SIGTERM, signal.SIGINT}),
)
def test_whatever_else_would_end_us_stops_the_task_too(
    platform: Platform, signum: signal.Signals
) -> None:
    platform.script("touch $O/begun; sleep 60")
    platform.wrapper = ("env", "--default-signal")  # a shell ignores some for what it starts by &
    process = platform.start("invoke", "-t", json.dumps([platform.task()]))
    poll((platform.root / "output/begun").exists)
    process.send_signal(signum)
    assert 128 + signum == finish(process, seconds=20).code
    assert STOPPED == platform.result()["user_safe_error_message"]


@pytest.mark.parametrize("signum", [signal.SIGPIPE, signal.SIGXFSZ])
def test_what_a_write_can_bring_upon_us_stops_nothing(
    platform: Platform, signum: signal.Signals
) -> None:
    platform.script("touch $O/begun; while ! test -e $O/go; do sleep 0.05; done")
    process = platform.start("invoke", "-t", json.dumps([platform.task()]))
    poll((platform.root / "output/begun").exists)
    os.kill(shim_pid(process), signum)
    time.sleep(0.2)
    (platform.root / "output/go").touch()
    assert 0 == finish(process, seconds=20).code
    assert 0 == platform.result()["return_code"]


COMMAND = """
import os, signal, sys
child = os.fork()
mark = lambda name: open(f"{sys.argv[1]}/{name}", "w").close()
for number in map(int, sys.argv[2:]):
    signal.signal(number, lambda n, _: mark(f"{n}-{'parent' if child else 'child'}"))
if not child:
    while True:
        signal.pause()
mark("begun")
wanted = {f"{n}-parent" for n in sys.argv[2:]}
while not wanted <= set(os.listdir(sys.argv[1])):
    signal.sigtimedwait([], 0.05)
"""


def test_a_signal_for_the_command_reaches_it_alone(supervised: Platform) -> None:
    """As the engine that started the image would have sent it to the first process alone."""
    signals = sorted(COMMAND_SIGNALS)
    output = supervised.root / "output"
    numbers = [str(int(signum)) for signum in signals]
    supervised.command(sys.executable, "-c", COMMAND, str(output), *numbers)
    process = supervised.start("invoke", "-t", json.dumps([supervised.task()]))
    poll((output / "begun").exists)
    for signum in signals:
        os.kill(shim_pid(process), signum)
    job = finish(process, seconds=20)
    assert (0, 0) == (job.code, supervised.result()["return_code"])
    received = {output["relative_path"] for output in supervised.result()["outputs"]} - {"begun"}
    assert {f"{number}-parent" for number in numbers} == received


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGWINCH, signal.SIGRTMAX])
def test_a_signal_for_no_command_changes_nothing(
    platform: Platform, signum: signal.Signals
) -> None:
    process = platform.start("invoke", "-f", "-", stdin=subprocess.PIPE)
    poll(lambda: takes_signals(shim_pid(process)))
    os.kill(shim_pid(process), signum)
    job = finish(process, stdin="[]", seconds=20)
    assert 2 == job.code
    assert "Empty task list provided" in job.stderr


def blocked_signals(pid: int) -> set[int]:
    status = Path(f"/proc/{pid}/status").read_text()
    return signal_set(status.partition("SigBlk:")[2].split()[0])


def takes_signals(pid: int) -> bool:
    """Tell whether a shim has a thread that waits for those signals alone that are for it."""
    blocked = blocked_signals(pid)
    return signal.SIGTERM in blocked and signal.SIGTSTP not in blocked


# What a shim that is stopped may leave with; -SIGTERM before Python has run anything of ours.
@pytest.mark.parametrize("command", ["serve", "invoke", "--help"])
def test_no_signal_at_any_moment_gives_another_exit_code(platform: Platform, command: str) -> None:
    """Two in a row, at the start, while idle and above all in the last milliseconds."""
    platform.environ.pop(f"{P}RUNTIME_OUTPUT_BUCKET_NAME")
    platform.script("exec sleep 0.05")
    arguments = {
        "serve": ["serve", "--port", str(free_port())],
        "invoke": ["invoke", "-t", json.dumps([platform.task()])],
        "--help": ["--help"],
    }[command]
    allowed = {"serve": {0}, "invoke": {0, 143, 130}, "--help": {0}}[command]
    codes = []
    generator = random.Random(12)
    for _ in range(25):
        process = platform.start(*arguments)
        poll(lambda process=process: signal.SIGTERM in blocked_signals(process.pid), every=0.001)
        time.sleep(generator.uniform(0, 0.2 if command != "--help" else 0.02))
        while process.poll() is None:
            process.send_signal(generator.choice([signal.SIGTERM, signal.SIGINT]))
            time.sleep(generator.uniform(0, 0.02))
        process.communicate()
        codes.append(process.returncode)
    assert set() == set(codes) - allowed


def test_a_signal_ends_the_wait_for_standard_input(supervised: Platform) -> None:
    process = supervised.start("invoke", "-f", "-", stdin=subprocess.PIPE)
    assert process.stdout and process.stdin
    process.stdin.write("[")
    process.stdin.flush()
    pipe = process.stdin.fileno()
    poll(lambda: fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)) == bytes(4))  # it has been read
    os.kill(shim_pid(process), signal.SIGTERM)
    assert 128 + signal.SIGTERM == process.wait(timeout=20)  # with its input still open
    process.communicate()


def test_time_limits_of_a_month_are_time_limits(platform: Platform) -> None:
    platform.script("true")
    platform.invoke(platform.task(timeout="P1M"))
    assert 0 == platform.result()["return_code"]


def shim_pid(process: subprocess.Popen[str]) -> int:
    """Return the shim's pid here: unshare's child's, where that is its parent."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    is_wrapped = b"unshare" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    return int(children[0]) if is_wrapped else process.pid


# Ways to the signing key that a user of the image could try; all of them as that user.
THEFTS = {
    "environment": "env",
    "parent": "cat /proc/$PPID/environ /proc/1/environ",
    "everybody": "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline",
    "memory": "for p in $PPID 1; do head -c 4096 /proc/$p/mem /proc/$p/maps; done",
    "descriptors": "for f in /proc/self/fd/* /proc/$PPID/fd/*; do test $f -ef /dev/stdin ||"
    " timeout 1 head -c 4096 $f; done </dev/null",
    "core": "ulimit -c unlimited; kill -QUIT $PPID; kill -ABRT $PPID; cat core* /core*",
    "ptrace": "strace -p $PPID -o /dev/stdout & gdb -p $PPID -batch & sleep 0.3; kill %1 %2",
    "link": "ln -s /proc/$PPID/environ $O/a; ln -s /proc/1/environ $O/b; ln /etc/shadow $O/c",
    "directory": "ln -s /proc $O/proc; ln -s / $O/root",
}


@needs_root
@pytest.mark.parametrize("theft", THEFTS.values(), ids=THEFTS)
def test_the_images_user_cannot_read_the_signing_key(supervised: Platform, theft: str) -> None:
    supervised.environ["LOG_LEVEL"] = "DEBUG"
    supervised.set(USER=str(UNPRIVILEGED_UID))
    supervised.script(f"({theft}) 2>&1; true")
    job = supervised.invoke(supervised.task())
    assert (0, 0) == (job.code, supervised.result()["return_code"])
    uploaded = b"".join(supervised.get(key) for key in supervised.keys("out/"))
    for text in (job.stdout, job.stderr, uploaded.decode(errors="replace")):
        assert SIGNING_KEY.hex() not in text
        assert "root:" not in text


# The same by a user who is the shim's own.
SEARCH = """
import os, re, sys
found, opened = 0, 0
for pid in filter(str.isdigit, os.listdir("/proc")):
    if int(pid) == os.getpid():
        continue
    try:
        with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
            opened += 1
            for start, end in re.findall("^(\\w+)-(\\w+) r", maps.read(), re.M):
                try:
                    memory.seek(int(start, 16))
                    content = memory.read(int(end, 16) - int(start, 16))
                    found += bytes.fromhex(sys.argv[1][::-1]) in content
                except (OSError, ValueError):
                    pass
    except OSError:
        pass
print(f"searched {opened} processes, found {found}")
"""
OWN_THEFTS = {
    **{name: theft for name, theft in THEFTS.items() if name != "core"},  # which stops a shim
    "open files": "ls -l /proc/$PPID/fd/ | grep .",
    "attached": "strace -p $PPID -o /dev/stdout & sleep 0.3; kill %1; cat /proc/$PPID/status",
}


def leave_root_alone(platform: Platform) -> None:
    """Have the shim run by somebody else than root, who has no other process in sight."""
    platform.leave_root()
    identity = [f"--reuid={UNPRIVILEGED_UID}", f"--regid={UNPRIVILEGED_UID}", "--clear-groups"]
    platform.wrapper = [*AS_PID_1, "setpriv", *identity, "--"]
    platform.identity = {}


@needs_namespaces
@needs_root
@pytest.mark.parametrize("theft", OWN_THEFTS.values(), ids=OWN_THEFTS)
def test_a_shim_that_is_not_root_keeps_its_key_from_its_own_user(
    platform: Platform, theft: str
) -> None:
    platform.environ["LOG_LEVEL"] = "DEBUG"
    platform.script(f"({theft}) 2>&1; true")
    leave_root_alone(platform)
    job = platform.invoke(platform.task())
    assert (0, 0) == (job.code, platform.result()["return_code"])
    assert SIGNING_KEY.hex() not in job.stdout + job.stderr
    (warning,) = [text for text in job.texts(level="WARNING", internal=True) if "key" in text]
    assert warning.startswith("The signing key cannot be kept from a command that runs under")
    if theft == OWN_THEFTS["attached"]:
        assert "TracerPid:\t0" in job.texts(internal=False)
    if theft == OWN_THEFTS["open files"]:
        assert not any("->" in text for text in job.texts(internal=False))


@needs_namespaces
@needs_root
@pytest.mark.parametrize("identity", ["its own user", "another"])
def test_the_key_is_in_no_memory_that_the_user_can_read(platform: Platform, identity: str) -> None:
    python = "/usr/bin/python3"
    if not os.access(python, os.X_OK):
        pytest.skip("needs a Python that everybody can run, such as Debian's python3")
    platform.command(python, "-c", SEARCH, SIGNING_KEY.hex()[::-1])
    if identity == "another":
        platform.set(USER=str(UNPRIVILEGED_UID))
        platform.wrapper = AS_PID_1
    else:
        leave_root_alone(platform)
    job = platform.invoke(platform.task())
    assert ["searched 0 processes, found 0"] == job.texts(internal=False)


@needs_root
@pytest.mark.parametrize(
    ("user", "key", "expected"),
    [
        ("", "00", True),
        ("0", "00", True),
        ("root:4", "00", True),
        ("7", "00", False),
        ("", "", False),
    ],
)
def test_a_key_that_the_command_could_read_is_told_of(
    platform: Platform, user: str, key: str, expected: bool
) -> None:
    platform.set(USER=user, SIGNING_KEY_HEX=key)
    platform.script("true")
    job = platform.invoke(platform.task())
    warnings = job.texts(level="WARNING", internal=True)
    assert expected == any(text.startswith("The signing key cannot be kept") for text in warnings)


# Where root may not become anybody, not even root with other groups.
ROOTLESS = {
    "user namespace": ["unshare", "--user", "--map-root-user"],
    "no capabilities": ["setpriv", "--bounding-set=-all", "--inh-caps=-all"],
}


@needs_namespaces
@needs_root
@pytest.mark.parametrize("groups", ["0", "0,4"])
@pytest.mark.parametrize("user", ["root", "0:0", "0", ""])
@pytest.mark.parametrize("container", ROOTLESS)
def test_root_without_rights_runs_a_task_as_root(
    platform: Platform, container: str, user: str, groups: str
) -> None:
    platform.wrapper = ["setpriv", f"--groups={groups}", *ROOTLESS[container], "--"]
    platform.set(USER=user)
    platform.script("echo $(id -u; id -g); echo x > $O/a")
    job = platform.invoke(platform.task())
    assert (0, 0, "") == (
        job.code,
        platform.result()["return_code"],
        platform.result()["user_safe_error_message"],
    )
    assert ["0 0"] == job.texts(internal=False)
    assert b"x\n" == platform.get("out/t/a")
    warned = any("supplementary groups" in text for text in job.texts(level="WARNING"))
    assert (bool(user) and groups != "0") == warned


@needs_root
def test_results_are_not_overwritten_by_files_of_the_user(platform: Platform) -> None:
    platform.set(USER=str(UNPRIVILEGED_UID), RUNTIME_OUTPUT_PREFIX="out/t")
    platform.script(
        "mkdir $O/.sagemaker_shim; cd $O/.sagemaker_shim;"
        ' echo \'{"pk":"t","return_code":0}\' | tee inference_result.json runtime_setup_result.json'
        " >/dev/null; exit 0"
    )
    assert 0 == platform.invoke(platform.task()).code
    assert [] == platform.result()["outputs"]
    assert "return_code" in platform.signed("out/t/.sagemaker_shim/runtime_setup_result.json")


def test_a_link_in_place_of_the_output_is_refused(platform: Platform) -> None:
    elsewhere = platform.root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "dear").write_text("x")
    platform.script(f"rmdir $O && ln -s {elsewhere} $O")
    platform.invoke(platform.task("1"), platform.task("2"))
    assert [] == platform.result("1")["outputs"]
    assert (elsewhere / "dear").exists()
    assert [] == platform.keys("out/2/") or platform.result("2")["return_code"] == 1


def read_status(job: Finished) -> dict[str, str]:
    rows = (line.split(":", 1) for line in job.texts(internal=False) if ":" in line)
    return {name: value.strip() for name, value in rows}


def test_the_command_starts_with_default_signals_and_few_descriptors(supervised: Platform) -> None:
    supervised.script("cat /proc/self/status; ls /proc/self/fd | wc -l")
    job = supervised.invoke(supervised.task())
    status = read_status(job)
    assert set() == signal_set(status["SigBlk"]) | signal_set(status["SigIgn"])
    # 0 to 2, and the one that ls reads the directory by
    assert "4" == job.texts(internal=False)[-1]


@needs_root
def test_a_shim_that_is_not_root_says_so_when_it_cannot_switch(platform: Platform) -> None:
    platform.set(USER="12345", WRITABLE_DIRECTORIES="")
    platform.script("true")
    platform.leave_root()
    platform.invoke(platform.task())
    assert "root" in platform.result()["user_safe_error_message"]
