"""The judge of what servers answer in all tests hears every answer, and objects to what is wrong."""

import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from google_types import disagreements
from servers import Server, job
from tunesmith import protos

V1BETA = "google.ai.generativelanguage.v1beta"
PART = f"{V1BETA}.GenerateContentResponse"
MODEL = {"name": "tunedModels/x", "state": "ACTIVE", "topP": 0.95, "readerProjectNumbers": ["7"]}
ASK = {"contents": [{"parts": [{"text": "1"}]}], "generationConfig": {"maxOutputTokens": 2}}


def test_every_answer_is_heard(server: Server):
    done = server.finished(server.tune(job("heard"), tunedModelId="heard"))
    name = "tunedModels/heard"
    server.call("GET", name, params={"$alt": "json;enum-encoding=int"})
    server.http.get(f"/v1/{name}", params={"alt": "proto"})
    server.call("GET", "tunedModels", headers={"accept-encoding": "identity"})
    server.call("POST", f"{name}:streamGenerateContent", ASK)
    server.http.post(f"/v1beta/{name}:streamGenerateContent?alt=sse", json=ASK)
    server.http.get("/openapi.json")
    server.call("GET", "tunedModels/absent", code=403)
    with grpc.insecure_channel(server.grpc) as channel:
        metadata = [("authorization", server.http.headers["authorization"])]
        request = protos.GetOperationRequest(name=done["name"]).SerializeToString()
        channel.unary_unary("/google.longrunning.Operations/GetOperation")(request, metadata=metadata, timeout=20)
    records = [json.loads(line) for line in server.recording.read_text().splitlines()]
    heard = {
        (record["rpc"].rpartition(".")[2], record.get("kind", "gRPC").partition(";")[0]) for record in records
    }
    assert heard == {
        ("CreateTunedModel", "application/json"),
        ("GetOperation", "application/json"),
        ("GetTunedModel", "application/json"),
        ("GetTunedModel", "application/x-protobuf"),
        ("ListTunedModels", "application/json"),
        ("StreamGenerateContent", "application/json"),
        ("StreamGenerateContent", "text/event-stream"),
        ("Operations/GetOperation", "gRPC"),
    }


def operation(response: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "o",
        "done": True,
        "response": {"@type": f"type.googleapis.com/{V1BETA}.TunedModel", **response},
    }


def text(message: str, answer: Any, **more: Any) -> dict[str, Any]:
    return {"rpc": "r", "message": message, "kind": "application/json", "text": json.dumps(answer), **more}


def events(body: str) -> dict[str, Any]:
    return {"rpc": "r", "message": PART, "kind": "text/event-stream", "text": body, "stream": True}


@pytest.mark.parametrize(
    ("record", "objection"),
    [
        (text(f"{V1BETA}.TunedModel", MODEL), None),
        (text(f"{V1BETA}.TunedModel", {**MODEL, "state": 2}, enum_numbers=True), None),
        (text(f"{V1BETA}.TunedModel", {**MODEL, "state": 2}), '"state": "ACTIVE"'),
        (text(f"{V1BETA}.TunedModel", {**MODEL, "etag": "1"}), '"etag"'),
        (text(f"{V1BETA}.TunedModel", {**MODEL, "description": ""}), "Google prints"),
        (text(f"{V1BETA}.TunedModel", {**MODEL, "topP": 0.949999988079071}), '"topP": 0.95'),
        (text(f"{V1BETA}.TunedModel", {**MODEL, "readerProjectNumbers": [7]}), '["7"]'),
        (text(f"{V1BETA}.TunedModel", {**MODEL, "createTime": "2026-01-01T00:00:00+00:00"}), "Google prints"),
        (text("google.longrunning.Operation", operation(MODEL)), None),
        (text("google.longrunning.Operation", operation({**MODEL, "etaSeconds": 3})), '"etaSeconds"'),
        (text("google.longrunning.Operation", {**operation(MODEL), "progress": 3}), '"progress"'),
        (text(PART, [{"modelVersion": "m"}, {"error": {"code": 9}}], stream=True), None),
        (text(PART, [{"modelVersion": "m"}, {"eta": 1}], stream=True), '"eta"'),
        (events('data: {"modelVersion": "m"}\r\n\r\n'), None),
        (events('data: {"modelVersion": "m"}\r\n\r\ndata: {"eta": 1}\r\n\r\n'), '"eta"'),
        ({"rpc": "r", "message": PART, "data": "CgQiAm0xCgQiAm0y", "stream": True}, None),
        ({"rpc": "r", "message": PART, "data": "CgQiAm0xCgT6PgFB", "stream": True}, "4 bytes are unknown"),
        ({"rpc": "r", "message": f"{V1BETA}.TunedModel", "data": "CgR0L3gx"}, None),
        ({"rpc": "r", "message": f"{V1BETA}.TunedModel", "data": "+j4BQQ=="}, "4 bytes are unknown"),
        ({"rpc": "r", "message": f"{V1BETA}.TunedModel", "data": "/w=="}, "TunedModel: "),
    ],
)
def test_google_types_object_to_what_is_wrong(tmp_path: Path, record: dict[str, Any], objection: str | None):
    file = tmp_path / "answers"
    file.write_text(json.dumps(record) + "\n")
    found = disagreements(file)
    if objection is None:
        assert found == []
    else:
        [sentence] = found
        assert objection in sentence
