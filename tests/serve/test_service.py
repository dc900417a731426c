"""Who may ask for a task: a real server, and real processes of other users that ask it."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shim.contract.errors import TaskStopped
from shim.contract.tasks import InferenceResult, InferenceTask
from shim.log.log import Log
from shim.process import sockets
from shim.process.sockets import Client, Ends, find_client
from shim.serve.protocol import Forbidden, Server
from shim.serve.service import FORBIDDEN_MESSAGE, Service, resolve_command_uid
from tests.support import UNPRIVILEGED_UID, needs_root, poll

ASKER = Path(__file__).parents[1] / "data/asker.py"
TASK = {"pk": "t", "inputs": [], "output_bucket_name": "b", "output_prefix": "p"}
BODY = json.dumps(TASK)
SOMEBODY_UID = 4321


class FakeRunner:
    """Run nothing, or whatever a test says."""

    is_healthy = True

    def __init__(self) -> None:
        self.tasks: list[InferenceTask] = []
        self.work: Callable[[], object] = lambda: None

    def run_task(self, task: InferenceTask) -> InferenceResult:
        self.tasks.append(task)
        self.work()
        return InferenceResult(pk=task.pk, return_code=0)


@dataclass
class Serving:
    server: Server
    port: int
    runner: FakeRunner
    service: Service
    log: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, uid: int, manner: str, *more: str, body: str = BODY) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [PYTHON, str(ASKER), str(self.port), body, manner, *more],
            user=uid,
            group=uid,
            extra_groups=[],
            cwd="/",
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.processes.append(process)
        return process

    def ask(self, uid: int, manner: str = "plain", body: str = BODY) -> str:
        """Return the status that a process of the user got."""
        process = self.start(uid, manner, body=body)
        stdout, stderr = process.communicate(timeout=60)
        assert "" == stderr
        return stdout.strip()

    def errors(self) -> list[str]:
        """Return the lines for the author."""
        records = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [record["log"] for record in records if not record["internal"]]


def find_python() -> str:
    """Return an interpreter for everybody, and "" without one; one below /root is root's alone."""
    for python in (sys.executable, "/usr/bin/python3"):
        with suppress(OSError):
            command = [python, "-c", f"open({str(ASKER)!r}); import socket"]
            if subprocess.run(command, user=UNPRIVILEGED_UID, cwd="/").returncode == 0:
                return python
    return ""


PYTHON = find_python() if os.geteuid() == 0 else ""
needs_askers = pytest.mark.skipif(
    not PYTHON, reason="needs root, and a Python and a checkout that everybody can read"
)


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    """Serve on all addresses, as the shim does; the algorithm is UNPRIVILEGED_UID."""
    fd = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    log = Log(stdout_fd=fd, stderr_fd=fd)
    runner = FakeRunner()
    service = Service(runner=runner, log=log, command_uid=UNPRIVILEGED_UID)
    service.open()
    server = Server(("0.0.0.0", 0), application=service, log=log)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    serving = Serving(server, server.server_address[1], runner, service, tmp_path / "log")
    yield serving
    for process in serving.processes:
        process.kill()
        process.communicate()
    server.shutdown()
    assert server.drain(20)
    server.server_close()
    thread.join()
    os.close(fd)


def has_interface() -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.77", 9))
        except OSError:
            return False
        return True


def has_mptcp() -> bool:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).close()
    except OSError:
        return False
    return True


def may_unshare() -> bool:
    """Tell whether anybody may make user and network namespaces here."""
    done = subprocess.run(["unshare", "-Urn", "true"], user=UNPRIVILEGED_UID, capture_output=True)
    return done.returncode == 0


OTHER_WAYS = [
    "plain",
    "another-loopback",
    "bound",
    "mapped",
    "kept",
    "exec",
    "half-closed",
    pytest.param("interface", marks=pytest.mark.skipif(not has_interface(), reason="no network")),
    pytest.param("mptcp", marks=pytest.mark.skipif(not has_mptcp(), reason="a kernel without it")),
]
IN_NAMESPACES = [
    pytest.param(
        manner,
        marks=pytest.mark.skipif(
            bool(PYTHON) and not may_unshare(), reason="users may make no namespaces here"
        ),
    )
    for manner in ("user-namespace", "net-namespace")
]


@needs_askers
@pytest.mark.parametrize("manner", OTHER_WAYS + IN_NAMESPACES)
def test_the_algorithm_is_not_served(serving: Serving, manner: str) -> None:
    assert "403" == serving.ask(UNPRIVILEGED_UID, manner)
    assert [] == serving.runner.tasks
    (line,) = serving.errors()
    assert line.startswith(f"{FORBIDDEN_MESSAGE}: an invocation from ")
    assert line.endswith(f"the socket of uid {UNPRIVILEGED_UID}, was refused")


@needs_askers
@pytest.mark.parametrize("uid", [0, SOMEBODY_UID])
@pytest.mark.parametrize("manner", OTHER_WAYS)
def test_somebody_else_on_this_machine_is_served(serving: Serving, uid: int, manner: str) -> None:
    assert "200" == serving.ask(uid, manner)
    assert 1 == len(serving.runner.tasks)
    assert [] == serving.errors()


@needs_askers
def test_a_socket_that_a_child_kept_is_still_the_algorithms(serving: Serving) -> None:
    process = serving.start(UNPRIVILEGED_UID, "fork")
    assert "403\n" == process.communicate(timeout=60)[0]
    assert [] == serving.runner.tasks


@needs_askers
def test_a_socket_that_the_algorithm_made_is_its_own_whoever_uses_it(
    serving: Serving, tmp_path: Path
) -> None:
    for directory in (tmp_path, *tmp_path.parents):
        directory.chmod(directory.stat().st_mode | 0o005)
    with socket.socket(socket.AF_UNIX) as friend:
        friend.bind(str(tmp_path / "friend"))
        os.chmod(tmp_path / "friend", 0o666)
        friend.listen()
        serving.start(UNPRIVILEGED_UID, "passed", str(tmp_path / "friend"))
        sender, _ = friend.accept()
        _, (fd,), _, _ = socket.recv_fds(sender, 1, 1)
        sender.send(b"x")
        sender.close()
    serving.processes[-1].wait()
    with socket.socket(fileno=fd) as passed:
        passed.settimeout(10)
        body = json.dumps(TASK).encode()
        passed.sendall(
            b"POST /invocations HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        assert b" 403 " in passed.recv(1000)
    assert [] == serving.runner.tasks


@needs_askers
@pytest.mark.parametrize("uid", [UNPRIVILEGED_UID, SOMEBODY_UID, 0])
@pytest.mark.parametrize("manner", ["gone", "reset"])
def test_nothing_is_begun_for_who_has_gone(serving: Serving, uid: int, manner: str) -> None:
    many = [{"relative_path": f"{i}", "bucket_name": "b", "bucket_key": "k"} for i in range(1000)]
    assert "gone" == serving.ask(uid, manner, body=json.dumps({**TASK, "inputs": many}))
    poll(lambda: serving.server._open == 0)
    assert [] == serving.runner.tasks


def test_who_goes_while_the_body_is_parsed_is_refused_before_the_task(serving: Serving) -> None:
    with socket.create_connection(("127.0.0.1", serving.port)) as connection:
        ends = Ends(client=connection.getsockname(), server=connection.getpeername())
        serving.service.check_client(ends)
    with pytest.raises(Forbidden):
        serving.service.invoke(json.dumps(TASK).encode(), ends)
    assert "the socket of nobody any more" in serving.errors()[0]
    assert [] == serving.runner.tasks


@needs_askers
def test_without_another_user_there_is_nobody_to_refuse(serving: Serving) -> None:
    serving.service._command_uid = None
    assert "200" == serving.ask(UNPRIVILEGED_UID)


def test_a_command_of_our_own_uid_is_not_told_from_others() -> None:
    assert [None] * 4 == [
        resolve_command_uid(user) for user in ("", "0", str(os.geteuid()), "no-such-user")
    ]
    assert 1234 == resolve_command_uid("1234:5")


def test_one_lock_covers_parsing_too(serving: Serving) -> None:
    serving.service._command_uid = None
    many = [{"relative_path": f"{i}", "bucket_name": "b", "bucket_key": "k"} for i in range(60_000)]
    body = json.dumps({**TASK, "inputs": many}, separators=(",", ":")).encode()
    answers: list[bytes] = []

    def post(body: bytes) -> bytes:
        head = b"POST /invocations HTTP/1.1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        with socket.create_connection(("127.0.0.1", serving.port)) as connection:
            connection.sendall(head % len(body) + body)
            return connection.recv(1000)

    first = threading.Thread(target=lambda: answers.append(post(body)))
    first.start()
    poll(serving.service._running.locked)
    began = time.monotonic()
    assert b" 503 " in post(b"{}")
    took = time.monotonic() - began
    assert [] == serving.runner.tasks
    first.join()
    assert b" 200 " in answers[0]
    assert 1 == len(serving.runner.tasks)
    assert took < 1


def test_a_stopped_task_is_503(serving: Serving) -> None:
    serving.service._command_uid = None

    def stop() -> None:
        raise TaskStopped("The task was stopped before it finished")

    serving.runner.work = stop
    body = json.dumps(TASK).encode()
    with socket.create_connection(("127.0.0.1", serving.port)) as connection:
        head = b"POST /invocations HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert answer.endswith(b'{"detail":"The task was stopped before it finished"}')


HOSTILE = {
    "lists": b"[" + b"[]," * 2_000_000 + b"[]]",
    "objects": b"[" + b'{"a":1},' * 780_000 + b"{}]",
    "members": b"{" + b",".join(b'"%x":0' % i for i in range(600_000)) + b"}",
    "text": b'["' + b"x" * 6_000_000 + "\U0001f600".encode() + b'"]',
    "astral": b"[" + '"\U0001f600",'.encode() * 890_000 + b"0]",
    "deep": b"[" * 6_000_000,
    "problems": b'{"inputs":[' + b"{}," * 490_000 + b"{}]}",
    "inputs": b'{"inputs":[' + b'{"relative_path":"a"},' * 240_000 + b"{}]}",
    "duration": b'{"timeout":"P' + b"1" * 6_000_000 + b'"}',
    "path": b'{"inputs":[{"relative_path":"' + b"a/" * 3_000_000 + b'"}]}',
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_a_body_of_six_megabytes_costs_little(serving: Serving, body: bytes) -> None:
    serving.service._command_uid = None
    assert 6_291_456 >= len(body)
    answers: list[bytes] = []

    def post() -> None:
        with socket.create_connection(("127.0.0.1", serving.port)) as connection:
            connection.sendall(
                b"POST /invocations HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            answers.append(connection.recv(100, socket.MSG_WAITALL))
            while connection.recv(65536) and not answers[0].startswith(b"HTTP/1.1 422"):
                pass

    def ping() -> float:
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", serving.port)) as connection:
            connection.sendall(b"GET /ping HTTP/1.1\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        return time.monotonic() - began

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_mib()
    client = threading.Thread(target=post)
    client.start()
    times = []
    while client.is_alive():
        times.append(ping())
        time.sleep(0.005)
    grown = peak_mib() - before
    times.sort()
    print(f"{grown} MiB, {len(times)} pings, median {times[len(times) // 2]}, worst {times[-1]}")
    assert answers[0].startswith(b"HTTP/1.1 422")
    assert grown < 200
    # The contract's 100 ms; what else this machine does may delay most of a few.
    assert times[(len(times) - 1) // 4] < 0.1


@pytest.mark.parametrize("lacking", [1, 3])
def test_a_row_that_a_changing_table_lacks_is_looked_for_again(
    lacking: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_rows, looks = sockets._find_rows, itertools.count(1)

    def find_late(ends: Ends) -> Iterator[list[bytes]]:
        if next(looks) > lacking:
            yield from [*find_rows(ends)] * 2  # and has it twice then

    monkeypatch.setattr(sockets, "_find_rows", find_late)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as client:
            ends = Ends(client=client.getsockname(), server=client.getpeername())
            assert Client(is_local=True, uid=os.getuid()) == find_client(ends)


def peak_mib() -> int:
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024


NETWORK = """
set -e
ip link set lo up
unshare --net sleep 60 &
other=$!
while [ /proc/$$/ns/net -ef /proc/$other/ns/net ]; do sleep 0.02; done
ip link add left type veth peer name right netns $other
ip addr add 10.99.0.1/24 dev left
ip link set left up
nsenter --net=/proc/$other/ns/net sh -c \
    'ip addr add 10.99.0.2/24 dev right; ip link set right up; ip link set lo up'
echo $1 > /proc/sys/net/ipv4/ip_nonlocal_bind
"$2" -c "$3" server &
"$2" -c "$3" client
nsenter --net=/proc/$other/ns/net "$2" -c "$3" client
wait $!
kill $other
"""
PROGRAM = """
import socket, sys, time
from shim.process.sockets import Ends, find_client
if sys.argv[1] == "client":
    for _ in range(200):
        try:
            connection = socket.create_connection(("10.99.0.1", 8080), 5)
            sys.exit(connection.recv(1) == b"")
        except OSError:
            time.sleep(0.05)
    sys.exit("nobody there")
server = socket.create_server(("0.0.0.0", 8080))
for _ in range(2):
    connection, client = server.accept()
    print(find_client(Ends(client=client, server=connection.getsockname())))
    connection.send(b"x")
"""


def can_make_networks() -> bool:
    try:
        command = ["unshare", "--net", "ip", "link", "add", "left", "type", "veth"]
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@needs_root
@pytest.mark.skipif(not can_make_networks(), reason="needs iproute2 and veth")
@pytest.mark.parametrize("nonlocal_bind", ["0", "1"])
def test_who_asks_from_elsewhere_is_nobody_of_ours(nonlocal_bind: str) -> None:
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", NETWORK, "sh", nonlocal_bind, sys.executable, PROGRAM],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=60,
    )
    assert (0, "") == (done.returncode, done.stderr)
    expected = [Client(is_local=True, uid=0), Client(is_local=False)]
    assert list(map(str, expected)) == done.stdout.splitlines()


def test_a_connection_that_was_closed_is_nobodys() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, address = server.accept()
        ends = Ends(client=address, server=accepted.getsockname())
        assert Client(is_local=True, uid=os.getuid()) == find_client(ends)
        client.shutdown(socket.SHUT_WR)
        assert Client(is_local=True, uid=os.getuid()) == find_client(ends)
        client.close()  # in FIN_WAIT2, then in TIME_WAIT
        assert Client(is_local=True) == find_client(ends)
        accepted.close()
        assert Client(is_local=True) == find_client(ends)
