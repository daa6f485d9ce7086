"""The OpenAPI 3.1 document of the API."""

from collections.abc import Iterable, Mapping
from typing import Any

from tunesmith.api.downloads import is_download
from tunesmith.api.http_rules import VERSIONS
from tunesmith.api.schemas import Schema, Schemas, describe
from tunesmith.api.surface import REQUIRED, Method, has_behavior, words

Document = dict[str, Any]

DEFAULT_VERSION = "v1beta"
FILE = "application/octet-stream"
ABOUT = (
    "Tunesmith tunes text models on your own machine and speaks the API of Google's Gemini tuning service. "
    "Every method answers alike under each version. Requests may spell names in camelCase or snake_case; "
    "an unknown name is an error, and zero, empty and false fields are left out of responses."
)

_SCHEMAS = "#/components/schemas/"
_ANY: Schema = {"type": "object", "properties": {"@type": {"type": "string"}}, "required": ["@type"]}
_WELL_KNOWN: Mapping[str, Schema] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]{1,9})?s$"},
    "google.protobuf.FieldMask": {"type": "string", "description": "Names of fields, separated by commas."},
    "google.protobuf.Any": _ANY,
    "google.protobuf.Struct": {"type": "object"},
    "google.protobuf.Value": {},
    "google.protobuf.ListValue": {"type": "array", "items": {}},
}
_ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "code": {"type": "integer", "description": "The HTTP status."},
                "message": {"type": "string", "description": "What went wrong and what to do about it."},
                "status": {"type": "string", "description": "The canonical name, such as NOT_FOUND."},
                "details": {"type": "array", "items": _ANY},
            },
            "required": ["code", "message", "status"],
            "additionalProperties": False,
        }
    },
    "required": ["error"],
    "additionalProperties": False,
}
_SECURITY: Mapping[str, Schema] = {
    "accessToken": {
        "type": "http",
        "scheme": "bearer",
        "description": "An access token: `tunesmith token EMAIL` prints one. It wins over an API key.",
    },
    "apiKey": {
        "type": "apiKey",
        "in": "header",
        "name": "x-goog-api-key",
        "description": "An API key: `tunesmith api-key create EMAIL` prints one.",
    },
    "apiKeyInQuery": {"type": "apiKey", "in": "query", "name": "key", "description": "The same, in the URL."},
}
_PARAMETERS: Mapping[str, Schema] = {
    "fields": {
        "name": "fields",
        "in": "query",
        "description": "What of the response to keep, such as `tunedModels(name,state),nextPageToken`.",
        "schema": {"type": "string"},
    },
    "prettyPrint": {
        "name": "prettyPrint",
        "in": "query",
        "description": "Whether JSON comes with a key a line.",
        "schema": {"type": "boolean", "default": True},
    },
    "alt": {
        "name": "alt",
        "in": "query",
        "description": "The form of the response; `proto` is protobuf's own encoding.",
        "schema": {"type": "string", "enum": ["json", "proto"], "default": "json"},
    },
    "altOfStreams": {
        "name": "alt",
        "in": "query",
        "description": "`json` streams one array, `sse` server-sent events, `proto` a google.rpc.StreamBody.",
        "schema": {"type": "string", "enum": ["json", "sse", "proto"], "default": "json"},
    },
    "altOfDownloads": {
        "name": "alt",
        "in": "query",
        "description": "`media` says what is so anyway: the answer is the file.",
        "schema": {"type": "string", "enum": ["json", "media"], "default": "json"},
    },
}
_TEXT = {"parts": [{"text": "LXIII"}]}
_EXAMPLES: Mapping[str, Schema] = {
    "CreateTunedModel": {
        "displayName": "number generator",
        "baseModel": "models/gemini-1.0-pro-001",
        "tuningTask": {
            "hyperparameters": {"epochCount": 5, "batchSize": 4, "learningRate": 0.001},
            "trainingData": {"examples": {"examples": [{"textInput": "1", "output": "2"}]}},
        },
    },
    "UpdateTunedModel": {"description": "Says the next number."},
    "CreatePermission": {"granteeType": "USER", "emailAddress": "reader@example.com", "role": "READER"},
    "UpdatePermission": {"role": "WRITER"},
    "TransferOwnership": {"emailAddress": "owner@example.com"},
    "GenerateContent": {"contents": [_TEXT]},
    "StreamGenerateContent": {"contents": [_TEXT]},
    "CountTokens": {"contents": [_TEXT]},
    "EmbedContent": {"content": _TEXT},
    "BatchEmbedContents": {"requests": [{"model": "models/gemma-3-270m", "content": _TEXT}]},
    "GenerateText": {"prompt": {"text": "LXIII"}},
    "CountTextTokens": {"prompt": {"text": "LXIII"}},
    "CancelOperation": {},
    "TuneModel": {
        "tunedModel": {
            "displayName": "number generator",
            "baseModel": "models/gemma-3-270m",
            "tuningTask": {"trainingData": {"examples": {"examples": [{"textInput": "1", "output": "2"}]}}},
        },
        "options": {"validationFraction": 0.1, "patience": 3, "keep": "BEST", "seed": 7},
    },
    "PauseTuning": {},
    "ResumeTuning": {},
}
"""A request body for each RPC that takes one."""


def openapi_document(methods: Iterable[Method], version: str, root_url: str) -> Document:
    """Return the document.

    Args:
        methods: What it offers.
        version: The version of this server.
        root_url: Where this server is, as the caller sees it; ends with a slash.
    """
    schemas = Schemas(_SCHEMAS, _WELL_KNOWN, openapi=True)
    paths: dict[str, Document] = {}
    tags: dict[str, None] = {}
    for method in methods:
        path = paths.setdefault(f"/{method.flat_path}", {})
        path[method.rule.http_method.lower()] = _operation(method, schemas)
        tags.setdefault(tag(method))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tunesmith",
            "version": version,
            "description": ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [
            {
                "url": f"{root_url}{{version}}",
                "variables": {"version": {"default": DEFAULT_VERSION, "enum": list(VERSIONS)}},
            }
        ],
        "security": [{name: []} for name in _SECURITY],
        "tags": [{"name": name} for name in tags],
        "paths": paths,
        "components": {
            "schemas": {"Error": _ERROR, **dict(sorted(schemas.collected.items()))},
            "parameters": dict(_PARAMETERS),
            "securitySchemes": dict(_SECURITY),
            "responses": {"Error": {"description": "What went wrong.", "content": _content(_ref("Error"))}},
        },
    }


def tag(method: Method) -> str:
    """Return the heading under which a method belongs."""
    return " ".join(words(name) for name in method.resource)


def _operation(method: Method, schemas: Schemas) -> Document:
    operation: Document = {
        "operationId": method.id,
        "tags": [tag(method)],
        "summary": method.summary,
        "parameters": _parameters(method, schemas),
        "responses": {
            "200": {"description": "Done.", "content": _answer(method, schemas)},
            "default": {"$ref": "#/components/responses/Error"},
        },
    }
    if method.rpc.server_streaming and not is_download(method.rpc.output_type):
        # An error before the first message comes in an array too, unless the stream is of events.
        of_errors = {"oneOf": [_ref("Error"), {"type": "array", "items": _ref("Error")}]}
        operation["responses"]["default"] = {"description": "What went wrong.", "content": _content(of_errors)}
    if method.body is not None:
        content: Document = {"schema": schemas.ref(method.body)}
        if method.rpc.name in _EXAMPLES:
            content["example"] = _EXAMPLES[method.rpc.name]
        operation["requestBody"] = {"content": {"application/json": content, "application/x-protobuf": {}}}
    return operation


def _parameters(method: Method, schemas: Schemas) -> list[Schema]:
    parameters: list[Schema] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in method.ids
    ]
    for name, field in method.query:
        schema = schemas.value(field)
        parameter: Schema = {
            "name": name,
            "in": "query",
            "schema": {"type": "array", "items": schema} if field.is_repeated else schema,
        }
        if has_behavior(field, REQUIRED):
            parameter["required"] = True
        if text := describe(field):
            parameter["description"] = text
        parameters.append(parameter)
    if is_download(method.rpc.output_type):
        return [*parameters, {"$ref": "#/components/parameters/altOfDownloads"}]
    alt = "altOfStreams" if method.rpc.server_streaming else "alt"
    return [*parameters, *({"$ref": f"#/components/parameters/{name}"} for name in ("fields", "prettyPrint", alt))]


def _answer(method: Method, schemas: Schemas) -> Document:
    if is_download(method.rpc.output_type):
        return {FILE: {"schema": {"type": "string", "format": "binary"}}}
    schema = schemas.ref(method.rpc.output_type)
    if not method.rpc.server_streaming:
        return _content(schema)
    # An error may end a stream that has begun.
    parts = {"type": "array", "items": {"anyOf": [schema, _ref("Error")]}}
    return {**_content(parts), "text/event-stream": {}}


def _content(schema: Schema) -> Document:
    return {"application/json": {"schema": schema}, "application/x-protobuf": {}}


def _ref(name: str) -> Schema:
    return {"$ref": _SCHEMAS + name}
