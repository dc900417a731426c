"""TLS over a connected socket, by way of memory.

An SSLSocket asks the kernel twice for each record of 16 KiB. Here ciphertext is received in large
pieces, which takes a tenth off the computing time of large downloads.
"""

from __future__ import annotations

import ssl
from contextlib import suppress

from shim.http.stream import SocketStream

RECEIVED_BYTES = 1 << 20
SENT_BYTES = 256 << 10
RECORD_BYTES = 17 << 10  # with header, tag and padding


class TlsStream:
    """The methods of a socket that a connection needs, with its errors.

    A BlockingIOError loses nothing: the same call goes on where it was.
    """

    def __init__(self, sock: SocketStream | TlsStream, context: ssl.SSLContext, host: str) -> None:
        """sock: a TlsStream is that to a proxy, behind which the host is."""
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        # The object behind has the same method, without a Python call for each record.
        self._read = getattr(self._tls, "_sslobj", self._tls).read
        self._scratch = memoryview(bytearray(RECORD_BYTES))
        self._unsent = memoryview(b"")
        self._accepted = 0  # bytes of a send() that are encrypted and not all sent

    def shake_hands(self) -> None:
        """Begin; that takes as long as the socket allows.

        Raises OSError, ssl.SSLCertVerificationError among them.
        """
        try:
            while True:
                with suppress(ssl.SSLWantReadError):
                    self._tls.do_handshake()
                    return
                with suppress(BlockingIOError):  # sock says when it has been enough
                    self._flush()
                    if not self._receive(self._scratch):
                        raise ssl.SSLEOFError("the server closed the connection")
        finally:
            with suppress(OSError):  # the server is told why not, if it listens
                self._flush()

    def holds_data(self) -> bool:
        """Tell whether something was received that recv_into() has not returned."""
        if self._incoming.pending or self._tls.pending():
            return True
        return isinstance(self._sock, TlsStream) and self._sock.holds_data()

    def recv_into(self, view: memoryview, nbytes: int = 0, flags: int = 0) -> int:
        """Receive what is there, at least a byte; 0 at the end, announced or not."""
        size, filled = nbytes or len(view), 0
        while True:
            try:
                while filled < size and (more := self._read(size - filled, view[filled:])):
                    filled += int(more)
                return filled
            except ssl.SSLWantReadError:
                if filled:
                    return filled
            if not self._accepted:  # else what send() has begun comes first
                with suppress(OSError):  # who listens no more may have said why
                    self._flush()
            # Where the plaintext will be, there is room for ciphertext.
            if not self._receive(view if size >= RECORD_BYTES else self._scratch):
                return 0

    def send(self, data: memoryview) -> int:
        """Send the beginning of data; return how long that was."""
        if not self._accepted:
            self._accepted = self._tls.write(data[:SENT_BYTES])
        self._flush()
        accepted, self._accepted = self._accepted, 0
        return accepted

    def _receive(self, room: memoryview) -> int:
        received = self._sock.recv_into(room[:RECEIVED_BYTES])
        self._incoming.write(room[:received])
        return received

    def _flush(self) -> None:
        while self._unsent or self._outgoing.pending:
            self._unsent = self._unsent or memoryview(self._outgoing.read())
            self._unsent = self._unsent[self._sock.send(self._unsent) :]
