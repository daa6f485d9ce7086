"""Messages to JSON text, as Google's servers print it: one key a line, camelCase, short floats."""

import base64
import json
import math
import struct
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from tunesmith import protos
from tunesmith.errors import ApiError

# A printer turns a value into text; `margin` is the line break and indentation that its last line has.
_Printer = Callable[[Any, str], str]

_quote = json.encoder.encode_basestring
_FLOAT32 = struct.Struct("<f")
_FLOAT32_MAX = 3.4028234663852886e38
_EPOCH = datetime(1970, 1, 1)  # in UTC, as all timestamps are; printed without an offset


class JsonWriter:
    """Prints messages in one style; safe to share between threads.

    Args:
        pretty: Two spaces of indentation and a key a line; else one line without spaces.
        enum_numbers: Enums as numbers instead of names.
    """

    def __init__(self, *, pretty: bool = True, enum_numbers: bool = False) -> None:
        self._margin = "\n" if pretty else ""
        self._indent = "  " if pretty else ""
        self._colon = ": " if pretty else ":"
        self._enum_numbers = enum_numbers
        self._plans: dict[Descriptor, dict[int, tuple[str, _Printer]]] = {}
        self._well_known: Mapping[str, _Printer] = {
            "google.protobuf.Timestamp": lambda value, _: f'"{_timestamp(value)}"',
            "google.protobuf.Duration": lambda value, _: f'"{value.ToJsonString()}"',
            "google.protobuf.FieldMask": lambda value, _: _quote(",".join(map(_camel, value.paths))),
            "google.protobuf.Any": self._any,
            "google.protobuf.Struct": lambda value, margin: self._map(value.fields, self._value, margin),
            "google.protobuf.ListValue": lambda value, margin: self._list(value.values, self._value, margin),
            "google.protobuf.Value": self._value,
        }

    def text(self, message: Message) -> str:
        """Return the message as JSON, with a final line break when pretty."""
        descriptor: Any = message.DESCRIPTOR
        return self._printer(descriptor)(message, self._margin) + self._margin

    def error_text(self, error: ApiError) -> str:
        """Return the body of an error response."""
        inner = self._margin + self._indent
        deeper = inner + self._indent
        items = [
            self._item("code", str(int(error.http))),
            self._item("message", _quote(error.message)),
            self._item("status", _quote(error.status)),
        ]
        if error.details:
            anys = error.to_status().details
            items.append(self._item("details", self._list(anys, self._any, deeper)))
        body = self._item("error", self._object(items, inner))
        return self._object([body], self._margin) + self._margin

    def _item(self, name: str, text: str) -> str:
        return f'"{name}"{self._colon}{text}'

    def _object(self, items: list[str], margin: str) -> str:
        if not items:
            return "{}"
        inner = margin + self._indent
        return f"{{{inner}{f',{inner}'.join(items)}{margin}}}"

    def _list(self, values: Any, printer: _Printer, margin: str) -> str:
        if not values:
            return "[]"
        inner = margin + self._indent
        items = f",{inner}".join([printer(value, inner) for value in values])
        return f"[{inner}{items}{margin}]"

    def _map(self, entries: Any, printer: _Printer, margin: str) -> str:
        inner = margin + self._indent
        names = sorted(entries)  # maps have no order; a response should be the same each time
        return self._object(
            [f"{_quote(_key(name))}{self._colon}{printer(entries[name], inner)}" for name in names], margin
        )

    def _message(self, message: Message, margin: str) -> str:
        return self._object(self._fields(message, margin), margin)

    def _fields(self, message: Message, margin: str) -> list[str]:
        descriptor: Any = message.DESCRIPTOR
        plan = self._plans.get(descriptor)
        if plan is None:
            plan = self._plans[descriptor] = self._plan(descriptor)
        inner = margin + self._indent
        items = []
        for field, value in message.ListFields():
            name, printer = plan[field.number]
            items.append(name + printer(value, inner))
        return items

    def _plan(self, descriptor: Descriptor) -> dict[int, tuple[str, _Printer]]:
        return {
            field.number: (f"{_quote(field.json_name)}{self._colon}", self._field_printer(field))
            for field in descriptor.fields
        }

    def _field_printer(self, field: FieldDescriptor) -> _Printer:
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            of_value = self._scalar_printer(kind.fields_by_name["value"])
            return lambda value, margin: self._map(value, of_value, margin)
        printer = self._scalar_printer(field)
        if field.is_repeated:
            return lambda value, margin: self._list(value, printer, margin)
        return printer

    def _scalar_printer(self, field: FieldDescriptor) -> _Printer:
        if field.message_type is not None:
            return self._printer(field.message_type)
        if field.enum_type is not None:
            return self._enum_printer(field.enum_type)
        return _SCALARS[field.cpp_type] if field.type != FieldDescriptor.TYPE_BYTES else _bytes

    def _printer(self, descriptor: Descriptor) -> _Printer:
        return self._well_known.get(descriptor.full_name, self._message)

    def _enum_printer(self, enum: EnumDescriptor) -> _Printer:
        if enum.full_name == "google.protobuf.NullValue":
            return lambda _value, _margin: "null"
        names = {} if self._enum_numbers else {v.number: _quote(v.name) for v in enum.values}
        return lambda value, _: names.get(value) or str(value)

    def _any(self, value: Any, margin: str) -> str:
        items = [self._item("@type", _quote(value.type_url))]
        try:
            descriptor = protos.POOL.FindMessageTypeByName(value.type_url.rpartition("/")[2])
        except KeyError:
            return self._object(items, margin)
        message = protos.message_class(descriptor).FromString(value.value)
        printer = self._well_known.get(descriptor.full_name)
        if printer is None:
            items += self._fields(message, margin)
        else:
            items.append(self._item("value", printer(message, margin + self._indent)))
        return self._object(items, margin)

    def _value(self, value: Any, margin: str) -> str:
        kind = value.WhichOneof("kind")
        if kind == "struct_value":
            return self._map(value.struct_value.fields, self._value, margin)
        if kind == "list_value":
            return self._list(value.list_value.values, self._value, margin)
        if kind == "string_value":
            return _quote(value.string_value)
        if kind == "number_value":
            return _double(value.number_value, "")
        if kind == "bool_value":
            return "true" if value.bool_value else "false"
        return "null"


def _double(value: float, _margin: str) -> str:
    if not math.isfinite(value):
        return '"NaN"' if value != value else '"Infinity"' if value > 0 else '"-Infinity"'
    text = repr(value)
    return text[:-2] if text.endswith(".0") and text != "-0.0" else text


def _float(value: float, _margin: str) -> str:
    return _short(value) if value else _double(value, "")  # zeros have a sign, which a cache does not tell apart


@lru_cache(maxsize=1 << 16)  # losses are printed again with each look at a model
def _short(value: float) -> str:
    """Print the shortest decimal that reads back as the same 32-bit float."""
    if math.isfinite(value):
        for digits in (6, 7, 8, 9):
            short = float(f"{value:.{digits}g}")
            # Clients refuse what is larger than the largest float, though it would round down to it.
            if abs(short) <= _FLOAT32_MAX and _FLOAT32.unpack(_FLOAT32.pack(short))[0] == value:
                return _double(short, "")
    return _double(value, "")


@lru_cache(maxsize=1 << 12)
def _second(seconds: int) -> str:
    return (_EPOCH + timedelta(seconds=seconds)).isoformat()


def _timestamp(value: Any) -> str:
    text, nanos = _second(value.seconds), value.nanos
    if nanos == 0:
        return f"{text}Z"
    if nanos % 1_000_000 == 0:
        return f"{text}.{nanos // 1_000_000:03d}Z"
    if nanos % 1_000 == 0:
        return f"{text}.{nanos // 1_000:06d}Z"
    return f"{text}.{nanos:09d}Z"


def _bytes(value: bytes, _margin: str) -> str:
    return f'"{base64.b64encode(value).decode()}"'


def _key(name: Any) -> str:
    return str(name).lower() if isinstance(name, bool) else str(name)


def _camel(path: str) -> str:
    first, *rest = path.split("_")
    return first + "".join(part[:1].upper() + part[1:] for part in rest)


_SCALARS: Mapping[int, _Printer] = {
    FieldDescriptor.CPPTYPE_STRING: lambda value, _: _quote(value),
    FieldDescriptor.CPPTYPE_INT32: lambda value, _: str(value),
    FieldDescriptor.CPPTYPE_UINT32: lambda value, _: str(value),
    # JavaScript's numbers do not hold 64 bits.
    FieldDescriptor.CPPTYPE_INT64: lambda value, _: f'"{value}"',
    FieldDescriptor.CPPTYPE_UINT64: lambda value, _: f'"{value}"',
    FieldDescriptor.CPPTYPE_FLOAT: _float,
    FieldDescriptor.CPPTYPE_DOUBLE: _double,
    FieldDescriptor.CPPTYPE_BOOL: lambda value, _: "true" if value else "false",
}
