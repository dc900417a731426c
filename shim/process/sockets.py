"""What /proc tells of the TCP sockets of our network namespace: whose they are, where who listens.

proc(5), /proc/net/tcp; an address is four bytes as one number of this machine, tcp6 has four such:

    sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
     0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12345
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

_TABLES = {"/proc/net/tcp": "{v4}", "/proc/net/tcp6": "{zero}{zero}{mapped}{v4}"}
# linux/net/tcp_states.h: what the client's end can be in before it has an answer.
_CONNECTED = (b"01", b"04", b"05")  # ESTABLISHED, FIN_WAIT1, FIN_WAIT2
_LISTENING = b"0A"
# A table that changes while it is read, as on a busy machine, may lack a row or have it twice.
LOOKS = 4
# The place of each column in a line.
_LOCAL, _REMOTE, _STATE, _UID, _INODE = 1, 2, 3, 7, 9


@dataclass(frozen=True, kw_only=True, slots=True)
class Ends:
    """An accepted TCP connection over IPv4: (host, port) of both ends."""

    client: tuple[str, int]
    server: tuple[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Client:
    """Who is at the other end of a connection.

    - is_local: whether that end is in our network namespace
    - uid: whose socket it is there; None when nobody has it, or has it any more
    """

    is_local: bool
    uid: int | None = None


def find_client(connection: Ends) -> Client:
    """Say who is at the other end of a connection.

    The uid is that of who made the socket, whoever has it now, as our user namespace knows it.
    """
    for _ in range(LOOKS):
        uids = {_read_uid(row) for row in _find_rows(connection)}
        if uids:
            return Client(is_local=True, uid=uids.pop() if len(uids) == 1 else None)
    return Client(is_local=_is_ours(connection.client[0]))


def find_listening_ports() -> list[int]:
    """Return the ports on which descendants of ours listen that are in sessions of their own."""
    inodes = {inode for pid in _find_descendants() for inode in _read_sockets(pid)}
    return sorted(
        {
            int(row[_LOCAL].rpartition(b":")[2], 16)
            for table in _TABLES
            for row in _read_rows(table, b" 0A ")
            if row[_STATE] == _LISTENING and row[_INODE] in inodes
        }
    )


def _find_rows(connection: Ends) -> Iterator[list[bytes]]:
    """Yield the rows of the client's end, of which there is one at most."""
    for table, form in _TABLES.items():
        ends = f"{_format(connection.client, form)} {_format(connection.server, form)}".encode()
        for row in _read_rows(table, ends):
            if b" ".join(row[_LOCAL : _REMOTE + 1]) == ends:
                yield row


def _format(end: tuple[str, int], form: str) -> str:
    (v4,) = struct.unpack("=I", socket.inet_aton(end[0]))
    address = form.format(v4=f"{v4:08X}", zero="0" * 8, mapped=f"{socket.htonl(0xFFFF):08X}")
    return f"{address}:{end[1]:04X}"


def _read_rows(table: str, part: bytes) -> Iterator[list[bytes]]:
    """Yield the columns of each line that holds the part."""
    with suppress(OSError):  # without IPv6 there is no tcp6
        with open(table, "rb") as file:
            yield from (line.split() for line in file if part in line)


def _read_uid(row: list[bytes]) -> int | None:
    """Return whose socket it is. One that was closed has no inode, and seems to be root's."""
    if row[_STATE] not in _CONNECTED or row[_INODE] == b"0":
        return None
    return int(row[_UID])


def _is_ours(host: str) -> bool:
    """Tell whether an address is one of our network namespace's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Takes nothing but an address of ours, where bind(2) takes any with ip_nonlocal_bind.
            probe.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(host))
        except OSError:
            return False
    return True


def _find_descendants() -> Iterator[int]:
    """Yield the processes below us in other sessions than ours: the command and what it started."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        with suppress(OSError, ValueError):  # no process, or one that is gone
            pid = int(name)
            if os.getsid(pid) != os.getsid(0):
                with open(f"/proc/{pid}/stat", "rb") as file:
                    parents[pid] = int(file.read().rpartition(b")")[2].split()[1])
    us = os.getpid()
    for pid in parents:
        ancestor = pid
        while ancestor in parents:
            ancestor = parents[ancestor]
        if ancestor == us:
            yield pid


def _read_sockets(pid: int) -> Iterator[bytes]:
    """Yield the inodes of the sockets that a process has."""
    with suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                name = os.readlink(f"/proc/{pid}/fd/{fd}")
                if name.startswith("socket:["):
                    yield name[8:-1].encode()
