from typing import Any

import pytest

from tunesmith import protos
from tunesmith.api.http_rules import VERSIONS, all_rules
from tunesmith.api.transcoding import Match, Router, to_message
from tunesmith.errors import InvalidArgument, NotFound

ROUTER = Router()


def rpc_at(http_method: str, path: str) -> tuple[str, dict[str, str]]:
    match = ROUTER.match(http_method, path)
    return match.rule.rpc.name, dict(match.variables)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("http_method", "path", "rpc", "variables"),
    [
        ("GET", "tunedModels", "ListTunedModels", {}),
        ("HEAD", "tunedModels", "ListTunedModels", {}),
        ("POST", "tunedModels", "CreateTunedModel", {}),
        ("GET", "tunedModels/x-1", "GetTunedModel", {"name": "tunedModels/x-1"}),
        ("PATCH", "tunedModels/x", "UpdateTunedModel", {"tuned_model.name": "tunedModels/x"}),
        ("DELETE", "tunedModels/x", "DeleteTunedModel", {"name": "tunedModels/x"}),
        ("GET", "models", "ListModels", {}),
        ("GET", "models/a", "GetModel", {"name": "models/a"}),
        ("POST", "models/a:generateContent", "GenerateContent", {"model": "models/a"}),
        ("POST", "tunedModels/a:generateContent", "GenerateContent", {"model": "tunedModels/a"}),
        ("POST", "tunedModels/a:streamGenerateContent", "StreamGenerateContent", {"model": "tunedModels/a"}),
        ("POST", "models/a:countTokens", "CountTokens", {"model": "models/a"}),
        ("POST", "tunedModels/a:countTokens", "CountTokens", {"model": "tunedModels/a"}),
        ("POST", "tunedModels/a:generateText", "GenerateText", {"model": "tunedModels/a"}),
        ("POST", "tunedModels/a:transferOwnership", "TransferOwnership", {"name": "tunedModels/a"}),
        ("GET", "tunedModels/a/permissions", "ListPermissions", {"parent": "tunedModels/a"}),
        ("POST", "tunedModels/a/permissions", "CreatePermission", {"parent": "tunedModels/a"}),
        (
            "PATCH",
            "tunedModels/a/permissions/b",
            "UpdatePermission",
            {"permission.name": "tunedModels/a/permissions/b"},
        ),
        ("GET", "tunedModels/a/operations/b", "GetOperation", {"name": "tunedModels/a/operations/b"}),
        ("DELETE", "tunedModels/a/operations/b", "DeleteOperation", {"name": "tunedModels/a/operations/b"}),
        ("POST", "tunedModels/a/operations/b:cancel", "CancelOperation", {"name": "tunedModels/a/operations/b"}),
        ("GET", "tunedModels/a/operations", "ListOperations", {"name": "tunedModels/a"}),
        # litellm's spelling
        ("POST", "models/tunedModels/a:generateContent", "GenerateContent", {"model": "tunedModels/a"}),
        ("POST", "models/tunedModels/a:countTokens", "CountTokens", {"model": "tunedModels/a"}),
        # percent-encoding
        ("GET", "tunedModels/%78%2Fy%20z", "GetTunedModel", {"name": "tunedModels/x%2Fy z"}),
        ("POST", "tunedModels/a%3AgenerateContent", "GenerateContent", {"model": "tunedModels/a"}),
        ("GET", "tunedModels/%E5%85%AD", "GetTunedModel", {"name": "tunedModels/六"}),
    ],
)
def test_finds_the_rpc(version: str, http_method: str, path: str, rpc: str, variables: dict[str, str]):
    assert rpc_at(http_method, f"/{version}/{path}") == (rpc, variables)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1beta",
        "/v1beta/",
        "/v1beta2/tunedModels",
        "/v2/tunedModels",
        "/tunedModels",
        "/v1beta/tunedModels/",
        "/v1beta/tunedModels/a/",
        "/v1beta/tunedModels/a/b",
        "/v1beta/tunedModels/a:flyToTheMoon",
        "/v1beta/tunedModels/:generateContent",
        "/v1beta/operations/a",
        "/v1beta//tunedModels",
        "/v1beta/TunedModels",
    ],
)
@pytest.mark.parametrize("http_method", ["GET", "POST"])
def test_an_unknown_path_is_not_found(http_method: str, path: str):
    with pytest.raises(NotFound, match="There is nothing at"):
        ROUTER.match(http_method, path)
    assert ROUTER.methods(path) == []


def test_a_known_path_says_which_methods_it_takes():
    with pytest.raises(NotFound, match=r"POST is not served at /v1/tunedModels/a; .* DELETE, GET, PATCH"):
        ROUTER.match("POST", "/v1/tunedModels/a")
    assert ROUTER.methods("/v1beta/tunedModels/a") == ["DELETE", "GET", "PATCH"]


def test_every_rule_of_the_descriptors_is_reachable():
    rules = list(all_rules())
    assert len(rules) > 70
    for rule in rules:
        path = "/".join("id" if segment == "*" else segment for segment in rule.segments)
        verb = f":{rule.verb}" if rule.verb else ""
        found = ROUTER.match(rule.http_method, f"/v1beta/{path}{verb}").rule
        assert found.rpc.full_name == rule.rpc.full_name
        message = to_message(Match(found, tuple((name, "x") for name, _, _ in found.variables)), {}, b"")
        assert type(message).DESCRIPTOR.full_name == rule.rpc.input_type.full_name


def message_of(http_method: str, path: str, query: Any = None, body: bytes = b"") -> Any:
    return to_message(ROUTER.match(http_method, path), query or {}, body)


def test_path_body_and_query_meet_in_the_message(tutorial_body: str):
    request = message_of("POST", "/v1beta/tunedModels", {"tunedModelId": ["numbers"]}, tutorial_body.encode())
    assert request.tuned_model_id == "numbers"
    assert request.tuned_model.display_name == "number generator model"
    assert request.tuned_model.base_model == "models/gemini-1.0-pro-001"
    task = request.tuned_model.tuning_task
    assert (task.hyperparameters.batch_size, task.hyperparameters.epoch_count) == (2, 5)
    assert task.hyperparameters.learning_rate == pytest.approx(0.001)
    examples = task.training_data.examples.examples
    assert len(examples) == 15
    assert (examples[8].text_input, examples[8].output) == ("1,000", "1,001")


def test_the_path_wins_over_the_body_and_the_query():
    request = message_of(
        "PATCH", "/v1/tunedModels/a", {"updateMask": ["description"]}, b'{"name": "tunedModels/b"}'
    )
    assert request.tuned_model.name == "tunedModels/a"
    assert list(request.update_mask.paths) == ["description"]
    assert message_of("GET", "/v1/tunedModels/a", {"name": ["tunedModels/b"]}).name == "tunedModels/a"
    request = message_of("POST", "/v1/tunedModels/a:generateContent", {}, b'{"model": "models/b"}')
    assert request.model == "tunedModels/a"


def test_a_body_where_none_belongs_is_ignored():
    assert message_of("DELETE", "/v1/tunedModels/a", body=b"not { json") == protos.DeleteTunedModelRequest(
        name="tunedModels/a"
    )


def test_an_empty_body_is_an_empty_message():
    assert message_of("POST", "/v1/tunedModels/a/operations/b:cancel").name == "tunedModels/a/operations/b"
    assert message_of("POST", "/v1/tunedModels").HasField("tuned_model")


def test_all_of_query_and_body_is_told_at_once():
    with pytest.raises(InvalidArgument) as raised:
        message_of("POST", "/v1/tunedModels", {"foo": ["1"]}, b'{"bar": 1, "topK": "x"}')
    assert raised.value.message.split("\n") == [
        'Invalid JSON payload received. Unknown name "foo": Cannot bind query parameter.'
        " Field 'foo' could not be found in request message.",
        "Invalid JSON payload received. Unknown name \"bar\" at 'tuned_model': Cannot find field.",
        "Invalid value at 'tuned_model.top_k' (TYPE_INT32), \"x\"",
    ]
