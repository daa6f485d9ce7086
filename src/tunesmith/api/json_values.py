"""One JSON value to the value of one scalar field, or to one of protobuf's well-known types."""

import base64
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from tunesmith import protos

MAX_DEPTH = 90
"""Messages within messages that a request may have; protobuf reads back no more than 100."""

Converter = Callable[[Any], Any]
Filler = Callable[[Message, Any, int], None]

_INTEGER = re.compile(r"-?[0-9]{1,40}")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NOT_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
_FLOAT32 = struct.Struct("<f")


def converter(field: FieldDescriptor) -> Converter:
    """Return the function that turns a JSON value into a value of `field`, or raises ValueError."""
    if field.enum_type is not None:
        return _enum(field.enum_type)
    return _CONVERTERS[field.type]


def _integer(low: int, high: int) -> Converter:
    def convert(value: Any) -> int:
        kind = type(value)
        if kind is str:
            value = int(value) if _INTEGER.fullmatch(value) else _double(value)
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise ValueError
        return value

    return convert


def _double(value: Any) -> float:
    kind = type(value)
    if kind is str:
        if value in _NOT_FINITE:
            return _NOT_FINITE[value]
        if not _NUMBER.fullmatch(value):
            raise ValueError
        value, kind = float(value), float
    if kind is int:
        try:
            return float(value)
        except OverflowError:
            raise ValueError from None
    # A literal out of range, or NaN spelled without quotes, is no number in JSON.
    if kind is not float or value != value or value in (float("inf"), float("-inf")):
        raise ValueError
    return float(value)


def _float(value: Any) -> float:
    number = _double(value)
    try:
        _FLOAT32.pack(number)
    except OverflowError:
        raise ValueError from None
    return number


def _bool(value: Any) -> bool:
    if value is True or value == "true":
        return True
    if value is False or value == "false":
        return False
    raise ValueError


def _string(value: Any) -> str:
    if type(value) is not str:
        raise ValueError
    return value


def _bytes(value: Any) -> bytes:
    text = _string(value).translate(_URL_SAFE).rstrip("=")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _enum(enum: EnumDescriptor) -> Converter:
    numbers = {name: value.number for name, value in enum.values_by_name.items()}
    integer = _integer(-(1 << 31), (1 << 31) - 1)

    def convert(value: Any) -> int:
        if type(value) is str:
            # "object" for OBJECT is common in schemas, and Google takes it.
            number = numbers.get(value, numbers.get(value.upper().replace("-", "_")))
            if number is not None:
                return number
            if not _INTEGER.fullmatch(value):
                raise ValueError
        return int(integer(value))

    return convert


_URL_SAFE = str.maketrans("-_", "+/")
_INT32 = _integer(-(1 << 31), (1 << 31) - 1)
_INT64 = _integer(-(1 << 63), (1 << 63) - 1)
_UINT32 = _integer(0, (1 << 32) - 1)
_UINT64 = _integer(0, (1 << 64) - 1)
_CONVERTERS: Mapping[int, Converter] = {
    FieldDescriptor.TYPE_DOUBLE: _double,
    FieldDescriptor.TYPE_FLOAT: _float,
    FieldDescriptor.TYPE_INT32: _INT32,
    FieldDescriptor.TYPE_SINT32: _INT32,
    FieldDescriptor.TYPE_SFIXED32: _INT32,
    FieldDescriptor.TYPE_INT64: _INT64,
    FieldDescriptor.TYPE_SINT64: _INT64,
    FieldDescriptor.TYPE_SFIXED64: _INT64,
    FieldDescriptor.TYPE_UINT32: _UINT32,
    FieldDescriptor.TYPE_FIXED32: _UINT32,
    FieldDescriptor.TYPE_UINT64: _UINT64,
    FieldDescriptor.TYPE_FIXED64: _UINT64,
    FieldDescriptor.TYPE_BOOL: _bool,
    FieldDescriptor.TYPE_STRING: _string,
    FieldDescriptor.TYPE_BYTES: _bytes,
}


def _fill_timestamp(message: Any, value: Any, _depth: int) -> None:
    if type(value) is not str:
        raise ValueError("Invalid data type for timestamp.")
    if not re.search(r"([zZ]|[+-]\d\d:\d\d)$", value):
        raise ValueError("Illegal timestamp format; timestamps must end with 'Z' or have a valid timezone offset.")
    try:
        message.FromJsonString(value.upper())
    except ValueError:
        raise ValueError(f"Invalid time format: {value}") from None


def _fill_duration(message: Any, value: Any, _depth: int) -> None:
    if type(value) is not str:
        raise ValueError("Invalid data type for duration.")
    if not value.endswith("s"):
        raise ValueError("Illegal duration format; duration must end with 's'")
    try:
        message.FromJsonString(value)
    except ValueError:
        raise ValueError(f"Invalid duration format: {value}") from None


def _fill_field_mask(message: Any, value: Any, _depth: int) -> None:
    if type(value) is not str:
        raise ValueError
    del message.paths[:]
    for path in filter(None, (part.strip() for part in value.split(","))):
        message.paths.append(re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", path))


def _fill_struct(message: Any, value: Any, depth: int) -> None:
    if type(value) is not dict:
        raise ValueError
    message.fields.clear()
    for key, item in value.items():
        _fill_value(message.fields[key], item, depth + 2)


def _fill_list_value(message: Any, value: Any, depth: int) -> None:
    if type(value) is not list:
        raise ValueError
    del message.values[:]
    for item in value:
        _fill_value(message.values.add(), item, depth + 1)


def _fill_value(message: Any, value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError("Message too deep. Max recursion depth reached.")
    if value is None:
        message.null_value = 0
    elif isinstance(value, bool):
        message.bool_value = value
    elif isinstance(value, str):
        message.string_value = value
    elif isinstance(value, list):
        message.list_value.SetInParent()
        _fill_list_value(message.list_value, value, depth + 1)
    elif isinstance(value, dict):
        message.struct_value.SetInParent()
        _fill_struct(message.struct_value, value, depth + 1)
    else:
        message.number_value = _double(value)


def _fill_as_protobuf(message: Message, value: Any, _depth: int) -> None:
    try:
        json_format.ParseDict(value, message, descriptor_pool=protos.POOL)
    except (json_format.Error, RecursionError, TypeError) as error:
        raise ValueError(str(error)) from None


TEXT_FILLERS: Mapping[str, Filler] = {
    "google.protobuf.Timestamp": _fill_timestamp,
    "google.protobuf.Duration": _fill_duration,
    "google.protobuf.FieldMask": _fill_field_mask,
}
"""The well-known types that JSON writes as a string; a query parameter may hold them."""

FILLERS: Mapping[str, Filler] = {
    **TEXT_FILLERS,
    "google.protobuf.Struct": _fill_struct,
    "google.protobuf.Value": _fill_value,
    "google.protobuf.ListValue": _fill_list_value,
    "google.protobuf.Any": _fill_as_protobuf,
    **{
        f"google.protobuf.{kind}Value": _fill_as_protobuf
        for kind in ("Bool", "Bytes", "Double", "Float", "Int32", "Int64", "String", "UInt32", "UInt64")
    },
}
"""The well-known types, each with the function that fills one from JSON, or raises ValueError.

An error without a text means a value of the wrong kind."""
