"""A server with more to do than it can: refused in words, deadlines kept, and told to Prometheus."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from servers import Server
from tunesmith import protos

BUSY = {"TUNESMITH_MAX_BATCH": "1", "TUNESMITH_WAITING_ANSWERS": "1", "TUNESMITH_KV_CACHE_MB": "64"}
TEXT = {"contents": [{"parts": [{"text": "the other one is in a tin on the table, and a hat"}]}]}
MANY = {**TEXT, "generationConfig": {"maxOutputTokens": 256, "candidateCount": 8}}  # one after the other: seconds
MODEL = "models/tiny-gemma3"
SERVICE = "google.ai.generativelanguage.v1beta.GenerativeService"


@pytest.fixture(scope="module")
def server(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("data"), {**tiny, **BUSY}, "--workers", "0") as running:
        yield running


@contextmanager
def kept_busy(server: Server) -> Iterator[None]:
    """Someone else's candidates wait: the queue is full."""
    with server.http.stream("POST", f"/v1beta/{MODEL}:streamGenerateContent?alt=sse", json=MANY) as answer:
        next(answer.iter_lines())
        yield


def test_a_full_queue(server: Server) -> None:
    for _ in range(10):  # on a machine that is busy itself, what kept it busy may have ended by then
        with kept_busy(server):
            response = server.http.post(f"/v1beta/{MODEL}:generateContent", json=TEXT)
        if response.status_code != 200:
            break
    assert response.status_code == 429, response.text
    assert int(response.headers["retry-after"]) >= 1
    error = response.json()["error"]
    assert error["status"] == "RESOURCE_EXHAUSTED"
    assert "waiting_answers" in error["message"]
    assert [detail["@type"].rpartition(".")[2] for detail in error["details"]] == ["RetryInfo"]


def test_a_full_queue_over_grpc(server: Server) -> None:
    request = protos.GenerateContentRequest(model=MODEL)
    request.contents.add().parts.add(text="hello")
    metadata = (("authorization", server.http.headers["authorization"]),)
    with grpc.insecure_channel(server.grpc) as channel:
        grpc.channel_ready_future(channel).result(60)
        ask = channel.unary_unary(
            f"/{SERVICE}/GenerateContent", request_serializer=lambda message: message.SerializeToString()
        )
        code = grpc.StatusCode.OK
        for _ in range(10):
            with kept_busy(server):
                try:
                    ask(request, metadata=metadata)
                except grpc.RpcError as refused:
                    code = refused.code()
                    break
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    metrics = server.http.get("/metrics").text
    label = 'model="tiny-gemma3"'
    refused_here = rf'^tunesmith_refused_answers_total{{{label},reason="queue_full"}} [1-9]'
    assert re.search(refused_here, metrics, re.MULTILINE)
    assert re.search(rf"^tunesmith_first_token_seconds_count{{{label}}} [1-9]", metrics, re.MULTILINE)


@pytest.mark.parametrize("method", ["generateContent", "streamGenerateContent"])
def test_the_clients_deadline(server: Server, method: str) -> None:
    response = server.http.post(f"/v1beta/{MODEL}:{method}", json=MANY, headers={"x-server-timeout": "0.2"})
    body = json.loads(response.text)
    if method == "generateContent":
        assert response.status_code == 504
    else:
        assert "finishReason" not in str(body[0])
        body = body[-1]
    assert body["error"]["status"] == "DEADLINE_EXCEEDED"
    assert "x-server-timeout" in body["error"]["message"]
    assert settled(server, {"x-server-timeout": "60"}) == 200


def settled(server: Server, headers: dict[str, str]) -> int:
    """The status of an answer once those that were left have left the queue, which is with the next step."""
    config = {"generationConfig": {"maxOutputTokens": 3}}
    for _ in range(100):
        response = server.http.post(f"/v1beta/{MODEL}:generateContent", json=TEXT | config, headers=headers)
        if response.status_code != 429:
            break
        threading.Event().wait(0.05)
    return response.status_code
