"""The gRPC front: a handler for each of Google's RPCs, health checking and reflection."""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse

from tunesmith import protos
from tunesmith.api import resource_names
from tunesmith.api.dispatch import GENERATING, WAITS, Dispatcher
from tunesmith.api.field_mask import FieldMask, field_mask
from tunesmith.api.grpc_metadata import abort, address, credentials, fields
from tunesmith.api.grpc_reflection import reflection_handlers
from tunesmith.api.http_rules import VERSIONS
from tunesmith.api.metrics import CallMetrics
from tunesmith.errors import ApiError, InvalidArgument, Unimplemented

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]

THREADS = 40
"""Calls of one service that run at a time; the next ones wait their turn."""

QUICK_THREADS = 2
"""For all calls that never wait: more would only fight for the interpreter."""

PACKAGE = "google.ai.generativelanguage."
_OWN_VERSION = "v1beta"

# A larger message is refused by grpc itself, with RESOURCE_EXHAUSTED: up to this it is refused in our words.
_REFUSED_IN_WORDS = 2
_OPTIONS = (
    ("grpc.so_reuseport", 0),  # or a second server would take half of the first one's connections
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # for clients that keep a long wait alive
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_send_message_length", -1),
)


class GrpcServer:
    """Serves over gRPC what the REST app serves over HTTP.

    It is bound when it is made, so that a taken port is known before anything else starts, and answers from
    `start` on.

    Args:
        host: The address to listen on.
        port: The port; 0 takes a free one.
        max_message_bytes: The largest request that is taken.
        key_and_certificates: PEM of the private key and of the certificate chain, for TLS.
        threads: Calls of one service that run at a time.
        generating: Calls that run at a time of services that make answers.

    Raises:
        OSError: The address cannot be listened on.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        max_message_bytes: int,
        key_and_certificates: tuple[bytes, bytes] | None = None,
        threads: int = THREADS,
        generating: int = THREADS,
    ) -> None:
        self._max_message_bytes = max_message_bytes
        self._threads, self._generating = threads, generating
        self._pools = [ThreadPoolExecutor(threads, "grpc")]
        largest = ("grpc.max_receive_message_length", _REFUSED_IN_WORDS * max_message_bytes)
        self._server = grpc.server(self._pools[0], options=(*_OPTIONS, largest))
        self._health = health.HealthServicer()
        self._say(HealthCheckResponse.NOT_SERVING)
        where = f"[{host}]" if ":" in host else host
        try:
            if key_and_certificates is None:
                bound = self._server.add_insecure_port(f"{where}:{port}")
            else:
                tls = grpc.ssl_server_credentials([key_and_certificates])
                bound = self._server.add_secure_port(f"{where}:{port}", tls)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {where}:{port} for gRPC: choose another --grpc-port") from error
        self.address = f"{where}:{bound}"

    def start(
        self, dispatcher: Dispatcher, metrics: CallMetrics | None = None, quick: Collection[str] = ()
    ) -> None:
        """Answer from now on; health checks say NOT_SERVING until `ready`.

        Args:
            dispatcher: Runs the calls.
            metrics: Where calls are counted.
            quick: RPCs, by full name, that take a fraction of a millisecond and never wait.
        """
        shown, quick_threads = metrics or CallMetrics(), self._pool("quick", QUICK_THREADS)
        own_threads = dict.fromkeys(quick, quick_threads)
        for service in protos.SERVICES.values():
            handlers = self._handlers(service, dispatcher, shown, own_threads)
            self._server.add_generic_rpc_handlers(
                tuple(grpc.method_handlers_generic_handler(name, handlers) for name in _names(service.full_name))
            )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        others = [PACKAGE + version for version in VERSIONS if version != _OWN_VERSION]
        shown_handlers = reflection_handlers(PACKAGE + _OWN_VERSION, others, self._pool("reflection"))
        self._server.add_generic_rpc_handlers((*shown_handlers, _Unknown()))
        self._server.start()

    def ready(self) -> None:
        """Say SERVING to health checks from now on."""
        self._say(HealthCheckResponse.SERVING)

    def stop(self, grace: float) -> None:
        """End; calls under way have `grace` seconds to finish, and are then told that nobody waits."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace).wait()
        for pool in self._pools:
            pool.shutdown()

    def _say(self, status: Any) -> None:
        """Tell health checks the status of the server, which is that of each service."""
        for name in ("", *(name for service in protos.SERVICES for name in _names(service))):
            self._health.set(name, status)

    def _handlers(
        self,
        service: ServiceDescriptor,
        dispatcher: Dispatcher,
        metrics: CallMetrics,
        own_threads: Mapping[str, ThreadPoolExecutor],
    ) -> "dict[str, Handler]":
        # Threads for each service, so that long generations never keep a `get` waiting.
        threads = self._pool(service.name, self._generating if service.full_name in GENERATING else None)
        handlers = {}
        for rpc in service.methods:
            waits = WAITS.get(rpc.full_name)
            own = self._pool(rpc.name, waits) if waits else own_threads.get(rpc.full_name, threads)
            handlers[rpc.name] = _handler(_Rpc(rpc, dispatcher, metrics, self._max_message_bytes), own)
        return handlers

    def _pool(self, name: str, threads: int | None = None) -> ThreadPoolExecutor:
        pool = ThreadPoolExecutor(threads or self._threads, f"grpc-{name}")
        self._pools.append(pool)
        return pool


class _Rpc:
    """One RPC: bytes in, messages out."""

    def __init__(
        self, rpc: MethodDescriptor, dispatcher: Dispatcher, metrics: CallMetrics, max_message_bytes: int
    ) -> None:
        self.rpc = rpc
        self._dispatcher, self._metrics = dispatcher, metrics
        self._max_message_bytes = max_message_bytes
        self._request = protos.message_class(rpc.input_type)

    def answer(self, data: bytes, context: grpc.ServicerContext) -> Message:
        """Answer once."""
        with self._observed(context) as gone:
            mask, brought = self._mask(context), credentials(context.invocation_metadata())
            response = self._dispatcher.call(self.rpc, self._parse(data), brought, gone, address(context.peer()))
            return mask.apply(response) if mask else response

    def stream(self, data: bytes, context: grpc.ServicerContext) -> Iterator[Message]:
        """Answer with a stream; grpc closes it when the client leaves."""
        with self._observed(context) as gone:
            mask, brought = self._mask(context), credentials(context.invocation_metadata())
            request, peer = self._parse(data), address(context.peer())
            with closing(self._dispatcher.stream(self.rpc, request, brought, gone, peer)) as responses:
                for response in responses:
                    if response is not None:  # HTTP/2 has its own way to say that somebody is there
                        yield mask.apply(response) if mask else response

    def refuse(self, _requests: Iterable[bytes], context: grpc.ServicerContext) -> Iterator[Message]:
        """Answer a stream of requests: no service takes one, so the dispatcher finds a word for it."""
        with self._observed(context) as gone:
            brought = credentials(context.invocation_metadata())
            answers = self._dispatcher.stream(self.rpc, self._request(), brought, gone)
            yield from (answer for answer in answers if answer is not None)

    @contextmanager
    def _observed(self, context: grpc.ServicerContext) -> Iterator[threading.Event]:
        """Yield the event that is set when the client leaves; count the call, and end it when it fails."""
        started, code, gone = time.perf_counter(), "OK", threading.Event()
        if not context.add_callback(gone.set):
            gone.set()
        try:
            yield gone
        except ApiError as error:
            code = error.status
            abort(context, error)
        finally:
            if gone.is_set():
                code = "DEADLINE_EXCEEDED" if context.time_remaining() == 0 else "CANCELLED"
            self._metrics.observe(self.rpc.full_name, code, time.perf_counter() - started)

    def _mask(self, context: grpc.ServicerContext) -> FieldMask | None:
        """Return the mask that the caller asks for; raise InvalidArgument before anything is done."""
        asked = fields(context.invocation_metadata())
        return field_mask(asked, self.rpc.output_type) if asked else None

    def _parse(self, data: bytes) -> Message:
        if len(data) > self._max_message_bytes:
            raise InvalidArgument(f"Request payload size exceeds the limit: {self._max_message_bytes} bytes.")
        try:
            request = self._request.FromString(data)
        except DecodeError as error:
            raise InvalidArgument(f"The request is not a {self.rpc.input_type.full_name}: {error}") from None
        request.DiscardUnknownFields()  # or they would be stored, and come back
        resource_names.check(self.rpc, request)
        return request


class _Unknown(grpc.GenericRpcHandler):
    """Answers what no other handler does."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "Handler":
        """Return a handler that names the method."""
        name = handler_call_details.method.strip("/").replace("/", ".")

        def refuse(_requests: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
            abort(context, Unimplemented(f"{name} is not implemented by this server."))
            yield b""

        return grpc.stream_stream_rpc_method_handler(refuse)


def _handler(rpc: _Rpc, threads: ThreadPoolExecutor) -> "Handler":
    behavior: Callable[[Any, grpc.ServicerContext], Any]
    make: Callable[..., Handler]
    if rpc.rpc.client_streaming:
        behavior, make = rpc.refuse, grpc.stream_stream_rpc_method_handler
    elif rpc.rpc.server_streaming:
        behavior, make = rpc.stream, grpc.unary_stream_rpc_method_handler
    else:
        behavior, make = rpc.answer, grpc.unary_unary_rpc_method_handler

    def serve(request: Any, context: grpc.ServicerContext) -> Any:
        return behavior(request, context)

    serve.experimental_thread_pool = threads  # type: ignore[attr-defined]  # grpc's way to choose the threads
    return make(serve, response_serializer=_serialize)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _names(service: str) -> list[str]:
    """Return the names that a service is served under: clients of each version call their own."""
    own = PACKAGE + _OWN_VERSION + "."
    if not service.startswith(own):
        return [service]
    return [f"{PACKAGE}{version}.{service.removeprefix(own)}" for version in VERSIONS]
