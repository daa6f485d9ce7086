import json
from typing import Any

import pytest
from google.protobuf import json_format

from tunesmith import protos
from tunesmith.api.json_writer import JsonWriter
from tunesmith.errors import InvalidArgument, NotFound

PRETTY, COMPACT = JsonWriter(), JsonWriter(pretty=False)


@pytest.fixture
def model() -> Any:
    model = protos.TunedModel(
        name="tunedModels/x",
        base_model="models/gemini-1.0-pro-001",
        display_name='"六" <b>\n',
        state=2,
        temperature=0.0,
        top_p=0.95,
        reader_project_numbers=[2**53 + 1],
    )
    model.create_time.FromJsonString("2024-03-06T20:11:05.123456Z")
    model.tuning_task.hyperparameters.learning_rate = 0.001
    model.tuning_task.snapshots.add(step=1, mean_loss=1.402067)
    return model


def test_prints_a_key_a_line_as_google_does(model: Any):
    assert PRETTY.text(model) == (
        """{
  "name": "tunedModels/x",
  "baseModel": "models/gemini-1.0-pro-001",
  "displayName": "\\"六\\" <b>\\n",
  "state": "ACTIVE",
  "createTime": "2024-03-06T20:11:05.123456Z",
  "tuningTask": {
    "snapshots": [
      {
        "step": 1,
        "meanLoss": 1.402067
      }
    ],
    "hyperparameters": {
      "learningRate": 0.001
    }
  },
  "temperature": 0,
  "topP": 0.95,
  "readerProjectNumbers": [
    "9007199254740993"
  ]
}
"""
    )


def test_compact_is_one_line_without_spaces_and_means_the_same(model: Any):
    text = COMPACT.text(model)
    assert text.startswith('{"name":"tunedModels/x","baseModel":')
    assert "\n" not in text
    assert json.loads(text) == json.loads(PRETTY.text(model)) == json_format.MessageToDict(model)


def test_prints_enums_as_numbers_on_request(model: Any):
    text = JsonWriter(enum_numbers=True).text(model)
    assert '"state": 2' in text
    model.state = 77
    assert '"state": 77' in PRETTY.text(model)


def test_leaves_zeros_out_but_for_fields_with_presence():
    assert PRETTY.text(protos.TuningSnapshot()) == "{}\n"
    assert COMPACT.text(protos.Candidate(index=0)) == '{"index":0}'
    assert COMPACT.text(protos.Operation(name="a", done=False)) == '{"name":"a"}'


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.001, "0.001"),
        (0.0002, "0.0002"),
        (1.402067, "1.402067"),
        (1.0, "1"),
        (100.0, "100"),
        (1 / 3, "0.33333334"),
        (3.4028234663852886e38, "3.4028234663852886e+38"),
        (1e-45, "1.4013e-45"),
        (16777216.0, "16777216"),
        (0.0, "0"),
        (-0.0, "-0.0"),
        (float("nan"), '"NaN"'),
        (float("inf"), '"Infinity"'),
        (float("-inf"), '"-Infinity"'),
    ],
)
def test_prints_floats_as_short_as_they_read_back(value: float, text: str):
    assert COMPACT.text(protos.TunedModel(temperature=value)) == f'{{"temperature":{text}}}'


@pytest.mark.parametrize(
    ("nanos", "text"),
    [(0, "1970-01-01T00:00:01Z"), (10**8, "1970-01-01T00:00:01.100Z"), (1, "1970-01-01T00:00:01.000000001Z")],
)
def test_prints_times_with_as_many_digits_as_they_need(nanos: int, text: str):
    model = protos.TunedModel()
    model.create_time.seconds, model.create_time.nanos = 1, nanos
    assert COMPACT.text(model) == f'{{"createTime":"{text}"}}'


def test_expands_any():
    operation = protos.Operation(name="a", done=True)
    operation.metadata.Pack(protos.CreateTunedModelMetadata(total_steps=38))
    operation.error.CopyFrom(NotFound("gone", [protos.ErrorInfo(metadata={"b": "2", "a": "1"})]).to_status())
    assert json.loads(PRETTY.text(operation)) == {
        "name": "a",
        "metadata": {
            "@type": "type.googleapis.com/google.ai.generativelanguage.v1beta.CreateTunedModelMetadata",
            "totalSteps": 38,
        },
        "done": True,
        "error": {
            "code": 5,
            "message": "gone",
            "details": [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "metadata": {"a": "1", "b": "2"}}],
        },
    }
    operation = protos.Operation()
    operation.response.Pack(protos.Empty())
    assert '"@type":"type.googleapis.com/google.protobuf.Empty"' in COMPACT.text(operation)
    operation.response.type_url = "type.googleapis.com/some.Unknown"
    assert json.loads(COMPACT.text(operation)) == {"response": {"@type": "type.googleapis.com/some.Unknown"}}


def test_prints_structs_and_bytes_as_protobuf_does():
    part = protos.Part(thought_signature=b"\xfb\xff")
    part.function_call.args.update({"b": [1, None, {"c": True}], "a": 1.5})
    assert json.loads(PRETTY.text(part)) == json_format.MessageToDict(part)
    assert COMPACT.text(part).index('"a"') < COMPACT.text(part).index('"b"')


def test_error_bodies_have_googles_shape():
    error = InvalidArgument.at([("tuned_model.foo", "is bad")])
    assert json.loads(PRETTY.error_text(error)) == {
        "error": {
            "code": 400,
            "message": "* tuned_model.foo: is bad",
            "status": "INVALID_ARGUMENT",
            "details": [
                {
                    "@type": "type.googleapis.com/google.rpc.BadRequest",
                    "fieldViolations": [{"field": "tuned_model.foo", "description": "is bad"}],
                }
            ],
        }
    }
    assert COMPACT.error_text(NotFound("no")) == '{"error":{"code":404,"message":"no","status":"NOT_FOUND"}}'
    assert PRETTY.error_text(NotFound("no")).startswith('{\n  "error": {\n    "code": 404,\n')
