import asyncio
import gzip
import json
import threading
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from api.stand_ins import MAX_BODY, PREFIX, Backend
from tunesmith import protos
from tunesmith.caller import Credentials

HI = {"contents": {"parts": {"text": "hi"}}}
ASK = "/v1beta/tunedModels/x:generateContent"
STREAM = "/v1beta/tunedModels/x:streamGenerateContent"
PROMPT = '{"contents": {"parts": {"text": "%s"}}}'


def error_of(response: httpx2.Response, status: int) -> Any:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json; charset=UTF-8"
    body = response.json()
    assert list(body) == ["error"]
    assert body["error"]["code"] == status
    return body["error"]


# What goes out


def test_the_tutorials_curl(client: TestClient, backend: Backend, tutorial_body: str):
    response = client.post(
        "/v1beta/tunedModels?tunedModelId=numbers",
        content=tutorial_body,
        headers={"content-type": "application/x-www-form-urlencoded"},
    )
    assert response.status_code == 200
    assert response.text == (
        """{
  "name": "tunedModels/numbers/operations/one",
  "metadata": {
    "@type": "type.googleapis.com/google.ai.generativelanguage.v1beta.CreateTunedModelMetadata",
    "totalSteps": 38,
    "tunedModel": "tunedModels/numbers"
  }
}
"""
    )
    response = client.get("/v1/tunedModels/numbers")
    assert '\n  "state": "CREATING",\n' in response.text
    assert "trainingData" not in response.text
    assert len(backend.models.models["tunedModels/numbers"].tuning_task.training_data.examples.examples) == 15


def test_headers_of_an_answer(client: TestClient):
    response = client.get("/v1beta/tunedModels")
    assert response.text == "{}\n"
    assert response.headers["content-type"] == "application/json; charset=UTF-8"
    assert response.headers["vary"].startswith("X-Origin, Referer")
    assert response.headers["content-length"] == "3"


@pytest.mark.parametrize("query", ["prettyPrint=false", "prettyPrint=0", "$prettyPrint=false"])
def test_compact_on_request(client: TestClient, query: str):
    response = client.post(f"{ASK}?{query}", json=HI)
    assert response.text == (
        '{"candidates":[{"content":{"parts":[{"text":"hi"}]},"finishReason":"STOP","index":0}]}'
    )


@pytest.mark.parametrize(
    "query", ["$alt=json;enum-encoding=int", "%24alt=json%3Benum-encoding%3Dint", "alt=json;enum-encoding=int"]
)
def test_enums_as_numbers_on_request(client: TestClient, query: str):
    candidate = client.post(f"{ASK}?{query}", json=HI).json()["candidates"][0]
    assert candidate["finishReason"] == 1


def test_operations_show_no_training_data(client: TestClient):
    body = client.get("/v1/tunedModels/x/operations/y").json()
    assert body["response"] == {
        "@type": "type.googleapis.com/google.ai.generativelanguage.v1beta.TunedModel",
        "name": "tunedModels/x",
        "state": "ACTIVE",
        "tuningTask": {},
    }


def test_compresses_large_answers_for_those_who_take_it(client: TestClient):
    body = PROMPT % ("a" * 5000)
    plain = client.post(ASK, content=body, headers={"accept-encoding": "gzip;q=0"})
    zipped = client.post(ASK, content=body, headers={"accept-encoding": "br, gzip"})
    assert "content-encoding" not in plain.headers
    assert zipped.headers["content-encoding"] == "gzip"
    assert int(zipped.headers["content-length"]) < 500 < int(plain.headers["content-length"])
    assert zipped.text == plain.text
    assert "Accept-Encoding" in zipped.headers["vary"]
    assert "content-encoding" not in client.post(ASK, json=HI, headers={"accept-encoding": "gzip"}).headers


# Partial responses and other forms


def test_partial_responses(client: TestClient):
    client.post("/v1beta/tunedModels?tunedModelId=x", json={"displayName": "d", "topK": 3})
    assert client.get("/v1beta/tunedModels/x?fields=name,top_k").json() == {"name": "tunedModels/x", "topK": 3}
    assert client.get("/v1beta/tunedModels?$fields=tunedModels(displayName)").json() == {
        "tunedModels": [{"displayName": "d"}]
    }
    headers = {"x-goog-fieldmask": "tunedModels.name"}
    response = client.get("/v1beta/tunedModels", headers=headers)
    assert response.json() == {"tunedModels": [{"name": "tunedModels/x"}]}
    assert len(client.get("/v1beta/tunedModels?fields=*").json()["tunedModels"][0]) > 2
    operation = client.get("/v1/tunedModels/x/operations/y?fields=name,response/state").json()
    assert operation == {
        "name": "tunedModels/x/operations/y",
        "response": {
            "@type": "type.googleapis.com/google.ai.generativelanguage.v1beta.TunedModel",
            "state": "ACTIVE",
        },
    }


@pytest.mark.parametrize("query", ["", "&alt=sse"])
def test_partial_responses_of_streams(client: TestClient, query: str):
    response = client.post(f"{STREAM}?fields=candidates/content/parts/text{query}", content=PROMPT % "a")
    assert response.text.count('"text"') == 3
    assert "finishReason" not in response.text
    response = client.post(f"{STREAM}?fields=candidates/index{query}", content=PROMPT % "fail")
    assert response.text.count('"index"') == 1
    assert "The model went away." in response.text


def test_protobuf_in_and_out(client: TestClient, backend: Backend):
    model = protos.TunedModel(display_name="d", top_k=3)
    response = client.post(
        "/v1beta/tunedModels?tunedModelId=x&alt=proto",
        content=model.SerializeToString(),
        headers={"content-type": "application/x-protobuf"},
    )
    assert response.headers["content-type"] == "application/x-protobuf"
    assert protos.Operation.FromString(response.content).name == "tunedModels/x/operations/one"
    assert backend.models.models["tunedModels/x"].display_name == "d"
    partial = client.get("/v1beta/tunedModels/x?alt=proto&fields=topK")
    assert protos.TunedModel.FromString(partial.content) == protos.TunedModel(top_k=3)
    error = client.get("/v1beta/tunedModels/y?alt=proto")
    assert error.status_code == 404
    assert protos.Status.FromString(error.content).code == 5


def test_a_path_wins_over_a_protobuf_body(client: TestClient, backend: Backend):
    request = protos.GenerateContentRequest(model="tunedModels/other")
    request.contents.add().parts.add(text="hi")
    headers = {"content-type": "application/x-protobuf; charset=binary"}
    assert client.post(ASK, content=request.SerializeToString(), headers=headers).status_code == 200
    assert backend.generative.requests[0].model == "tunedModels/x"
    message = error_of(client.post(ASK, content=b"\xff", headers=headers), 400)["message"]
    assert message == f"The body is not an encoded {PREFIX}GenerateContentRequest."


def stream_body(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a google.rpc.StreamBody: 1 is a message, 2 the Status that ends it."""
    at = 0
    while at < len(data):
        tag, at = data[at], at + 1
        length = shift = 0
        while True:
            byte, at = data[at], at + 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        yield tag >> 3, data[at : at + length]
        at += length


def test_a_stream_in_protobuf(client: TestClient):
    response = client.post(f"{STREAM}?alt=proto", content=PROMPT % ("a" * 300))
    assert response.headers["content-type"] == "application/x-protobuf"
    parts = list(stream_body(response.content))
    assert [number for number, _ in parts] == [1, 1, 1]
    texts = [
        protos.GenerateContentResponse.FromString(part).candidates[0].content.parts[0].text for _, part in parts
    ]
    assert texts == [f"{'a' * 300} {number}" for number in range(3)]
    (_, _), (number, status) = stream_body(client.post(f"{STREAM}?alt=proto", content=PROMPT % "fail").content)
    assert (number, protos.Status.FromString(status).message) == (2, "The model went away.")


# Browsers


@pytest.mark.parametrize("method", ["POST", "PATCH", "DELETE"])
def test_preflight(client: TestClient, method: str):
    response = client.options(
        "/v1beta/tunedModels/x",
        headers={
            "origin": "https://a.example",
            "access-control-request-method": method,
            "access-control-request-headers": "authorization,content-type,x-goog-api-key,x-goog-api-client",
        },
    )
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "*"
    assert method in response.headers["access-control-allow-methods"]
    assert "x-goog-api-key" in response.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in response.headers


def test_scripts_may_read_answers_and_errors(client: TestClient):
    headers = {"origin": "https://a.example"}
    for path in ("/v1beta/tunedModels", "/v1beta/tunedModels/x", "/openapi.json"):
        response = client.get(path, headers=headers)
        assert response.headers["access-control-allow-origin"] == "*"
        assert "www-authenticate" in response.headers["access-control-expose-headers"]
    assert client.post(STREAM, content=PROMPT % "a", headers=headers).headers["access-control-allow-origin"] == "*"


def test_only_the_origins_that_are_set(backend: Backend):
    app = backend.app(cors_origins=["https://a.example"])
    with TestClient(app, headers={"authorization": "Bearer good"}) as client:
        mine = client.get("/v1beta/tunedModels", headers={"origin": "https://a.example"})
        other = client.get("/v1beta/tunedModels", headers={"origin": "https://b.example"})
    assert mine.headers["access-control-allow-origin"] == "https://a.example"
    assert "Origin" in mine.headers["vary"]
    assert "access-control-allow-origin" not in other.headers


# What comes in


def test_takes_gzip(client: TestClient):
    body = (PROMPT % "hi").encode()
    for content in (gzip.compress(body), gzip.compress(body[:9]) + gzip.compress(body[9:])):
        response = client.post(ASK, content=content, headers={"content-encoding": "gzip"})
        assert response.json()["candidates"][0]["content"]["parts"] == [{"text": "hi"}]


@pytest.mark.parametrize(
    ("content", "encoding", "message"),
    [
        (b"{}", "gzip", "The body is not gzip, though its Content-Encoding says so."),
        (gzip.compress(b"{}", mtime=0)[:-4], "gzip", "The body is not gzip, though its Content-Encoding says so."),
        (b"{}", "br", 'Content-Encoding "br" is not known here: send gzip, or no encoding.'),
        (
            gzip.compress(bytes(50_000_000)),
            "gzip",
            f"Request payload size exceeds the limit: {MAX_BODY} bytes.",
        ),
    ],
)
def test_refuses_what_is_no_gzip_or_a_bomb(
    client: TestClient, backend: Backend, content: bytes, encoding: str, message: str
):
    tracemalloc.start()
    response = client.post(ASK, content=content, headers={"content-encoding": encoding})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert error_of(response, 400)["message"] == message
    assert peak < 10_000_000, "it was decompressed before it was refused"
    assert backend.generative.requests == []


@pytest.mark.parametrize(
    ("headers", "query", "credentials"),
    [
        ({"authorization": "Bearer good"}, "", Credentials(bearer="good")),
        ({"authorization": "bearer  good"}, "", Credentials(bearer="good")),
        (
            {"authorization": "Bearer good", "x-goog-api-key": "dummy"},
            "",
            Credentials(bearer="good", api_key="dummy"),
        ),
        ({}, "access_token=good", Credentials(bearer="good")),
        ({}, "oauth_token=good", Credentials(bearer="good")),
        ({}, "access_token=good&key=dummy", Credentials(bearer="good", api_key="dummy")),
        ({"x-goog-api-key": "good-key"}, "", Credentials(api_key="good-key")),
        ({"x-goog-api-key": "good-key"}, "key=other", Credentials(api_key="good-key")),
        ({}, "key=good-key&$.xgafv=2&quotaUser=a&uploadType=b&upload_protocol=c", Credentials(api_key="good-key")),
        ({}, "%24key=good-key", Credentials(api_key="good-key")),
        (
            {"authorization": "Bearer good", "x-goog-user-project": "p"},
            "",
            Credentials(bearer="good", project="p"),
        ),
    ],
)
def test_finds_credentials_wherever_they_are(
    backend: Backend, headers: dict[str, str], query: str, credentials: Credentials
):
    with TestClient(backend.app(), headers=headers) as client:
        assert client.get(f"/v1beta/tunedModels?{query}").status_code == 200
    assert backend.verifier.seen == [credentials]
    assert "good" not in repr(credentials)


@pytest.mark.parametrize(
    ("headers", "status", "name"),
    [
        ({}, 403, "PERMISSION_DENIED"),
        ({"authorization": "Basic Z29vZDpnb29k"}, 403, "PERMISSION_DENIED"),
        ({"x-goog-api-key": "bad"}, 400, "INVALID_ARGUMENT"),
        ({"authorization": "Bearer bad"}, 401, "UNAUTHENTICATED"),
        ({"authorization": "Bearer "}, 401, "UNAUTHENTICATED"),
        ({"authorization": "Bearer bad", "x-goog-api-key": "good-key"}, 401, "UNAUTHENTICATED"),
    ],
)
def test_refuses_bad_credentials(backend: Backend, headers: dict[str, str], status: int, name: str):
    with TestClient(backend.app(), headers=headers) as client:
        response = client.get("/v1beta/tunedModels")
    error = error_of(response, status)
    assert error["status"] == name
    if status == 401:
        assert response.headers["www-authenticate"] == (
            'Bearer realm="https://accounts.google.com/", error="invalid_token"'
        )
        assert error["details"] == [
            {
                "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                "reason": "ACCESS_TOKEN_TYPE_UNSUPPORTED",
                "domain": "googleapis.com",
                "metadata": {"service": "generativelanguage.googleapis.com"},
            }
        ]
    else:
        assert "www-authenticate" not in response.headers
        assert "details" not in error


def test_query_parameters_reach_the_request(client: TestClient, backend: Backend):
    client.get("/v1beta/tunedModels?page_size=5&filter=owner:me+x%20y&alt=json&prettyPrint=true")
    assert (backend.models.requests[0].page_size, backend.models.requests[0].filter) == (5, "owner:me x y")


@pytest.mark.parametrize("content_type", ["text/plain;charset=UTF-8", "application/json", "nonsense", ""])
def test_any_content_type_is_json(client: TestClient, content_type: str):
    response = client.post(ASK, content=PROMPT % "hi", headers={"content-type": content_type})
    assert response.json()["candidates"][0]["content"]["parts"] == [{"text": "hi"}]


def test_patch_takes_a_whole_resource_with_what_only_the_server_says(client: TestClient, backend: Backend):
    client.post("/v1beta/tunedModels?tunedModelId=x", json={"baseModel": "models/a"})
    body = {
        "name": "tunedModels/y",
        "description": "d",
        "state": 2,
        "createTime": "2024-01-01T00:00:00Z",
        "tuningTask": {"snapshots": [{"step": 1}]},
    }
    response = client.patch("/v1beta/tunedModels/x?updateMask=description", json=body)
    assert response.status_code == 200
    request = backend.models.requests[-1]
    assert (request.tuned_model.name, request.tuned_model.description) == ("tunedModels/x", "d")
    assert (request.tuned_model.state, list(request.update_mask.paths)) == (0, ["description"])


def test_delete_ignores_its_body(client: TestClient, backend: Backend):
    client.post("/v1beta/tunedModels?tunedModelId=x", json={})
    response = client.request("DELETE", "/v1beta/tunedModels/x", content="{}")
    assert (response.status_code, response.text) == (200, "{}\n")
    assert backend.models.models == {}


def test_cancel_takes_no_body_and_an_empty_one(client: TestClient, backend: Backend):
    for body in (b"", b"{}"):
        response = client.post("/v1beta/tunedModels/x/operations/y:cancel", content=body)
        assert (response.status_code, response.text) == (200, "{}\n")
    assert {request.name for request in backend.operations.requests} == {"tunedModels/x/operations/y"}


def test_cancel_by_the_models_name(client: TestClient, backend: Backend):
    for body in (b"", b"{}"):
        response = client.post("/v1/tunedModels/x:cancel", content=body)
        assert (response.status_code, response.text) == (200, "{}\n")
    assert [request.name for request in backend.operations.requests] == ["tunedModels/x"] * 2


def test_litellms_alias_and_count_tokens(client: TestClient, backend: Backend):
    assert client.post("/v1beta/models/tunedModels/x:generateContent", json=HI).status_code == 200
    assert client.post("/v1beta/tunedModels/x:countTokens", json=HI).json() == {"totalTokens": 7}
    assert [request.model for request in backend.generative.requests] == ["tunedModels/x"] * 2


def test_a_post_may_stand_for_another_method(client: TestClient, backend: Backend):
    client.post("/v1beta/tunedModels?tunedModelId=x", json={})
    headers = {"x-http-method-override": "GET"}
    assert client.post("/v1beta/tunedModels/x", headers=headers).json()["name"] == "tunedModels/x"
    # google-api-python-client moves a long query into the body
    response = client.post("/v1beta/tunedModels", headers=headers, data={"pageSize": "7", "alt": "json"})
    assert response.status_code == 200
    assert backend.models.requests[-1].page_size == 7
    assert client.get("/v1beta/tunedModels/x", headers={"x-http-method-override": "DELETE"}).status_code == 200
    assert "tunedModels/x" in backend.models.models


def test_head_and_options(client: TestClient):
    head = client.head("/v1beta/tunedModels")
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "3")
    options = client.options("/v1beta/tunedModels/x")
    assert (options.status_code, options.headers["allow"]) == (200, "DELETE, GET, PATCH, OPTIONS")
    assert client.options("/v1beta/nothing").status_code == 404


# What is refused


@pytest.mark.parametrize(
    ("http_method", "path", "body", "status", "message"),
    [
        ("GET", "/v1beta/nothing", "", 404, "There is nothing at /v1beta/nothing."),
        ("GET", "/", "", 404, "There is nothing at /."),
        ("GET", "/v1beta/tunedModels/%0Ax", "", 404, "Tuned model tunedModels/\nx does not exist."),
        ("GET", "/docs/", "", 404, "There is nothing at /docs/."),
        (
            "PUT",
            "/v1beta/tunedModels/x",
            "",
            404,
            "PUT is not served at /v1beta/tunedModels/x; this path answers to DELETE, GET, PATCH.",
        ),
        ("GET", "/v1beta/tunedModels/x", "", 404, "Tuned model tunedModels/x does not exist."),
        ("GET", "/v1beta/files", "", 501, f"{PREFIX}FileService.ListFiles is not implemented by this server."),
        (
            "GET",
            "/v1beta/tunedModels?alt=media",
            "",
            400,
            "alt=media is for downloads of files; this method answers with a message.",
        ),
        (
            "GET",
            "/v1beta/tunedModels?alt=xml",
            "",
            400,
            'Invalid value "xml" for parameter alt: expected json, sse or proto.',
        ),
        ("GET", "/v1beta/tunedModels?alt=sse", "", 400, "alt=sse is for streams; ListTunedModels answers once."),
        ("GET", "/v1beta/tunedModels?fields=name", "", 400, "Invalid field selection name"),
        (
            "GET",
            "/v1beta/tunedModels?callback=f",
            "",
            400,
            "JSONP is not supported: leave out the parameter callback.",
        ),
        ("GET", "/v1beta/tunedModels?pageSize=x", "", 400, "Invalid value at 'page_size' (TYPE_INT32), \"x\""),
        (
            "GET",
            "/v1beta/tunedModels?x=1",
            "",
            400,
            'Invalid JSON payload received. Unknown name "x": Cannot bind query parameter.'
            " Field 'x' could not be found in request message.",
        ),
        (
            "POST",
            "/v1beta/tunedModels",
            '{"tuning_task": {"foo": 1}}',
            400,
            "Invalid JSON payload received. Unknown name \"foo\" at 'tuned_model.tuning_task': Cannot find field.",
        ),
        ("POST", ASK, "{}", 400, "* GenerateContentRequest.contents: contents is not specified"),
        (
            "POST",
            ASK,
            "[]",
            400,
            'Invalid JSON payload received. Unknown name "": Root element must be a message.',
        ),
        (
            "POST",
            ASK,
            "{contents: oops}",
            400,
            "Invalid JSON payload received. Expected a value at line 1, column 12, found 'o'.\n"
            "{contents: oops}\n           ^",
        ),
    ],
)
def test_errors(client: TestClient, http_method: str, path: str, body: str, status: int, message: str):
    error = error_of(client.request(http_method, path, content=body), status)
    assert error["message"] == message


def test_field_violations_are_in_the_details(client: TestClient):
    error = error_of(client.post("/v1beta/tunedModels", json={"tuningTask": {"foo": 1}, "topK": "x"}), 400)
    first, second = error["message"].split("\n")
    assert error["status"] == "INVALID_ARGUMENT"
    assert error["details"] == [
        {
            "@type": "type.googleapis.com/google.rpc.BadRequest",
            "fieldViolations": [
                {"field": "tuned_model.tuning_task", "description": first},
                {"field": "tuned_model.top_k", "description": second},
            ],
        }
    ]


def test_a_bad_selection_is_refused_before_anything_is_done(client: TestClient, backend: Backend):
    error = error_of(client.post("/v1beta/tunedModels?fields=name,foo/bar", json={}), 400)
    assert error["message"] == "Invalid field selection foo"
    (violation,) = error["details"][0]["fieldViolations"]
    assert violation["field"] == "foo"
    assert backend.models.models == {}


def test_a_fault_of_ours_is_a_500_without_secrets(client: TestClient, caplog: pytest.LogCaptureFixture):
    error = error_of(client.get("/v1beta/models/a"), 500)
    assert error["status"] == "INTERNAL"
    assert "secret" not in json.dumps(error)
    assert "secret of the server" in caplog.text


def test_errors_follow_the_style(client: TestClient):
    assert client.get("/v1beta/tunedModels/x").text.startswith('{\n  "error": {\n    "code": 404,\n')
    assert client.get("/v1beta/tunedModels/x?prettyPrint=false").text.startswith('{"error":{"code":404,')


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit(client: TestClient, backend: Backend, chunked: bool):
    body = (PROMPT % ("a" * MAX_BODY)).encode()
    content: Any = iter([body[:1000], body[1000:]]) if chunked else body
    error = error_of(client.post(ASK, content=content), 400)
    assert error["status"] == "INVALID_ARGUMENT"
    assert error["message"] == f"Request payload size exceeds the limit: {MAX_BODY} bytes."
    assert backend.generative.requests == []
    fits = (PROMPT % "").encode().ljust(MAX_BODY)
    assert client.post(ASK, content=fits).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xfe{\x00}\x00",
        b'{"contents": {"parts": {"text": "\\ud800"}}}',
        b"[" * 19_000,
        b'{"a":' * 3_000,
        b'{"generationConfig": {"temperature": NaN}}',
        b'{"generationConfig": {"seed": 1e999}}',
        b'{"generationConfig": {"seed": ' + b"9" * 5_000 + b"}}",
        b"null",
        b'"x"',
        b"\x00",
        b'{"generationConfig": {"responseJsonSchema": ' + b'{"a":' * 500 + b"1" + b"}" * 502,
    ],
)
def test_no_body_breaks_the_server(client: TestClient, body: bytes):
    assert error_of(client.post(ASK, content=body), 400)["status"] == "INVALID_ARGUMENT"


# Streams


def test_a_stream_is_one_json_array(client: TestClient):
    response = client.post(STREAM, content=PROMPT % "a")
    assert response.headers["content-type"] == "application/json; charset=UTF-8"
    assert "content-length" not in response.headers
    parts = response.text.split(",\r\n")
    assert len(parts) == 3
    assert parts[0].startswith('[{\n  "candidates": [\n')
    assert [item["candidates"][0]["content"]["parts"][0]["text"] for item in response.json()] == [
        "a 0",
        "a 1",
        "a 2",
    ]


def test_a_stream_as_server_sent_events(client: TestClient):
    response = client.post(f"{STREAM}?alt=sse", content=PROMPT % "a")
    assert response.headers["content-type"] == "text/event-stream"
    *events, rest = response.text.split("\r\n\r\n")
    assert rest == ""
    assert [event[: len('data: {"candidates":[')] for event in events] == ['data: {"candidates":['] * 3
    assert all("\n" not in event for event in events)


def test_streams_write_enums_as_numbers_on_request(client: TestClient):
    response = client.post(f"{STREAM}?$alt=json;enum-encoding=int", content=PROMPT % "a")
    assert response.json()[0]["candidates"][0]["finishReason"] == 1


def test_an_empty_stream(client: TestClient):
    assert client.post(STREAM, content=PROMPT % "nothing").text == "[]"
    response = client.post(f"{STREAM}?alt=sse", content=PROMPT % "nothing")
    assert (response.status_code, response.text) == (200, "")


def test_a_stream_that_fails_at_once_has_the_errors_status(client: TestClient):
    response = client.post(STREAM, content=PROMPT % "refuse")
    assert response.status_code == 400
    (item,) = response.json()
    assert item["error"]["status"] == "FAILED_PRECONDITION"
    response = client.post(f"{STREAM}?alt=sse", content=PROMPT % "refuse")
    assert error_of(response, 400)["message"] == "The model is CREATING."
    (item,) = client.post(STREAM, content='{"foo": 1}').json()
    assert item["error"]["message"] == 'Invalid JSON payload received. Unknown name "foo": Cannot find field.'


@pytest.mark.parametrize(("prompt", "status"), [("fail", "FAILED_PRECONDITION"), ("break", "INTERNAL")])
def test_a_stream_that_fails_later_ends_with_the_error(client: TestClient, prompt: str, status: str):
    first, last = client.post(STREAM, content=PROMPT % prompt).json()
    assert "candidates" in first
    assert last["error"]["status"] == status
    response = client.post(f"{STREAM}?alt=sse", content=PROMPT % prompt)
    first, last, rest = response.text.split("\r\n\r\n")
    assert rest == ""
    assert last.startswith('data: {"error":{"code":')
    assert json.loads(last.removeprefix("data: "))["error"]["status"] == status
    assert "secret" not in response.text


# The server's own routes


def test_health_needs_no_credentials(backend: Backend):
    with TestClient(backend.app()) as client:
        assert (client.get("/healthz").status_code, client.get("/healthz").json()) == (200, {"status": "ok"})
        assert client.get("/readyz").status_code == 200
        backend.ready = False
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200


def test_metrics_count_calls_by_rpc_and_code(client: TestClient):
    client.get("/v1beta/tunedModels")
    client.get("/v1beta/tunedModels/x")
    client.get("/v1beta/tunedModels?x=1")
    client.get("/nothing")
    client.post(STREAM, content=PROMPT % "fail")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    for rpc, code in [
        (f"{PREFIX}ModelService.ListTunedModels", "OK"),
        (f"{PREFIX}ModelService.ListTunedModels", "INVALID_ARGUMENT"),
        (f"{PREFIX}ModelService.GetTunedModel", "NOT_FOUND"),
        (f"{PREFIX}GenerativeService.StreamGenerateContent", "FAILED_PRECONDITION"),
        ("unknown", "NOT_FOUND"),
    ]:
        assert f'tunesmith_calls_total{{code="{code}",rpc="{rpc}"}} 1.0' in response.text
    assert f'tunesmith_call_seconds_count{{rpc="{PREFIX}ModelService.ListTunedModels"}} 2.0' in response.text


def test_other_parts_may_add_routes(backend: Backend):
    def hello(_request: Any) -> PlainTextResponse:
        return PlainTextResponse("hello")

    with TestClient(backend.app(routes=[Route("/o/hello", hello)])) as client:
        assert client.get("/o/hello").text == "hello"
        assert error_of(client.get("/o/other"), 404)


def test_waiting_calls_of_one_service_do_not_hold_up_another(backend: Backend):
    def ask(client: TestClient, answers: list[int]) -> None:
        answers.append(client.post(STREAM, content=PROMPT % "step").status_code)

    with TestClient(backend.app(threads=2), headers={"authorization": "Bearer good"}) as client:
        answers: list[int] = []
        asking = [threading.Thread(target=ask, args=(client, answers)) for _ in range(4)]
        for thread in asking:
            thread.start()
        assert backend.generative.held.acquire(timeout=20)
        assert backend.generative.held.acquire(timeout=20)
        started = time.monotonic()
        assert client.get("/v1beta/tunedModels").status_code == 200
        assert time.monotonic() - started < 10, "it waited until the others gave up"
        assert answers == []
        backend.generative.waiting.set()
        for thread in asking:
            thread.join(20)
        assert answers == [200] * 4


def test_a_stream_whose_task_is_cancelled_tells_its_service(backend: Backend):
    async def receive() -> dict[str, Any]:
        if bodies:
            return {"type": "http.request", "body": bodies.pop()}
        return await asyncio.Future()

    async def send(message: dict[str, Any]) -> None:
        pass

    async def cancelled() -> bool:
        scope = {
            "type": "http",
            "method": "POST",
            "path": STREAM,
            "query_string": b"",
            "headers": [(b"authorization", b"Bearer good")],
        }
        task = asyncio.create_task(backend.app()(scope, receive, send))
        await asyncio.to_thread(backend.generative.waiting.wait, 20)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    bodies = [(PROMPT % "linger").encode()]
    assert asyncio.run(cancelled())
    assert backend.generative.closed.wait(20)
