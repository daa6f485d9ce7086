"""Any message, written and read again, is the same message."""

import math
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith import protos
from tunesmith.api import json_text
from tunesmith.api.json_reader import MessageReader
from tunesmith.api.json_writer import JsonWriter

WRITERS = [
    JsonWriter(pretty=pretty, enum_numbers=numbers) for pretty in (True, False) for numbers in (True, False)
]
TEXT = st.text(max_size=8)
SCALARS = {
    FieldDescriptor.CPPTYPE_STRING: TEXT,
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_FLOAT: st.floats(width=32, allow_nan=False) | st.just(math.nan),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats(allow_nan=False) | st.just(math.nan),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def fill(draw: Any, message: Any, depth: int) -> None:
    """Set a random part of the fields of `message`."""
    descriptor: Descriptor = message.DESCRIPTOR
    if descriptor.full_name == "google.protobuf.Timestamp":
        message.seconds = draw(st.integers(-62135596800, 253402300799))
        message.nanos = draw(st.integers(0, 10**9 - 1))
    elif descriptor.full_name == "google.protobuf.Duration":
        sign = draw(st.sampled_from([-1, 1]))
        message.seconds = sign * draw(st.integers(0, 315576000000))
        message.nanos = sign * draw(st.integers(0, 10**9 - 1))
    elif descriptor.full_name == "google.protobuf.Value":
        json_format.ParseDict(draw(JSON), message, descriptor_pool=protos.POOL)
    elif descriptor.full_name == "google.protobuf.Struct":
        message.update(draw(st.dictionaries(TEXT, JSON, max_size=3)))
    else:
        fill_fields(draw, message, depth)


def fill_fields(draw: Any, message: Any, depth: int) -> None:
    fields = [field for field in message.DESCRIPTOR.fields if depth or field.message_type is None]
    if not fields:
        return
    for field in draw(st.lists(st.sampled_from(fields), max_size=4, unique_by=lambda field: field.name)):
        oneof = field.containing_oneof
        if oneof is not None and message.WhichOneof(oneof.name):
            continue
        count = draw(st.integers(1, 2)) if field.is_repeated else 1
        if field.message_type is None:
            values = [draw(scalar(field)) for _ in range(count)]
            if field.is_repeated:
                getattr(message, field.name).extend(values)
            else:
                setattr(message, field.name, values[0])
        elif field.message_type.GetOptions().map_entry:
            for key in draw(st.lists(TEXT, max_size=2)):
                fill(draw, getattr(message, field.name)[key], depth - 1)
        else:
            target = getattr(message, field.name)
            for _ in range(count):
                part = target.add() if field.is_repeated else target
                if not field.is_repeated:
                    part.SetInParent()
                fill(draw, part, depth - 1)


def scalar(field: FieldDescriptor) -> Any:
    if field.enum_type is not None:
        return st.sampled_from([value.number for value in field.enum_type.values]) | st.just(999)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=6)
    return SCALARS[field.cpp_type]


@st.composite
def messages(draw: Any, name: str) -> Any:
    message = getattr(protos, name)()
    fill(draw, message, 6)
    return message


def read(name: str, text: str) -> Any:
    message = getattr(protos, name)()
    reader = MessageReader(message)
    reader.read_body(json_text.parse(text.encode()), "*")
    reader.finish()
    return message


@pytest.mark.parametrize("name", ["TunedModel", "GenerateContentRequest"])
def test_what_is_written_reads_back(name: str):
    @settings(max_examples=150, deadline=None, database=None)
    @given(messages(name), st.sampled_from(WRITERS))
    def roundtrip(message: Any, writer: JsonWriter) -> None:
        text = writer.text(message)
        # Bytes tell NaN and -0.0 from the rest; == does not.
        assert as_bytes(read(name, text)) == as_bytes(message)
        assert as_bytes(json_format.Parse(text, getattr(protos, name)(), descriptor_pool=protos.POOL)) == as_bytes(
            message
        )

    roundtrip()


def as_bytes(message: Any) -> bytes:
    return message.SerializeToString(deterministic=True)
