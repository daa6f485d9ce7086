"""Bad input gets the reference's error body and changes nothing."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from servers import EXAMPLES, Server, job

REQUEST = "CreateTunedModelRequest.tuned_model"
HYPERPARAMETERS = f"{REQUEST}.tuning_task.hyperparameters"
ROWS = f"{REQUEST}.tuning_task.training_data.examples.examples"

Change = Callable[[dict[str, Any]], object]


def put(path: str, value: Any) -> Change:
    """A change of the body: set the value at a dotted path."""

    def change(body: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            body = body[name]
        body[last] = value

    return change


def hyper(field: str, value: Any) -> Change:
    return put(f"tuning_task.hyperparameters.{field}", value)


def row(number: int, **fields: Any) -> Change:
    def change(body: dict[str, Any]) -> None:
        body["tuning_task"]["training_data"]["examples"]["examples"][number] = {**EXAMPLES[number], **fields}

    return change


def without(path: str) -> Change:
    def change(body: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            body = body[name]
        del body[last]

    return change


INVALID = "INVALID_ARGUMENT"
BAD: dict[str, tuple[Change, int, str, str]] = {
    "unknown field": (
        put("tuning_task.colour", "red"),
        400,
        INVALID,
        "Invalid JSON payload received. Unknown name \"colour\" at 'tuned_model.tuning_task': Cannot find field.",
    ),
    "wrong type": (
        hyper("batch_size", "abc"),
        400,
        INVALID,
        "Invalid value at 'tuned_model.tuning_task.hyperparameters.batch_size' (TYPE_INT32), \"abc\"",
    ),
    "bad enum": (
        put("state", "SLEEPING"),
        400,
        INVALID,
        "Invalid value at 'tuned_model.state' "
        '(type.googleapis.com/google.ai.generativelanguage.v1beta.TunedModel.State), "SLEEPING"',
    ),
    "both sources": (
        put("tunedModelSource", {"tunedModel": "tunedModels/x"}),
        400,
        INVALID,
        "oneof field 'source_model' is already set. Cannot set 'tunedModelSource'",
    ),
    "no source": (without("base_model"), 400, INVALID, f"* {REQUEST}.base_model: base_model is not specified"),
    "no tuning task": (without("tuning_task"), 400, INVALID, "tuning_task"),
    "no examples": (
        put("tuning_task.training_data.examples.examples", []),
        400,
        INVALID,
        f"* {REQUEST}.tuning_task.training_data: no examples were received. google-genai 1.47.0",
    ),
    "no training data": (without("tuning_task.training_data"), 400, INVALID, "use 1.46.0"),
    "empty output": (row(3, output=""), 400, INVALID, f"* {ROWS}[3].output: output is empty"),
    "no output": (row(3, output=None), 400, INVALID, f"* {ROWS}[3].output: output is empty"),
    "empty input": (row(9, text_input=""), 400, INVALID, f"* {ROWS}[9].text_input: text_input is empty"),
    "long output": (
        row(0, output="x" * 5_001),
        400,
        INVALID,
        f"* {ROWS}[0].output: must be at most 5,000 characters long, not 5,001",
    ),
    "long input": (
        row(1, text_input="x" * 40_001),
        400,
        INVALID,
        f"* {ROWS}[1].text_input: must be at most 40,000 characters long, not 40,001",
    ),
    "zero epochs": (hyper("epoch_count", 0), 400, INVALID, f"* {HYPERPARAMETERS}.epoch_count: must be between"),
    "negative epochs": (hyper("epoch_count", -3), 400, INVALID, f"* {HYPERPARAMETERS}.epoch_count: must be"),
    "batch size 0": (hyper("batch_size", 0), 400, INVALID, f"* {HYPERPARAMETERS}.batch_size: must be between"),
    "int32 overflow": (hyper("batch_size", 1 << 40), 400, INVALID, "(TYPE_INT32), 1099511627776"),
    "NaN": (hyper("learning_rate", "NaN"), 400, INVALID, f"* {HYPERPARAMETERS}.learning_rate: must be a number"),
    "both rates": (
        hyper("learning_rate_multiplier", 2.0),
        400,
        INVALID,
        "oneof field 'learning_rate_option' is already set. Cannot set 'learning_rate_multiplier'",
    ),
    "long display name": (
        put("display_name", "n" * 41),
        400,
        INVALID,
        f"* {REQUEST}.display_name: must be at most 40 characters long, not 41",
    ),
    "temperature": (put("temperature", 2.5), 400, INVALID, f"* {REQUEST}.temperature: must be between 0 and 2"),
    "unknown base": (
        put("base_model", "models/nobody"),
        404,
        "NOT_FOUND",
        "models/nobody is not found for CREATE TUNED MODEL at API version v1beta.",
    ),
    "unknown parent": (
        put("base_model", "tunedModels/x"),
        403,
        "PERMISSION_DENIED",
        "You do not have permission to access tuned model tunedModels/x.",
    ),
    "bad parent": (
        put("base_model", "tunedModels/x/y"),
        400,
        INVALID,
        f"* {REQUEST}.tuned_model_source.tuned_model: must look like tunedModels/{{id}}, not 'tunedModels/x/y'",
    ),
}


@pytest.fixture(autouse=True)
def nothing_changes(server: Server) -> Any:
    before = server.call("GET", "tunedModels?pageSize=1000")
    yield
    assert server.call("GET", "tunedModels?pageSize=1000") == before


def refused(server: Server, code: int, status: str, **request: Any) -> str:
    """Make a create that must be refused; check the body's form and return its message."""
    request = {"method": "POST", "url": "/v1beta/tunedModels", **request}
    response = server.http.request(**request)
    assert response.status_code == code, response.text
    assert response.headers["content-type"] == "application/json; charset=UTF-8"
    error = response.json()["error"]
    assert (error["code"], error["status"]) == (code, status)
    message: str = error["message"]
    return message


@pytest.mark.parametrize("case", BAD)
def test_bad_create(server: Server, case: str) -> None:
    change, code, status, expected = BAD[case]
    body = copy.deepcopy(job())
    change(body)
    assert expected in refused(server, code, status, json=body)


def test_all_bad_rows_are_named_at_once(server: Server) -> None:
    body = copy.deepcopy(job())
    for change in (row(1, output=""), row(4, text_input=""), row(7, output="x" * 6000), hyper("epoch_count", 0)):
        change(body)
    response = server.http.post("/v1beta/tunedModels", json=body).json()["error"]
    violations = response["details"][0]["fieldViolations"]
    assert [violation["field"] for violation in violations] == [
        f"{HYPERPARAMETERS}.epoch_count",
        f"{ROWS}[1].output",
        f"{ROWS}[4].text_input",
        f"{ROWS}[7].output",
    ]
    assert [line.split(":")[0] for line in response["message"].splitlines()] == [
        f"* {violation['field']}" for violation in violations
    ]


def test_the_first_fifty_of_many_bad_rows(server: Server) -> None:
    body = job()
    body["tuning_task"]["training_data"]["examples"]["examples"] = [{"text_input": "x"}] * 70
    message = refused(server, 400, INVALID, json=body)
    assert len(message.splitlines()) == 51
    assert message.endswith("… and 20 more of them")


@pytest.mark.parametrize("model_id", ["1abc", "Abc", "a_b", "a" * 41, "abc-", "ü"])
def test_bad_id(server: Server, model_id: str) -> None:
    message = refused(server, 400, INVALID, json=job(), params={"tunedModelId": model_id})
    assert message.startswith("* CreateTunedModelRequest.tuned_model_id: must be at most 40 of a-z")


def test_taken_id(server: Server) -> None:
    server.finished(server.tune(job(), tunedModelId="taken"))
    before = server.call("GET", "tunedModels/taken")
    message = refused(server, 409, "ALREADY_EXISTS", json=job("other"), params={"tunedModelId": "taken"})
    assert message == "Tuned model tunedModels/taken already exists."
    assert server.call("GET", "tunedModels/taken") == before
    server.call("DELETE", "tunedModels/taken")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"display_name": ', "Invalid JSON payload received."),
        (b"[1, 2]", "Invalid JSON payload received."),
        (b'{"display_name": "\xff\xfe"}', "Invalid JSON payload received."),
        (b"[" * 100_000, "Invalid JSON payload received."),
        (
            json.dumps({"description": "x" * 10_000_000}).encode(),
            "Request payload size exceeds the limit: 8388608",
        ),
    ],
    ids=["cut off", "an array", "not UTF-8", "deep", "10 MB"],
)
def test_bad_bytes(server: Server, content: bytes, expected: str) -> None:
    assert refused(server, 400, INVALID, content=content).startswith(expected)


def test_no_credentials(server: Server) -> None:
    without_token = {"authorization": ""}
    message = refused(server, 403, "PERMISSION_DENIED", json=job(), headers=without_token)
    assert message.startswith("Method doesn't allow unregistered callers")


@pytest.mark.parametrize("token", ["tst.wrong", "ya29.a0", "x" * 5000])
def test_a_bad_token(server: Server, token: str) -> None:
    headers = {"authorization": f"Bearer {token}"}
    message = refused(server, 401, "UNAUTHENTICATED", json=job(), headers=headers)
    assert message.startswith("Request had invalid authentication credentials.")


def test_a_bad_key(server: Server) -> None:
    headers = {"authorization": "", "x-goog-api-key": "tsk_wrong"}
    assert refused(server, 400, INVALID, json=job(), headers=headers) == (
        "API key not valid. Please pass a valid API key."
    )


def test_an_rpc_that_does_not_exist_yet_names_itself(server: Server) -> None:
    message = refused(server, 501, "UNIMPLEMENTED", method="GET", url="/v1beta/files")
    assert "google.ai.generativelanguage.v1beta.FileService.ListFiles" in message
    message = refused(server, 501, "UNIMPLEMENTED", url="/v1beta/models/tiny-gemma3:embedText", json={})
    assert "TextService.EmbedText" in message
