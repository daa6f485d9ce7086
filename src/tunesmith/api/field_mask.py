"""Partial responses: `fields=a,b(c,d),e/f` keeps what it names of a response, through lists, maps and Any."""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Self

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from tunesmith import protos
from tunesmith.errors import InvalidArgument

LONGEST = 4096  # characters; Google's URLs hold no more either
MAX_DEPTH = 32

_TOKEN = re.compile(r"\s*(?:([A-Za-z0-9_@$*-]+)|([,()/.]))")
_WELL_KNOWN = "google.protobuf."
# Their JSON is free in form: what it holds is known only once the response is there.
_OPEN = {f"{_WELL_KNOWN}{name}" for name in ("Any", "Struct", "Value", "ListValue")}
_STRINGS = {f"{_WELL_KNOWN}{name}" for name in ("Timestamp", "Duration", "FieldMask")}


class FieldMask:
    """What of a message to keep: names with the masks of what they hold; without names, everything."""

    def __init__(self) -> None:
        self._parts: dict[str, FieldMask] = {}
        self._whole = False

    @classmethod
    def parse(cls, text: str, descriptor: Descriptor) -> Self:
        """Return the mask that a `fields` parameter means for a message type; names in camelCase or snake_case.

        Raises:
            InvalidArgument: It cannot be read, or names a field that the message type has not.
        """
        if len(text) > LONGEST:
            raise InvalidArgument(f"Invalid field selection: it is longer than {LONGEST} characters.")
        mask = cls()
        tokens = _Tokens(text)
        _selection(tokens, [mask], 0)
        tokens.expect(None)
        _check(mask, descriptor, "")
        return mask

    def apply(self, message: Message) -> Message:
        """Return a copy of a message with only what the mask names; never changes `message`."""
        copy = type(message)()
        copy.CopyFrom(message)
        self._prune(copy)
        return copy

    def into(self, name: str) -> "FieldMask":
        """Return the mask of what `name` holds, adding it if there is none."""
        return self._parts.setdefault(name, FieldMask())

    def keep_all(self) -> None:
        """Let the mask name everything from here on down."""
        self._whole = True

    def parts(self) -> Iterator[tuple[str, "FieldMask"]]:
        """Yield what is named; nothing when everything is kept."""
        if not self._whole:
            yield from self._parts.items()

    def _of(self, *names: str) -> "FieldMask | None":
        """Return the mask of what goes by any of `names`; None when it is not to be kept."""
        if self._whole:
            return self
        found = [self._parts[name] for name in {*names, "*"} if name in self._parts]
        if len(found) < 2:
            return found[0] if found else None
        merged = FieldMask()
        for mask in found:
            merged._merge(mask)
        return merged

    def _merge(self, other: "FieldMask") -> None:
        self._whole = self._whole or other._whole
        for name, mask in other._parts.items():
            self.into(name)._merge(mask)

    def _prune(self, message: Any) -> None:
        prune = _PRUNERS.get(message.DESCRIPTOR.full_name)
        if self._whole:
            return
        if prune is not None:
            prune(self, message)
            return
        for field, value in message.ListFields():
            mask = self._of(field.name, field.json_name)
            if mask is None or (not mask._whole and _is_scalar(field.message_type)):
                message.ClearField(field.name)
            elif not mask._whole:
                mask._prune_field(field, value)

    def _prune_field(self, field: FieldDescriptor, value: Any) -> None:
        kind: Any = field.message_type
        if kind.GetOptions().map_entry:
            self._prune_map(value, kind.fields_by_name["value"].message_type is not None)
        elif field.is_repeated:
            for item in value:
                self._prune(item)
        else:
            self._prune(value)

    def _prune_map(self, entries: Any, of_messages: bool) -> None:
        for key in list(entries):
            mask = self._of(str(key))
            if mask is None:
                del entries[key]
            elif of_messages:
                mask._prune(entries[key])

    def _prune_any(self, packed: Any) -> None:
        try:
            descriptor = protos.POOL.FindMessageTypeByName(packed.type_url.rpartition("/")[2])
        except KeyError:
            return
        message = protos.message_class(descriptor).FromString(packed.value)
        self._prune(message)
        packed.value = message.SerializeToString()

    def _prune_value(self, value: Any) -> None:
        kind = value.WhichOneof("kind")
        if kind in ("struct_value", "list_value"):
            self._prune(getattr(value, kind))


_PRUNERS = {
    f"{_WELL_KNOWN}Any": FieldMask._prune_any,
    f"{_WELL_KNOWN}Struct": lambda mask, struct: mask._prune_map(struct.fields, of_messages=True),
    f"{_WELL_KNOWN}ListValue": lambda mask, values: [mask._prune(value) for value in values.values],
    f"{_WELL_KNOWN}Value": FieldMask._prune_value,
}


@lru_cache(maxsize=256)
def field_mask(text: str, descriptor: Descriptor) -> FieldMask:
    """Return `FieldMask.parse`'s result, remembered; clients send the same few again and again."""
    return FieldMask.parse(text, descriptor)


class _Tokens:
    """The names and signs of a `fields` parameter, one ahead."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self.next: str | None = None
        self.take()

    def take(self) -> str | None:
        """Return the next token and move on."""
        token, self.next = self.next, None
        if self._text[self._at :].strip():
            found = _TOKEN.match(self._text, self._at)
            if found is None:
                raise self.refusal()
            self._at, self.next = found.end(), found[1] or found[2]
        return token

    def expect(self, token: str | None) -> None:
        """Take `token`, or refuse the text; None is its end."""
        if self.next != token:
            raise self.refusal()
        self.take()

    def refusal(self) -> InvalidArgument:
        """Return the error that refuses the whole text."""
        return _invalid(self._text)


def _selection(tokens: _Tokens, masks: list[FieldMask], depth: int) -> None:
    """Read `a,b(c,d),e/f` into every one of `masks`."""
    if depth > MAX_DEPTH:
        raise tokens.refusal()
    while True:
        _path(tokens, masks, depth)
        if tokens.next != ",":
            return
        tokens.take()


def _path(tokens: _Tokens, masks: list[FieldMask], depth: int) -> None:
    while True:
        name = tokens.take()
        if name is None or name in ",()/.":
            raise tokens.refusal()
        masks = [mask.into(str(name)) for mask in masks]
        depth += 1
        if tokens.next not in ("/", "."):  # the header X-Goog-FieldMask separates with dots
            break
        tokens.take()
    if depth > MAX_DEPTH:
        raise tokens.refusal()
    if tokens.next == "(":
        tokens.take()
        _selection(tokens, masks, depth)
        tokens.expect(")")
    else:
        for mask in masks:
            mask.keep_all()


def _check(mask: FieldMask, descriptor: Descriptor | None, path: str) -> None:
    """Refuse names that a message type has not; what is free in form takes any."""
    for name, inner in mask.parts():
        if descriptor is not None and descriptor.full_name in _OPEN:
            return
        here = f"{path}/{name}".removeprefix("/")
        if descriptor is None or descriptor.full_name in _STRINGS:
            raise _invalid(here)
        if name == "*":
            _check_any_of(inner, descriptor, here)
        elif (field := _field(descriptor, name)) is not None:
            _check_field(inner, field, here)
        else:
            raise _invalid(here)


def _check_any_of(mask: FieldMask, descriptor: Descriptor, path: str) -> None:
    """Refuse a mask under `*` that fits none of the fields."""
    refusals = []
    for field in descriptor.fields:
        try:
            return _check_field(mask, field, path)
        except InvalidArgument as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]
    return None


def _check_field(mask: FieldMask, field: FieldDescriptor, path: str) -> None:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        for key, inner in mask.parts():
            _check(inner, kind.fields_by_name["value"].message_type, f"{path}/{key}")
    else:
        _check(mask, kind, path)


def _field(descriptor: Descriptor, name: str) -> FieldDescriptor | None:
    found = descriptor.fields_by_name.get(name)
    return found or next((field for field in descriptor.fields if field.json_name == name), None)


def _is_scalar(descriptor: Descriptor | None) -> bool:
    """Whether there is nothing within: no message, or one whose JSON is a string, such as Timestamp."""
    return descriptor is None or descriptor.full_name in _STRINGS


def _invalid(selection: str) -> InvalidArgument:
    # The message is what Google's older front end says, the violation what its newer one does.
    description = f"Error expanding 'fields' parameter. Cannot find matching fields for path '{selection}'."
    return InvalidArgument.at([(selection, description)], f"Invalid field selection {selection}")
