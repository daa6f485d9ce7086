"""What can be asked of a model: conversations, several candidates, embeddings, PaLM's calls."""

import copy
import json
import math
from typing import Any
from unittest.mock import ANY

import jsonschema
import pytest

from servers import Server, job, losses

BASE = "models/tiny-gemma3"
REQUEST = "CreateTunedModelRequest.tuned_model.tuning_task.training_data.examples"


def content(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"text": text}]}


def conversations(count: int = 6) -> dict[str, Any]:
    rows = [
        {
            "systemInstruction": {"parts": [{"text": "count on"}]},
            "contents": [
                content("user", str(n)),
                content("model", str(n + 1)),
                content("user", "again"),
                content("model", str(n + 2)),
            ],
        }
        for n in range(count)
    ]
    body = job("chat", epochs=3)
    body["tuning_task"]["training_data"] = {"examples": {"multiturnExamples": rows}}
    return body


@pytest.fixture(scope="module")
def chat(server: Server) -> str:
    """A model tuned on conversations."""
    name: str = server.finished(server.tune(conversations()))["response"]["name"]
    return name


def test_conversations_are_tuned_on(server: Server, chat: str) -> None:
    operation = server.call("GET", f"{chat}/operations")["operations"][0]
    steps = losses(operation)
    assert len(steps) == operation["metadata"]["totalSteps"] == 5  # six examples, three epochs, batches of four
    assert steps[-1] < steps[0]
    body = {
        "systemInstruction": {"parts": [{"text": "count on"}]},
        "contents": [content("user", "1"), content("model", "2"), content("user", "again")],
        "generationConfig": {"maxOutputTokens": 4},
    }
    assert server.call("POST", f"{chat}:generateContent", body)["candidates"]


@pytest.mark.parametrize("version", ["v1", "v1alpha", "v1beta3"])
def test_every_version_takes_conversations(server: Server, version: str) -> None:
    text = json.dumps(conversations(1)).replace("multiturnExamples", "multiturn_examples")
    response = server.http.post(f"/{version}/tunedModels", content=text)
    assert response.status_code == 200, response.text
    server.finished(response.json())


def test_all_that_is_wrong_with_conversations_is_named_by_row(server: Server) -> None:
    body = conversations()
    rows = body["tuning_task"]["training_data"]["examples"]["multiturnExamples"]
    rows[0]["contents"][0]["role"] = "model"
    rows[1]["contents"].pop()
    rows[2]["contents"][1]["parts"] = []
    rows[3]["systemInstruction"] = {"parts": [{"text": "x" * 40_001}]}
    rows[4]["contents"] = []
    rows[5]["contents"][3]["parts"][0]["text"] = "x" * 5_001
    error = server.call("POST", "tunedModels", body, code=400)["error"]
    path = f"{REQUEST}.multiturn_examples"
    assert error["message"].splitlines() == [
        f"* {path}[0].contents[0].role: must be user, not 'model': roles alternate, and the user begins",
        f"* {path}[1].contents: the last content must be the model's",
        f"* {path}[2].contents[1].parts: parts is empty",
        f"* {path}[3].system_instruction.parts: must be at most 40,000 characters long, not 40,001",
        f"* {path}[4].contents: contents is not specified",
        f"* {path}[5].contents[3].parts: must be at most 5,000 characters long, not 5,001",
    ]


def test_examples_are_all_of_one_kind(server: Server) -> None:
    body = conversations()
    body["tuning_task"]["training_data"]["examples"]["examples"] = [{"text_input": "1", "output": "2"}]
    message = server.call("POST", "tunedModels", body, code=400)["error"]["message"]
    assert message.startswith(f"* {REQUEST}: all examples must be of one kind")
    image = copy.deepcopy(conversations(1))
    part = image["tuning_task"]["training_data"]["examples"]["multiturnExamples"][0]["contents"][0]["parts"][0]
    part["inlineData"] = {"mimeType": "image/png"}
    assert 'Unknown name "inlineData"' in server.call("POST", "tunedModels", image, code=400)["error"]["message"]


@pytest.mark.parametrize("tuned", [False, True])
def test_a_system_instruction_is_part_of_the_prompt(server: Server, chat: str, tuned: bool) -> None:
    model = chat if tuned else BASE
    body: dict[str, Any] = {"contents": [content("user", "hello")], "generationConfig": {"maxOutputTokens": 12}}
    told = {**body, "systemInstruction": {"parts": [{"text": "be brief and "}, {"text": "kind"}]}}
    answers = [server.call("POST", f"{model}:generateContent", asked) for asked in (body, told)]
    counts = [answer["usageMetadata"]["promptTokenCount"] for answer in answers]
    assert counts[0] < counts[1]
    inner = {**told, "model": model}
    counted = server.call("POST", f"{model}:countTokens", {"generateContentRequest": inner})
    assert counted["totalTokens"] == counts[1]
    assert server.call("POST", f"{model}:countTokens", {"contents": body["contents"]})["totalTokens"] == counts[0]


def test_count_tokens_takes_contents_or_a_request(server: Server) -> None:
    contents = [content("user", "1"), content("model", "2")]  # a history, as chats count theirs
    assert server.call("POST", f"{BASE}:countTokens", {"contents": contents})["totalTokens"] > 2
    both = {"contents": contents, "generateContentRequest": {"model": BASE, "contents": contents}}
    message = server.call("POST", f"{BASE}:countTokens", both, code=400)["error"]["message"]
    assert "give contents or generate_content_request, not both" in message
    neither = {"generateContentRequest": {"model": BASE}}
    message = server.call("POST", f"{BASE}:countTokens", neither, code=400)["error"]["message"]
    assert message == "* CountTokensRequest.generate_content_request.contents: contents is not specified"


SAMPLED = {"candidateCount": 3, "seed": 5, "temperature": 1.2, "maxOutputTokens": 8}


def test_candidates(server: Server, chat: str) -> None:
    body = {"contents": [content("user", "hello")], "generationConfig": SAMPLED}
    answer = server.call("POST", f"{chat}:generateContent", body)
    assert [candidate["index"] for candidate in answer["candidates"]] == [0, 1, 2]
    assert all(candidate["finishReason"] in ("STOP", "MAX_TOKENS") for candidate in answer["candidates"])
    texts = [candidate["content"]["parts"][0].get("text", "") for candidate in answer["candidates"]]
    assert len(set(texts)) > 1
    assert server.call("POST", f"{chat}:generateContent", body) == {**answer, "responseId": ANY}
    usage = answer["usageMetadata"]
    assert 3 <= usage["candidatesTokenCount"] <= 24
    assert usage["totalTokenCount"] == usage["promptTokenCount"] + usage["candidatesTokenCount"]
    for index, text in enumerate(texts):  # each is what its own seed gives alone
        one = {**body, "generationConfig": {**SAMPLED, "candidateCount": 1, "seed": 5 + index}}
        (alone,) = server.call("POST", f"{chat}:generateContent", one)["candidates"]
        # Its beginning: later tokens may differ by the rounding of products in bfloat16.
        assert alone["content"]["parts"][0].get("text", "")[:1] == text[:1]


def test_a_stream_of_candidates(server: Server, chat: str) -> None:
    body = {"contents": [content("user", "hello")], "generationConfig": SAMPLED}
    whole = server.call("POST", f"{chat}:generateContent", body)
    chunks = server.call("POST", f"{chat}:streamGenerateContent", body)
    pieces = ["", "", ""]
    ends: list[Any] = [None] * 3
    for chunk in chunks:
        (candidate,) = chunk["candidates"]
        assert ends[candidate["index"]] is None
        pieces[candidate["index"]] += candidate["content"]["parts"][0].get("text", "")
        ends[candidate["index"]] = candidate.get("finishReason")
    assert pieces == [one["content"]["parts"][0].get("text", "") for one in whole["candidates"]]
    assert ends == [one["finishReason"] for one in whole["candidates"]]
    assert chunks[-1]["usageMetadata"] == whole["usageMetadata"]


@pytest.mark.parametrize("count", [0, 9, -1])
def test_too_many_candidates(server: Server, count: int) -> None:
    body = {"contents": [content("user", "1")], "generationConfig": {"candidateCount": count}}
    message = server.call("POST", f"{BASE}:generateContent", body, code=400)["error"]["message"]
    assert message.endswith(f"generation_config.candidate_count: must be between 1 and 8, not {count}")


def test_embeddings(server: Server) -> None:
    texts = ["the cat is in the hat", "a", "x" * 900]
    alone = [server.call("POST", f"{BASE}:embedContent", {"content": content("user", text)}) for text in texts]
    vectors = [one["embedding"]["values"] for one in alone]
    assert all(math.hypot(*vector) == pytest.approx(1, abs=1e-4) for vector in vectors)
    requests = [{"model": BASE, "content": content("user", text)} for text in texts]
    batch = server.call("POST", f"{BASE}:batchEmbedContents", {"requests": requests})["embeddings"]
    for vector, one in zip(vectors, batch, strict=True):
        assert sum(a * b for a, b in zip(vector, one["values"], strict=True)) > 0.99
    options = {"outputDimensionality": 8, "taskType": "RETRIEVAL_DOCUMENT"}
    short = server.call("POST", f"{BASE}:embedContent", {**requests[0], **options})["embedding"]["values"]
    length = math.hypot(*vectors[0][:8])
    assert short == pytest.approx([value / length for value in vectors[0][:8]], rel=1e-3)
    titled = server.call("POST", f"{BASE}:embedContent", {**requests[0], "title": "On cats"})
    assert titled["embedding"]["values"] != vectors[0]


@pytest.mark.parametrize(
    ("path", "body", "code", "expected"),
    [
        ("models/nobody:embedContent", {"content": content("user", "x")}, 404, "not supported for embedContent"),
        (f"{BASE}:embedContent", {"content": {}}, 400, "EmbedContentRequest.content"),
        (f"{BASE}:embedContent", {"content": content("user", "x" * 3000)}, 400, "The input token count (3001)"),
        (
            f"{BASE}:embedContent",
            {"content": content("user", "x"), "outputDimensionality": 33},
            400,
            "EmbedContentRequest.output_dimensionality: must be between 1 and 32, the model's own, not 33",
        ),
        (
            f"{BASE}:batchEmbedContents",
            {"requests": [{"model": "models/other", "content": content("user", "x")}]},
            400,
            f"BatchEmbedContentsRequest.requests[0].model: must be {BASE}",
        ),
        (
            f"{BASE}:batchEmbedContents",
            {"requests": [{"content": content("user", "x")}] * 101},
            400,
            "BatchEmbedContentsRequest.requests: must be between 1 and 100 requests, not 101",
        ),
    ],
)
def test_bad_embeddings(server: Server, path: str, body: dict[str, Any], code: int, expected: str) -> None:
    assert expected in server.call("POST", path, body, code=code)["error"]["message"]


def test_tuned_models_do_not_embed(server: Server, chat: str) -> None:
    server.call("POST", f"{chat}:embedContent", {"content": content("user", "x")}, code=404)


@pytest.mark.parametrize("version", ["v1beta", "v1beta3"])
def test_generate_text(server: Server, chat: str, version: str) -> None:
    for model in (chat, BASE):
        body = {"prompt": {"text": "hello"}, "maxOutputTokens": 6, "candidateCount": 2, "temperature": 0.0}
        response = server.http.post(f"/{version}/{model}:generateText", json=body)
        assert response.status_code == 200, response.text
        outputs = [candidate["output"] for candidate in response.json()["candidates"]]
        new = {"contents": [content("user", "hello")], "generationConfig": {"maxOutputTokens": 6}}
        answer = server.call("POST", f"{model}:generateContent", new)
        assert outputs == [answer["candidates"][0]["content"]["parts"][0]["text"]] * 2  # greedy: both the same
    counted = server.call("POST", f"{BASE}:countTextTokens", {"prompt": {"text": "hello"}})
    assert counted["tokenCount"] == answer["usageMetadata"]["promptTokenCount"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"candidateCount": 9}, "* GenerateTextRequest.candidate_count: must be between 1 and 8, not 9"),
        ({"temperature": 3.0}, "* GenerateTextRequest.temperature: must be between 0 and 2, not 3"),
        ({"prompt": {}}, "GenerateTextRequest.prompt"),
    ],
)
def test_bad_generate_text(server: Server, fields: dict[str, Any], expected: str) -> None:
    body = {"prompt": {"text": "x"}, **fields}
    assert expected in server.call("POST", f"{BASE}:generateText", body, code=400)["error"]["message"]


def test_palm_clients_find_a_model_to_tune(server: Server) -> None:
    models = server.call("GET", "models?pageSize=1000")["models"]
    found = [one["name"] for one in models if "createTunedTextModel" in one["supportedGenerationMethods"]]
    assert found == ["models/text-bison-001"]
    assert all("embedContent" in one["supportedGenerationMethods"] for one in models)


PERSON = {
    "type": "OBJECT",
    "properties": {
        "name": {"type": "STRING", "maxLength": "5"},
        "age": {"type": "INTEGER", "minimum": 0, "maximum": 150},
        "tags": {"type": "ARRAY", "items": {"type": "STRING", "enum": ["a", "b"]}, "maxItems": "2"},
        "spouse": {"type": "BOOLEAN", "nullable": True},
    },
    "required": ["name", "age", "tags", "spouse"],
    "propertyOrdering": ["spouse", "age", "name", "tags"],
}
PERSON_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        "spouse": {"type": ["boolean", "null"]},
    },
    "required": ["name", "age", "tags", "spouse"],
    "additionalProperties": False,
}


def asked(server: Server, model: str, code: int = 200, **config: Any) -> dict[str, Any]:
    body = {"contents": [content("user", "hello")], "generationConfig": config}
    answer: dict[str, Any] = server.call("POST", f"{model}:generateContent", body, code=code)
    return answer


def texts(answer: dict[str, Any]) -> list[str]:
    return [one["content"]["parts"][0].get("text", "") for one in answer["candidates"]]


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_json_of_a_schema(server: Server, chat: str, tuned: bool, temperature: float) -> None:
    options = {"responseMimeType": "application/json", "candidateCount": 4, "temperature": temperature, "seed": 1}
    model = chat if tuned else BASE
    answer = asked(server, model, **options, responseSchema=PERSON)
    for text in texts(answer):
        jsonschema.validate(json.loads(text), PERSON_SCHEMA)
        assert list(json.loads(text)) == PERSON["propertyOrdering"]
    assert {one["finishReason"] for one in answer["candidates"]} == {"STOP"}
    answer = asked(server, model, **options, responseJsonSchema=PERSON_SCHEMA)
    for text in texts(answer):
        jsonschema.validate(json.loads(text), PERSON_SCHEMA)
        assert list(json.loads(text)) == PERSON_SCHEMA["required"]
    assert {one["finishReason"] for one in answer["candidates"]} == {"STOP"}


def test_a_stream_of_json_is_the_same_json(server: Server, chat: str) -> None:
    config = {"responseMimeType": "application/json", "responseSchema": PERSON, "responseLogprobs": True}
    body = {"contents": [content("user", "hello")], "generationConfig": config}
    whole = server.call("POST", f"{chat}:generateContent", body)
    chunks = server.call("POST", f"{chat}:streamGenerateContent", body)
    pieces = [chunk["candidates"][0] for chunk in chunks]
    assert "".join(texts({"candidates": pieces})) == texts(whole)[0]
    told = [one for piece in pieces for one in piece["logprobsResult"].get("chosenCandidates", [])]
    assert told == whole["candidates"][0]["logprobsResult"]["chosenCandidates"]
    assert len(told) == chunks[-1]["usageMetadata"]["candidatesTokenCount"]
    assert pieces[-1]["avgLogprobs"] == whole["candidates"][0]["avgLogprobs"]
    assert not any("avgLogprobs" in piece for piece in pieces[:-1])


def test_json_that_is_cut_stays_as_it_is(server: Server) -> None:
    answer = asked(
        server,
        BASE,
        responseMimeType="application/json",
        responseSchema=PERSON,
        maxOutputTokens=4,
        temperature=1.0,
    )
    (candidate,) = answer["candidates"]
    assert candidate["finishReason"] == "MAX_TOKENS"
    assert answer["usageMetadata"]["candidatesTokenCount"] == 4
    assert texts(answer)[0].startswith("{")
    with pytest.raises(json.JSONDecodeError):
        json.loads(texts(answer)[0])


def test_numbers_come_to_an_end(server: Server, chat: str) -> None:
    schema = {"type": "array", "items": {"type": ["number", "null"]}, "minItems": 3, "maxItems": 3}
    config = {
        "responseMimeType": "application/json",
        "frequencyPenalty": -2,
        "candidateCount": 4,
        "temperature": 1.5,
    }
    answer = asked(server, chat, **config, responseJsonSchema=schema)
    assert {one["finishReason"] for one in answer["candidates"]} == {"STOP"}
    for text in texts(answer):
        jsonschema.validate(json.loads(text), schema)
    whole = asked(server, chat, **config, responseSchema={"type": "NUMBER"})
    assert all(abs(json.loads(text)) < 2**53 for text in texts(whole))


def test_json_without_a_schema_is_any_json(server: Server) -> None:
    answer = asked(
        server, BASE, responseMimeType="application/json", candidateCount=8, temperature=2.0, stopSequences=["}"]
    )
    assert all(text == "" or text[0] in '{["-0123456789tfn' for text in texts(answer))


@pytest.mark.parametrize("tuned", [False, True])
def test_one_of_some_texts(server: Server, chat: str, tuned: bool) -> None:
    schema = {"type": "STRING", "enum": ["yes", "no", "no idea"]}
    options = {"candidateCount": 8, "temperature": 2.0, "responseSchema": schema}
    answer = asked(server, chat if tuned else BASE, responseMimeType="text/x.enum", **options)
    assert set(texts(answer)) <= set(schema["enum"])
    assert {one["finishReason"] for one in answer["candidates"]} == {"STOP"}
    quoted = asked(server, BASE, responseMimeType="application/json", **options)
    assert {json.loads(text) for text in texts(quoted)} <= set(schema["enum"])


def test_logprobs(server: Server, chat: str) -> None:
    answer = asked(server, chat, responseLogprobs=True, logprobs=3, maxOutputTokens=6)
    (candidate,) = answer["candidates"]
    result = candidate["logprobsResult"]
    count = answer["usageMetadata"]["candidatesTokenCount"]
    assert len(result["chosenCandidates"]) == len(result["topCandidates"]) == count
    for chosen, top in zip(result["chosenCandidates"], result["topCandidates"], strict=True):
        told = [one["logProbability"] for one in top["candidates"]]
        assert told == sorted(told, reverse=True)
        assert len(told) == 3
        assert chosen == top["candidates"][0]  # greedy
    tokens = "".join(one["token"] for one in result["chosenCandidates"])
    assert tokens.removeprefix(" ") == texts(answer)[0]
    total = sum(one["logProbability"] for one in result["chosenCandidates"])
    assert result["logProbabilitySum"] == pytest.approx(total, rel=1e-5)
    assert candidate["avgLogprobs"] == pytest.approx(total / count, rel=1e-5)
    only = asked(server, chat, responseLogprobs=True, maxOutputTokens=6)["candidates"][0]
    assert "topCandidates" not in only["logprobsResult"]
    assert "logprobsResult" not in asked(server, chat, maxOutputTokens=6)["candidates"][0]


def test_penalties_change_what_comes(server: Server) -> None:
    plain = asked(server, BASE, maxOutputTokens=80)
    assert texts(asked(server, BASE, maxOutputTokens=80, frequencyPenalty=0, presencePenalty=0)) == texts(plain)
    rewarded = asked(server, BASE, maxOutputTokens=80, frequencyPenalty=-2, responseLogprobs=True)["candidates"][0]
    tokens = [one["tokenId"] for one in rewarded["logprobsResult"]["chosenCandidates"]]
    assert len(set(tokens[-20:])) == 1  # each time it is worth more
    punished = asked(server, BASE, maxOutputTokens=80, frequencyPenalty=2, presencePenalty=2)
    assert texts(punished) != texts(plain)


CONFIG = "GenerateContentRequest.generation_config"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"responseMimeType": "text/html"},
            ".response_mime_type: must be text/plain, application/json or text/x.enum",
        ),
        ({"responseSchema": PERSON}, ".response_mime_type: must be application/json or text/x.enum with a schema"),
        (
            {
                "responseMimeType": "application/json",
                "responseSchema": PERSON,
                "responseJsonSchema": PERSON_SCHEMA,
            },
            ".response_json_schema: give response_schema or response_json_schema, not both",
        ),
        (
            {"responseMimeType": "application/json", "responseJsonSchema": {"type": "person"}},
            ".response_json_schema: cannot be used: Invalid type: person",
        ),
        (
            {"responseMimeType": "application/json", "responseJsonSchema": [1]},
            ".response_json_schema: must be an object",
        ),
        (
            {"responseMimeType": "application/json", "responseSchema": {**PERSON, "required": ["nome"]}},
            ".response_schema.required[0]: there is no property 'nome'",
        ),
        (
            {
                "responseMimeType": "application/json",
                "responseSchema": {"type": "ARRAY", "items": {"type": "INTEGER", "enum": ["one"]}},
            },
            ".response_schema.items.enum: must be numbers, as the type is INTEGER",
        ),
        ({"responseMimeType": "text/x.enum"}, ".response_schema: must have an enum of texts"),
        (
            {"responseMimeType": "text/x.enum", "responseSchema": PERSON},
            ".response_schema: must have an enum of texts",
        ),
        ({"logprobs": 2}, ".response_logprobs: must be true when logprobs is set"),
        ({"responseLogprobs": True, "logprobs": 21}, ".logprobs: must be between 0 and 20, not 21"),
        ({"presencePenalty": 2.5}, ".presence_penalty: must be between -2 and 2, not 2.5"),
        ({"frequencyPenalty": -3}, ".frequency_penalty: must be between -2 and 2, not -3"),
        ({"responseModalities": ["IMAGE"]}, ".response_modalities: must be TEXT"),
        ({"stopSequences": list("abcdef")}, ".stop_sequences: must be at most 5 texts"),
    ],
)
def test_bad_generation_config(server: Server, config: dict[str, Any], expected: str) -> None:
    error = asked(server, BASE, code=400, **config)["error"]
    assert error["status"] == "INVALID_ARGUMENT"
    assert error["message"].startswith(f"* {CONFIG}{expected}")
    violations = error["details"][0]["fieldViolations"]
    assert violations[0]["field"] == error["message"][2:].partition(": ")[0]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"tools": [{"functionDeclarations": [{"name": "f", "description": "d"}]}]}, "tools"),
        ({"toolConfig": {"functionCallingConfig": {"mode": "ANY"}}}, "tool_config"),
        (
            {"contents": [{"parts": [{"text": "x"}, {"functionCall": {"name": "f"}}]}]},
            "contents[0].parts[1].function_call",
        ),
        (
            {"contents": [{"parts": [{"functionResponse": {"name": "f", "response": {"a": 1}}}]}]},
            "contents[0].parts[0].function_response",
        ),
        (
            {"systemInstruction": {"parts": [{"inlineData": {"mimeType": "image/png", "data": "AA=="}}]}},
            "system_instruction.parts[0].inline_data",
        ),
    ],
)
def test_what_the_models_cannot_do_is_refused_by_name(server: Server, body: dict[str, Any], field: str) -> None:
    asked_for = {"contents": [content("user", "x")], **body}
    error = server.call("POST", f"{BASE}:generateContent", asked_for, code=400)["error"]
    assert error["status"] == "INVALID_ARGUMENT"
    assert error["message"].startswith(f"* GenerateContentRequest.{field}: these models ")
