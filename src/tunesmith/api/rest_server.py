"""The REST front: a Starlette app with one endpoint for all of Google's routes, and three routes of its own."""

import gzip
import math
import re
import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import anyio
from anyio import CapacityLimiter, to_thread
from google.protobuf.message import Message
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Lifespan, Receive, Scope, Send

from tunesmith import protos
from tunesmith.api.body_formats import (
    ARRAY_STREAM,
    EVENT_STREAM,
    JSON_FORMATS,
    PROTOBUF_FORMAT,
    PROTOBUF_STREAM,
    BodyFormat,
    StreamFormat,
)
from tunesmith.api.dispatch import WAITS, Dispatcher, internal
from tunesmith.api.documents import document_routes
from tunesmith.api.exchange import Exchange, Headers
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
from tunesmith.errors import ApiError, InvalidArgument, Unauthenticated

THREADS = 40
"""Calls of one service that run at a time; the next ones wait their turn."""

_Result = TypeVar("_Result")

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
    api = _Api(dispatcher, max_body_bytes, receive_seconds, shown, threads, inline)
    app = Starlette(routes=[*own, *described, *routes], middleware=[_cors(cors_origins)], lifespan=lifespan)
    # Not a route: those match no path with a line break in it, and would answer in words of their own.
    app.router.default, app.router.redirect_slashes = api, False
    return app


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
        return bool(self.match and self.match.rule.rpc.server_streaming and self.stream is ARRAY_STREAM)

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


class _Api:
    """The endpoint of all of Google's routes."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        max_body_bytes: int,
        receive_seconds: float,
        metrics: CallMetrics,
        threads: int,
        inline: Collection[str],
    ) -> None:
        self._router = Router()
        self._dispatcher = dispatcher
        self._max_body_bytes, self._receive_seconds = max_body_bytes, receive_seconds
        self._metrics = metrics
        self._threads = threads
        self._inline = frozenset(inline)
        # One for each service, and for what waits, so that long generations never keep a `get` waiting.
        self._limiters: dict[str, CapacityLimiter] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        exchange, call = Exchange(scope, receive, send), _Call(SystemParameters())
        try:
            await self._serve(exchange, call)
        except ApiError as error:
            await _refuse(exchange, call, error)
        except (ClientDisconnect, OSError):
            call.code = "CANCELLED"
        except Exception as error:  # noqa: BLE001 — whatever it is, the client gets an answer
            await _refuse(exchange, call, internal(error, f"{exchange.method} {exchange.path}"))
        finally:
            code = "CANCELLED" if exchange.gone.is_set() else call.code
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
            return _compress(call.written(response, mask), zipped)

        if rpc.full_name in self._inline:
            response = run()
            if response.ByteSize() < _WRITTEN_INLINE:
                payload, headers = write(response)
            else:
                payload, headers = await self._in_thread(match, lambda: write(response))
        else:
            async with exchange.watched():
                payload, headers = await self._in_thread(match, lambda: write(run()))
        await exchange.respond(200, payload, [(b"content-type", call.format.content_type), *headers])

    async def _stream(self, exchange: Exchange, call: _Call, match: Match, body: bytes) -> None:
        rpc, parameters, mask = match.rule.rpc, call.parameters, _mask(call, match)

        def begin() -> tuple[Generator[Message], bytes | None]:
            request = to_message(match, parameters.query, body, protobuf=is_protobuf(exchange.headers))
            who = parameters.credentials
            messages = self._dispatcher.stream(rpc, request, who, exchange.gone, exchange.address)
            first = next(messages, None)
            return messages, None if first is None else call.stream.part(call.written(first, mask), first=True)

        async with exchange.watched():
            messages, part = await self._in_thread(match, begin)
            try:
                await self._send_stream(exchange, call, match, messages, part)
            except BaseException:
                exchange.gone.set()
                raise
            finally:
                # A server that stops does not wait for the thread that pulls; that one then closes.
                with anyio.CancelScope(shield=True), suppress(ValueError):
                    await self._in_thread(match, messages.close)

    async def _send_stream(
        self, exchange: Exchange, call: _Call, match: Match, messages: Generator[Message], part: bytes | None
    ) -> None:
        stream, mask = call.stream, _mask(call, match)

        def pull() -> bytes | None:
            try:
                message = next(messages, None)
                if exchange.gone.is_set():
                    messages.close()
                return None if message is None else stream.part(call.written(message, mask), first=False)
            except ApiError as error:
                call.code = error.status
                return stream.part(call.format.error(error), first=False, failed=True)

        await exchange.begin(200, [(b"content-type", stream.content_type)])
        end = stream.empty
        while part is not None and not exchange.gone.is_set():
            await exchange.send_part(part)
            end = stream.end
            part = await self._in_thread(match, pull)
        await exchange.send_part(end, more=False)

    async def _in_thread(self, match: Match, work: Callable[[], _Result]) -> _Result:
        rpc = match.rule.rpc
        group = rpc.full_name if rpc.full_name in WAITS else rpc.containing_service.full_name
        limiter = self._limiters.get(group)
        if limiter is None:
            limiter = self._limiters[group] = CapacityLimiter(self._threads)
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
