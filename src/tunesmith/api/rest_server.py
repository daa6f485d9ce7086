"""The REST front: a Starlette app with one endpoint for all of Google's routes, and three routes of its own."""

import gzip
import re
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import anyio
from anyio import CapacityLimiter, to_thread
from google.protobuf.message import Message
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Lifespan, Receive, Scope, Send

from tunesmith.api.dispatch import Dispatcher, internal
from tunesmith.api.exchange import Exchange, Headers
from tunesmith.api.json_writer import JsonWriter
from tunesmith.api.metrics import CONTENT_TYPE, CallMetrics
from tunesmith.api.system_parameters import SystemParameters, http_method, is_form, system_parameters
from tunesmith.api.transcoding import Match, Router, to_message
from tunesmith.errors import ApiError, InvalidArgument, Unauthenticated

THREADS = 40
"""Calls of one service that run at a time; the next ones wait their turn."""

_Result = TypeVar("_Result")

_JSON = (b"content-type", b"application/json; charset=UTF-8")
_CHALLENGE = (b"www-authenticate", b'Bearer realm="https://accounts.google.com/", error="invalid_token"')
_GZIP_FROM = 1400  # bytes; what fits a packet is not worth compressing
_TAKES_GZIP = re.compile(rb"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))")


def rest_app(
    dispatcher: Dispatcher,
    *,
    max_body_bytes: int,
    ready: Callable[[], bool],
    metrics: CallMetrics | None = None,
    routes: Sequence[BaseRoute] = (),
    lifespan: Lifespan[Starlette] | None = None,
    threads: int = THREADS,
) -> Starlette:
    """Return the ASGI app.

    Args:
        dispatcher: Runs the calls.
        max_body_bytes: The largest request body that is taken.
        ready: Whether the server can serve; called in a thread for each `GET /readyz`.
        metrics: What `GET /metrics` shows.
        routes: Routes of other parts (sign-in, web page), tried before Google's.
        lifespan: Starlette's hook for what starts and ends with the server.
        threads: Calls of one service that run at a time.
    """
    shown = metrics or CallMetrics()

    def healthz(_request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    def readyz(_request: Request) -> Response:
        return JSONResponse({"status": "ok"}) if ready() else JSONResponse({"status": "not ready"}, 503)

    def prometheus(_request: Request) -> Response:
        return Response(shown.text(), headers={"content-type": CONTENT_TYPE})

    own = [Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", prometheus)]
    api = _Api(dispatcher, max_body_bytes, shown, threads)
    return Starlette(routes=[*own, *routes, Route("/{path:path}", api)], lifespan=lifespan)


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
        return bool(self.match and self.match.rule.rpc.server_streaming and not self.parameters.style.sse)

    @property
    def writer(self) -> JsonWriter:
        style = self.parameters.style
        return _WRITERS[style.pretty and not style.sse, style.enum_numbers]


@dataclass(frozen=True)
class _Framing:
    """How the messages of a stream are set apart from each other."""

    content_type: bytes
    before_first: bytes
    before_next: bytes
    after_each: bytes
    end: bytes
    empty: bytes  # the whole of a stream without messages


_EVENTS = _Framing(b"text/event-stream", b"data: ", b"data: ", b"\r\n\r\n", b"", b"")
_ARRAY = _Framing(_JSON[1], b"[", b",\r\n", b"", b"]", b"[]")
_WRITERS = {
    (pretty, numbers): JsonWriter(pretty=pretty, enum_numbers=numbers)
    for pretty in (True, False)
    for numbers in (True, False)
}


class _Api:
    """The endpoint of all of Google's routes."""

    def __init__(self, dispatcher: Dispatcher, max_body_bytes: int, metrics: CallMetrics, threads: int) -> None:
        self._router = Router()
        self._dispatcher = dispatcher
        self._max_body_bytes = max_body_bytes
        self._metrics = metrics
        self._threads = threads
        # One for each service, so that long generations never keep a `get` waiting.
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
            body = await exchange.read_body(self._max_body_bytes)
        elif method != exchange.method and is_form(headers):
            form = await exchange.read_body(self._max_body_bytes)
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

        def work() -> tuple[bytes, Headers]:
            request = to_message(match, parameters.query, body)
            response = self._dispatcher.call(rpc, request, parameters.credentials, exchange.gone)
            return _encode(call.writer.text(response), zipped)

        async with exchange.watched():
            payload, headers = await self._in_thread(match, work)
        await exchange.respond(200, payload, [_JSON, *headers])

    async def _stream(self, exchange: Exchange, call: _Call, match: Match, body: bytes) -> None:
        rpc, parameters = match.rule.rpc, call.parameters

        def begin() -> tuple[Generator[Message], str | None]:
            request = to_message(match, parameters.query, body)
            messages = self._dispatcher.stream(rpc, request, parameters.credentials, exchange.gone)
            first = next(messages, None)
            return messages, None if first is None else call.writer.text(first)

        async with exchange.watched():
            messages, text = await self._in_thread(match, begin)
            try:
                await self._send_stream(exchange, call, match, messages, text)
            except BaseException:
                exchange.gone.set()
                raise
            finally:
                # A server that stops does not wait for the thread that pulls; that one then closes.
                with anyio.CancelScope(shield=True), suppress(ValueError):
                    await self._in_thread(match, messages.close)

    async def _send_stream(
        self, exchange: Exchange, call: _Call, match: Match, messages: Generator[Message], text: str | None
    ) -> None:
        framing = _ARRAY if call.in_array else _EVENTS

        def pull() -> str | None:
            try:
                message = next(messages, None)
                if exchange.gone.is_set():
                    messages.close()
                return None if message is None else call.writer.text(message)
            except ApiError as error:
                call.code = error.status
                return call.writer.error_text(error)

        await exchange.begin(200, [(b"content-type", framing.content_type)])
        before, end = framing.before_first, framing.empty
        while text is not None and not exchange.gone.is_set():
            await exchange.send_part(before + text.rstrip("\n").encode() + framing.after_each)
            before, end = framing.before_next, framing.end
            text = await self._in_thread(match, pull)
        await exchange.send_part(end, more=False)

    async def _in_thread(self, match: Match, work: Callable[[], _Result]) -> _Result:
        service = match.rule.rpc.containing_service.full_name
        limiter = self._limiters.get(service)
        if limiter is None:
            limiter = self._limiters[service] = CapacityLimiter(self._threads)
        return await to_thread.run_sync(work, limiter=limiter)


async def _refuse(exchange: Exchange, call: _Call, error: ApiError) -> None:
    call.code = error.status
    if exchange.answered:  # half a stream is out: all that is left is to end it
        await exchange.send_part(b"", more=False)
        return
    text = call.writer.error_text(error)
    body = f"[{text.rstrip()}]\n" if call.in_array else text
    challenge = [_CHALLENGE] if isinstance(error, Unauthenticated) else []
    await exchange.respond(int(error.http), body.encode(), [_JSON, *challenge])


def _encode(text: str, zipped: bool) -> tuple[bytes, Headers]:
    data = text.encode()
    if len(data) < _GZIP_FROM:
        return data, ()
    vary = (b"vary", b"Accept-Encoding")
    if not zipped:
        return data, (vary,)
    return gzip.compress(data, 6, mtime=0), (vary, (b"content-encoding", b"gzip"))
