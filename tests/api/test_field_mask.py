import pytest

from tunesmith import protos
from tunesmith.api.field_mask import FieldMask, field_mask
from tunesmith.errors import InvalidArgument

LIST = protos.ListTunedModelsResponse.DESCRIPTOR


def response() -> protos.ListTunedModelsResponse:
    message = protos.ListTunedModelsResponse(next_page_token="t")
    for name in ("a", "b"):
        model = message.tuned_models.add(name=name, description="d", reader_project_numbers=[1, 2])
        model.create_time.seconds = 5
        model.tuning_task.hyperparameters.epoch_count = 3
        for step in (1, 2):
            model.tuning_task.snapshots.add(step=step, epoch=1)
    return message


def kept(text: str) -> str:
    """What is kept of the response, on one line."""
    return " ".join(str(FieldMask.parse(text, LIST).apply(response())).split())


def both(first: str, second: str | None = None) -> str:
    return f"tuned_models {{ {first} }} tuned_models {{ {second or first} }}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nextPageToken", 'next_page_token: "t"'),
        ("next_page_token", 'next_page_token: "t"'),
        ("tunedModels/name", both('name: "a"', 'name: "b"')),
        ("tunedModels.name", both('name: "a"', 'name: "b"')),
        ("tunedModels(name)", both('name: "a"', 'name: "b"')),
        (" tunedModels ( name , description ) ", both('name: "a" description: "d"', 'name: "b" description: "d"')),
        (
            "tunedModels/name,tunedModels/createTime",
            both('name: "a" create_time { seconds: 5 }', 'name: "b" create_time { seconds: 5 }'),
        ),
        ("tunedModels/tuningTask/hyperparameters", both("tuning_task { hyperparameters { epoch_count: 3 } }")),
        (
            "tunedModels/tuningTask(snapshots(step))",
            both("tuning_task { snapshots { step: 1 } snapshots { step: 2 } }"),
        ),
        ("tunedModels/*/hyperparameters", both("tuning_task { hyperparameters { epoch_count: 3 } }")),
        ("*/name", both('name: "a"', 'name: "b"')),
        (
            "tunedModels(name,*/hyperparameters/epochCount)",
            both(
                'name: "a" tuning_task { hyperparameters { epoch_count: 3 } }',
                'name: "b" tuning_task { hyperparameters { epoch_count: 3 } }',
            ),
        ),
        ("tunedModels/readerProjectNumbers", both("reader_project_numbers: 1 reader_project_numbers: 2")),
        ("tunedModels/topK", "tuned_models { } tuned_models { }"),
    ],
)
def test_keeps_what_is_named(text: str, expected: str):
    assert kept(text) == expected


@pytest.mark.parametrize("text", ["*", "tunedModels,nextPageToken", "tunedModels,tunedModels/name,nextPageToken"])
def test_keeps_everything(text: str):
    assert FieldMask.parse(text, LIST).apply(response()) == response()


def test_leaves_the_message_alone():
    message = response()
    field_mask("nextPageToken", LIST).apply(message)
    assert message == response()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("foo", "foo"),
        ("tunedModels/foo", "tunedModels/foo"),
        ("tunedModels(name,foo)", "tunedModels/foo"),
        ("tunedModels/*/foo", "tunedModels/*/foo"),
        ("nextPageToken/x", "nextPageToken/x"),
        ("nextPageToken/*", "nextPageToken/*"),
        ("tunedModels/createTime/seconds", "tunedModels/createTime/seconds"),
        ("tunedModels(name", "tunedModels(name"),
        ("tunedModels)", "tunedModels)"),
        ("tunedModels()", "tunedModels()"),
        ("a,,b", "a,,b"),
        ("/a", "/a"),
        ("a b", "a b"),
        ("name;drop", "name;drop"),
        ("(" * 5, "((((("),
        ("a(" * 40 + "a" + ")" * 40, "a(" * 40 + "a" + ")" * 40),
    ],
)
def test_refuses_with_googles_words(text: str, named: str):
    with pytest.raises(InvalidArgument) as refusal:
        FieldMask.parse(text, LIST)
    assert refusal.value.message == f"Invalid field selection {named}"
    assert refusal.value.details[0].field_violations[0].field == named


def test_refuses_what_is_too_long():
    with pytest.raises(InvalidArgument, match="longer than"):
        FieldMask.parse("a," * 3000 + "a", LIST)


def test_through_any():
    operation = protos.Operation(name="o", done=True)
    operation.response.Pack(protos.TunedModel(name="x", description="y"))
    operation.metadata.Pack(protos.CreateTunedModelMetadata(total_steps=3, tuned_model="x"))
    mask = FieldMask.parse("response(name,noSuchField),metadata/totalSteps", protos.Operation.DESCRIPTOR)
    kept = mask.apply(operation)
    model, metadata = protos.TunedModel(), protos.CreateTunedModelMetadata()
    assert kept.response.Unpack(model)
    assert kept.metadata.Unpack(metadata)
    assert (kept.name, kept.done) == ("", False)
    assert model == protos.TunedModel(name="x")
    assert metadata == protos.CreateTunedModelMetadata(total_steps=3)


def test_through_structs_and_maps():
    request = protos.GenerateContentRequest()
    call = request.contents.add().parts.add().function_call
    call.name = "f"
    call.args.update({"a": {"b": 1, "c": [{"d": 2, "e": 3}]}, "x": 4})
    mask = FieldMask.parse("contents/parts/functionCall/args/a/c/d", protos.GenerateContentRequest.DESCRIPTOR)
    kept = mask.apply(request).contents[0].parts[0].function_call
    assert kept.name == ""
    assert dict(kept.args["a"]) == {"c": kept.args["a"]["c"]}
    assert dict(kept.args["a"]["c"][0]) == {"d": 2}
    info = protos.ErrorInfo(reason="r", metadata={"service": "s", "method": "m"})
    kept_info = FieldMask.parse("metadata/service", protos.ErrorInfo.DESCRIPTOR).apply(info)
    assert kept_info == protos.ErrorInfo(metadata={"service": "s"})
