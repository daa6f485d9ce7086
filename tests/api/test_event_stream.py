"""Streams of events: their names, ids, and where a client goes on."""

import json
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from api.stand_ins import Backend
from api.test_live_server import HEADERS, serving

WATCH = "/v1beta/tunedModels/x:watch"


def events(text: str) -> list[dict[str, Any]]:
    """What a browser makes of a stream: the lines of each event, without comments."""
    found = []
    for block in text.split("\r\n\r\n")[:-1]:
        lines = [line.partition(": ") for line in block.split("\r\n") if not line.startswith(":")]
        if lines:
            found.append({name: value for name, _, value in lines})
    return found


@pytest.mark.parametrize("how", [{"params": {"alt": "sse"}}, {"headers": {"accept": "text/event-stream"}}])
def test_events_have_names_and_ids(client: TestClient, how: dict[str, Any]) -> None:
    response = client.get(WATCH, **how)
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["x-accel-buffering"] == "no"
    retry, *told = events(response.text)
    assert retry == {"retry": "2000"}
    assert [(event.get("id"), event["event"]) for event in told] == [
        ("1", "queued"),
        (None, "queued"),  # not kept: the client's last id stays 1
        ("2", "step"),
        ("3", "finished"),
    ]
    step = {"eventId": 2, "step": {"step": 1, "meanLoss": 0.5}}
    assert json.loads(told[2]["data"]) == step
    assert response.text.count(":\r\n\r\n") == 4  # a sign of life each


def test_without_asking_for_events_a_stream_is_one_array(client: TestClient) -> None:
    response = client.get("/v1beta/tunedModels/silent:watch", headers={"accept": "*/*"})
    assert response.headers["content-type"].startswith("application/json")
    assert [event.get("eventId", 0) for event in response.json()] == [1, 0, 2, 3]
    error = client.get("/v1beta/tunedModels/broken:watch").json()[-1]["error"]
    assert error["status"] == "FAILED_PRECONDITION"


def test_a_client_that_comes_back_hears_the_rest(client: TestClient, backend: Backend) -> None:
    accept = {"accept": "text/event-stream"}
    text = client.get(f"{WATCH}?afterEvent=1", headers={**accept, "last-event-id": "2"}).text
    assert [event["id"] for event in events(text)[1:]] == ["3"]
    assert client.get(f"{WATCH}?after_event=2", headers=accept).text.count("data:") == 1
    assert [request.after_event for request in backend.tuning.requests] == [2, 2]
    done = client.get(WATCH, headers={**accept, "last-event-id": "3"})
    assert (done.status_code, done.content) == (204, b"")  # after which a browser stays away
    assert client.get(f"{WATCH}?after_event=3", headers=accept).status_code == 200
    refused = client.get(WATCH, headers={**accept, "last-event-id": "x"})
    assert refused.status_code == 400
    assert "after_event" in refused.text


def test_who_only_asks_for_the_headers_waits_for_no_event(client: TestClient, backend: Backend) -> None:
    response = client.head(f"{WATCH}?alt=sse")
    assert (response.status_code, response.content) == (200, b"")
    assert backend.tuning.closed.is_set()


def test_generated_answers_are_no_events_of_ours(client: TestClient) -> None:
    ask = {"contents": {"parts": {"text": "hello"}}}
    text = client.post("/v1beta/tunedModels/x:streamGenerateContent?alt=sse", json=ask).text
    assert text.startswith("data: {")
    assert "id:" not in text
    headers = {"accept": "application/json, text/event-stream"}
    answer = client.post("/v1beta/tunedModels/x:streamGenerateContent", json=ask, headers=headers)
    assert answer.headers["content-type"].startswith("application/json")


def test_a_client_that_leaves_ends_the_service(backend: Backend) -> None:
    with serving(backend) as (host, port):
        path = f"http://{host}:{port}/v1beta/tunedModels/endless:watch?alt=sse"
        with httpx2.stream("GET", path, headers=HEADERS) as response:
            parts = response.iter_raw()
            assert next(parts)
            assert backend.tuning.waiting.wait(20)
            assert not backend.tuning.closed.is_set()
        assert backend.tuning.closed.wait(20)
