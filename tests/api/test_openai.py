"""OpenAI's surface over plain HTTP, on a live server: chats, completions, models, errors."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from people import Person
from servers import Server, job

BASE = "models/tiny-gemma3"
ASKED = [{"role": "user", "content": "one, two, three"}]


@pytest.fixture(scope="module")
def tuned(server: Server) -> str:
    """A tuned model of the first account."""
    name: str = server.finished(server.tune(job(epochs=1), tunedModelId="counts"))["response"]["name"]
    return name


def post(server: Server, path: str, body: dict[str, Any], code: int = 200, **options: Any) -> Any:
    response = server.http.post(f"/v1beta/openai/{path}", json=body, **options)
    assert response.status_code == code, response.text
    return response.json()


def chat(server: Server, model: str = BASE, code: int = 200, messages: Any = ASKED, **more: Any) -> Any:
    return post(server, "chat/completions", {"model": model, "messages": messages, **more}, code)


def error(server: Server, code: int = 400, **more: Any) -> tuple[str | None, str]:
    """Make a chat fail; return the parameter that the error names, and its message."""
    found = chat(server, code=code, **more)["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found["param"], found["message"]


def events(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end as OpenAI's do."""
    with server.http.stream("POST", f"/v1beta/openai/{path}", json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def same_as_google(server: Server, model: str, **config: Any) -> str:
    body = {"contents": [{"parts": [{"text": "one, two, three"}]}], "generationConfig": config}
    answer = server.call("POST", f"{model}:generateContent", body)
    return str(answer["candidates"][0]["content"]["parts"][0]["text"])


def test_a_chat_has_the_answer_of_generate_content(server: Server, tuned: str) -> None:
    for model in (BASE, tuned):
        answer = chat(server, model, max_tokens=12)
        assert answer["object"] == "chat.completion"
        assert answer["model"] == model
        (choice,) = answer["choices"]
        assert choice["message"]["content"] == same_as_google(server, model, maxOutputTokens=12) != ""
        assert choice["message"]["role"] == "assistant"
        assert choice["finish_reason"] in ("stop", "length")
        usage = answer["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert 0 < usage["completion_tokens"] <= 12


def test_the_end_says_why(server: Server) -> None:
    assert chat(server, max_completion_tokens=2, max_tokens=200)["choices"][0]["finish_reason"] == "length"
    text = chat(server, max_tokens=12)["choices"][0]["message"]["content"]
    stopped = chat(server, max_tokens=12, stop=text[2:5])["choices"][0]
    assert stopped["message"]["content"] == text[: text.index(text[2:5])]
    assert stopped["finish_reason"] == "stop"


@pytest.mark.parametrize("name", ["tiny-gemma3", "models/tiny-gemma3"])
def test_base_models_with_and_without_their_prefix(server: Server, name: str) -> None:
    assert chat(server, name, max_tokens=2)["model"] == name


def test_tuned_models_with_a_prefix_too_many(server: Server, tuned: str) -> None:
    assert chat(server, f"models/{tuned}", max_tokens=2)["choices"]


def test_sampling_is_the_same_as_google_s(server: Server) -> None:
    drawn = {"temperature": 1.5, "top_p": 0.9, "seed": 7}
    ours = {"temperature": 1.5, "topP": 0.9, "seed": 7, "maxOutputTokens": 12}
    text = chat(server, max_tokens=12, **drawn)["choices"][0]["message"]["content"]
    assert text == same_as_google(server, BASE, **ours)
    assert text != chat(server, max_tokens=12, **drawn | {"seed": 8})["choices"][0]["message"]["content"]
    large = chat(server, max_tokens=4, **drawn | {"seed": 2**40 + 7})["choices"]
    assert (
        large[0]["message"]["content"] == chat(server, max_tokens=4, **drawn)["choices"][0]["message"]["content"]
    )


def test_several_choices(server: Server) -> None:
    answer = chat(server, n=3, temperature=1.5, seed=1, max_tokens=6)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in answer["choices"]}) > 1


def test_instructions_and_parts(server: Server) -> None:
    def tokens(*messages: dict[str, Any]) -> int:
        return int(chat(server, messages=list(messages), max_tokens=1)["usage"]["prompt_tokens"])

    plain = tokens(*ASKED)
    parts = [{"type": "text", "text": "one, two,"}, {"type": "text", "text": " three"}]
    assert tokens({"role": "user", "content": parts}) == plain
    told = tokens({"role": "system", "content": "count"}, {"role": "developer", "content": "on"}, *ASKED)
    assert told > tokens({"role": "system", "content": "count"}, *ASKED) > plain
    assert tokens(*ASKED, {"role": "assistant", "content": "four"}, *ASKED) > 2 * plain - 4


def test_a_stream_is_the_whole_answer_in_pieces(server: Server, tuned: str) -> None:
    body = {"model": tuned, "messages": ASKED, "max_tokens": 12}
    whole = chat(server, tuned, max_tokens=12)
    chunks = events(server, "chat/completions", body)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [delta.get("role") for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    ends = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert ends == [*[None] * (len(ends) - 1), whole["choices"][0]["finish_reason"]]
    assert "usage" not in chunks[-1]

    counted = events(server, "chat/completions", {**body, "stream_options": {"include_usage": True}})
    assert counted[-1]["choices"] == []
    assert counted[-1]["usage"] == whole["usage"]
    assert {json.dumps(chunk["usage"]) for chunk in counted[:-1]} == {"null"}


def test_choices_of_a_stream_are_told_apart(server: Server) -> None:
    config = {"n": 2, "temperature": 1.5, "seed": 1, "max_tokens": 6}
    texts = {0: "", 1: ""}
    for chunk in events(server, "chat/completions", {"model": BASE, "messages": ASKED, **config}):
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
    whole = [choice["message"]["content"] for choice in chat(server, **config)["choices"]]
    assert [texts[0], texts[1]] == whole


def test_completions(server: Server, tuned: str) -> None:
    answer = post(server, "completions", {"model": tuned, "prompt": "one, two, three", "max_tokens": 12})
    assert answer["object"] == "text_completion"
    text = same_as_google(server, tuned, maxOutputTokens=12)
    assert answer["choices"][0]["text"] == text
    both = post(server, "completions", {"model": tuned, "prompt": ["one, two, three", "4"], "max_tokens": 12})
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    assert both["choices"][0]["text"] == text
    assert both["usage"]["prompt_tokens"] > answer["usage"]["prompt_tokens"]
    pieces = events(server, "completions", {"model": tuned, "prompt": ["one, two, three", "4"], "max_tokens": 12})
    for index in (0, 1):
        streamed = "".join(one["choices"][0]["text"] for one in pieces if one["choices"][0]["index"] == index)
        assert streamed == both["choices"][index]["text"]
    short = post(server, "completions", {"model": BASE, "prompt": "one, two, three"})
    assert short["usage"]["completion_tokens"] <= 16


def test_models(server: Server, tuned: str) -> None:
    listed = server.http.get("/v1beta/openai/models").json()
    assert listed["object"] == "list"
    ids = [model["id"] for model in listed["data"]]
    assert tuned in ids
    assert BASE in ids
    one = server.http.get(f"/v1beta/openai/models/{tuned}").json()
    assert one == {"id": tuned, "object": "model", "created": one["created"], "owned_by": "tunesmith"}
    assert one["created"] > 1_700_000_000
    assert one in listed["data"]
    escaped = server.http.get("/v1beta/openai/models/" + tuned.replace("/", "%2F"))
    assert escaped.json() == one
    assert server.http.get("/v1beta/openai/models/tiny-gemma3").json()["id"] == BASE
    missing = server.http.get("/v1beta/openai/models/none-such")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_models_that_cannot_answer_yet_are_not_listed(server: Server) -> None:
    waiting = server.tune(job(epochs=50))["metadata"]["tunedModel"]
    ids = [model["id"] for model in server.http.get("/v1beta/openai/models").json()["data"]]
    assert waiting not in ids
    assert "CREATING" in error(server, model=waiting)[1]
    server.call("DELETE", waiting)


@pytest.mark.parametrize(
    ("given", "parameter", "told"),
    [
        ({"temperature": 9}, "temperature", "between 0 and 2"),
        ({"temperature": "warm"}, "temperature", '"warm"'),
        ({"max_tokens": 100_000}, "max_tokens", "between 1 and 256"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "between 1 and 256"),
        ({"n": 9}, "n", "between 1 and 8"),
        ({"stop": ["a", "b", "c", "d", "e", "f"]}, "stop", "at most 5"),
        ({"seed": "x"}, "seed", "integer"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "not supported"),
        ({"repetition_penalty": 1.2}, "repetition_penalty", "not supported"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "'yaml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "JSON schema"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "tool", "content": "1"}]}, "messages[0].role", "'tool'"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "1"}]}, "messages", "the user's"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "text"),
        ({"messages": [{"role": "user", "content": "x" * 40_001}]}, "messages", "40,000"),
        ({"model": None}, "model", "name a model"),
        ({"model": "a/b"}, "model", "tunedModels/*"),
    ],
)
def test_what_is_wrong_is_named(server: Server, given: dict[str, Any], parameter: str, told: str) -> None:
    name, message = error(server, **given)
    assert name == parameter
    assert told in message
    assert "GenerateContentRequest" not in message
    assert "generation_config" not in message


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_parts_that_are_no_text_are_refused(server: Server, kind: str) -> None:
    parts = [{"type": "text", "text": "what is it?"}, {"type": kind, kind: {"url": "data:,"}}]
    name, message = error(server, messages=[{"role": "user", "content": parts}])
    assert name == "messages[0].content[1]"
    assert repr(kind) in message


def test_what_changes_nothing_is_ignored(server: Server) -> None:
    harmless = {
        **dict.fromkeys(("user", "service_tier", "never_heard_of"), "any"),
        "tools": [],
        **dict.fromkeys(("logit_bias", "top_k")),
        "metadata": {"a": "b"},
        "tool_choice": "none",
        "repetition_penalty": 1.0,
        "response_format": {"type": "text"},
        "modalities": ["text"],
    }
    assert chat(server, max_tokens=8, **harmless)["choices"] == chat(server, max_tokens=8)["choices"]


def test_unknown_models_and_paths(server: Server) -> None:
    found = chat(server, "none-such", 404)["error"]
    assert (found["type"], found["param"], found["code"]) == ("invalid_request_error", "model", "model_not_found")
    assert "models/none-such is not found" in found["message"]
    assert "embeddings is not implemented" in post(server, "embeddings", {}, 501)["error"]["message"]
    assert "chat/completions" in post(server, "chat", {}, 404)["error"]["message"]
    assert server.http.get("/v1beta/openai/chat/completions").status_code == 404
    broken = server.http.post("/v1beta/openai/chat/completions", content=b"{")
    assert broken.status_code == 400
    assert "Invalid JSON payload" in broken.json()["error"]["message"]
    listed = server.http.post("/v1beta/openai/chat/completions", content=b"[]")
    assert listed.json()["error"]["message"] == "The body must be a JSON object."


def test_keys_and_tokens(server: Server, tuned: str) -> None:
    person = Person(server, "openai@example.com")
    key = {"authorization": f"Bearer {person.headers['x-goog-api-key']}"}
    body = {"model": BASE, "messages": ASKED, "max_tokens": 2}
    assert post(server, "chat/completions", body, headers=key)["choices"]
    denied = post(server, "chat/completions", {**body, "model": tuned}, 403, headers=key)["error"]
    assert denied["type"] == "permission_error"
    for wrong in ("Bearer sk-none", "Bearer tsk_none", ""):
        refused = post(server, "chat/completions", body, 401, headers={"authorization": wrong})["error"]
        assert (refused["type"], refused["code"]) == ("authentication_error", "invalid_api_key")
    ids = [model["id"] for model in server.http.get("/v1beta/openai/models", headers=key).json()["data"]]
    assert BASE in ids
    assert tuned not in ids


def test_pages_of_any_origin_may_call(server: Server) -> None:
    asks = {"origin": "https://a.example", "access-control-request-method": "POST"}
    asks["access-control-request-headers"] = "authorization,content-type,x-stainless-os"
    response = server.http.options("/v1beta/openai/chat/completions", headers=asks)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "*"


def test_calls_are_counted_as_what_they_are(server: Server) -> None:
    def count() -> float:
        line = 'tunesmith_calls_total{code="OK",rpc="google.ai.generativelanguage.v1beta.GenerativeService.'
        found = server.http.get("/metrics").text.splitlines()
        return sum(float(one.split()[-1]) for one in found if one.startswith(line))

    before = count()
    chat(server, max_tokens=1)
    events(server, "completions", {"model": BASE, "prompt": "1", "max_tokens": 1})
    assert count() == before + 2


@pytest.fixture(scope="module")
def limited(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on which an account has one answer under way at a time."""
    limits = {"TUNESMITH_GENERATIONS_PER_ACCOUNT": "1", "TUNESMITH_MAX_BATCH": "1"}
    with Server(tmp_path_factory.mktemp("data"), {**tiny, **limits}, "--workers", "0") as running:
        yield running


def test_limits_hold_here_too(limited: Server) -> None:
    long = [{"role": "user", "content": "the other one is in a tin on the table, and a hat"}]  # has no end
    body = {"model": BASE, "messages": long, "n": 8, "max_tokens": 256, "stream": True}
    path = "/v1beta/openai/chat/completions"
    for _ in range(20):  # on a machine that is busy, the stream may end before the next request comes
        with limited.http.stream("POST", path, json=body) as answer:
            next(answer.iter_lines())
            refused = limited.http.post(path, json={"model": BASE, "messages": ASKED})
        if refused.status_code == 429:
            break
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    short = {"model": BASE, "messages": ASKED, "max_tokens": 1}
    for _ in range(100):  # until the server has noticed that the stream was left
        if limited.http.post(path, json=short).status_code == 200:
            return
        threading.Event().wait(0.1)
    raise AssertionError("the stream that was left still counts")


def test_probabilities_of_tokens(server: Server) -> None:
    asked = {"max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    (choice,) = chat(server, **asked)["choices"]
    tokens = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == choice["message"]["content"]
    for token in tokens:
        assert len(token["top_logprobs"]) == 3
        assert token["logprob"] == token["top_logprobs"][0]["logprob"] <= 0  # greedy: the best one is chosen
        assert bytes(token["bytes"]).decode() == token["token"]
    body = {"model": BASE, "messages": ASKED, **asked}
    chunks = [chunk["choices"][0] for chunk in events(server, "chat/completions", body)]
    assert [one for chunk in chunks for one in (chunk["logprobs"] or {}).get("content", [])] == tokens

    completion = {"model": BASE, "prompt": "one, two, three", "max_tokens": 6, "logprobs": 2}
    (choice,) = post(server, "completions", completion)["choices"]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    places = zip(found["text_offset"], found["tokens"], strict=True)
    assert all(choice["text"][at:].startswith(token) for at, token in places)
    assert {len(top) for top in found["top_logprobs"]} == {2}
    assert chat(server, max_tokens=2)["choices"][0]["logprobs"] is None


def test_answers_are_held_to_a_schema(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"size": {"enum": ["small", "large"]}, "count": {"type": "integer", "maximum": 9}},
        "required": ["size", "count"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": schema}}
    answer = json.loads(chat(server, response_format=form, max_tokens=256)["choices"][0]["message"]["content"])
    assert answer["size"] in ("small", "large")
    assert answer["count"] <= 9


def test_penalties_change_the_answer(server: Server) -> None:
    plain = chat(server, max_tokens=24)["choices"][0]["message"]["content"]
    body = {"maxOutputTokens": 24, "frequencyPenalty": 1.9}
    fresh = chat(server, max_tokens=24, frequency_penalty=1.9)["choices"][0]["message"]["content"]
    assert fresh == same_as_google(server, BASE, **body)
    assert fresh != plain
    assert error(server, presence_penalty=9)[0] == "presence_penalty"
    assert error(server, top_logprobs=3)[0] == "logprobs"  # which must be true
