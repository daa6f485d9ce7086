"""The gRPC server in front of small services, driven by grpc's own client."""

import socket
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from api.stand_ins import MAX_BODY, Backend
from tunesmith import protos
from tunesmith.api.dispatch import Dispatcher
from tunesmith.api.grpc_server import GrpcServer
from tunesmith.api.http_rules import VERSIONS
from tunesmith.api.metrics import CallMetrics
from tunesmith.errors import InvalidArgument, NotFound

GOOD = (("authorization", "Bearer good"),)
V1BETA = "google.ai.generativelanguage.v1beta"
MODEL = "tunedModels/x"


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
def metrics() -> CallMetrics:
    return CallMetrics()


@pytest.fixture
def server(backend: Backend, metrics: CallMetrics) -> Iterator[GrpcServer]:
    server = GrpcServer("127.0.0.1", 0, max_message_bytes=MAX_BODY, threads=2)
    server.start(backend.dispatcher, metrics)
    yield server
    server.stop(0)


@pytest.fixture
def channel(server: GrpcServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


def stub(channel: grpc.Channel, rpc: str, package: str = V1BETA) -> Any:
    """Return what calls an RPC, named `Service.Rpc`, with our own messages."""
    service, _, name = rpc.rpartition(".")
    method = protos.SERVICES[service if "." in service else f"{V1BETA}.{service}"].methods_by_name[name]
    make = channel.unary_stream if method.server_streaming else channel.unary_unary
    path = f"/{service if '.' in service else f'{package}.{service}'}/{name}"
    return make(
        path,
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=protos.message_class(method.output_type).FromString,
    )


def raw(channel: grpc.Channel, path: str) -> Any:
    return channel.unary_unary(path)


def prompt(text: str) -> protos.GenerateContentRequest:
    return protos.GenerateContentRequest(
        model=MODEL, contents=[protos.Content(parts=[protos.Part(text=text)], role="user")]
    )


def status_of(error: Any) -> protos.Status:
    """Return the google.rpc.Status in the trailers of a call."""
    return protos.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])


@pytest.mark.parametrize("version", VERSIONS)
def test_each_version_answers(channel: grpc.Channel, version: str):
    get = stub(channel, "ModelService.GetTunedModel", f"google.ai.generativelanguage.{version}")
    create = stub(channel, "ModelService.CreateTunedModel", f"google.ai.generativelanguage.{version}")
    model = protos.TunedModel(base_model="models/b", display_name="numbers")
    operation = create(
        protos.CreateTunedModelRequest(tuned_model=model, tuned_model_id="x"), metadata=GOOD, timeout=20
    )
    assert operation.name == "tunedModels/x/operations/one"
    assert get(protos.GetTunedModelRequest(name=MODEL), metadata=GOOD, timeout=20).display_name == "numbers"


@pytest.mark.parametrize(
    ("metadata", "seen"),
    [
        ((("authorization", "Bearer good"),), ("good", None, None)),
        ((("authorization", "bearer  good"), ("x-goog-api-key", "dummy")), ("good", "dummy", None)),
        ((("x-goog-api-key", "good-key"), ("x-goog-user-project", "p")), (None, "good-key", "p")),
        ((("x-goog-api-key", "good-key"), ("authorization", "Basic eDp5")), (None, "good-key", None)),
        ((*GOOD, ("x-goog-request-params", "name=y"), ("x-binary-bin", b"\xff")), ("good", None, None)),
    ],
)
def test_credentials_come_as_metadata(channel: grpc.Channel, backend: Backend, metadata: Any, seen: Any):
    count = stub(channel, "GenerativeService.CountTokens")
    assert count(protos.CountTokensRequest(model=MODEL), metadata=metadata, timeout=20).total_tokens == 7
    [credentials] = backend.verifier.seen
    assert (credentials.bearer, credentials.api_key, credentials.project) == seen


def test_an_error_carries_its_details(channel: grpc.Channel):
    ask = stub(channel, "GenerativeService.GenerateContent")
    with pytest.raises(grpc.RpcError) as caught:
        ask(prompt("hi"), metadata=(("authorization", "Bearer bad"),), timeout=20)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert error.details() == "Request had invalid authentication credentials."
    status = status_of(error)
    assert (status.code, status.message) == (16, error.details())
    info = protos.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.reason == "ACCESS_TOKEN_TYPE_UNSUPPORTED"


def test_our_own_fault_is_told_without_its_secrets(channel: grpc.Channel, caplog: pytest.LogCaptureFixture):
    with pytest.raises(grpc.RpcError) as caught:
        stub(channel, "ModelService.GetModel")(protos.GetModelRequest(name="models/x"), metadata=GOOD, timeout=20)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in error.details() + str(status_of(error))
    assert "secret of the server" in caplog.text


def test_a_stream_comes_in_parts(channel: grpc.Channel):
    parts = stub(channel, "GenerativeService.StreamGenerateContent")(prompt("a"), metadata=GOOD, timeout=20)
    assert [part.candidates[0].content.parts[0].text for part in parts] == ["a 0", "a 1", "a 2"]


@pytest.mark.parametrize(
    ("text", "before", "code", "message"),
    [
        ("refuse", 0, grpc.StatusCode.FAILED_PRECONDITION, "The model is CREATING."),
        ("fail", 1, grpc.StatusCode.FAILED_PRECONDITION, "The model went away."),
        ("break", 1, grpc.StatusCode.INTERNAL, "An internal error has occurred."),
    ],
)
def test_a_stream_that_fails_says_why(
    channel: grpc.Channel, text: str, before: int, code: grpc.StatusCode, message: str
):
    parts = stub(channel, "GenerativeService.StreamGenerateContent")(prompt(text), metadata=GOOD, timeout=20)
    seen = []
    with pytest.raises(grpc.RpcError) as caught:
        seen.extend(parts)
    error: Any = caught.value
    assert len(seen) == before
    assert error.code() is code
    assert error.details().startswith(message)
    assert status_of(error).message == error.details()


@pytest.mark.parametrize("rpc", ["GenerateContent", "StreamGenerateContent"])
def test_a_client_that_cancels_stops_its_call(
    channel: grpc.Channel, backend: Backend, server: GrpcServer, metrics: CallMetrics, rpc: str
):
    ask = stub(channel, f"GenerativeService.{rpc}")
    start = ask if rpc.startswith("Stream") else ask.future
    call = start(prompt("endless" if rpc.startswith("Stream") else "wait"), metadata=GOOD, timeout=60)
    assert backend.generative.waiting.wait(20)
    assert not backend.generative.closed.is_set()
    call.cancel()
    assert backend.generative.closed.wait(20)
    server.stop(20)  # returns when the handlers have
    assert f'tunesmith_calls_total{{code="CANCELLED",rpc="{V1BETA}.GenerativeService.{rpc}"}} 1.0' in (
        metrics.text().decode()
    )


def test_a_deadline_stops_the_call(
    channel: grpc.Channel, backend: Backend, server: GrpcServer, metrics: CallMetrics
):
    with pytest.raises(grpc.RpcError) as caught:
        stub(channel, "GenerativeService.GenerateContent")(prompt("wait"), metadata=GOOD, timeout=0.3)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert backend.generative.closed.wait(20)
    server.stop(20)
    assert 'code="DEADLINE_EXCEEDED"' in metrics.text().decode()


def test_long_calls_of_one_service_leave_the_others_free(channel: grpc.Channel, backend: Backend):
    ask = stub(channel, "GenerativeService.GenerateContent").future
    waiting = [ask(prompt("wait"), metadata=GOOD, timeout=60) for _ in range(4)]  # twice the threads
    assert backend.generative.waiting.wait(20)
    models = stub(channel, "ModelService.ListTunedModels")(
        protos.ListTunedModelsRequest(), metadata=GOOD, timeout=20
    )
    assert list(models.tuned_models) == []
    for call in waiting:
        call.cancel()


@pytest.mark.parametrize(
    ("size", "code"),
    [
        (MAX_BODY + 1, grpc.StatusCode.INVALID_ARGUMENT),
        (MAX_BODY * 50, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
def test_a_large_message_is_refused(channel: grpc.Channel, size: int, code: grpc.StatusCode):
    with pytest.raises(grpc.RpcError) as caught:
        stub(channel, "GenerativeService.GenerateContent")(prompt("a" * size), metadata=GOOD, timeout=20)
    error: Any = caught.value
    assert error.code() is code
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        assert error.details() == f"Request payload size exceeds the limit: {MAX_BODY} bytes."


def test_what_is_no_message_is_refused(channel: grpc.Channel):
    with pytest.raises(grpc.RpcError) as caught:
        raw(channel, f"/{V1BETA}.ModelService/GetTunedModel")(b"\xff\xff", metadata=GOOD, timeout=20)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"{V1BETA}.GetTunedModelRequest" in error.details()


def test_fields_of_the_future_are_dropped(channel: grpc.Channel, backend: Backend):
    model = protos.TunedModel(base_model="models/b").SerializeToString() + bytes([0xFA, 0x3E, 1, 65])  # field 1007
    request = bytes([0x12, len(model)]) + model
    raw(channel, f"/{V1BETA}.ModelService/CreateTunedModel")(request, metadata=GOOD, timeout=20)
    [received] = backend.models.requests
    assert received.SerializeToString() == request.removesuffix(bytes([0xFA, 0x3E, 1, 65])).replace(
        b"\x12\x0e", b"\x12\x0a"
    )


@pytest.mark.parametrize(
    "path",
    [
        f"/{V1BETA}.GenerativeService/GenerateAnswer",
        f"/{V1BETA}.GenerativeService/BidiGenerateContent",
        f"/{V1BETA}.FileService/ListFiles",
        f"/{V1BETA}.ModelService/PolishTunedModel",
        "/google.cloud.location.Locations/ListLocations",
    ],
)
def test_what_is_not_implemented_names_itself(channel: grpc.Channel, path: str):
    request = protos.GenerateAnswerRequest(model="models/x").SerializeToString() if "Answer" in path else b""
    with pytest.raises(grpc.RpcError) as caught:
        raw(channel, path)(request, metadata=GOOD, timeout=20)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert error.details() == f"{path.strip('/').replace('/', '.')} is not implemented by this server."


@pytest.mark.parametrize(
    ("rpc", "request_", "message"),
    [
        (
            "ModelService.GetTunedModel",
            protos.GetTunedModelRequest(name="models/x"),
            "* GetTunedModelRequest.name: must look like tunedModels/*, not 'models/x'",
        ),
        (
            "ModelService.UpdateTunedModel",
            protos.UpdateTunedModelRequest(tuned_model=protos.TunedModel(display_name="n")),
            "* UpdateTunedModelRequest.tuned_model.name: tuned_model.name is not specified",
        ),
        (
            "google.longrunning.Operations.WaitOperation",
            protos.WaitOperationRequest(name="operations/1"),
            "* WaitOperationRequest.name: must look like tunedModels/*/operations/*, not 'operations/1'",
        ),
    ],
)
def test_a_name_that_no_route_could_bring_is_refused(channel: grpc.Channel, rpc: str, request_: Any, message: str):
    with pytest.raises(grpc.RpcError) as caught:
        stub(channel, rpc)(request_, metadata=GOOD, timeout=20)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == message


class Refusing:
    """A ModelService that refuses fifty rows of every request."""

    def __init__(self, text: str) -> None:
        self._text = text

    def get_tuned_model(self, _request: Any, _caller: Any) -> Any:
        raise InvalidArgument.at([(f"CreateTunedModelRequest.examples[{row}]", self._text) for row in range(50)])


@pytest.mark.parametrize("text", ["must not be empty, and this one is 六", "x" * 9000])
def test_a_long_error_fits_what_clients_take(backend: Backend, text: str):
    server = GrpcServer("127.0.0.1", 0, max_message_bytes=MAX_BODY)
    server.start(Dispatcher({f"{V1BETA}.ModelService": Refusing(text)}, backend.verifier))
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        stub(channel, "ModelService.GetTunedModel")(
            protos.GetTunedModelRequest(name=MODEL), metadata=GOOD, timeout=20
        )
    server.stop(0)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    lines = error.details().split("\n")
    assert lines[0].startswith(f"* CreateTunedModelRequest.examples[0]: {text[:900]}")
    assert status_of(error).message == error.details()
    if len(text) < 100:
        request = protos.BadRequest()
        assert status_of(error).details[0].Unpack(request)
        assert len(request.field_violations) == len(lines) - 1 > 10
        assert lines[-1] == f"… and {50 - len(lines) + 1} more."


def test_health_follows_the_server(channel: grpc.Channel, server: GrpcServer):
    health = health_pb2_grpc.HealthStub(channel)
    ask = health_pb2.HealthCheckRequest
    services = (f"{V1BETA}.ModelService", "google.ai.generativelanguage.v1.ModelService")
    for service in ("", *services):
        assert health.Check(ask(service=service), timeout=20).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch = health.Watch(ask(), timeout=20)
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    server.ready()
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    for service in services:
        assert health.Check(ask(service=service), timeout=20).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(ask(service="no.such.Service"), timeout=20)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.NOT_FOUND


def reflect(channel: grpc.Channel, version: str, **request: Any) -> reflection_pb2.ServerReflectionResponse:
    ask = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    [response] = ask(iter([reflection_pb2.ServerReflectionRequest(**request)]), timeout=20)
    return response


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_describes_every_service(channel: grpc.Channel, version: str):
    listed = reflect(channel, version, list_services="").list_services_response.service
    names = {service.name for service in listed}
    assert names >= {
        "google.longrunning.Operations",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        *(f"google.ai.generativelanguage.{version}.ModelService" for version in VERSIONS),
    }
    for name in names:
        response = reflect(channel, version, file_containing_symbol=name)
        pool = DescriptorPool()
        files = [
            FileDescriptorProto.FromString(file)
            for file in response.file_descriptor_response.file_descriptor_proto
        ]
        waiting = {file.name: file for file in files}
        while waiting:  # each after what it imports, as a client would add them
            file = next(file for file in waiting.values() if not waiting.keys() & set(file.dependency))
            pool.Add(waiting.pop(file.name))
        service = pool.FindServiceByName(name)
        if "generativelanguage" in name:
            package = name.rpartition(".")[0]
            assert {method.input_type.file.package for method in service.methods} == {package}


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1:{port} for gRPC.*--grpc-port"):
            GrpcServer("127.0.0.1", port, max_message_bytes=MAX_BODY)


def test_two_servers_never_share_a_port(server: GrpcServer):
    with pytest.raises(OSError, match="cannot listen"):
        GrpcServer("127.0.0.1", int(server.address.rpartition(":")[2]), max_message_bytes=MAX_BODY)


@pytest.mark.parametrize(("rpc", "text"), [("GenerateContent", "wait"), ("StreamGenerateContent", "endless")])
def test_a_server_that_stops_stops_its_calls(
    channel: grpc.Channel, server: GrpcServer, backend: Backend, rpc: str, text: str
):
    ask = stub(channel, f"GenerativeService.{rpc}")
    call = (ask if rpc.startswith("Stream") else ask.future)(prompt(text), metadata=GOOD, timeout=60)
    assert backend.generative.waiting.wait(20)
    server.stop(0.1)
    assert backend.generative.closed.is_set()
    with pytest.raises(grpc.RpcError):
        list(call) if rpc.startswith("Stream") else call.result()
    assert call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def test_calls_are_counted_by_their_code(channel: grpc.Channel, server: GrpcServer, metrics: CallMetrics):
    get = stub(channel, "ModelService.GetTunedModel")
    with pytest.raises(grpc.RpcError):
        get(protos.GetTunedModelRequest(name=MODEL), metadata=GOOD, timeout=20)
    server.stop(20)
    code = NotFound.status
    assert f'tunesmith_calls_total{{code="{code}",rpc="{V1BETA}.ModelService.GetTunedModel"}} 1.0' in (
        metrics.text().decode()
    )
