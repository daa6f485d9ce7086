"""What only a real server shows: clients that leave, and parts that arrive one by one."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest
import uvicorn

from api.stand_ins import MAX_BODY, Backend

PROMPT = '{"contents": {"parts": {"text": "%s"}}}'
ASK = "/v1beta/tunedModels/x:generateContent"
STREAM = "/v1beta/tunedModels/x:streamGenerateContent"
HEADERS = {"authorization": "Bearer good"}


@contextmanager
def serving(backend: Backend) -> Iterator[tuple[str, int]]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(backend.app(), log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture
def address(backend: Backend) -> Iterator[tuple[str, int]]:
    with serving(backend) as address:
        yield address


def send(address: tuple[str, int], path: str, body: str) -> socket.socket:
    connection = socket.create_connection(address, timeout=20)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer good\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall((head + body).encode())
    return connection


def test_a_client_that_leaves_stops_its_call(address: tuple[str, int], backend: Backend):
    with send(address, ASK, PROMPT % "wait"):
        assert backend.generative.waiting.wait(20)
        assert not backend.generative.closed.is_set()
    assert backend.generative.closed.wait(20)
    assert 'code="CANCELLED"' in wait_for_metric(address, 'code="CANCELLED"')


@pytest.mark.parametrize("query", ["", "?alt=sse"])
def test_a_client_that_leaves_stops_its_stream(address: tuple[str, int], backend: Backend, query: str):
    with send(address, STREAM + query, PROMPT % "endless") as connection:
        while b"endless 3" not in connection.recv(65536):
            pass
        assert not backend.generative.closed.is_set()
    assert backend.generative.closed.wait(20)
    assert backend.generative.closed_by.startswith("AnyIO worker"), "the event loop ran the service's code"
    wait_for_metric(address, 'code="CANCELLED"')


def wait_for_metric(address: tuple[str, int], text: str) -> str:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        metrics = httpx2.get(f"http://{address[0]}:{address[1]}/metrics").text
        if text in metrics:
            return metrics
        time.sleep(0.05)
    pytest.fail(f"{text} is not in the metrics")


@pytest.mark.parametrize("query", ["", "?alt=sse"])
def test_each_part_of_a_stream_arrives_when_it_is_made(address: tuple[str, int], backend: Backend, query: str):
    with send(address, STREAM + query, PROMPT % "step") as connection:
        received = b""
        while b'"step 0"' not in received:
            received += connection.recv(65536)
        assert b'"step 1"' not in received
        backend.generative.waiting.set()
        while b"\r\n0\r\n\r\n" not in received:
            received += connection.recv(65536)
        assert b'"step 2"' in received


def test_a_large_body_is_refused_in_words(address: tuple[str, int]):
    body = (PROMPT % ("a" * (MAX_BODY * 500))).encode()
    url = f"http://{address[0]}:{address[1]}{ASK}"
    for content in (body, iter([body[: len(body) // 2], body[len(body) // 2 :]])):
        response = httpx2.post(url, content=content, headers=HEADERS)
        assert response.status_code == 400
        assert response.json()["error"]["message"] == f"Request payload size exceeds the limit: {MAX_BODY} bytes."


def test_a_client_that_sends_all_of_a_large_body_first_still_hears_why(address: tuple[str, int]):
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(
            f"POST {ASK} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 30000000\r\n\r\n".encode()
        )
        connection.sendall(b"a" * 30_000_000)
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_who_asks_before_sending_a_large_body_is_told_at_once(address: tuple[str, int]):
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(
            f"POST {ASK} HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n"
            "content-length: 1000000000\r\n\r\n".encode()
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_head_and_pipelined_keep_alive(address: tuple[str, int]):
    with httpx2.Client(base_url=f"http://{address[0]}:{address[1]}", headers=HEADERS) as client:
        for _ in range(3):
            assert client.head("/v1beta/tunedModels").headers["content-length"] == "3"
            assert client.get("/v1beta/tunedModels").json() == {}
            assert json.loads(client.post(ASK, content=PROMPT % "hi").text)["candidates"]


def test_a_client_that_leaves_in_the_middle_of_its_body(address: tuple[str, int], backend: Backend):
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(f"POST {ASK} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{".encode())
    wait_for_metric(address, 'code="CANCELLED"')
    assert backend.generative.requests == []


@pytest.mark.parametrize(("path", "prompt"), [(ASK, "wait"), (STREAM, "endless"), (STREAM, "linger")])
def test_a_server_that_stops_stops_its_calls(backend: Backend, path: str, prompt: str, caplog: Any):
    with serving(backend) as address:
        connection = send(address, path, PROMPT % prompt)
        assert backend.generative.waiting.wait(20)
    assert backend.generative.closed.wait(20)
    connection.close()
    assert [record for record in caplog.records if record.name.startswith("tunesmith")] == []
