from typing import Any

import pytest

from tunesmith import protos
from tunesmith.api.validation import Validator, without_input_only
from tunesmith.errors import InvalidArgument

PREFIX = "google.ai.generativelanguage.v1beta."


def validator(rpc: str) -> Validator:
    service, _, method = rpc.partition(".")
    return Validator(protos.SERVICES[PREFIX + service].methods_by_name[method])


def missing(rpc: str, request: Any) -> list[str]:
    with pytest.raises(InvalidArgument) as raised:
        validator(rpc).check(request)
    violations = raised.value.details[0].field_violations
    lines = [f"* {violation.field}: {violation.description}" for violation in violations]
    assert raised.value.message == "\n".join(lines)
    return lines


def permission(**fields: Any) -> Any:
    return protos.CreatePermissionRequest(parent="tunedModels/x", permission=protos.Permission(**fields))


@pytest.mark.parametrize(
    ("rpc", "request_", "lines"),
    [
        (
            "GenerativeService.GenerateContent",
            protos.GenerateContentRequest(model="models/a"),
            ["* GenerateContentRequest.contents: contents is not specified"],
        ),
        (
            "GenerativeService.StreamGenerateContent",
            protos.GenerateContentRequest(),
            [
                "* GenerateContentRequest.model: model is not specified",
                "* GenerateContentRequest.contents: contents is not specified",
            ],
        ),
        (
            "ModelService.CreateTunedModel",
            protos.CreateTunedModelRequest(),
            ["* CreateTunedModelRequest.tuned_model: tuned_model is not specified"],
        ),
        (
            "PermissionService.CreatePermission",
            permission(),
            ["* CreatePermissionRequest.permission.role: role is not specified"],
        ),
        (
            "PermissionService.UpdatePermission",
            protos.UpdatePermissionRequest(permission=protos.Permission(name="a")),
            ["* UpdatePermissionRequest.update_mask: update_mask is not specified"],
        ),
        (
            "PermissionService.TransferOwnership",
            protos.TransferOwnershipRequest(name="tunedModels/x"),
            ["* TransferOwnershipRequest.email_address: email_address is not specified"],
        ),
    ],
)
def test_names_the_required_fields_that_are_missing(rpc: str, request_: Any, lines: list[str]):
    assert missing(rpc, request_) == lines


@pytest.mark.parametrize(
    ("rpc", "request_"),
    [
        ("PermissionService.CreatePermission", permission(role=3)),
        # services/models.py says what is wrong with the training data
        (
            "ModelService.CreateTunedModel",
            protos.CreateTunedModelRequest(tuned_model=protos.TunedModel(base_model="models/a")),
        ),
        # an update brings a part of the resource, and needs no mask
        (
            "ModelService.UpdateTunedModel",
            protos.UpdateTunedModelRequest(tuned_model=protos.TunedModel(name="tunedModels/x")),
        ),
        ("ModelService.ListTunedModels", protos.ListTunedModelsRequest()),
        ("GenerativeService.CountTokens", protos.CountTokensRequest(model="models/a")),
    ],
)
def test_takes_what_google_takes(rpc: str, request_: Any):
    validator(rpc).check(request_)


def test_looks_into_messages_lists_and_maps():
    request = protos.GenerateContentRequest(model="models/a")
    parts = request.contents.add().parts
    parts.add(text="hi")
    parts.add().function_call.SetInParent()
    request.safety_settings.add(category=7)
    # What Google takes without a type and a description:
    request.tools.add().function_declarations.add(name="f").parameters.properties["a"].SetInParent()
    assert missing("GenerativeService.GenerateContent", request) == [
        "* GenerateContentRequest.contents[0].parts[1].function_call.name: name is not specified",
        "* GenerateContentRequest.safety_settings[0].threshold: threshold is not specified",
    ]


def test_names_no_more_than_fifty():
    request = protos.GenerateContentRequest(model="models/a")
    for _ in range(200):
        request.contents.add().parts.add().function_call.SetInParent()
    assert len(missing("GenerativeService.GenerateContent", request)) == 50


def test_training_rows_are_left_to_the_service():
    request = protos.CreateTunedModelRequest()
    request.tuned_model.tuning_task.training_data.examples.examples.add(text_input="1")
    validator("ModelService.CreateTunedModel").check(request)


def whole_model() -> Any:
    model = protos.TunedModel(name="tunedModels/x", state=2, description="d", temperature=0.0)
    model.create_time.seconds = 1
    model.tuning_task.snapshots.add(step=1)
    model.tuning_task.hyperparameters.epoch_count = 3
    model.tuning_task.training_data.examples.examples.add(text_input="1", output="2")
    return model


def test_clears_what_only_the_server_may_say():
    request = protos.CreateTunedModelRequest(tuned_model=whole_model())
    request.tuned_model.tuned_model_source.tuned_model = "tunedModels/y"
    request.tuned_model.tuned_model_source.base_model = "models/z"
    validator("ModelService.CreateTunedModel").check(request)
    kept = protos.TunedModel(description="d", temperature=0.0)
    kept.tuned_model_source.tuned_model = "tunedModels/y"
    kept.tuning_task.hyperparameters.epoch_count = 3
    kept.tuning_task.training_data.examples.examples.add(text_input="1", output="2")
    assert request.tuned_model == kept


def test_an_update_keeps_the_name_that_its_path_gave():
    request = protos.UpdateTunedModelRequest(tuned_model=whole_model())
    validator("ModelService.UpdateTunedModel").check(request)
    assert request.tuned_model.name == "tunedModels/x"
    assert request.tuned_model.state == 0
    update = protos.UpdatePermissionRequest(permission=protos.Permission(name="a/b", role=2))
    update.update_mask.paths.append("role")
    validator("PermissionService.UpdatePermission").check(update)
    assert update.permission.name == "a/b"


def test_responses_never_carry_training_data():
    model = whole_model()
    answer: Any = without_input_only(model)
    assert not answer.tuning_task.HasField("training_data")
    assert answer.tuning_task.snapshots[0].step == 1
    assert model == whole_model(), "the service's own message was changed"
    listed: Any = without_input_only(protos.ListTunedModelsResponse(tuned_models=[model, model]))
    assert [item.tuning_task.HasField("training_data") for item in listed.tuned_models] == [False, False]
    operation = protos.Operation(name="a", done=True)
    operation.response.Pack(model)
    operation.metadata.Pack(protos.CreateTunedModelMetadata(total_steps=3))
    stripped: Any = without_input_only(operation)
    inside = protos.TunedModel()
    assert stripped.response.Unpack(inside)
    assert inside == answer
    assert stripped.metadata == operation.metadata


def test_a_response_without_such_fields_is_passed_on_as_it_is():
    response = protos.CountTokensResponse(total_tokens=1)
    assert without_input_only(response) is response
