"""uvicorn's HTTP protocol, with an end to how long and how large a request's head may be."""

import asyncio
import json

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LARGEST_HEAD = 64 << 10  # bytes: room for a long URL and a long token, and no more


class _TooLarge(Exception):
    """The head of a request is too large."""


def http_protocol(seconds: float) -> type[HttpToolsProtocol]:
    """Return the protocol for `uvicorn.Config(http=…)`.

    A client that sends its head byte by byte, or without end, would hold a connection for as long as it likes.

    Args:
        seconds: How long a head may take to arrive.
    """

    class Protocol(_Protocol):
        head_seconds = seconds

    return Protocol


class _Protocol(HttpToolsProtocol):
    head_seconds: float
    _deadline: asyncio.TimerHandle | None = None
    _received = _head_bytes = 0
    _refusal: tuple[str, str] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        if self._deadline is None:
            self._begin_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > LARGEST_HEAD:  # all of it came at once, with what follows
            self._too_large()
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._deadline is not None and not self.transport.is_closing():
            self._received += len(data)
            if self._received > LARGEST_HEAD:
                self._refuse("431 Request Header Fields Too Large", _TOO_LARGE)

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser does not take."""
        self._refuse(*(self._refusal or ("400 Bad Request", msg)))

    def _begin_head(self) -> None:
        self._received = 0
        self._deadline = self.loop.call_later(self.head_seconds, self._too_late)

    def _end_head(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_large(self) -> None:
        self._refusal = ("431 Request Header Fields Too Large", _TOO_LARGE)
        raise _TooLarge

    def _too_late(self) -> None:
        if not self.transport.is_closing():
            self._refuse(
                "408 Request Timeout",
                f"The head of the request did not arrive within {self.head_seconds:g} seconds.",
            )

    def _refuse(self, status: str, message: str) -> None:
        self._end_head()
        code = int(status[:3])
        error = {"error": {"code": code, "message": message, "status": "INVALID_ARGUMENT"}}
        body = json.dumps(error, indent=2).encode() + b"\n"
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json; charset=UTF-8\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()


_TOO_LARGE = f"The head of the request is larger than {LARGEST_HEAD >> 10} KiB: send what is long in the body."
