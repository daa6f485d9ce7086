"""What google.api.field_behavior asks for: REQUIRED given, OUTPUT_ONLY ignored, INPUT_ONLY kept back."""

from collections.abc import Iterator
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

from tunesmith import protos
from tunesmith.api.http_rules import rules_of
from tunesmith.errors import InvalidArgument

MAX_VIOLATIONS = 50
_REQUIRED, _OUTPUT_ONLY, _INPUT_ONLY = 2, 3, 4  # google.api.FieldBehavior
_ANY = "google.protobuf.Any"

# RPCs that make something need all of it; an update brings the part that changes.
_WHOLE = ("Create", "Generate", "StreamGenerate", "Tune")

_NOT_ENFORCED = {
    f"google.ai.generativelanguage.v1beta.{field}"
    for field in (
        # services/creation.py explains missing training data, and names each row that is not whole.
        "TunedModel.tuning_task",
        "TuningTask.training_data",
        "TuningExample.output",
        # Google takes function declarations and schemas without these.
        "FunctionDeclaration.description",
        "Schema.type",
    )
}
# Without presence, their zero is a value that cannot be told from a missing one.
_ZERO_IS_A_VALUE = {
    FieldDescriptor.CPPTYPE_BOOL,
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
    FieldDescriptor.CPPTYPE_FLOAT,
    FieldDescriptor.CPPTYPE_DOUBLE,
}


class Validator:
    """The checks of one RPC's requests; made once, used for each request."""

    def __init__(self, rpc: MethodDescriptor) -> None:
        self._name = rpc.input_type.name
        self._whole = rpc.name.startswith(_WHOLE)
        paths = [path for rule in rules_of(rpc) for path, _, _ in rule.variables if "." in path]
        # An update finds its resource by `tuned_model.name`, an OUTPUT_ONLY field that must stay.
        self._resource, _, self._key = paths[0].partition(".") if paths else ("", "", "")

    def check(self, request: Message) -> None:
        """Clear what only the server may say, and refuse a request that lacks what it must say.

        Raises:
            InvalidArgument: Names every missing field, up to 50.
        """
        name = getattr(getattr(request, self._resource), self._key) if self._resource else None
        _clear(request, _OUTPUT_ONLY)
        if name:
            setattr(getattr(request, self._resource), self._key, name)
        violations = []
        for field, path in self._missing(request, self._name):
            violations.append((f"{path}.{field}", f"{field} is not specified"))
            if len(violations) == MAX_VIOLATIONS:
                break
        if violations:
            raise InvalidArgument.at(violations)

    def _missing(self, message: Any, path: str) -> Iterator[tuple[str, str]]:
        for field in _fields_with(message.DESCRIPTOR, _REQUIRED):
            given = message.HasField(field.name) if field.has_presence else getattr(message, field.name)
            if not given:
                yield field.name, path
        if self._whole:
            for field in _fields_towards(message.DESCRIPTOR, _REQUIRED):
                for step, part in _parts(message, field):
                    yield from self._missing(part, f"{path}.{step}")


def without_input_only(message: Message) -> Message:
    """Return a response without the fields that are for requests only; never changes `message`."""
    descriptor: Any = message.DESCRIPTOR
    if not _leads_to(descriptor, _INPUT_ONLY):
        return message
    copy = type(message)()
    copy.CopyFrom(message)
    _clear(copy, _INPUT_ONLY)
    return copy


def _clear(message: Any, behavior: int) -> None:
    if message.DESCRIPTOR.full_name == _ANY:
        _clear_packed(message, behavior)
        return
    for field in _fields_with(message.DESCRIPTOR, behavior):
        message.ClearField(field.name)
    for field in _fields_towards(message.DESCRIPTOR, behavior):
        for _, part in _parts(message, field):
            _clear(part, behavior)


def _clear_packed(packed: Any, behavior: int) -> None:
    try:
        descriptor = protos.POOL.FindMessageTypeByName(packed.type_url.rpartition("/")[2])
    except KeyError:
        return
    if _leads_to(descriptor, behavior):
        message = protos.message_class(descriptor).FromString(packed.value)
        _clear(message, behavior)
        packed.value = message.SerializeToString()


def _parts(message: Any, field: FieldDescriptor) -> Iterator[tuple[str, Any]]:
    """Yield the messages that a field holds, each with its step of the path."""
    if not field.is_repeated:
        if message.HasField(field.name):
            yield field.name, getattr(message, field.name)
    elif _is_map(field):
        for key, part in getattr(message, field.name).items():
            yield f"{field.name}[{key}]", part
    else:
        for index, part in enumerate(getattr(message, field.name)):
            yield f"{field.name}[{index}]", part


@cache
def _fields_with(descriptor: Descriptor, behavior: int) -> tuple[FieldDescriptor, ...]:
    """Return the fields of a message that have a behavior."""
    return tuple(field for field in descriptor.fields if _has(field, behavior))


@cache
def _fields_towards(descriptor: Descriptor, behavior: int) -> tuple[FieldDescriptor, ...]:
    """Return the fields whose messages have, at any depth, a field with a behavior."""
    return tuple(
        field
        for field in descriptor.fields
        if (inner := _message_of(field)) is not None and _leads_to(inner, behavior)
    )


@cache
def _leads_to(descriptor: Descriptor, behavior: int) -> bool:
    seen: set[str] = set()
    waiting = [descriptor]
    while waiting:
        kind = waiting.pop()
        if kind.full_name in seen:
            continue
        seen.add(kind.full_name)
        if kind.full_name == _ANY and behavior == _INPUT_ONLY:
            return True
        if _fields_with(kind, behavior):
            return True
        waiting += [inner for field in kind.fields if (inner := _message_of(field)) is not None]
    return False


def _has(field: FieldDescriptor, behavior: int) -> bool:
    if behavior not in protos.extension(field, "google.api.field_behavior"):
        return False
    if behavior != _REQUIRED:
        return True
    countable = not field.has_presence and not field.is_repeated and field.cpp_type in _ZERO_IS_A_VALUE
    return field.full_name not in _NOT_ENFORCED and not countable


def _message_of(field: FieldDescriptor) -> Descriptor | None:
    """Return the type of the messages that a field holds; None for scalars and maps of scalars."""
    inner = field.message_type
    if inner is not None and _is_map(field):
        return inner.fields_by_name["value"].message_type
    return inner


@cache
def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)
