"""JSON values and query parameters into a message, with Google's words for everything that does not fit."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import FieldDescriptorProto
from google.protobuf.message import Message

from tunesmith.api.json_values import FILLERS, MAX_DEPTH, TEXT_FILLERS, Converter, Filler, converter
from tunesmith.errors import InvalidArgument

MAX_VIOLATIONS = 50
_SHOWN = 200  # characters of a bad value to repeat in the error
_NO_LIST = "Proto field is not repeating, cannot start list."
_NO_OBJECT = "Starting an object on a scalar field"

# A place in the request, linked to what holds it: spelled out only when something is wrong there.
_Place = tuple[Any, str | int] | None


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    json_name: str
    type_name: str  # as error texts name it: TYPE_INT32, or the type URL
    oneof: str | None
    repeated: bool
    map_key: Converter | None
    convert: Converter | None  # of a scalar, or of a map's scalar values
    fill: Filler | None  # of a well-known type
    takes_null: bool
    takes_list: bool


class MessageReader:
    """Reads one request into one message and collects what is wrong, so that a caller sees it all at once."""

    def __init__(self, message: Message) -> None:
        self._message = message
        self._violations: list[tuple[str, str]] = []

    def read_body(self, value: Any, field: str) -> None:
        """Read the JSON value of the body.

        Args:
            value: The parsed body.
            field: The request's field that the body is, or `*` when the body is the request itself.
        """
        if type(value) is not dict:
            self._unknown(None, "", "Root element must be a message.")
        elif field == "*":
            self._fill(self._message, value, None, 0)
        else:
            part = getattr(self._message, field)
            part.SetInParent()
            self._fill(part, value, (None, field), 1)

    def read_query(self, parameters: Mapping[str, list[str]], *, body: str = "") -> None:
        """Read query parameters; `a.b` names a field of a message.

        Args:
            parameters: Each parameter with its values in order; a field that is not repeated takes the last.
            body: The field that the body holds and a parameter cannot; `*` has no such effect.
        """
        for name, values in parameters.items():
            target = self._resolve(name, body)
            if target is None:
                self._unknown(
                    None,
                    name,
                    f"Cannot bind query parameter. Field '{name}' could not be found in request message.",
                )
            else:
                message, field, place = target
                self._set(message, field, list(values) if field.repeated else values[-1], name, place, 0)

    def finish(self) -> None:
        """Raise InvalidArgument if anything was wrong."""
        if self._violations:
            lines = "\n".join(description for _, description in self._violations)
            raise InvalidArgument.at(self._violations, lines)

    def _resolve(self, name: str, body: str) -> tuple[Message, _Field, _Place] | None:
        message = self._message
        place: _Place = None
        *outer, last = name.split(".")
        first = _fields(message.DESCRIPTOR).get(outer[0] if outer else last)
        if len(outer) > MAX_DEPTH or first is None or first.name == body:
            return None
        for part in outer:
            field = _fields(message.DESCRIPTOR).get(part)
            if field is None or field.repeated or field.convert or field.fill or field.map_key:
                return None
            message, place = getattr(message, field.name), (place, field.name)
        field = _fields(message.DESCRIPTOR).get(last)
        if field is None or field.map_key:
            return None
        if field.convert or field.fill in TEXT_FILLERS.values():
            return message, field, place
        return None

    def _fill(self, message: Message, value: dict[str, Any], place: _Place, depth: int) -> None:
        fields = _fields(message.DESCRIPTOR)
        for key, item in value.items():
            field = fields.get(key)
            if field is None:
                self._unknown(place, key, "Cannot find field.")
            elif item is None and not field.takes_null:
                message.ClearField(field.name)
            else:
                self._set(message, field, item, key, place, depth)

    def _set(self, message: Message, field: _Field, value: Any, key: str, place: _Place, depth: int) -> None:
        """Set one field of `message`, which lies at `place`."""
        if field.oneof and message.WhichOneof(field.oneof) not in (None, field.name):
            taken = f"oneof field '{field.oneof}' is already set. Cannot set '{key}'"
            self._invalid(place, "oneof", taken)
        elif field.map_key:
            self._set_map(message, field, value, place, depth)
        elif field.convert and type(value) is dict:
            self._invalid(place, field.name, _NO_OBJECT)
        elif field.repeated:
            # A lone value where several may stand is taken for a list of one.
            message.ClearField(field.name)
            items: Iterable[tuple[_Place, Any]] = (
                ((((place, field.name), index), item) for index, item in enumerate(value))
                if type(value) is list
                else [((place, field.name), value)]
            )
            container = getattr(message, field.name)
            for inner, item in items:
                if field.convert:
                    self._append(container, field, item, inner)
                else:
                    self._fill_message(container.add(), field, item, inner, depth + 1)
        elif type(value) is list and not field.takes_list:
            self._unknown(place, key, _NO_LIST)
        elif field.convert:
            self._set_scalar(message, field, value, place)
        else:
            message.ClearField(field.name)
            part = getattr(message, field.name)
            part.SetInParent()
            self._fill_message(part, field, value, (place, field.name), depth + 1)

    def _set_scalar(self, message: Message, field: _Field, value: Any, place: _Place) -> None:
        try:
            setattr(message, field.name, field.convert(value))  # type: ignore[misc]
        except ValueError:
            self._invalid((place, field.name), field.type_name, _shown(value))

    def _append(self, container: Any, field: _Field, value: Any, place: _Place) -> None:
        if type(value) is list:
            self._unknown(place, "", _NO_LIST)
            return
        if type(value) is dict:
            self._invalid(place, field.name, _NO_OBJECT)
            return
        try:
            container.append(field.convert(value))  # type: ignore[misc]
        except ValueError:
            self._invalid(place, field.type_name, _shown(value))

    def _fill_message(self, message: Message, field: _Field, value: Any, place: _Place, depth: int) -> None:
        """Fill one message that `field` holds, from the value at `place`."""
        if depth > MAX_DEPTH:
            self._invalid(place, field.type_name, "Message too deep. Max recursion depth reached.")
        elif field.fill:
            try:
                field.fill(message, value, depth)
            except ValueError as error:
                # A lone surrogate in a string raises a ValueError with a text of Python's own.
                text = "" if isinstance(error, UnicodeError) else str(error)
                said = f"Field '{field.json_name}', {text}" if text else _shown(value)
                self._invalid(place, field.type_name, said)
        elif type(value) is dict:
            self._fill(message, value, place, depth)
        elif type(value) is list:
            self._unknown(place, "", _NO_LIST)
        else:
            self._invalid(place, field.type_name, _shown(value))

    def _set_map(self, message: Message, field: _Field, value: Any, place: _Place, depth: int) -> None:
        if type(value) is not dict:
            kind = "list" if type(value) is list else "primitive value"
            self._invalid(place, "Map", f"Cannot bind a {kind} to map for field '{field.name}'.")
            return
        message.ClearField(field.name)
        entries = getattr(message, field.name)
        for index, (name, item) in enumerate(value.items()):
            # A map is a list of entries on the wire, and Google's error paths show it as one.
            entry = ((place, field.name), index)
            try:
                key = field.map_key(name)  # type: ignore[misc]
                if field.convert:
                    entries[key] = field.convert(item)
                    continue
                part = entries[key]
            except ValueError:
                self._invalid((entry, "value"), field.type_name, _shown(item))
                continue
            self._fill_message(part, field, item, (entry, "value"), depth + 2)

    def _unknown(self, place: _Place, name: str, problem: str) -> None:
        at = f" at '{_path(place)}'" if place else ""
        self._add(place, f'Invalid JSON payload received. Unknown name "{name}"{at}: {problem}')

    def _invalid(self, place: _Place, type_name: str, problem: str) -> None:
        at = f" at '{_path(place)}'" if place else ""
        self._add(place, f"Invalid value{at} ({type_name}), {problem}")

    def _add(self, place: _Place, description: str) -> None:
        if len(self._violations) < MAX_VIOLATIONS:
            # Names and values come from the request and may hold half a surrogate pair.
            readable = description.encode(errors="replace").decode()
            self._violations.append((_path(place), readable))


def _path(place: _Place) -> str:
    steps: list[str] = []
    while place is not None:
        place, step = place
        steps.append(f"[{step}]" if isinstance(step, int) else f".{step}")
    return "".join(reversed(steps)).removeprefix(".")


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):  # may be deeper than json prints
        return "{…}" if isinstance(value, dict) else "[…]"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


@cache
def _fields(descriptor: Descriptor) -> dict[str, _Field]:
    """Return the fields by every name that JSON may use for them."""
    by_name: dict[str, _Field] = {}
    for descriptor_field in descriptor.fields:
        field = _field(descriptor_field)
        by_name[descriptor_field.name] = by_name[descriptor_field.json_name] = field
    return by_name


def _field(field: FieldDescriptor) -> _Field:
    content, key = field, None
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key = converter(field.message_type.fields_by_name["key"])
        content = field.message_type.fields_by_name["value"]
    oneof = field.containing_oneof
    message_type = content.message_type
    type_name = message_type.full_name if message_type is not None else ""
    return _Field(
        name=field.name,
        json_name=field.json_name,
        type_name=_type_name(content),
        # An `optional` field is alone in a oneof that the compiler made up.
        oneof=oneof.name if oneof is not None and len(oneof.fields) > 1 else None,
        repeated=bool(field.is_repeated),
        map_key=key,
        convert=None if message_type is not None else converter(content),
        fill=FILLERS.get(type_name),
        takes_null=type_name == "google.protobuf.Value" and not field.is_repeated,
        takes_list=type_name in ("google.protobuf.Value", "google.protobuf.ListValue"),
    )


def _type_name(field: FieldDescriptor) -> str:
    named = field.message_type or field.enum_type
    if named is not None:
        return f"type.googleapis.com/{named.full_name}"
    return FieldDescriptorProto.Type.Name(field.type)  # type: ignore[arg-type]
