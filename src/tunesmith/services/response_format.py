"""What an answer must be: `responseMimeType`, with the schema of either kind, as a constraint."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from tunesmith import protos
from tunesmith.engines.base import Constraint
from tunesmith.errors import InvalidArgument

MIME_TYPES = ("text/plain", "application/json", "text/x.enum")
LARGEST_INTEGER = 2**53 - 1
"""Of a number without bounds: what every JSON parser reads exactly. Small models write digits without end."""
SMALLEST_PART = 1e-9
"""Of a number: so it has an end behind its point too."""

_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
"""Formats of strings that answers are held to; any other is a remark, as in OpenAPI and JSON Schema."""

_KINDS = {1: "string", 2: "number", 3: "integer", 4: "boolean", 5: "array", 6: "object", 7: "null"}
"""By the number of a Schema's type."""
_ONE_SCHEMA = {"items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"}
_SCHEMA_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
_SCHEMA_MAPS = {"properties", "patternProperties", "$defs", "definitions"}
_NOT_SCHEMAS = {"x-guidance"}
"""Keywords that would change how the engine reads a schema."""
_OPEN = {"allOf", "anyOf", "oneOf", "$ref", "additionalProperties", "patternProperties", "unevaluatedProperties"}
"""Keywords that say what other properties there may be, or may bring some."""


def constraint(config: protos.GenerationConfig, path: str) -> Constraint | None:
    """Return what a request's answers must be; None when anything will do.

    Args:
        config: The request's.
        path: Where it stands in the request, for errors.

    Raises:
        InvalidArgument: The fields do not go together, or a schema is none.
    """
    mime_type = config.response_mime_type or "text/plain"
    field, schema = _schema(config, path)
    if mime_type not in MIME_TYPES:
        _refuse(f"{path}.response_mime_type", f"must be {_either(MIME_TYPES)}, not {mime_type!r}")
    if mime_type == "text/plain":
        if schema is not None:
            _refuse(f"{path}.response_mime_type", "must be application/json or text/x.enum with a schema")
        return None
    if mime_type == "application/json":
        return Constraint(field, schema=schema or {})
    choices = None if schema is None else schema.get("enum")
    if not choices or not all(isinstance(choice, str) and choice for choice in choices):
        _refuse(field, "must have an enum of texts, none of them empty, for text/x.enum")
    return Constraint(field, choices=tuple(dict.fromkeys(choices)))


def _schema(config: protos.GenerationConfig, path: str) -> tuple[str, dict[str, Any] | None]:
    """Return the name of the field that has a request's schema, and the schema as JSON Schema."""
    given = [
        name
        for name in ("response_schema", "response_json_schema", "response_json_schema_ordered")
        if config.HasField(name)
    ]
    if len(given) > 1:
        _refuse(f"{path}.response_json_schema", "give response_schema or response_json_schema, not both")
    if not given:
        return f"{path}.response_schema", None
    if given == ["response_schema"]:
        field = f"{path}.response_schema"
        return field, _from_message(config.response_schema, field)
    field = f"{path}.response_json_schema"
    schema = _plain(getattr(config, given[0]))
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, dict):
        _refuse(field, f"must be an object, not {schema!r}")
    return field, _tidied(schema, closes=not _joins(schema))


def _from_message(schema: protos.Schema, path: str) -> dict[str, Any]:
    """Return Google's Schema as JSON Schema."""
    kind = _KINDS.get(schema.type)
    made: dict[str, Any] = {"type": kind} if kind else {}
    if kind in ("integer", "number"):
        made |= _number(schema, kind, path)
    elif schema.enum:
        made["enum"] = list(schema.enum)
    if kind == "string":
        made |= {"minLength": schema.min_length} if schema.min_length else {}
        made |= {"maxLength": schema.max_length} if schema.max_length else {}
        made |= {"pattern": schema.pattern} if schema.pattern else {}
        made |= {"format": schema.format} if schema.format in _FORMATS else {}
    if kind == "array":
        made |= {"items": _from_message(schema.items, f"{path}.items")} if schema.HasField("items") else {}
        made |= {"minItems": schema.min_items} if schema.min_items else {}
        made |= {"maxItems": schema.max_items} if schema.max_items else {}
    if kind == "object":
        made |= _object(schema, path)
    if schema.any_of:
        made["anyOf"] = [_from_message(one, f"{path}.any_of[{i}]") for i, one in enumerate(schema.any_of)]
    return {"anyOf": [made, {"type": "null"}]} if schema.nullable else made


def _number(schema: protos.Schema, kind: str, path: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if schema.HasField("minimum"):
        made["minimum"] = _whole(schema.minimum)
    if schema.HasField("maximum"):
        made["maximum"] = _whole(schema.maximum)
    if schema.enum:
        try:
            made["enum"] = [_whole(float(number)) for number in schema.enum]
        except ValueError:
            _refuse(f"{path}.enum", f"must be numbers, as the type is {kind.upper()}")
        return made
    return _bounded(made, [kind])


def _object(schema: protos.Schema, path: str) -> dict[str, Any]:
    """Return what an object has; one that lists its properties has no others."""
    for field in ("required", "property_ordering"):
        for number, name in enumerate(getattr(schema, field)):
            if schema.properties and name not in schema.properties:
                _refuse(f"{path}.{field}[{number}]", f"there is no property {name!r}")
    made: dict[str, Any] = {}
    if schema.properties:
        names = _in_order(schema.properties, schema.property_ordering, schema.required)
        made["properties"] = {
            name: _from_message(schema.properties[name], f"{path}.properties[{name}]") for name in names
        }
        if not schema.any_of:
            made["additionalProperties"] = False
    made |= {"required": list(schema.required)} if schema.required else {}
    made |= {"minProperties": schema.min_properties} if schema.min_properties else {}
    made |= {"maxProperties": schema.max_properties} if schema.max_properties else {}
    return made


def _tidied(schema: Any, closes: bool) -> Any:
    """Return a JSON Schema that says what is left open, in a way that every answer is still one of the schema's.

    Args:
        schema: It, or any value that stands where one should.
        closes: Whether objects that list their properties get no others.
    """
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for key in sorted(schema.keys() - _NOT_SCHEMAS, key=lambda key: (key != "properties", key)):
        value = schema[key]
        if key in _ONE_SCHEMA:
            made[key] = _tidied(value, closes)
        elif key in _SCHEMA_LISTS and isinstance(value, list):
            # What stands beside anyOf is asked for too, and may be the properties.
            inside = closes and not schema.keys() & {"properties", "required"}
            made[key] = [_tidied(one, inside) for one in value]
        elif key in _SCHEMA_MAPS and isinstance(value, dict):
            names = _in_order(value, schema.get("propertyOrdering"), schema.get("required"))
            made[key] = {name: _tidied(value[name], closes) for name in names}
        else:
            made[key] = value
    return _filled(made, closes)


def _filled(made: dict[str, Any], closes: bool) -> dict[str, Any]:
    """Say what one schema leaves open; see `_tidied`."""
    kind = made.get("type")
    if isinstance(kind, str) and kind.lower() in _KINDS.values():
        kind = made["type"] = kind.lower()
    if made.get("format") not in _FORMATS:
        made.pop("format", None)
    kinds = kind if isinstance(kind, list) else [kind]
    if not made.keys() & {"enum", "const"}:
        made = _bounded(made, kinds)
    if closes and "properties" in made and not made.keys() & _OPEN:
        made["additionalProperties"] = False
    return made


def _bounded(schema: dict[str, Any], kinds: Sequence[Any]) -> dict[str, Any]:
    """Return the schema of a value of some types with bounds on both sides, if it may be a number."""
    made = dict(schema)
    if "number" in kinds:
        made.setdefault("multipleOf", SMALLEST_PART)
    elif "integer" not in kinds:
        return made
    if not made.keys() & {"minimum", "exclusiveMinimum"}:
        made["minimum"] = -LARGEST_INTEGER
    if not made.keys() & {"maximum", "exclusiveMaximum"}:
        made["maximum"] = LARGEST_INTEGER
    return made


def _in_order(names: Iterable[str], *orders: Any) -> list[str]:
    """Return names as the first order that has them says, the rest by name: messages lose their own order."""
    known = set(names)
    said = [name for order in orders if isinstance(order, Sequence) for name in order if name in known]
    return list(dict.fromkeys([*said, *sorted(known)]))


def _joins(value: Any) -> bool:
    """Return whether a schema makes one object of several schemas, each with some of its properties."""
    if isinstance(value, dict):
        return "allOf" in value or value.keys() >= {"$ref", "properties"} or any(map(_joins, value.values()))
    return isinstance(value, list) and any(map(_joins, value))


def _plain(value: protos.Value) -> Any:
    """Return a JSON value as Python's."""
    kinds: Mapping[str | None, Callable[[], Any]] = {
        "struct_value": lambda: {key: _plain(one) for key, one in value.struct_value.fields.items()},
        "list_value": lambda: [_plain(one) for one in value.list_value.values],
        "number_value": lambda: _whole(value.number_value),
        "string_value": lambda: value.string_value,
        "bool_value": lambda: value.bool_value,
    }
    return kinds.get(value.WhichOneof("kind"), lambda: None)()


def _whole(number: float) -> int | float:
    """Return a number that is one as an integer, as lengths and bounds are written."""
    return int(number) if number.is_integer() and abs(number) <= LARGEST_INTEGER else number


def _either(texts: Sequence[str]) -> str:
    return f"{', '.join(texts[:-1])} or {texts[-1]}"


def _refuse(field: str, reason: str) -> NoReturn:
    raise InvalidArgument.at([(field, reason)])
