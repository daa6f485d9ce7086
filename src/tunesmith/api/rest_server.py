"""The REST front: a Starlette app with one endpoint for all of Google's routes, and three routes of its own."""

import gzip
import math
import re
import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import anyio
from anyio import CapacityLimiter, to_thread
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Lifespan, Receive, Scope, Send

from tunesmith import protos
from tunesmith.api import event_stream
from tunesmith.api.body_formats import (
    ARRAY_STREAM,
    EVENT_STREAM,
    JSON_FORMATS,
    PROTOBUF_FORMAT,
    PROTOBUF_STREAM,
    BodyFormat,
    StreamFormat,
)
from tunesmith.api.dispatch import GENERATING, WAITS, Dispatcher, internal
from tunesmith.api.documents import document_routes
from tunesmith.api.downloads import headers_of, is_download
from tunesmith.api.exchange import Exchange, Headers, too_late
from tunesmith.api.field_mask import FieldMask, field_mask
from tunesmith.api.metrics import CONTENT_TYPE, CallMetrics
from tunesmith.api.system_parameters import (
    SystemParameters,
    http_method,
    is_form,
    is_protobuf,
    system_parameters,
)
from tunesmith.api.transcoding import Match, Router, to_message
from tunesmith.auth.scopes import INSUFFICIENT_SCOPE
from tunesmith.errors import ApiError, InvalidArgument, Unauthenticated, Unavailable

THREADS = 40
"""Calls of one service that run at a time; the next ones wait their turn."""

_Result = TypeVar("_Result")

_END = object()

_REALM = b'Bearer realm="https://accounts.google.com/", error='
_EXPOSED = ("www-authenticate", "retry-after", "content-encoding", "content-length", "date", "vary")
_PREFLIGHT_SECONDS = 3600
_WRITTEN_INLINE = 16 << 10  # bytes; a larger response would hold up the others for a millisecond and more
_GZIP_FROM = 1400  # bytes; what fits a packet is not worth compressing
_TAKES_GZIP = re.compile(rb"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))")


def rest_app(
    dispatcher: Dispatcher,
    *,
    max_body_bytes: int,
    receive_seconds: float = 60,
    ready: Callable[[], bool],
    metrics: CallMetrics | None = None,
    routes: Sequence[BaseRoute] = (),
    cors_origins: Sequence[str] = ("*",),
    lifespan: Lifespan[Starlette] | None = None,
    threads: int = THREADS,
    generating: int = THREADS,
    inline: Collection[str] = (),
) -> Starlette:
    """Return the ASGI app.

    Args:
        dispatcher: Runs the calls.
        max_body_bytes: The largest request body that is taken.
        receive_seconds: How long a request's body may take to arrive.
        ready: Whether the server can serve; called in a thread for each `GET /readyz`.
        metrics: What `GET /metrics` shows.
        routes: Routes of other parts (sign-in, web page), tried before Google's.
        cors_origins: Origins of web pages whose scripts may call; `*` for all. Browsers add no credentials of
            their own, so a page can do only what it brings a credential for.
        lifespan: Starlette's hook for what starts and ends with the server.
        threads: Calls of one service that run at a time.
        generating: Calls that run at a time of services that make answers.
        inline: RPCs, by full name, that take less time than a change of threads does, and never wait: they run
            on the event loop.
    """
    shown = metrics or CallMetrics()

    def healthz(_request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    def readyz(_request: Request) -> Response:
        return JSONResponse({"status": "ok"}) if ready() else JSONResponse({"status": "not ready"}, 503)

    def prometheus(_request: Request) -> Response:
        return Response(shown.text(), headers={"content-type": CONTENT_TYPE})

    own = [Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", prometheus)]
    described = document_routes(dispatcher.summaries())
    api = _Api(dispatcher, max_body_bytes, receive_seconds, shown, threads, generating, inline)
    app = Starlette(
        routes=[*own, *described, *routes],
        middleware=[_cors(cors_origins)],
        exception_handlers={Unavailable: _unavailable},
        lifespan=lifespan,
    )
    # Not a route: those match no path with a line break in it, and would answer in words of their own.
    app.router.default, app.router.redirect_slashes = api, False
    return app


async def _unavailable(_request: Request, error: Exception) -> Response:
    """Answer for the routes of sign-in, in OAuth's words, while the database is not available."""
    body = {"error": "temporarily_unavailable", "error_description": str(error)}
    seconds = error.retry_seconds if isinstance(error, Unavailable) else None
    return JSONResponse(body, Unavailable.http, {"retry-after": f"{math.ceil(seconds)}"} if seconds else None)


def _cors(origins: Sequence[str]) -> Middleware:
    return Middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"],
        allow_headers=["*"],
        expose_headers=_EXPOSED,
        allow_private_network=True,  # a page of the open web may call a server on this machine, if allowed above
        max_age=_PREFLIGHT_SECONDS,
    )


@dataclass
class _Call:
    """What is known so far of the call that an exchange means; `code` is its canonical outcome."""

    parameters: SystemParameters
    match: Match | None = None
    code: str = "OK"

    @property
    def rpc_name(self) -> str:
        return self.match.rule.rpc.full_name if self.match else "unknown"

    @property
    def in_array(self) -> bool:
        """Whether the response is a stream in the form of one JSON array."""
        rpc = self.match.rule.rpc if self.match else None
        streams = rpc is not None and rpc.server_streaming and not is_download(rpc.output_type)
        return streams and self.stream is ARRAY_STREAM

    @property
    def format(self) -> BodyFormat:
        style = self.parameters.style
        if style.protobuf:
            return PROTOBUF_FORMAT
        return JSON_FORMATS[style.pretty and not style.sse, style.enum_numbers]

    @property
    def stream(self) -> StreamFormat:
        style = self.parameters.style
        return EVENT_STREAM if style.sse else PROTOBUF_STREAM if style.protobuf else ARRAY_STREAM

    def written(self, message: Message, mask: FieldMask | None) -> bytes:
        """Return a response, or what the mask keeps of it."""
        return self.format.message(mask.apply(message) if mask else message)


class _Parts:
    """The parts of a body that is a stream; everything that its messages cost is spent in the thread that asks.

    Attributes:
        headers: Of the response, once the first part is there.
        broken: Whether it ended where no error can be written.
    """

    def __init__(
        self, call: _Call, kind: Descriptor, messages: Generator[Message | None], mask: FieldMask | None
    ) -> None:
        self._call, self._messages, self._mask = call, messages, mask
        self._events = call.stream is EVENT_STREAM and event_stream.are_events(kind)
        self._download = is_download(kind)
        self._empty, self.broken = True, False
        self.headers: Headers = [(b"content-type", call.stream.content_type)]
        if call.stream is EVENT_STREAM:
            self.headers = [*self.headers, (b"x-accel-buffering", b"no")]  # nginx would keep events back

    def first(self) -> bytes | None:
        """Return the first part; None when there is none.

        Raises:
            ApiError: The stream failed before it began.
        """
        message: Any = next(self._messages, _END)
        if self._download and message is not _END:
            self.headers = headers_of(message)
        part = self._part(message)
        return event_stream.RETRY + part if self._events and part is not None else part

    def next(self) -> bytes | None:
        """Return the next part, which may be the error that ends the stream; None after the last."""
        try:
            return self._part(next(self._messages, _END))
        except ApiError as error:
            return self.failed(error)

    def failed(self, error: ApiError) -> bytes | None:
        """Return the error that ends the stream; None where none can be written."""
        self._call.code, self.broken = error.status, self._download
        first, self._empty = self._empty, False
        written = self._call.format.error(error)
        return None if self.broken else self._call.stream.part(written, first=first, failed=True)

    @property
    def end(self) -> bytes:
        """What follows the last part."""
        if self._download:
            return b""
        return self._call.stream.empty if self._empty else self._call.stream.end

    def close(self) -> None:
        """End the service's work."""
        self._messages.close()

    def _part(self, message: Any) -> bytes | None:
        if message is _END or self._download:
            return None if message is _END else message.data
        stream = self._call.stream
        if message is None:
            return stream.alive
        first, self._empty = self._empty, False
        body = self._call.written(message, self._mask)
        return event_stream.part(message, body) if self._events else stream.part(body, first=first)


class _Api:
    """The endpoint of all of Google's routes."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        max_body_bytes: int,
        receive_seconds: float,
        metrics: CallMetrics,
        threads: int,
        generating: int,
        inline: Collection[str],
    ) -> None:
        self._router = Router()
        self._dispatcher = dispatcher
        self._max_body_bytes, self._receive_seconds = max_body_bytes, receive_seconds
        self._metrics = metrics
        self._threads = {**dict.fromkeys(GENERATING, generating), **WAITS}
        self._other_threads = threads
        self._inline = frozenset(inline)
        # One for each service, and for what waits, so that long generations never keep a `get` waiting.
        self._limiters: dict[str, CapacityLimiter] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        exchange, call = Exchange(scope, receive, send), _Call(SystemParameters())
        try:
            await self._serve(exchange, call)
        except ApiError as error:
            await _refuse(exchange, call, exchange.told(error))
        except (ClientDisconnect, OSError):
            call.code = "CANCELLED"
        except Exception as error:  # noqa: BLE001 — whatever it is, the client gets an answer
            await _refuse(exchange, call, internal(error, f"{exchange.method} {exchange.path}"))
        finally:
            code = "CANCELLED" if exchange.gone.is_set() and not exchange.late else call.code
            self._metrics.observe(call.rpc_name, code, time.perf_counter() - started)

    async def _serve(self, exchange: Exchange, call: _Call) -> None:
        headers = exchange.headers
        call.parameters = system_parameters(exchange.query, headers)
        method = http_method(exchange.method, headers)
        if method == "OPTIONS" and (methods := self._router.methods(exchange.path)):
            await exchange.respond(200, b"", [(b"allow", ", ".join([*methods, "OPTIONS"]).encode())])
            return
        match = call.match = self._router.match(method, exchange.path)
        body = b""
        if match.rule.body:
            body = await exchange.read_body(self._max_body_bytes, self._receive_seconds)
        elif method != exchange.method and is_form(headers):
            form = await exchange.read_body(self._max_body_bytes, self._receive_seconds)
            call.parameters = system_parameters(exchange.query + b"&" + form, headers)
        if call.parameters.style.media and not is_download(match.rule.rpc.output_type):
            raise InvalidArgument("alt=media is for downloads of files; this method answers with a message.")
        if match.rule.rpc.server_streaming:
            await self._stream(exchange, call, match, body)
        else:
            await self._answer(exchange, call, match, body)

    async def _answer(self, exchange: Exchange, call: _Call, match: Match, body: bytes) -> None:
        rpc, parameters = match.rule.rpc, call.parameters
        if parameters.style.sse:
            raise InvalidArgument(f"alt=sse is for streams; {rpc.name} answers once.")
        zipped = _TAKES_GZIP.search(exchange.headers.get(b"accept-encoding", b"")) is not None

        mask = _mask(call, match)

        def run() -> Message:
            request = to_message(match, parameters.query, body, protobuf=is_protobuf(exchange.headers))
            return self._dispatcher.call(rpc, request, parameters.credentials, exchange.gone, exchange.address)

        def write(response: Message) -> tuple[bytes, Headers]:
            payload, headers = _compress(call.written(response, mask), zipped)
            return payload, [(b"content-type", call.format.content_type), *headers]

        if rpc.full_name in self._inline:
            response = run()
            if response.ByteSize() < _WRITTEN_INLINE:
                payload, headers = write(response)
            else:
                payload, headers = await self._in_thread(match, lambda: write(response))
        else:
            async with exchange.watched():
                payload, headers = await self._in_thread(match, lambda: write(run()))
        await exchange.respond(200, payload, headers)

    async def _stream(self, exchange: Exchange, call: _Call, match: Match, body: bytes) -> None:
        rpc, style, headers = match.rule.rpc, call.parameters.style, exchange.headers
        if match.rule.http_method == "GET" and not style.protobuf and event_stream.wanted(headers):
            call.parameters = replace(call.parameters, style=replace(style, sse=True))
        parameters, mask = call.parameters, _mask(call, match)
        resumed = event_stream.resumed(parameters.query, headers, rpc.input_type)

        def begin() -> tuple[_Parts, bytes | None]:
            request = to_message(match, resumed or parameters.query, body, protobuf=is_protobuf(headers))
            who = parameters.credentials
            messages = self._dispatcher.stream(rpc, request, who, exchange.gone, exchange.address)
            parts = _Parts(call, rpc.output_type, messages, mask)
            return parts, parts.first()

        async with exchange.watched():
            parts, part = await self._in_thread(match, begin)
            try:
                if part is None and resumed is not None and call.stream is EVENT_STREAM:
                    await exchange.respond(204, b"")  # or a browser would come back for ever
                else:
                    await self._send_stream(exchange, match, parts, part)
            except BaseException:
                exchange.gone.set()
                raise
            finally:
                # A server that stops does not wait for the thread that pulls; that one then closes.
                with anyio.CancelScope(shield=True), suppress(ValueError):
                    await self._in_thread(match, parts.close)

    async def _send_stream(self, exchange: Exchange, match: Match, parts: "_Parts", part: bytes | None) -> None:
        def pull() -> bytes | None:
            part = parts.next()
            if exchange.gone.is_set():
                parts.close()
                if exchange.late and part is not None:
                    return parts.failed(too_late())
            return part

        def reads_on() -> bool:
            return exchange.method != "HEAD" and (exchange.late or not exchange.gone.is_set())

        await exchange.begin(200, parts.headers)
        while part is not None and reads_on():
            await exchange.send_part(part)
            part = await self._in_thread(match, pull)
        if not parts.broken:  # else the connection is closed without an end: half a file is none
            await exchange.send_part(b"" if exchange.method == "HEAD" else parts.end, more=False)

    async def _in_thread(self, match: Match, work: Callable[[], _Result]) -> _Result:
        rpc = match.rule.rpc
        group = rpc.full_name if rpc.full_name in WAITS else rpc.containing_service.full_name
        limiter = self._limiters.get(group)
        if limiter is None:
            limiter = self._limiters[group] = CapacityLimiter(self._threads.get(group, self._other_threads))
        return await to_thread.run_sync(work, limiter=limiter)


def _mask(call: _Call, match: Match) -> FieldMask | None:
    """Return the mask that the caller asks for; raise InvalidArgument before anything is done."""
    fields = call.parameters.style.fields
    return field_mask(fields, match.rule.rpc.output_type) if fields else None


async def _refuse(exchange: Exchange, call: _Call, error: ApiError) -> None:
    call.code = error.status
    if exchange.answered:  # half a stream is out: all that is left is to end it
        await exchange.send_part(b"", more=False)
        return
    body = call.format.error(error)
    if call.in_array:
        body = b"[" + body.rstrip() + b"]\n"
    headers = [(b"content-type", call.format.content_type)]
    if challenge := _challenge(error):
        headers.append((b"www-authenticate", challenge))
    if error.retry_seconds is not None:
        headers.append((b"retry-after", str(math.ceil(error.retry_seconds)).encode()))
    await exchange.respond(int(error.http), body, headers)


def _challenge(error: ApiError) -> bytes | None:
    """Return what RFC 6750, section 3, has a client told that could do better with another token."""
    if isinstance(error, Unauthenticated):
        return _REALM + b'"invalid_token"'
    reasons = (detail.reason for detail in error.details if isinstance(detail, protos.ErrorInfo))
    if INSUFFICIENT_SCOPE in reasons:
        return _REALM + b'"insufficient_scope"'
    return None


def _compress(data: bytes, zipped: bool) -> tuple[bytes, Headers]:
    if len(data) < _GZIP_FROM:
        return data, ()
    vary = (b"vary", b"Accept-Encoding")
    if not zipped:
        return data, (vary,)
    return gzip.compress(data, 6, mtime=0), (vary, (b"content-encoding", b"gzip"))
