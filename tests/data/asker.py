"""Ask `serve` for a task, from whoever runs this: asker.py PORT BODY [manner]

Prints the status of the answer. The manners are those of an algorithm that does not want to be
known for one.
"""

import array
import os
import socket
import struct
import subprocess
import sys

PORT, BODY = int(sys.argv[1]), sys.argv[2].encode()
MANNER, *REST = [*sys.argv[3:], "plain"]
HEAD = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY)
HOSTS = {"another-loopback": "127.0.0.2", "mapped": "::ffff:127.0.0.1"}


def connect():
    if MANNER == "interface":
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.77", 9))
            return socket.create_connection((probe.getsockname()[0], PORT), 10)
    if MANNER == "bound":
        return socket.create_connection(("127.0.0.1", PORT), 10, ("127.9.9.9", 0))
    if MANNER == "mptcp":
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
        connection.connect(("127.0.0.1", PORT))
        return connection
    if MANNER == "adopted":
        adopted = socket.socket(fileno=int(REST[0]))
        adopted.settimeout(10)
        return adopted
    return socket.create_connection((HOSTS.get(MANNER, "127.0.0.1"), PORT), 10)


def receive():
    """Return the status of the next answer; all of them have a short body or none."""
    answer = b""
    while b"\r\n\r\n" not in answer and (data := connection.recv(65536)):
        answer += data
    return answer.split(b" ")[1].decode() if answer else "nothing"


def ask(connection):
    connection.sendall(HEAD + BODY)
    return receive()


connection = connect()
fd = connection.fileno()
if MANNER in ("exec", "user-namespace", "net-namespace", "fork"):
    os.set_inheritable(fd, True)
    wrappers = {"user-namespace": ["unshare", "-Ur"], "net-namespace": ["unshare", "-Urn"]}
    command = [sys.executable, __file__, *sys.argv[1:3], "adopted", str(fd)]
    command = [*wrappers.get(MANNER, []), *command]
    if MANNER == "exec":
        os.execvp(command[0], command)
    if MANNER == "fork":  # whoever made the socket has gone, a child has it
        subprocess.Popen(["sh", "-c", 'sleep 0.3; exec "$@"', "sh", *command], pass_fds=[fd])
        sys.exit()
    sys.exit(subprocess.run(command, pass_fds=[fd]).returncode)
if MANNER == "kept":
    connection.sendall(b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n")
    receive()
if MANNER in ("gone", "reset"):
    if MANNER == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.sendall(HEAD + BODY)
    connection.close()
    sys.exit(print("gone"))
if MANNER == "half-closed":
    connection.sendall(HEAD + BODY)
    connection.shutdown(socket.SHUT_WR)
    sys.exit(print(receive()))
if MANNER == "passed":  # to somebody else, who asks
    with socket.socket(socket.AF_UNIX) as friend:
        friend.connect(REST[0])
        friend.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
        friend.recv(1)
    sys.exit()
print(ask(connection))
