"""Answers that must arrive: neither a drip nor a flood holds a transfer, whichever library asked.

A socket's timeout begins anew with each byte, so that a header of a byte a second beats it for ever; and libraries
read headers, bodies of errors and the framing of chunks to their end, however long. Both `urllib` and boto3 read
through `http.client`, whose class for responses may be replaced: by this one, which counts seconds and bytes.
"""

from __future__ import annotations

import io
import socket
import time
from http.client import CONTINUE, HTTPResponse
from typing import Any

SLACK = 1 << 20  # bytes beside those that were asked for: headers, the text of an error, the framing of chunks


class LimitedResponse(HTTPResponse):
    """A response whose head, and then each read, must come within the socket's timeout and at most so many bytes.

    The text of an error or of a redirect belongs to the head. A read that takes longer raises ``TimeoutError``, and one
    that brings more ``ConnectionError``.
    """

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._arriving = _Arriving(self.fp.detach(), sock)
        self.fp = io.BufferedReader(self._arriving)

    def _read_status(self) -> tuple[str, int, str]:
        """Read a first line; ``http.client`` goes on behind a 100 alone, and other news (103) precede an answer, too."""
        version, status, reason = super()._read_status()  # type: ignore[misc]
        return version, CONTINUE if status in range(102, 200) else status, reason

    def begin(self) -> None:
        """Read the head; a length that is none, or does not count, is not passed on."""
        super().begin()
        if self.length is None:
            del self.headers["Content-Length"]

    def allow(self, size: int) -> None:
        """Let the next read bring so many bytes; the clock begins anew."""
        self._arriving.allow(size)


class _Arriving(io.RawIOBase):
    """The bytes of a socket, counted and timed."""

    def __init__(self, source: io.RawIOBase, sock: socket.socket) -> None:
        self._source, self._sock, self._timeout = source, sock, sock.gettimeout()
        self.allow(0)

    def allow(self, size: int) -> None:
        self._room = size + SLACK
        self._since = time.monotonic()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._room <= 0:
            raise ConnectionError("more bytes than an answer has")
        if self._timeout is not None:
            left = self._timeout - (time.monotonic() - self._since)
            if left <= 0:
                raise TimeoutError("timed out")
            self._sock.settimeout(left)
        try:
            count = self._source.readinto(memoryview(buffer)[: self._room])
        finally:
            self._sock.settimeout(self._timeout)  # whoever uses the connection again has all of it
        self._room -= count or 0
        return count

    def close(self) -> None:
        self._source.close()
        super().close()


def limit_answers(client: Any) -> None:
    """Let a boto3 client read its answers through `LimitedResponse`."""
    session = client._endpoint.http_session  # boto3 has no public place for it
    pools = {}
    for scheme, pool in session._pool_classes_by_scheme.items():
        connection = type("Connection", (pool.ConnectionCls,), {"response_class": LimitedResponse})
        pools[scheme] = type("Pool", (pool,), {"ConnectionCls": connection})
    session._pool_classes_by_scheme = session._manager.pool_classes_by_scheme = pools
