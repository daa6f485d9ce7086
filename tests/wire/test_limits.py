"""One account's limits on a live server: queued jobs, answers under way, over REST and gRPC."""

import threading
from collections.abc import Iterator

import grpc
import pytest

from people import Person
from servers import Server, job
from tunesmith import protos

LIMITS = {
    "TUNESMITH_QUEUED_JOBS_PER_ACCOUNT": "2",
    "TUNESMITH_GENERATIONS_PER_ACCOUNT": "1",
    "TUNESMITH_MAX_BATCH": "1",
}
LONG = {"contents": [{"parts": [{"text": "the other one is in a tin on the table, and a hat"}]}]}
V1BETA = "google.ai.generativelanguage.v1beta"


@pytest.fixture(scope="module")
def server(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without a worker: jobs wait for ever."""
    with Server(tmp_path_factory.mktemp("data"), {**tiny, **LIMITS}, "--workers", "0") as running:
        yield running


def test_jobs_that_wait(server: Server) -> None:
    first = server.tune(job(), tunedModelId="first")
    server.tune(job(), tunedModelId="second")
    error = server.call("POST", "tunedModels", job(), 429)["error"]
    assert error["status"] == "RESOURCE_EXHAUSTED"
    assert "Too many tuning jobs are waiting" in error["message"]
    assert "queued_jobs_per_account" in error["message"]
    assert {detail["@type"].rpartition(".")[2] for detail in error["details"]} == {"QuotaFailure", "RetryInfo"}
    Person(server, "bob@example.com").call("POST", "tunedModels", job())  # it is no one else's limit
    server.call("POST", f"{first['name']}:cancel", {})
    server.tune(job(), tunedModelId="third")


def test_the_same_over_grpc(server: Server) -> None:
    person = Person(server, "eve@example.com")
    metadata = (("x-goog-api-key", person.headers["x-goog-api-key"]),)
    example = protos.TuningExample(text_input="1", output="2")
    dataset = protos.Dataset(examples=protos.TuningExamples(examples=[example] * 10))
    model = protos.TunedModel(
        base_model="models/tiny-gemma3", tuning_task=protos.TuningTask(training_data=dataset)
    )
    with grpc.insecure_channel(server.grpc) as channel:
        create = channel.unary_unary(
            f"/{V1BETA}.ModelService/CreateTunedModel",
            request_serializer=lambda message: message.SerializeToString(),
        )
        for _ in range(2):
            create(protos.CreateTunedModelRequest(tuned_model=model), metadata=metadata)
        with pytest.raises(grpc.RpcError) as refused:
            create(protos.CreateTunedModelRequest(tuned_model=model), metadata=metadata)
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    packed = dict(refused.value.trailing_metadata())["grpc-status-details-bin"]
    failure, retry = protos.Status.FromString(packed).details
    delay = protos.RetryInfo()
    assert retry.Unpack(delay)
    assert delay.retry_delay.ToSeconds() == 30
    assert failure.type_url.endswith("google.rpc.QuotaFailure")


def test_answers_under_way(server: Server) -> None:
    bob = Person(server, "carl@example.com")
    streamed = "/v1beta/models/tiny-gemma3:streamGenerateContent?alt=sse"
    config = {"generationConfig": {"maxOutputTokens": 256, "candidateCount": 8}}  # one after the other: seconds
    with server.http.stream("POST", streamed, json={**LONG, **config}) as answer:
        parts = answer.iter_lines()
        next(parts)
        error = server.call("POST", "models/tiny-gemma3:generateContent", LONG, 429)["error"]
        assert "generations_per_account" in error["message"]
        bob.call("POST", "models/tiny-gemma3:generateContent", LONG)  # has a turn before the other candidates
    # The server has noticed that the stream was left when the next answer comes.
    for _ in range(100):
        response = server.http.post("/v1beta/models/tiny-gemma3:generateContent", json=LONG)
        if response.status_code == 200:
            break
        assert response.headers["retry-after"] == "1"
        threading.Event().wait(0.1)
    assert response.status_code == 200
