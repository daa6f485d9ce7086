"""The same request over REST and over gRPC has the same effect, and fails with the same code and words."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any, NamedTuple, Protocol

import grpc
import httpx2
import pytest
from google.ai import generativelanguage_v1beta as google
from google.ai.generativelanguage_v1beta.services.file_service.transports import FileServiceGrpcTransport
from google.ai.generativelanguage_v1beta.services.generative_service.transports import (
    GenerativeServiceGrpcTransport,
)
from google.ai.generativelanguage_v1beta.services.model_service.transports import ModelServiceGrpcTransport
from google.ai.generativelanguage_v1beta.services.text_service.transports import TextServiceGrpcTransport
from google.api_core.exceptions import GoogleAPICallError
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.json_format import MessageToDict
from google.rpc import status_pb2

from servers import TIMEOUT, Server, job

BODY = {"contents": [{"role": "user", "parts": [{"text": "7"}]}], "generation_config": {"max_output_tokens": 8}}
ABSENT = "tunedModels/absent"


class Failure(Exception):
    """What a client is told: the canonical code, the message, and the types of the details."""

    def __init__(self, code: str, message: str, details: list[Any]) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message
        self.details = sorted(kind.rpartition("/")[2] for kind in details)


class Client(Protocol):
    """The calls that both transports have; answers are JSON as Google prints it."""

    def close(self) -> None: ...
    def create(self, model: dict[str, Any], model_id: str) -> Any: ...
    def get(self, name: str) -> Any: ...
    def list(self, size: int, token: str = "") -> Any: ...
    def patch(self, name: str, model: dict[str, Any], mask: str) -> Any: ...
    def delete(self, name: str) -> Any: ...
    def operation(self, name: str) -> Any: ...
    def operations(self, name: str) -> Any: ...
    def cancel(self, name: str) -> Any: ...
    def forget(self, name: str) -> Any: ...
    def wait(self, name: str, seconds: float | None = None) -> Any: ...
    def generate(self, model: str, body: dict[str, Any]) -> Any: ...
    def stream(self, model: str, body: dict[str, Any]) -> Any: ...
    def count(self, model: str, body: dict[str, Any]) -> Any: ...
    def count_text(self, model: str, text: str) -> Any: ...
    def files(self) -> Any: ...


class Rest:
    """REST, as a client of ours sends it."""

    def __init__(self, server: Server, headers: dict[str, str]) -> None:
        self.close = lambda: self._http.close()
        self._http = httpx2.Client(base_url=f"{server.url}/v1beta/", headers=headers, timeout=TIMEOUT)

    def _call(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        response = self._http.request(method, path, json=body, params=query)
        answer = response.json()
        if response.status_code == 200:
            return answer
        [error] = [part["error"] for part in (answer if isinstance(answer, list) else [answer])]
        assert error["code"] == response.status_code
        raise Failure(error["status"], error["message"], [d["@type"] for d in error.get("details", [])])

    def create(self, model, model_id):
        return self._call("POST", "tunedModels", model, tunedModelId=model_id)

    def get(self, name):
        return self._call("GET", name)

    def list(self, size, token=""):
        return self._call("GET", "tunedModels", pageSize=size, pageToken=token)

    def patch(self, name, model, mask):
        return self._call("PATCH", name, model, updateMask=mask)

    def delete(self, name):
        return self._call("DELETE", name)

    def operation(self, name):
        return self._call("GET", name)

    def operations(self, name):
        return self._call("GET", f"{name}/operations")

    def cancel(self, name):
        return self._call("POST", f"{name}:cancel", {})

    def forget(self, name):
        return self._call("DELETE", name)

    def wait(self, name, seconds=None):
        return self._call("POST", f"{name}:wait", {} if seconds is None else {"timeout": f"{seconds}s"})

    def generate(self, model, body):
        return self._call("POST", f"{model}:generateContent", body)

    def stream(self, model, body):
        return self._call("POST", f"{model}:streamGenerateContent", body)

    def count(self, model, body):
        return self._call("POST", f"{model}:countTokens", {"contents": body["contents"]})

    def count_text(self, model, text):
        return self._call("POST", f"{model}:countTextTokens", {"prompt": {"text": text}})

    def files(self):
        return self._call("GET", "files")


class _Metadata(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Sends the credentials with each call."""

    class _Details(NamedTuple):
        method: Any
        timeout: Any
        metadata: Any
        credentials: Any
        wait_for_ready: Any
        compression: Any

    def __init__(self, metadata: dict[str, str]) -> None:
        self._metadata = tuple(metadata.items())

    def intercept_unary_unary(self, continuation, details, request):
        metadata = (*(details.metadata or ()), *self._metadata)
        return continuation(
            self._Details(details.method, details.timeout, metadata, details.credentials, None, None), request
        )

    intercept_unary_stream = intercept_unary_unary


class Grpc:
    """gRPC, as Google's own client sends it."""

    def __init__(self, server: Server, metadata: dict[str, str]) -> None:
        plain = grpc.insecure_channel(server.grpc)
        self.close = lambda: plain.close()
        channel = grpc.intercept_channel(plain, _Metadata(metadata))
        self._models = google.ModelServiceClient(transport=ModelServiceGrpcTransport(channel=channel))
        self._answers = google.GenerativeServiceClient(transport=GenerativeServiceGrpcTransport(channel=channel))
        self._texts = google.TextServiceClient(transport=TextServiceGrpcTransport(channel=channel))
        self._files = google.FileServiceClient(transport=FileServiceGrpcTransport(channel=channel))
        self._operations = operations_pb2_grpc.OperationsStub(channel)

    def _call(self, call: Callable[..., Any], request: Any) -> Any:
        try:
            answer = call(request, timeout=TIMEOUT)
            return (
                [_json(part) for part in answer]
                if hasattr(answer, "cancel") and hasattr(answer, "__next__")
                else _json(answer)
            )
        except GoogleAPICallError as error:
            raise _failure(error.errors[0]) from error
        except grpc.RpcError as error:
            raise _failure(error) from error

    def create(self, model, model_id):
        return self._call(self._models.create_tuned_model, {"tuned_model": model, "tuned_model_id": model_id})

    def get(self, name):
        return self._call(self._models.get_tuned_model, {"name": name})

    def list(self, size, token=""):
        call = self._models.transport.list_tuned_models  # the client's own method fetches the pages unasked
        return self._call(call, google.ListTunedModelsRequest(page_size=size, page_token=token))

    def patch(self, name, model, mask):
        request = {"tuned_model": {"name": name, **model}, "update_mask": {"paths": mask.split(",")}}
        return self._call(self._models.update_tuned_model, request)

    def delete(self, name):
        return self._call(self._models.delete_tuned_model, {"name": name})

    def operation(self, name):
        return self._call(self._operations.GetOperation, operations_pb2.GetOperationRequest(name=name))

    def operations(self, name):
        return self._call(self._operations.ListOperations, operations_pb2.ListOperationsRequest(name=name))

    def cancel(self, name):
        return self._call(self._operations.CancelOperation, operations_pb2.CancelOperationRequest(name=name))

    def forget(self, name):
        return self._call(self._operations.DeleteOperation, operations_pb2.DeleteOperationRequest(name=name))

    def wait(self, name, seconds=None):
        request = operations_pb2.WaitOperationRequest(name=name)
        if seconds is not None:
            request.timeout.FromMilliseconds(int(1000 * seconds))
        return self._call(self._operations.WaitOperation, request)

    def generate(self, model, body):
        return self._call(self._answers.generate_content, {"model": model, **body})

    def stream(self, model, body):
        return self._call(self._answers.stream_generate_content, {"model": model, **body})

    def count(self, model, body):
        return self._call(self._answers.count_tokens, {"model": model, "contents": body["contents"]})

    def count_text(self, model, text):
        return self._call(self._texts.count_text_tokens, {"model": model, "prompt": {"text": text}})

    def files(self):
        return self._call(self._files.list_files, {})


def _json(answer: Any) -> Any:
    """Return a message of Google's client as its own library prints it; None, its way to say Empty, as {}."""
    message = getattr(answer, "operation", answer)
    return {} if message is None else MessageToDict(getattr(message, "_pb", message))


def _failure(error: Any) -> Failure:
    packed = dict(error.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(packed)
    assert (status.code, status.message) == (error.code().value[0], error.details())
    return Failure(error.code().name, status.message, [detail.type_url for detail in status.details])


TRANSPORTS: dict[str, Callable[[Server, dict[str, str]], Client]] = {"rest": Rest, "grpc": Grpc}


@pytest.fixture(params=TRANSPORTS)
def connect(request: pytest.FixtureRequest, server: Server) -> Iterator[Callable[[dict[str, str]], Client]]:
    """Connects with given credentials, over one transport and over the other."""
    with ExitStack() as open_clients:
        yield lambda headers: open_clients.enter_context(closing(TRANSPORTS[request.param](server, headers)))


@pytest.fixture
def client(connect: Callable[[dict[str, str]], Client], server: Server) -> Client:
    return connect({"authorization": server.http.headers["authorization"]})


@pytest.fixture
def both(server: Server) -> Iterator[list[Any]]:
    credentials = {"authorization": server.http.headers["authorization"]}
    with ExitStack() as open_clients:
        yield [open_clients.enter_context(closing(kind(server, credentials))) for kind in TRANSPORTS.values()]


@pytest.fixture(scope="module")
def tuned(server: Server) -> dict[str, Any]:
    """The operation of a tuned model that is ACTIVE."""
    return server.finished(server.tune(job("shared"), tunedModelId="shared"))


def test_a_model_from_create_to_delete(client: Client, server: Server, request: pytest.FixtureRequest):
    model_id = f"life-{request.node.callspec.id}"
    name = f"tunedModels/{model_id}"
    operation = client.create(job("numbers"), model_id)
    assert operation["name"].startswith(f"{name}/operations/")
    assert operation["metadata"] == {
        "@type": "type.googleapis.com/google.ai.generativelanguage.v1beta.CreateTunedModelMetadata",
        "totalSteps": 5,
        "tunedModel": name,
    }
    assert client.get(name)["displayName"] == "numbers"
    server.finished(operation)
    done = client.operation(operation["name"])
    assert done["response"]["state"] == "ACTIVE"
    assert done["metadata"]["completedSteps"] == 5
    assert client.operations(name)["operations"] == [done]
    changed = client.patch(name, {"display_name": "renamed", "description": "not in the mask"}, "display_name")
    assert (changed["displayName"], changed.get("description")) == ("renamed", None)
    assert client.get(name) == changed
    assert client.delete(name) == {}
    for call in (client.get, client.delete, lambda name: client.generate(name, BODY)):
        with pytest.raises(Failure) as caught:
            call(name)
        assert (caught.value.code, caught.value.message) == ("NOT_FOUND", f"Tuned model {name} does not exist.")


def test_both_read_the_same(both: list[Client], tuned: dict[str, Any]):
    name = tuned["metadata"]["tunedModel"]
    for read in (
        lambda client: client.get(name),
        lambda client: client.operation(tuned["name"]),
        lambda client: client.operations(name),
        lambda client: client.list(1)["tunedModels"],
        lambda client: client.count(name, BODY),
        lambda client: {**client.generate(name, BODY), "responseId": ""},
        lambda client: [{**part, "responseId": ""} for part in client.stream(name, BODY)],
    ):
        over_rest, over_grpc = [read(client) for client in both]
        assert over_rest == over_grpc


def test_a_stream_is_the_answer_in_parts(client: Client, tuned: dict[str, Any]):
    def text(answer: Any) -> str:
        return "".join(part["text"] for part in answer["candidates"][0]["content"]["parts"])

    name = tuned["metadata"]["tunedModel"]
    parts = client.stream(name, BODY)
    assert "".join(text(part) for part in parts) == text(client.generate(name, BODY))
    assert parts[-1]["candidates"][0]["finishReason"] in ("STOP", "MAX_TOKENS")


def test_cancel(client: Client, server: Server):
    running = client.create(job("long", epochs=200), "")
    server.until(running, lambda now: "snapshots" in now["metadata"])
    assert client.cancel(running["name"]) == {}
    server.finished(running)
    assert client.operation(running["name"])["error"]["code"] == 1
    assert client.cancel(running["name"]) == {}  # what is done stays as it is


def test_a_forgotten_operation_is_gone(client: Client, server: Server):
    operation = server.finished(client.create(job("forgotten"), ""))
    assert client.forget(operation["name"]) == {}
    with pytest.raises(Failure) as caught:
        client.operation(operation["name"])
    assert caught.value.code == "NOT_FOUND"
    assert caught.value.message == f"Operation {operation['name']} does not exist."


def test_wait_returns_when_it_is_done(client: Client, server: Server):
    operation = server.tune(job("awaited", epochs=5))
    assert "done" not in client.wait(operation["name"], seconds=0)
    assert client.wait(operation["name"])["response"]["state"] == "ACTIVE"
    running = server.tune(job("not-awaited", epochs=1000))
    assert "done" not in client.wait(running["name"], seconds=0.3)
    client.cancel(running["name"])


def test_text_tokens_of_a_tuned_model_and_of_its_base(client: Client, tuned: dict[str, Any]):
    for model in (tuned["metadata"]["tunedModel"], "models/tiny-gemma3"):
        assert client.count_text(model, "7") == {"tokenCount": client.count(model, BODY)["totalTokens"]}


MASK = "x-goog-fieldmask"


def test_partial_responses(connect: Callable[[dict[str, str]], Client], server: Server, tuned: dict[str, Any]):
    def masked(mask: str) -> Client:
        return connect({"authorization": server.http.headers["authorization"], MASK: mask})

    name = tuned["metadata"]["tunedModel"]
    assert masked("name,state").get(name) == {"name": name, "state": "ACTIVE"}
    assert masked("*").get(name) == masked("").get(name)
    assert "tuningTask" in masked("*").get(name)
    assert masked("tunedModels.name").list(1000)["tunedModels"][0].keys() == {"name"}
    operation = masked("done,metadata(totalSteps,snapshots.step)").operation(tuned["name"])
    assert operation["metadata"].pop("@type").endswith("CreateTunedModelMetadata")
    steps = [{"step": step} for step in range(1, 6)]
    assert operation == {"done": True, "metadata": {"totalSteps": 5, "snapshots": steps}}
    parts = masked("candidates.finish_reason").stream(name, BODY)
    assert parts[-1]["candidates"][0]["finishReason"] in ("STOP", "MAX_TOKENS")
    assert {key for part in parts for key in part} == {"candidates"}
    assert {key for part in parts for one in part["candidates"] for key in one} == {"finishReason"}


def test_a_mask_of_what_is_not_there_refuses_the_call(
    connect: Callable[[dict[str, str]], Client], server: Server, tuned: dict[str, Any]
):
    client = connect({"authorization": server.http.headers["authorization"], MASK: "name,etag"})
    for call in (
        lambda: client.get(tuned["metadata"]["tunedModel"]),
        lambda: client.stream(tuned["metadata"]["tunedModel"], BODY),
        lambda: client.create(job("masked"), "masked"),
    ):
        with pytest.raises(Failure) as caught:
            call()
        assert (caught.value.code, caught.value.details) == ("INVALID_ARGUMENT", BAD_REQUEST)
        assert caught.value.message.startswith("Invalid field selection ")
    server.call("GET", "tunedModels/masked", code=403)  # nothing was done


def test_pages_go_on_over_the_other_transport(both: list[Client], tuned: dict[str, Any], server: Server):
    for number in range(3):
        server.finished(server.tune(job(f"page {number}", epochs=1)))
    expected = [model["name"] for model in both[0].list(1000)["tunedModels"]]
    names, token, turn = [], "", 0
    while True:
        page = both[turn % 2].list(1, token)
        names += [model["name"] for model in page["tunedModels"]]
        token, turn = page.get("nextPageToken", ""), turn + 1
        if not token:
            break
    assert names == expected


BAD_ROWS = {
    **job(),
    "tuning_task": {"training_data": {"examples": {"examples": [{"text_input": "1", "output": ""}]}}},
}
BAD_REQUEST = ["google.rpc.BadRequest"]
ROW = "CreateTunedModelRequest.tuned_model.tuning_task.training_data.examples.examples[0]"


@pytest.mark.parametrize(
    ("call", "code", "message", "details"),
    [
        (
            lambda client: client.get(ABSENT),
            "PERMISSION_DENIED",
            f"You do not have permission to access tuned model {ABSENT}.",
            [],
        ),
        (
            lambda client: client.operation(f"{ABSENT}/operations/x"),
            "PERMISSION_DENIED",
            f"You do not have permission to access tuned model {ABSENT}.",
            [],
        ),
        (
            lambda client: client.generate("models/absent", BODY),
            "NOT_FOUND",
            "models/absent is not found for API version v1beta, or is not supported for generateContent. Call "
            "ListModels to see the list of available models and their supported methods.",
            [],
        ),
        (
            lambda client: client.stream("models/absent", BODY),
            "NOT_FOUND",
            "models/absent is not found for API version v1beta, or is not supported for generateContent. Call "
            "ListModels to see the list of available models and their supported methods.",
            [],
        ),
        (lambda client: client.create(BAD_ROWS, ""), "INVALID_ARGUMENT", f"* {ROW}.output: ", BAD_REQUEST),
        (
            lambda client: client.create(job(), "Not An Id"),
            "INVALID_ARGUMENT",
            "* CreateTunedModelRequest.tuned_model_id: ",
            BAD_REQUEST,
        ),
        (
            lambda client: client.create(job(), "shared"),
            "ALREADY_EXISTS",
            "Tuned model tunedModels/shared already exists.",
            [],
        ),
        (
            lambda client: client.generate("tunedModels/shared", {"contents": []}),
            "INVALID_ARGUMENT",
            "* GenerateContentRequest.contents: contents is not specified",
            BAD_REQUEST,
        ),
        (
            lambda client: client.generate(
                "tunedModels/shared", {**BODY, "generation_config": {"temperature": 9}}
            ),
            "INVALID_ARGUMENT",
            "* GenerateContentRequest.generation_config.temperature: ",
            BAD_REQUEST,
        ),
        (
            lambda client: client.list(-1),
            "INVALID_ARGUMENT",
            "* ListTunedModelsRequest.page_size: must not be negative, not -1",
            BAD_REQUEST,
        ),
        (
            lambda client: client.list(1, "forged"),
            "INVALID_ARGUMENT",
            "* ListTunedModelsRequest.page_token: ",
            BAD_REQUEST,
        ),
        (
            lambda client: client.patch("tunedModels/shared", {"display_name": "x"}, "state"),
            "INVALID_ARGUMENT",
            "* UpdateTunedModelRequest.update_mask: ",
            BAD_REQUEST,
        ),
        (
            lambda client: client.files(),
            "UNIMPLEMENTED",
            "google.ai.generativelanguage.v1beta.FileService.ListFiles is not implemented by this server.",
            [],
        ),
    ],
)
def test_the_same_error(client: Client, tuned: dict[str, Any], call: Any, code: str, message: str, details: Any):
    with pytest.raises(Failure) as caught:
        call(client)
    assert caught.value.code == code
    assert caught.value.message.startswith(message)
    assert caught.value.details == details


@pytest.mark.parametrize(
    ("credentials", "code", "message", "details"),
    [
        ({}, "PERMISSION_DENIED", "Method doesn't allow unregistered callers", []),
        (
            {"x-goog-api-key": "wrong"},
            "INVALID_ARGUMENT",
            "API key not valid. Please pass a valid API key.",
            ["google.rpc.ErrorInfo", "google.rpc.LocalizedMessage"],
        ),
        (
            {"authorization": "Bearer wrong"},
            "UNAUTHENTICATED",
            "Request had invalid authentication credentials.",
            None,
        ),
    ],
)
def test_the_same_refusal(
    connect: Callable[[dict[str, str]], Client], credentials: dict[str, str], code: str, message: str, details: Any
):
    client = connect(credentials)
    for call in (client.list, client.files, lambda *_: client.stream("tunedModels/shared", BODY)):
        with pytest.raises(Failure) as caught:
            call(*([1] if call == client.list else []))
        assert caught.value.code == code
        assert caught.value.message.startswith(message)
        assert details is None or caught.value.details == details


def test_a_key_and_a_dummy_key_beside_a_token(connect: Callable[[dict[str, str]], Client], server: Server):
    key = server.run("api-key", "create", "admin@localhost").strip()
    assert connect({"x-goog-api-key": key, "x-goog-user-project": "p"}).list(1)
    token = server.http.headers["authorization"]
    assert connect({"x-goog-api-key": "dummy", "authorization": token}).list(1)


def test_operations_of_all_models(both: list[Any], tuned: dict[str, Any]):
    """The old SDK's `list_operations()`; over REST it fails in the client, for want of a route."""
    listed = both[1].operations("")["operations"]
    assert tuned["name"] in [operation["name"] for operation in listed]
    assert len({operation["name"].split("/")[1] for operation in listed}) > 1
