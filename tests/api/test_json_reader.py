from typing import Any

import pytest

from tunesmith import protos
from tunesmith.api.json_reader import MessageReader
from tunesmith.errors import InvalidArgument

V1BETA = "type.googleapis.com/google.ai.generativelanguage.v1beta"


def read(message: Any, value: Any, field: str = "*") -> Any:
    reader = MessageReader(message)
    reader.read_body(value, field)
    reader.finish()
    return message


def problems(message: Any, value: Any, field: str = "*") -> InvalidArgument:
    with pytest.raises(InvalidArgument) as raised:
        read(message, value, field)
    return raised.value


def test_takes_camel_case_snake_case_and_both_at_once():
    model = read(
        protos.TunedModel(),
        {"displayName": "a", "tuning_task": {"trainingData": {"examples": {"examples": [{"text_input": "1"}]}}}},
    )
    assert model.display_name == "a"
    assert model.tuning_task.training_data.examples.examples[0].text_input == "1"


@pytest.mark.parametrize(
    ("field", "given", "read_as"),
    [
        ("topK", 40, 40),
        ("topK", "40", 40),
        ("topK", 40.0, 40),
        ("topK", "4e1", 40),
        ("topK", -(2**31), -(2**31)),
        ("state", "ACTIVE", 2),
        ("state", "active", 2),
        ("state", 2, 2),
        ("state", "2", 2),
        ("state", 77, 77),
        ("temperature", 1, 1.0),
        ("temperature", "0.5", 0.5),
        ("temperature", "Infinity", float("inf")),
        ("temperature", "-Infinity", float("-inf")),
        ("temperature", 3.4028235e38, pytest.approx(3.4028235e38)),
        ("readerProjectNumbers", ["9223372036854775807", 5], [2**63 - 1, 5]),
        ("readerProjectNumbers", 5, [5]),
        ("displayName", None, ""),
    ],
)
def test_takes_a_value_in_every_form(field: str, given: Any, read_as: Any):
    model = read(protos.TunedModel(), {field: given})
    name = protos.TunedModel.DESCRIPTOR.fields_by_camelcase_name[field].name
    assert getattr(model, name) == read_as


def test_takes_nan_as_a_string():
    temperature = read(protos.TunedModel(), {"temperature": "NaN"}).temperature
    assert temperature != temperature


def test_null_leaves_a_field_unset():
    model = read(protos.TunedModel(temperature=0.5), {"temperature": None, "tuningTask": None})
    assert not model.HasField("temperature")
    assert not model.HasField("tuning_task")


def test_takes_a_lone_object_for_a_list_of_one():
    request = read(protos.GenerateContentRequest(), {"contents": {"parts": {"text": "hi"}}})
    assert request.contents[0].parts[0].text == "hi"


@pytest.mark.parametrize("text", ["+/+/", "-_-_", "-_-_YQ", "-_-_YQ=="])
def test_takes_bytes_in_both_alphabets(text: str):
    part = read(protos.Part(), {"inlineData": {"data": text}})
    assert part.inline_data.data in (b"\xfb\xff\xbf", b"\xfb\xff\xbfa")


def test_takes_well_known_types():
    request = read(
        protos.GenerateContentRequest(),
        {
            "contents": [
                {
                    "parts": [
                        {"functionCall": {"name": "f", "args": {"a": [1, None, {"b": True}], "c": "x"}}},
                        {"videoMetadata": {"startOffset": "1.5s"}},
                    ]
                }
            ],
            "generationConfig": {"responseJsonSchema": {"type": ["string", "null"]}},
        },
    )
    first, second = request.contents[0].parts
    assert dict(first.function_call.args)["c"] == "x"
    assert first.function_call.args["a"][2]["b"] is True
    assert (second.video_metadata.start_offset.seconds, second.video_metadata.start_offset.nanos) == (1, 500000000)
    schema = request.generation_config.response_json_schema_ordered.struct_value
    assert schema.fields["type"].list_value.values[1].string_value == "null"
    model = read(protos.TunedModel(), {"createTime": "2024-03-01T01:02:03.5+01:00"})
    assert model.create_time.ToJsonString() == "2024-03-01T00:02:03.500Z"


def test_takes_masks_in_either_case():
    request = read(protos.UpdateTunedModelRequest(), {"updateMask": "displayName, tuning_task.startTime"})
    assert list(request.update_mask.paths) == ["display_name", "tuning_task.start_time"]


def test_the_last_of_two_spellings_wins():
    model = read(protos.TunedModel(), {"displayName": "a", "display_name": "b"})
    assert model.display_name == "b"
    task = {"hyperparameters": {"epochCount": 1}}
    model = read(protos.TunedModel(), {"tuningTask": task, "tuning_task": {"hyperparameters": {"batchSize": 2}}})
    assert not model.tuning_task.hyperparameters.HasField("epoch_count")


MODEL_ERRORS = [
    (
        {"foo": 1},
        "tuned_model",
        "Invalid JSON payload received. Unknown name \"foo\" at 'tuned_model': Cannot find field.",
    ),
    (
        {"tuningTask": {"foo": 1}},
        "tuned_model.tuning_task",
        "Invalid JSON payload received. Unknown name \"foo\" at 'tuned_model.tuning_task': Cannot find field.",
    ),
    (
        {"tuningTask": {"trainingData": {"examples": {"examples": [{}, {"input": "1"}]}}}},
        "tuned_model.tuning_task.training_data.examples.examples[1]",
        'Invalid JSON payload received. Unknown name "input" at'
        " 'tuned_model.tuning_task.training_data.examples.examples[1]': Cannot find field.",
    ),
    (
        {"tuningTask": {"hyperparameters": {"batchSize": "abc"}}},
        "tuned_model.tuning_task.hyperparameters.batch_size",
        "Invalid value at 'tuned_model.tuning_task.hyperparameters.batch_size' (TYPE_INT32), \"abc\"",
    ),
    ({"topK": 2147483648}, "tuned_model.top_k", "Invalid value at 'tuned_model.top_k' (TYPE_INT32), 2147483648"),
    ({"topK": 1.5}, "tuned_model.top_k", "Invalid value at 'tuned_model.top_k' (TYPE_INT32), 1.5"),
    ({"topK": True}, "tuned_model.top_k", "Invalid value at 'tuned_model.top_k' (TYPE_INT32), true"),
    ({"topK": float("nan")}, "tuned_model.top_k", "Invalid value at 'tuned_model.top_k' (TYPE_INT32), NaN"),
    (
        {"temperature": 1e39},
        "tuned_model.temperature",
        "Invalid value at 'tuned_model.temperature' (TYPE_FLOAT), 1e+39",
    ),
    (
        {"temperature": float("nan")},
        "tuned_model.temperature",
        "Invalid value at 'tuned_model.temperature' (TYPE_FLOAT), NaN",
    ),
    (
        {"temperature": float("inf")},
        "tuned_model.temperature",
        "Invalid value at 'tuned_model.temperature' (TYPE_FLOAT), Infinity",
    ),
    (
        {"temperature": "1_0"},
        "tuned_model.temperature",
        "Invalid value at 'tuned_model.temperature' (TYPE_FLOAT), \"1_0\"",
    ),
    (
        {"readerProjectNumbers": [1, "9223372036854775808"]},
        "tuned_model.reader_project_numbers[1]",
        "Invalid value at 'tuned_model.reader_project_numbers[1]' (TYPE_INT64), \"9223372036854775808\"",
    ),
    (
        {"readerProjectNumbers": [None]},
        "tuned_model.reader_project_numbers[0]",
        "Invalid value at 'tuned_model.reader_project_numbers[0]' (TYPE_INT64), null",
    ),
    (
        {"displayName": 5},
        "tuned_model.display_name",
        "Invalid value at 'tuned_model.display_name' (TYPE_STRING), 5",
    ),
    (
        {"displayName": "\ud800"},
        "tuned_model.display_name",
        "Invalid value at 'tuned_model.display_name' (TYPE_STRING), \"?\"",
    ),
    (
        {"displayName": {}},
        "tuned_model",
        "Invalid value at 'tuned_model' (display_name), Starting an object on a scalar field",
    ),
    (
        {"displayName": ["a"]},
        "tuned_model",
        "Invalid JSON payload received. Unknown name \"displayName\" at 'tuned_model':"
        " Proto field is not repeating, cannot start list.",
    ),
    (
        {"state": "DONE"},
        "tuned_model.state",
        f"Invalid value at 'tuned_model.state' ({V1BETA}.TunedModel.State), \"DONE\"",
    ),
    (
        {"tuningTask": "x"},
        "tuned_model.tuning_task",
        f"Invalid value at 'tuned_model.tuning_task' ({V1BETA}.TuningTask), \"x\"",
    ),
    (
        {"tuningTask": {"snapshots": [[]]}},
        "tuned_model.tuning_task.snapshots[0]",
        "Invalid JSON payload received. Unknown name \"\" at 'tuned_model.tuning_task.snapshots[0]':"
        " Proto field is not repeating, cannot start list.",
    ),
    (
        {"baseModel": "models/a", "tunedModelSource": {}},
        "tuned_model",
        "Invalid value at 'tuned_model' (oneof), oneof field 'source_model' is already set."
        " Cannot set 'tunedModelSource'",
    ),
    (
        {"tuningTask": {"hyperparameters": {"learning_rate": 1, "learningRateMultiplier": 1}}},
        "tuned_model.tuning_task.hyperparameters",
        "Invalid value at 'tuned_model.tuning_task.hyperparameters' (oneof), oneof field"
        " 'learning_rate_option' is already set. Cannot set 'learningRateMultiplier'",
    ),
    (
        {"createTime": "yesterday"},
        "tuned_model.create_time",
        "Invalid value at 'tuned_model.create_time' (type.googleapis.com/google.protobuf.Timestamp), Field"
        " 'createTime', Illegal timestamp format; timestamps must end with 'Z' or have a valid timezone offset.",
    ),
    (
        {"createTime": "2024-13-01T00:00:00Z"},
        "tuned_model.create_time",
        "Invalid value at 'tuned_model.create_time' (type.googleapis.com/google.protobuf.Timestamp), Field"
        " 'createTime', Invalid time format: 2024-13-01T00:00:00Z",
    ),
]


@pytest.mark.parametrize(("body", "field", "text"), MODEL_ERRORS)
def test_errors_read_as_googles(body: Any, field: str, text: str):
    error = problems(protos.CreateTunedModelRequest(), body, "tuned_model")
    assert error.message == text
    (violation,) = error.details[0].field_violations
    assert (violation.field, violation.description) == (field, text)


@pytest.mark.parametrize(
    ("body", "field", "text"),
    [
        ({"foo": 1}, "", 'Invalid JSON payload received. Unknown name "foo": Cannot find field.'),
        ([1], "", 'Invalid JSON payload received. Unknown name "": Root element must be a message.'),
        (None, "", 'Invalid JSON payload received. Unknown name "": Root element must be a message.'),
        ({"model": {}}, "", "Invalid value (model), Starting an object on a scalar field"),
        (
            {"contents": ["hi"]},
            "contents[0]",
            f"Invalid value at 'contents[0]' ({V1BETA}.Content), \"hi\"",
        ),
        (
            {"contents": [{"parts": [{"text": "a", "inlineData": {}}]}]},
            "contents[0].parts[0]",
            "Invalid value at 'contents[0].parts[0]' (oneof), oneof field 'data' is already set."
            " Cannot set 'inlineData'",
        ),
        (
            {"contents": [{"parts": [{"inlineData": {"data": "%"}}]}]},
            "contents[0].parts[0].inline_data.data",
            "Invalid value at 'contents[0].parts[0].inline_data.data' (TYPE_BYTES), \"%\"",
        ),
        (
            {"generationConfig": {"stopSequences": [{}]}},
            "generation_config.stop_sequences[0]",
            "Invalid value at 'generation_config.stop_sequences[0]' (stop_sequences),"
            " Starting an object on a scalar field",
        ),
        (
            {"generationConfig": {"responseSchema": {"properties": {"a": {}, "b": {"const": 1}}}}},
            "generation_config.response_schema.properties[1].value",
            'Invalid JSON payload received. Unknown name "const" at'
            " 'generation_config.response_schema.properties[1].value': Cannot find field.",
        ),
        (
            {"generationConfig": {"responseSchema": {"properties": []}}},
            "generation_config.response_schema",
            "Invalid value at 'generation_config.response_schema' (Map),"
            " Cannot bind a list to map for field 'properties'.",
        ),
    ],
)
def test_errors_at_the_root_and_below(body: Any, field: str, text: str):
    error = problems(protos.GenerateContentRequest(), body)
    assert error.message == text
    (violation,) = error.details[0].field_violations
    assert (violation.field, violation.description) == (field, text)


def test_names_all_that_is_wrong_but_no_more_than_fifty():
    error = problems(protos.TunedModel(), {"topK": "x", "foo": 1, "state": []})
    assert len(error.message.split("\n")) == 3
    assert [violation.field for violation in error.details[0].field_violations] == ["top_k", "", ""]
    error = problems(protos.TunedModel(), {f"unknown{number}": 1 for number in range(1000)})
    assert len(error.message.split("\n")) == 50
    assert len(error.details[0].field_violations) == 50


def test_a_long_value_is_cut():
    assert len(problems(protos.TunedModel(), {"topK": "x" * 100_000}).message) < 300


def nested_schema(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def nested_struct(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize("nest", [nested_schema, nested_struct])
def test_nesting_ends_before_protobuf_can_no_longer_read_it_back(nest: Any):
    key = "responseSchema" if nest is nested_schema else "responseJsonSchema"
    deepest = None
    for levels in range(1, 150):
        try:
            deepest = read(protos.GenerateContentRequest(), {"generationConfig": {key: nest(levels)}})
        except InvalidArgument as error:
            assert "Message too deep" in error.message  # noqa: PT017
            break
    else:
        pytest.fail("any depth was taken")
    assert deepest is not None
    assert protos.GenerateContentRequest.FromString(deepest.SerializeToString()) == deepest
    error = problems(protos.GenerateContentRequest(), {"generationConfig": {key: nest(900)}})
    assert "Message too deep" in error.message


def bind(message: Any, **parameters: list[str]) -> Any:
    reader = MessageReader(message)
    reader.read_query({name.replace("__", "."): values for name, values in parameters.items()}, body="tuned_model")
    reader.finish()
    return message


def test_binds_query_parameters():
    request = bind(protos.ListTunedModelsRequest(), pageSize=["5"], page_token=["a", "b"])
    assert (request.page_size, request.page_token) == (5, "b")
    request = bind(protos.UpdateTunedModelRequest(), updateMask=["description,topK"])
    assert list(request.update_mask.paths) == ["description", "top_k"]
    request = bind(
        protos.GenerateContentRequest(), generationConfig__stopSequences=["a", "b"], generation_config__topK=["3"]
    )
    assert list(request.generation_config.stop_sequences) == ["a", "b"]
    assert request.generation_config.top_k == 3


@pytest.mark.parametrize(
    ("request_type", "name"),
    [
        ("ListTunedModelsRequest", "pagesize"),
        ("ListTunedModelsRequest", "pageSize__x"),
        ("CreateTunedModelRequest", "tunedModel"),
        ("CreateTunedModelRequest", "tunedModel__displayName"),
        ("GenerateContentRequest", "contents"),
        ("GenerateContentRequest", "contents__role"),
        ("GenerateContentRequest", "generationConfig"),
    ],
)
def test_refuses_query_parameters_that_bind_to_nothing(request_type: str, name: str):
    with pytest.raises(InvalidArgument) as raised:
        bind(getattr(protos, request_type)(), **{name: ["1"]})
    name = name.replace("__", ".")
    assert raised.value.message == (
        f'Invalid JSON payload received. Unknown name "{name}": Cannot bind query parameter.'
        f" Field '{name}' could not be found in request message."
    )


def test_refuses_a_query_parameter_of_the_wrong_type():
    with pytest.raises(InvalidArgument, match=r"""^Invalid value at 'page_size' \(TYPE_INT32\), "many"$"""):
        bind(protos.ListTunedModelsRequest(), pageSize=["many"])
