"""OpenAI's surface, under the path that Google's hosted API had it: the same calls in other words."""

import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import anyio
from anyio import CapacityLimiter, to_thread
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from tunesmith import protos
from tunesmith.api import json_text, openai_requests, resource_names
from tunesmith.api.dispatch import Dispatcher, internal
from tunesmith.api.exchange import Exchange
from tunesmith.api.http_rules import VERSIONS
from tunesmith.api.metrics import CallMetrics
from tunesmith.api.openai_answers import Answer, Chat, Form, Text, model
from tunesmith.api.openai_errors import error_body, error_headers, http_status
from tunesmith.api.openai_requests import GENERATE, STREAM, Asked, model_name
from tunesmith.api.system_parameters import system_parameters
from tunesmith.auth.api_keys import PREFIX
from tunesmith.caller import Credentials
from tunesmith.errors import ApiError, NotFound, Unimplemented

THREADS = 40
"""Calls that run at a time; the next ones wait their turn."""

_MODELS = protos.SERVICES["google.ai.generativelanguage.v1beta.ModelService"].methods_by_name
_PAGE = 1000  # models
_JSON = (b"content-type", b"application/json")
_EVENTS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no"))
_COMPLETIONS: Mapping[str, tuple[Callable[[Any], Asked], Form]] = {
    "chat/completions": (openai_requests.chat, Chat()),
    "completions": (openai_requests.completion, Text()),
}
_NOT_YET = ("embeddings", "images", "audio", "files", "batches", "moderations", "responses", "fine_tuning")

_Result = TypeVar("_Result")


def openai_routes(
    dispatcher: Dispatcher,
    metrics: CallMetrics,
    max_body_bytes: int,
    receive_seconds: float = 60,
    threads: int = THREADS,
) -> list[BaseRoute]:
    """Return the routes.

    Args:
        dispatcher: Runs the calls.
        metrics: Where they are counted, under the names of the RPCs that they stand for.
        max_body_bytes: The largest request body that is taken.
        receive_seconds: How long a request's body may take to arrive.
        threads: Calls that run at a time.
    """
    app = _OpenAi(dispatcher, metrics, max_body_bytes, receive_seconds, threads)
    return [Route(f"/{version}/openai/{{path:path}}", app) for version in VERSIONS]


@dataclass
class _Call:
    """What is known so far of the call that an exchange means; `code` is its canonical outcome."""

    credentials: Credentials = field(default_factory=Credentials)
    names: Mapping[str, str] = field(default_factory=dict)
    rpc_name: str = "unknown"
    code: str = "OK"


class _OpenAi:
    """The endpoint of all of OpenAI's routes."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        metrics: CallMetrics,
        max_body_bytes: int,
        receive_seconds: float,
        threads: int,
    ) -> None:
        self._threads = threads
        self._dispatcher, self._metrics = dispatcher, metrics
        self._max_body_bytes, self._receive_seconds = max_body_bytes, receive_seconds
        self._limiter: CapacityLimiter | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        exchange, call = Exchange(scope, receive, send), _Call()
        try:
            await self._serve(exchange, call, scope["path_params"]["path"].strip("/"))
        except ApiError as error:
            await _refuse(exchange, call, exchange.told(error))
        except (ClientDisconnect, OSError):
            call.code = "CANCELLED"
        except Exception as error:  # noqa: BLE001 — whatever it is, the client gets an answer
            await _refuse(exchange, call, internal(error, f"{exchange.method} {exchange.path}"))
        finally:
            code = "CANCELLED" if exchange.gone.is_set() else call.code
            self._metrics.observe(call.rpc_name, code, time.perf_counter() - started)

    async def _serve(self, exchange: Exchange, call: _Call, path: str) -> None:
        call.credentials = _credentials(exchange)
        if path in _COMPLETIONS and exchange.method == "POST":
            await self._complete(exchange, call, *_COMPLETIONS[path])
        elif path == "models" and exchange.method in ("GET", "HEAD"):
            call.rpc_name = _MODELS["ListModels"].full_name
            await self._answer(exchange, lambda: self._list(exchange, call))
        elif path.startswith("models/") and exchange.method in ("GET", "HEAD"):
            call.rpc_name = _MODELS["GetModel"].full_name
            await self._answer(exchange, lambda: self._get(exchange, call, path.removeprefix("models/")))
        elif path.partition("/")[0] in _NOT_YET:
            raise Unimplemented(f"{exchange.method} {exchange.path} is not implemented by this server.")
        else:
            raise NotFound(
                f"There is no {exchange.method} {exchange.path}. Of OpenAI's API there are POST chat/completions "
                "and completions, and GET models and models/MODEL."
            )

    async def _complete(self, exchange: Exchange, call: _Call, read: Callable[[Any], Asked], form: Form) -> None:
        body = await exchange.read_body(self._max_body_bytes, self._receive_seconds)
        call.rpc_name = GENERATE.full_name
        asked = await self._in_thread(lambda: read(json_text.parse(body)))
        call.names = asked.names
        if asked.stream:
            call.rpc_name = STREAM.full_name
            await self._stream(exchange, call, asked, form)
        else:
            await self._answer(
                exchange,
                lambda: Answer(form, asked).whole(
                    self._call(GENERATE, request, exchange, call) for request in asked.requests
                ),
            )

    async def _answer(self, exchange: Exchange, run: Callable[[], dict[str, Any]]) -> None:
        async with exchange.watched():
            payload = await self._in_thread(lambda: _json(run()))
        await exchange.respond(200, payload, [_JSON])

    async def _stream(self, exchange: Exchange, call: _Call, asked: Asked, form: Form) -> None:
        events = self._events(exchange, call, asked, form)

        def pull() -> bytes | None:
            event = next(events, None)
            if exchange.gone.is_set():
                events.close()
            return event

        async with exchange.watched():
            try:
                event = await self._in_thread(pull)
                await exchange.begin(200, _EVENTS)
                while event is not None and not exchange.gone.is_set():
                    await exchange.send_part(event)
                    event = await self._in_thread(pull)
                await exchange.send_part(b"", more=False)
            except BaseException:
                exchange.gone.set()
                raise
            finally:
                # A server that stops does not wait for the thread that pulls; that one then closes.
                with anyio.CancelScope(shield=True), suppress(ValueError):
                    await self._in_thread(events.close)

    def _events(self, exchange: Exchange, call: _Call, asked: Asked, form: Form) -> Generator[bytes]:
        """Yield a stream's events; raise ApiError when it fails before the first, and tell it after that."""
        begun = False
        chunks = Answer(form, asked).chunks(self._streams(exchange, call, asked))
        try:
            for chunk in chunks:
                yield b"data: " + _json(chunk) + b"\n\n"
                begun = True
        except ApiError as error:
            if not begun:
                raise
            call.code = error.status
            yield b"data: " + error_body(error, call.names, call.credentials) + b"\n\n"
        else:
            yield b"data: [DONE]\n\n"

    def _streams(
        self, exchange: Exchange, call: _Call, asked: Asked
    ) -> Iterator[Iterator[protos.GenerateContentResponse]]:
        for request in asked.requests:
            who = call.credentials, exchange.gone, exchange.address
            with closing(self._dispatcher.stream(STREAM, request, *who)) as responses:
                yield (one for one in responses if isinstance(one, protos.GenerateContentResponse))

    def _list(self, exchange: Exchange, call: _Call) -> dict[str, Any]:
        """Return the caller's tuned models that can answer, then the base models under all their names."""
        tuned, base = protos.ListTunedModelsRequest(page_size=_PAGE), protos.ListModelsRequest(page_size=_PAGE)
        pages = [
            *(page.tuned_models for page in self._pages("ListTunedModels", tuned, exchange, call)),
            *(page.models for page in self._pages("ListModels", base, exchange, call)),
        ]
        found = [one for page in pages for one in page if _answers(one)]
        return {"object": "list", "data": [model(one.name, _created(one)) for one in found]}

    def _pages(self, method: str, request: Any, exchange: Exchange, call: _Call) -> Iterator[Any]:
        while True:
            page = self._call(_MODELS[method], request, exchange, call)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def _get(self, exchange: Exchange, call: _Call, name: str) -> dict[str, Any]:
        name = model_name(name)
        rpc = _MODELS["GetTunedModel" if name.startswith("tunedModels/") else "GetModel"]
        request = protos.message_class(rpc.input_type)(name=name)
        resource_names.check(rpc, request)
        return model(name, _created(self._call(rpc, request, exchange, call)))

    def _call(self, rpc: Any, request: Any, exchange: Exchange, call: _Call) -> Any:
        return self._dispatcher.call(rpc, request, call.credentials, exchange.gone, exchange.address)

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        if self._limiter is None:  # it belongs to the loop that it is made in
            self._limiter = CapacityLimiter(self._threads)
        return await to_thread.run_sync(work, limiter=self._limiter)


def _credentials(exchange: Exchange) -> Credentials:
    """Return what the caller brings; OpenAI's clients send a key where others send a token."""
    found = system_parameters(exchange.query, exchange.headers).credentials
    if found.bearer is not None and found.bearer.startswith(PREFIX):
        return replace(found, bearer=None, api_key=found.bearer)
    return found


def _answers(one: protos.Model | protos.TunedModel) -> bool:
    return isinstance(one, protos.Model) or one.state == protos.TunedModel.ACTIVE


def _created(one: protos.Model | protos.TunedModel) -> int:
    return 0 if isinstance(one, protos.Model) else int(one.create_time.ToSeconds())


async def _refuse(exchange: Exchange, call: _Call, error: ApiError) -> None:
    call.code = error.status
    if exchange.answered:  # half a stream is out: all that is left is to end it
        await exchange.send_part(b"", more=False)
        return
    body = error_body(error, call.names, call.credentials)
    await exchange.respond(http_status(error, call.credentials), body, [_JSON, *error_headers(error)])


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
