import logging
from threading import Event
from typing import Any

import pytest

from api.stand_ins import PREFIX, Backend
from tunesmith import protos
from tunesmith.api.dispatch import Dispatcher
from tunesmith.caller import Credentials
from tunesmith.errors import (
    ApiError,
    Cancelled,
    Internal,
    InvalidArgument,
    NotFound,
    Unauthenticated,
    Unimplemented,
)

GOOD = Credentials(bearer="good")


def rpc(name: str) -> Any:
    service, _, method = name.rpartition(".")
    return protos.SERVICES[service].methods_by_name[method]


GET = rpc(PREFIX + "ModelService.GetTunedModel")
STREAM = rpc(PREFIX + "GenerativeService.StreamGenerateContent")


def prompt(text: str) -> Any:
    request = protos.GenerateContentRequest(model="models/a")
    request.contents.add().parts.add(text=text)
    return request


def test_runs_a_call(backend: Backend):
    backend.models.models["tunedModels/x"] = protos.TunedModel(name="tunedModels/x")
    response = backend.dispatcher.call(GET, protos.GetTunedModelRequest(name="tunedModels/x"), GOOD)
    assert response == protos.TunedModel(name="tunedModels/x")


def test_hands_the_caller_on_with_the_transports_event(backend: Backend):
    gone = Event()
    generate = rpc(PREFIX + "GenerativeService.GenerateContent")
    backend.dispatcher.call(generate, prompt("hi"), Credentials(bearer="good", project="p"), gone)
    (caller,) = backend.generative.callers
    assert (caller.account, caller.project) == ("a@example.com", "p")
    assert caller.gone is gone


def test_who_is_unknown_learns_nothing_else(backend: Backend):
    with pytest.raises(Unauthenticated):
        backend.dispatcher.call(
            rpc(PREFIX + "FileService.ListFiles"), protos.ListFilesRequest(), Credentials("bad")
        )
    with pytest.raises(Unauthenticated):
        backend.dispatcher.call(GET, protos.GetTunedModelRequest(), Credentials("bad"))
    assert backend.models.requests == []


@pytest.mark.parametrize(
    "name",
    [
        PREFIX + "FileService.ListFiles",
        PREFIX + "ModelService.ListModels",
        "google.longrunning.Operations.WaitOperation",
    ],
)
def test_what_is_not_there_names_itself(backend: Backend, name: str):
    method = rpc(name)
    request = protos.message_class(method.input_type)()
    with pytest.raises(Unimplemented, match=f"^{name} is not implemented by this server.$"):
        backend.dispatcher.call(method, request, GOOD)


def test_refuses_what_lacks_required_fields_before_the_service_sees_it(backend: Backend):
    with pytest.raises(InvalidArgument, match=r"GetTunedModelRequest\.name: name is not specified"):
        backend.dispatcher.call(GET, protos.GetTunedModelRequest(), GOOD)
    assert backend.models.requests == []


def test_errors_of_the_service_pass_unchanged(backend: Backend):
    with pytest.raises(NotFound, match=r"^Tuned model tunedModels/x does not exist\.$"):
        backend.dispatcher.call(GET, protos.GetTunedModelRequest(name="tunedModels/x"), GOOD)


def test_a_fault_of_ours_is_logged_and_kept_from_the_caller(backend: Backend, caplog: pytest.LogCaptureFixture):
    get_model = rpc(PREFIX + "ModelService.GetModel")
    with pytest.raises(Internal) as raised:
        backend.dispatcher.call(get_model, protos.GetModelRequest(name="models/a"), GOOD)
    assert raised.value.message.startswith("An internal error has occurred. ")
    assert "secret" not in raised.value.message
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage() == f"{PREFIX}ModelService.GetModel failed"
    assert "secret of the server" in caplog.text


def test_a_call_whose_client_has_left_does_not_run(backend: Backend):
    gone = Event()
    gone.set()
    with pytest.raises(Cancelled):
        backend.dispatcher.call(GET, protos.GetTunedModelRequest(name="tunedModels/x"), GOOD, gone)
    assert backend.verifier.seen == []


def texts(messages: Any) -> list[str]:
    return [message.candidates[0].content.parts[0].text for message in messages]


def test_streams(backend: Backend):
    assert texts(backend.dispatcher.stream(STREAM, prompt("a"), GOOD)) == ["a 0", "a 1", "a 2"]


@pytest.mark.parametrize(("text", "status"), [("fail", "FAILED_PRECONDITION"), ("break", "INTERNAL")])
def test_an_error_in_the_middle_of_a_stream(backend: Backend, text: str, status: str):
    messages = backend.dispatcher.stream(STREAM, prompt(text), GOOD)
    assert texts([next(messages)]) == [f"{text} 0"]
    with pytest.raises(ApiError) as raised:
        next(messages)
    assert raised.value.status == status
    assert "secret" not in raised.value.message


def test_closing_a_stream_closes_the_services(backend: Backend):
    messages = backend.dispatcher.stream(STREAM, prompt("endless"), GOOD)
    next(messages)
    assert not backend.generative.closed.is_set()
    messages.close()
    assert backend.generative.closed.is_set()


def test_a_service_that_the_protos_lack_is_refused(backend: Backend):
    with pytest.raises(KeyError, match="Misspelled"):
        Dispatcher({"google.Misspelled": object()}, backend.verifier)
