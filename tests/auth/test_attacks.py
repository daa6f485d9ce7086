"""What somebody tries who wants in, or wants the server down: each is refused, and the server goes on."""

import gzip
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from people import Person, share
from servers import Server, job
from tunesmith.store.tables import Table

RECEIVE_SECONDS = 1.5


@pytest.fixture(scope="module")
def server(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    environment = {**tiny, "TUNESMITH_RECEIVE_SECONDS": str(RECEIVE_SECONDS)}
    with Server(tmp_path_factory.mktemp("data"), environment, "--workers", "0", "--log-level", "debug") as running:
        yield running


@pytest.fixture(scope="module")
def model(server: Server) -> str:
    name: str = server.tune(job("target"))["metadata"]["tunedModel"]
    return name


@pytest.fixture(autouse=True)
def goes_on(server: Server) -> Iterator[None]:
    """After each attack the server answers others as before."""
    yield
    assert server.http.get("/healthz").status_code == 200
    assert server.call("GET", "models")["models"]


def connection(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def answer(raw: socket.socket) -> bytes:
    """Return all that comes until the server closes."""
    parts = []
    try:
        while part := raw.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


@pytest.mark.parametrize(
    "name",
    [
        "..%2f..%2f..%2fetc%2fpasswd",
        "..%252f..%252fetc",
        "%2e%2e/%2e%2e/tunesmith.db",
        "../../../tunesmith.db",
        "..\\..\\secret",
        "x%00",
        "a" * 4000,
        "x' OR '1'='1",
        "x'; DROP TABLE tuned_models; --",
        "%27%20UNION%20SELECT%20token_hash%20FROM%20access_tokens--",
        "x%0d%0aset-cookie:%20a=b",
    ],
)
def test_names_reach_nothing_else(server: Server, model: str, name: str) -> None:
    with connection(server) as raw:  # a client library would tidy the path up
        token = server.http.headers["authorization"]
        path = f"/v1beta/tunedModels/{name}".replace(" ", "%20")
        raw.sendall(
            f"GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: {token}\r\nconnection: close\r\n\r\n".encode()
        )
        head, _, body = answer(raw).partition(b"\r\n\r\n")
    assert head.split()[1] in (b"400", b"403", b"404")
    assert b"set-cookie" not in head.lower()
    assert b"root:" not in body
    assert b"SQLite" not in body
    assert server.call("GET", model)["name"] == model


@pytest.mark.parametrize("model_id", ["../x", "..", "a/b", "a\\b", "x\0", "x'--", "con:aux", "é"])
def test_ids_are_no_paths(server: Server, model_id: str) -> None:
    before = sorted(Path(server.data_dir).rglob("*"))
    error = server.call("POST", "tunedModels", job("evil"), 400, params={"tunedModelId": model_id})["error"]
    assert "CreateTunedModelRequest.tuned_model_id" in error["message"]
    assert [file for file in sorted(Path(server.data_dir).rglob("*")) if file not in before] == []


def test_a_filter_is_no_sql(server: Server, model: str) -> None:
    for text in ("'; DELETE FROM tuned_models; --", "%' OR 1=1 --", '"\' UNION SELECT"', "%", "_", "\\"):
        found = server.call("GET", "tunedModels", params={"filter": text})
        assert found.get("tunedModels", []) == []
    error = server.call("GET", "tunedModels", code=400, params={"pageToken": "' OR 1=1 --"})["error"]
    assert "page_token" in error["message"]
    assert server.call("GET", model)["name"] == model
    assert Table.metadata.tables  # and they are still there, as the call above says


def test_header_values_stay_values(server: Server) -> None:
    for value in ("a\rb", "a\nERROR forged: b", "a\0b", "a\x1b[31mb"):
        with connection(server) as raw:
            head = f"GET /v1beta/models HTTP/1.1\r\nhost: x\r\nx-goog-user-project: {value}\r\nconnection: close"
            raw.sendall(f"{head}\r\n\r\n".encode())
            assert answer(raw).split()[1] in (b"400", b"403")
    key = Person(server, "logger@x").headers["x-goog-api-key"]
    headers = {
        "authorization": "",
        "x-goog-api-key": key,
        "x-goog-user-project": "p\x85ERROR forged: q".encode("latin-1"),
    }
    assert server.http.get("/v1beta/models", headers=headers).status_code == 200
    log = Path(server.log.name).read_text()
    assert "p\\x85ERROR" in log
    assert not any(line.startswith("ERROR forged") for line in log.splitlines())


def test_a_head_without_end(server: Server) -> None:
    with connection(server) as raw:
        raw.sendall(b"GET /v1beta/models HTTP/1.1\r\nhost: x\r\nx-long: ")
        try:
            for _ in range(1000):
                raw.sendall(b"a" * 65536)
        except OSError:
            return  # closed in the middle
        assert answer(raw).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    "line", [b"x-long: " + b"a" * 70_000, b"\r\n".join(b"x-%d: a" % n for n in range(12_000))]
)
def test_a_large_head(server: Server, line: bytes) -> None:
    with connection(server) as raw:
        raw.sendall(b"GET /v1beta/models HTTP/1.1\r\nhost: x\r\n" + line + b"\r\n\r\n")
        assert answer(raw).startswith(b"HTTP/1.1 431 ")


def test_a_head_that_comes_byte_by_byte(server: Server) -> None:
    began = time.monotonic()
    with connection(server) as raw:
        try:
            for byte in b"GET /v1beta/models HTTP/1.1\r\n" * 100:
                raw.sendall(bytes([byte]))
                raw.settimeout(0.05)
                try:
                    early = raw.recv(1 << 16)
                except TimeoutError:
                    continue
                assert early.startswith(b"HTTP/1.1 408 ")
                break
        except OSError:
            pass
    assert RECEIVE_SECONDS / 2 < time.monotonic() - began < 10 * RECEIVE_SECONDS


def test_many_that_never_ask(server: Server) -> None:
    waiting = [connection(server) for _ in range(200)]
    assert server.call("GET", "models")["models"]  # others are served meanwhile
    assert answer(waiting[0]).startswith(b"HTTP/1.1 408 ")
    for raw in waiting:
        raw.close()


def test_a_body_that_does_not_come(server: Server) -> None:
    token = server.http.headers["authorization"]
    with connection(server) as raw:
        raw.sendall(
            f"POST /v1beta/tunedModels HTTP/1.1\r\nhost: x\r\nauthorization: {token}\r\n"
            "content-length: 100\r\n\r\n{".encode()
        )
        told = b""
        while b"seconds" not in told:
            told += raw.recv(1 << 16)
    assert told.startswith(b"HTTP/1.1 400 ")
    assert b"did not arrive within 1.5 seconds" in told


def test_a_decompression_bomb(server: Server) -> None:
    bomb = gzip.compress(gzip.compress(b"\0" * (1 << 28), 9), 9)
    layer = gzip.decompress(bomb)  # 260 KB that stand for 256 MB
    began = memory(server)
    response = server.http.post("/v1beta/tunedModels", content=layer, headers={"content-encoding": "gzip"})
    assert response.status_code == 400
    assert "exceeds the limit" in response.json()["error"]["message"]
    assert memory(server) - began < 64 << 20


def memory(server: Server) -> int:
    """Bytes that the server process holds."""
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def deep(levels: int) -> Any:
    return b'{"a":' * levels + b"1" + b"}" * levels


def test_json_without_a_bottom(server: Server) -> None:
    response = server.http.post("/v1beta/tunedModels", content=deep(200_000))
    assert response.status_code == 400


def test_nobody_grows_their_own_role(server: Server, model: str) -> None:
    reader, writer = Person(server, "reader@x"), Person(server, "writer@x")
    share(server, model, "READER", reader.email)
    share(server, model, "WRITER", writer.email)
    reader.call("PATCH", model, {"description": "mine"}, code=403)
    writer.call("DELETE", model, code=403)
    writer.call("POST", f"{model}:transferOwnership", {"emailAddress": writer.email}, code=403)
    owner = {"granteeType": "USER", "emailAddress": "accomplice@x", "role": "OWNER"}
    writer.call("POST", f"{model}/permissions", owner, code=400)
    mine = next(
        entry
        for entry in writer.call("GET", f"{model}/permissions")["permissions"]
        if entry.get("emailAddress") == writer.email
    )
    writer.call("PATCH", f"{mine['name']}?updateMask=role", {"role": "OWNER"}, code=400)
    reader.call("PATCH", f"{mine['name']}?updateMask=role", {"role": "READER"}, code=403)
    assert server.call("GET", model)["name"] == model
