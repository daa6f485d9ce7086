"""Small real services to put behind the wire."""

import threading
import time
from typing import Any

from starlette.applications import Starlette

from tunesmith import protos
from tunesmith.api.dispatch import Dispatcher
from tunesmith.api.rest_server import rest_app
from tunesmith.caller import Caller, Credentials
from tunesmith.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    error_info,
)

PREFIX = "google.ai.generativelanguage.v1beta."
MAX_BODY = 20_000


class ModelService:
    """Keeps tuned models in a dict."""

    def __init__(self) -> None:
        self.models: dict[str, Any] = {}
        self.requests: list[Any] = []

    def create_tuned_model(self, request, caller):
        self.requests.append(request)
        name = f"tunedModels/{request.tuned_model_id or 'made-up'}"
        model = protos.TunedModel()
        model.CopyFrom(request.tuned_model)
        model.name, model.state = name, 1
        self.models[name] = model
        operation = protos.Operation(name=f"{name}/operations/one")
        operation.metadata.Pack(protos.CreateTunedModelMetadata(total_steps=38, tuned_model=name))
        return operation

    def get_tuned_model(self, request, caller):
        self.requests.append(request)
        try:
            return self.models[request.name]
        except KeyError:
            raise NotFound(f"Tuned model {request.name} does not exist.") from None

    def list_tuned_models(self, request, caller):
        self.requests.append(request)
        return protos.ListTunedModelsResponse(tuned_models=self.models.values())

    def update_tuned_model(self, request, caller):
        self.requests.append(request)
        model = self.models[request.tuned_model.name]
        model.MergeFrom(request.tuned_model)
        return model

    def delete_tuned_model(self, request, caller):
        del self.models[request.name]
        return protos.Empty()

    def get_model(self, request, caller):
        raise RuntimeError("secret of the server")


class OperationsService:
    """Answers with what it was asked."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def get_operation(self, request, caller):
        self.requests.append(request)
        operation = protos.Operation(name=request.name, done=True)
        model = protos.TunedModel(name="tunedModels/x", state=2)
        model.tuning_task.training_data.examples.examples.add(text_input="1", output="2")
        operation.response.Pack(model)
        return operation

    def list_operations(self, request, caller):
        self.requests.append(request)
        return protos.ListOperationsResponse(operations=[protos.Operation(name=f"{request.name}/operations/1")])

    def cancel_operation(self, request, caller):
        self.requests.append(request)
        return protos.Empty()

    def delete_operation(self, request, caller):
        self.requests.append(request)
        return protos.Empty()


class GenerativeService:
    """Echoes; the prompt says how to misbehave."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.callers: list[Caller] = []
        self.closed = threading.Event()
        self.closed_by = ""
        self.waiting = threading.Event()
        self.held = threading.Semaphore(0)

    def _part(self, text: str) -> Any:
        response = protos.GenerateContentResponse()
        candidate = response.candidates.add(index=0, finish_reason=1)
        candidate.content.parts.add(text=text)
        return response

    def generate_content(self, request, caller):
        self.requests.append(request)
        self.callers.append(caller)
        text = request.contents[0].parts[0].text
        if text == "wait":
            self.waiting.set()
            assert caller.gone.wait(20), "the client left, but nobody said so"
            self.closed.set()
        return self._part(text)

    def stream_generate_content(self, request, caller):
        self.requests.append(request)
        text = request.contents[0].parts[0].text
        if text == "refuse":
            raise FailedPrecondition("The model is CREATING.")
        try:
            for number in range(1_000_000 if text == "endless" else 3):
                if number == 1 and text == "fail":
                    raise FailedPrecondition("The model went away.")
                if number == 1 and text == "break":
                    raise RuntimeError("secret of the server")
                if number == 1 and text == "step":
                    self.held.release()
                    self.waiting.wait(20)
                if text == "endless":
                    self.waiting.set()
                    caller.gone.wait(0.01)
                if number == 1 and text == "linger":
                    self.waiting.set()
                    assert caller.gone.wait(20), "nobody waits for this, but nobody said so"
                    time.sleep(0.3)  # a step that cannot be interrupted
                if text != "nothing":
                    yield self._part(f"{text} {number}")
        finally:
            self.closed_by = threading.current_thread().name
            self.closed.set()

    def count_tokens(self, request, caller):
        self.requests.append(request)
        return protos.CountTokensResponse(total_tokens=7)


class TuningService:
    """Tells a story of three events, and gives a file of three parts; the name says how to misbehave."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.waiting = threading.Event()
        self.closed = threading.Event()

    def watch_tuning(self, request, caller):
        self.requests.append(request)
        events = [
            protos.TuningEvent(event_id=1, queued=protos.TuningEvent.Queued(position=2)),
            protos.TuningEvent(queued=protos.TuningEvent.Queued(position=1)),
            protos.TuningEvent(event_id=2, step=protos.TuningStep(step=1, mean_loss=0.5)),
            protos.TuningEvent(event_id=3, finished=protos.TuningEvent.Finished(state=2)),
        ]
        try:
            if request.name.endswith("/silent"):
                yield None
            for event in events:
                if event.event_id > request.after_event or not (event.event_id or request.after_event):
                    yield event
                    yield None
            if request.name.endswith("/endless"):
                self.waiting.set()
                assert caller.gone.wait(20), "the client left, but nobody said so"
            if request.name.endswith("/broken"):
                raise FailedPrecondition("The model went away.")
        finally:
            self.closed.set()

    def export_tuned_model(self, request, caller):
        self.requests.append(request)
        if request.name.endswith("/creating"):
            raise FailedPrecondition("The model is CREATING.")
        first = protos.HttpBody(content_type="application/zip", data=b"PK\x00\xff")
        about = protos.Download(filename='a "näme".zip', size=9 if request.name.endswith("/sized") else 0)
        first.extensions.add().Pack(about)
        yield first
        yield protos.HttpBody(data=b"two")
        if request.name.endswith("/broken"):
            raise FailedPrecondition("The model went away.")
        yield protos.HttpBody(data=b"!\n")


class Verifier:
    """Knows one token and one key."""

    def __init__(self) -> None:
        self.seen: list[Credentials] = []

    def verify(self, credentials: Credentials) -> Caller:
        self.seen.append(credentials)
        if credentials.bearer is not None:
            if credentials.bearer != "good":
                info = error_info("ACCESS_TOKEN_TYPE_UNSUPPORTED")
                raise Unauthenticated("Request had invalid authentication credentials.", [info])
        elif credentials.api_key is None:
            raise PermissionDenied("Method doesn't allow unregistered callers.")
        elif credentials.api_key != "good-key":
            raise InvalidArgument("API key not valid. Please pass a valid API key.")
        return Caller("a@example.com", project=credentials.project)


class Backend:
    """The services and the app in front of them."""

    def __init__(self) -> None:
        self.models, self.operations = ModelService(), OperationsService()
        self.generative, self.verifier = GenerativeService(), Verifier()
        self.tuning = TuningService()
        self.ready = True
        self.dispatcher = Dispatcher(
            {
                f"{PREFIX}ModelService": self.models,
                f"{PREFIX}GenerativeService": self.generative,
                "google.longrunning.Operations": self.operations,
                "tunesmith.v1beta.TuningService": self.tuning,
            },
            self.verifier,
        )

    def app(self, **options: Any) -> Starlette:
        return rest_app(self.dispatcher, max_body_bytes=MAX_BODY, ready=lambda: self.ready, **options)
