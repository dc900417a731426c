"""A proxy that leads everywhere to one port of this machine."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def serve_as_proxy(client: socket.socket, target: int, heads: list[bytes], refusal: bytes) -> None:
    with client, socket.create_connection(("127.0.0.1", target)) as server:
        data = b""
        while b"\r\n\r\n" not in data:
            data += client.recv(65536)
        heads.append(data)
        if refusal:
            client.sendall(refusal)
            return
        if data.startswith(b"CONNECT"):
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            line, _, rest = data.partition(b"\r\n")
            method, url, version = line.split(b" ")
            server.sendall(b"%b /%b %b\r\n%b" % (method, url.split(b"/", 3)[3], version, rest))
        back = threading.Thread(target=pump, args=(server, client))
        back.start()
        pump(client, server)
        back.join()


@contextmanager
def running_proxy(
    target: int, *, refusal: bytes = b"", tls: ssl.SSLContext | None = None
) -> Iterator[tuple[int, list[bytes]]]:
    """Run a proxy that leads everywhere to one port of this machine; list the heads it saw."""
    heads: list[bytes] = []

    def serve(client: socket.socket) -> None:
        try:
            secured = tls.wrap_socket(client, server_side=True) if tls else client
        except OSError:
            client.close()
            return
        serve_as_proxy(secured, target, heads, refusal)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        yield listener.getsockname()[1], heads
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
