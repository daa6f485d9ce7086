"""One HTTP request and its response: body within its limit, client watched, response in one piece or in parts."""

import asyncio
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from threading import Event

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from tunesmith.errors import ApiError, Cancelled, DeadlineExceeded, InvalidArgument

Headers = Sequence[tuple[bytes, bytes]]

_DRAINED = 64 << 20  # bytes of a too large body that are read and dropped, so that the client hears why
_LONGEST_TIMEOUT = 86_400.0  # seconds
_COMMON: Headers = (
    (b"vary", b"X-Origin, Referer"),
    (b"cache-control", b"private"),
    (b"x-content-type-options", b"nosniff"),
)


class Exchange:
    """One HTTP exchange.

    Attributes:
        method: The HTTP method as sent.
        path: The path as sent, percent-encoded.
        query: The query string as sent.
        headers: The request's headers, by lower-case name.
        address: The network address of the client.
        gone: Set when the client has left, or does not wait any more.
        late: Whether the client's `x-server-timeout` has passed.
        answered: Whether the response has begun.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
        self.query: bytes = scope["query_string"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.address: str = scope["client"][0] if scope.get("client") else ""
        self.gone = Event()
        self.late = False
        self.answered = False
        self._complete = False
        self._receive = receive
        self._send = send

    async def read_body(self, limit: int, seconds: float) -> bytes:
        """Return the body, decompressed when it is gzip.

        Args:
            limit: The most bytes that are taken.
            seconds: The longest time that they may take to arrive.

        Raises:
            InvalidArgument: It is longer than `limit` bytes, however small it came; no more than that is ever
                held. Or it is compressed in another way, or is no gzip though it says so. Or it comes too slowly.
            ClientDisconnect: The client left before sending all of it.
        """
        try:
            async with asyncio.timeout(seconds):
                return await self._read_body(limit)
        except TimeoutError:
            raise InvalidArgument(f"The request's body did not arrive within {seconds:g} seconds.") from None

    async def _read_body(self, limit: int) -> bytes:
        refusal = InvalidArgument(f"Request payload size exceeds the limit: {limit} bytes.")
        inflate = _inflater(self.headers.get(b"content-encoding", b""))
        announced = int(self.headers.get(b"content-length", b"0"))
        if announced > limit and b"expect" in self.headers:
            raise refusal  # the client waits for a word before it sends
        chunks: list[bytes] = []
        size, more = 0, True
        while more and size <= limit + _DRAINED:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.gone.set()
                raise ClientDisconnect
            part = message.get("body", b"")
            more = message.get("more_body", False)
            if inflate is not None and size <= limit:
                part = inflate.read(part, limit + 1 - size)
            size += len(part)
            if size <= limit:
                chunks.append(part)
            else:
                chunks.clear()
        if size > limit:
            raise refusal
        if inflate is not None:
            inflate.finish()
        return b"".join(chunks)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Set `gone` as soon as the client leaves or waits no more; only once the body has been read."""
        watcher = asyncio.create_task(self._watch())
        seconds = _timeout(self.headers.get(b"x-server-timeout", b""))
        timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, self._expire)
        try:
            yield
        except asyncio.CancelledError:  # the server stops
            self.gone.set()
            raise
        finally:
            watcher.cancel()
            if timer:
                timer.cancel()

    def told(self, error: ApiError) -> ApiError:
        """Return what the client is told of an error: work that its own deadline ended was not cancelled."""
        return too_late() if self.late and isinstance(error, Cancelled) else error

    def _expire(self) -> None:
        if not self._complete:
            self.late = True
            self.gone.set()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._complete:  # after the last part, a disconnect is only the end
            self.gone.set()

    async def respond(self, status: int, body: bytes, headers: Headers = ()) -> None:
        """Send the whole response."""
        length = (b"content-length", str(len(body)).encode())
        await self.begin(status, (*headers, length))
        await self.send_part(b"" if self.method == "HEAD" else body, more=False)

    async def begin(self, status: int, headers: Headers) -> None:
        """Send the status and the headers."""
        self.answered = True
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *_COMMON]})

    async def send_part(self, body: bytes, *, more: bool = True) -> None:
        """Send a part of the response at once."""
        self._complete = not more
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


def too_late() -> DeadlineExceeded:
    """Return the error of a request whose client does not wait any more."""
    return DeadlineExceeded(
        "The deadline of the request (x-server-timeout) passed before the answer was whole: allow more time, or "
        "ask for fewer tokens."
    )


def _timeout(header: bytes) -> float | None:
    """Return the seconds that a client waits, as Google's say it; None when it does not, or not in numbers."""
    try:
        seconds = float(header)
    except ValueError:
        return None
    return min(seconds, _LONGEST_TIMEOUT) if seconds > 0 else None


class _Inflater:
    """Decompresses gzip as it arrives, never more than is asked for."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)
        self._begun = False

    def read(self, data: bytes, most: int) -> bytes:
        """Return what `data` adds, up to `most` bytes.

        Raises:
            InvalidArgument: It is not gzip.
        """
        parts: list[bytes] = []
        try:
            while data and most > 0:
                if self._member.eof:  # a gzip file may be several, one after the other
                    self._member = zlib.decompressobj(wbits=31)
                self._begun = True
                parts.append(self._member.decompress(data, most))
                most -= len(parts[-1])
                data = self._member.unused_data
        except zlib.error:
            raise _not_gzip() from None
        return b"".join(parts)

    def finish(self) -> None:
        """Raise InvalidArgument when the end is missing."""
        if self._begun and not self._member.eof:
            raise _not_gzip()


def _not_gzip() -> InvalidArgument:
    return InvalidArgument("The body is not gzip, though its Content-Encoding says so.")


def _inflater(encoding: bytes) -> _Inflater | None:
    name = encoding.decode("latin-1").strip().lower()
    if name in ("", "identity"):
        return None
    if name not in ("gzip", "x-gzip"):
        raise InvalidArgument(f'Content-Encoding "{name}" is not known here: send gzip, or no encoding.')
    return _Inflater()
