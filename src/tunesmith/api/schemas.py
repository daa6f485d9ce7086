"""Messages as JSON schemas, in Google's discovery dialect and in OpenAPI's."""

from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from tunesmith import protos
from tunesmith.api.surface import IMMUTABLE, INPUT_ONLY, OUTPUT_ONLY, REQUIRED, has_behavior

Schema = dict[str, Any]

_ANY_JSON = "Any JSON value."
_SCALARS: Mapping[int, Schema] = {
    FieldDescriptor.TYPE_DOUBLE: {"type": "number", "format": "double"},
    FieldDescriptor.TYPE_FLOAT: {"type": "number", "format": "float"},
    FieldDescriptor.TYPE_INT64: {"type": "string", "format": "int64"},
    FieldDescriptor.TYPE_UINT64: {"type": "string", "format": "uint64"},
    FieldDescriptor.TYPE_INT32: {"type": "integer", "format": "int32"},
    FieldDescriptor.TYPE_UINT32: {"type": "integer", "format": "uint32"},
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "format": "byte"},
}
_BEHAVIORS = (
    (REQUIRED, "Required."),
    (OUTPUT_ONLY, "Output only."),
    (INPUT_ONLY, "Input only: never returned."),
    (IMMUTABLE, "Immutable."),
)


def schema_name(kind: Descriptor | EnumDescriptor) -> str:
    """Return the name of a message's schema: without its package, nested ones joined to their parents."""
    package: str = kind.file.package
    return kind.full_name.removeprefix(f"{package}.").replace(".", "")


class Schemas:
    """Collects the schemas that a document needs.

    Args:
        prefix: What stands before the name of a schema in a `$ref`.
        well_known: The schemas of protobuf's own messages, by full name.
        openapi: Whether to write in OpenAPI's dialect.
    """

    def __init__(self, prefix: str, well_known: Mapping[str, Schema], *, openapi: bool = False) -> None:
        self.collected: dict[str, Schema] = {}
        self._prefix, self._well_known, self._openapi = prefix, well_known, openapi

    def ref(self, kind: Descriptor) -> Schema:
        """Return a reference to a message's schema, which is collected."""
        if kind.full_name in self._well_known:
            return dict(self._well_known[kind.full_name])
        name = schema_name(kind)
        if name not in self.collected:
            schema = self.collected[name] = self._named(name)
            if text := protos.comment(kind.full_name):
                schema["description"] = text
            schema["properties"] = {field.json_name: self.field(field) for field in kind.fields}
        return {"$ref": self._prefix + name}

    def field(self, field: FieldDescriptor) -> Schema:
        """Return the schema of a field, described."""
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            schema: Schema = {
                "type": "object",
                "additionalProperties": self.value(kind.fields_by_name["value"]),
            }
        elif field.is_repeated:
            schema = {"type": "array", "items": self.value(field)}
        else:
            schema = self.value(field)
        if text := describe(field):
            schema["description"] = text
        if has_behavior(field, OUTPUT_ONLY):
            schema["readOnly"] = True
        if self._openapi and has_behavior(field, INPUT_ONLY):
            schema["writeOnly"] = True
        return schema

    def value(self, field: FieldDescriptor) -> Schema:
        """Return the schema of one value of a field."""
        if field.message_type is not None:
            return self.ref(field.message_type)
        if field.enum_type is not None:
            return {"type": "string", "enum": [value.name for value in field.enum_type.values]}
        return dict(_SCALARS[field.type])

    def _named(self, name: str) -> Schema:
        if self._openapi:
            return {"type": "object", "additionalProperties": False}
        return {"id": name, "type": "object"}


def describe(field: FieldDescriptor) -> str:
    """Return what the descriptor and our own .proto files say of a field besides its type."""
    behaviors = (text for behavior, text in _BEHAVIORS if has_behavior(field, behavior))
    return " ".join(filter(None, [*behaviors, protos.comment(field.full_name)]))
