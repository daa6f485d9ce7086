"""Google's discovery document, from which google-api-python-client builds its methods."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from tunesmith.api.downloads import is_download
from tunesmith.api.http_rules import VERSIONS
from tunesmith.api.schemas import Schema, Schemas, describe
from tunesmith.api.surface import Method
from tunesmith.errors import NotFound

NAME = "generativelanguage"
BATCH_PATH = "batch"

_WELL_KNOWN: Mapping[str, Schema] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "google-datetime"},
    "google.protobuf.Duration": {"type": "string", "format": "google-duration"},
    "google.protobuf.FieldMask": {"type": "string", "format": "google-fieldmask"},
    "google.protobuf.Any": {"type": "object", "additionalProperties": {"type": "any"}},
    "google.protobuf.Struct": {"type": "object", "additionalProperties": {"type": "any"}},
    "google.protobuf.Value": {"type": "any"},
    "google.protobuf.ListValue": {"type": "array", "items": {"type": "any"}},
}
_PARAMETERS: Mapping[str, Schema] = {
    "$.xgafv": {"type": "string", "enum": ["1", "2"], "description": "V1 error format."},
    "access_token": {"type": "string", "description": "OAuth access token."},
    "alt": {
        "type": "string",
        "default": "json",
        "enum": ["json", "media", "proto"],
        "description": "Data format for response.",
    },
    "callback": {"type": "string", "description": "JSONP; refused."},
    "fields": {"type": "string", "description": "Selector specifying which fields to include in a response."},
    "key": {"type": "string", "description": "API key."},
    "oauth_token": {"type": "string", "description": "OAuth access token."},
    "prettyPrint": {
        "type": "boolean",
        "default": "true",
        "description": "Returns response with indentations and line breaks.",
    },
    "quotaUser": {"type": "string", "description": "Taken and ignored."},
    "uploadType": {"type": "string", "description": "Taken and ignored."},
    "upload_protocol": {"type": "string", "description": "Taken and ignored."},
}


class Discovery:
    """Makes discovery documents.

    Args:
        methods: What the documents offer.
        revision: The version of this server.
    """

    def __init__(self, methods: Iterable[Method], revision: str) -> None:
        self._methods, self._revision = tuple(methods), revision
        self._parts = lru_cache(maxsize=None)(self._make_parts)

    def document(self, version: str, root_url: str) -> dict[str, Any]:
        """Return the document of one version of the API.

        Args:
            version: Such as v1beta.
            root_url: Where this server is, as the caller sees it; ends with a slash.

        Raises:
            NotFound: There is no such version.
        """
        if version not in VERSIONS:
            raise NotFound(f"There is no version {version} of {NAME}; there are {', '.join(VERSIONS)}.")
        resources, schemas = self._parts(version)
        return {
            "kind": "discovery#restDescription",
            "discoveryVersion": "v1",
            "id": f"{NAME}:{version}",
            "name": NAME,
            "canonicalName": "Generative Language",
            "title": "Tunesmith",
            "description": "Tuning of text models on your own machine, behind the API of Gemini tuning.",
            "version": version,
            "revision": self._revision,
            "ownerDomain": "google.com",
            "ownerName": "Google",
            "documentationLink": f"{root_url}docs",
            "protocol": "rest",
            "rootUrl": root_url,
            "servicePath": "",
            "baseUrl": root_url,
            "batchPath": BATCH_PATH,
            "version_module": True,
            "fullyEncodeReservedExpansion": True,
            "icons": {},
            "parameters": {name: {**about, "location": "query"} for name, about in _PARAMETERS.items()},
            "schemas": schemas,
            "resources": resources,
        }

    def _make_parts(self, version: str) -> tuple[dict[str, Any], dict[str, Schema]]:
        schemas = Schemas("", _WELL_KNOWN)
        root: dict[str, Any] = {}
        for method in self._methods:
            place = root
            for name in method.resource:
                place = place.setdefault("resources", {}).setdefault(name, {})
            place.setdefault("methods", {})[method.name] = _method(method, version, schemas)
        return root.get("resources", {}), schemas.collected


def _method(method: Method, version: str, schemas: Schemas) -> dict[str, Any]:
    parameters: dict[str, Schema] = {
        variable.name: {
            "location": "path",
            "type": "string",
            "required": True,
            "pattern": f"^{'/'.join(_pattern(method, variable.start, variable.stop))}$",
            "description": "Required. A resource name.",
        }
        for variable in method.variables
    }
    order = list(parameters)
    for name, field in method.query:
        parameters[name] = _parameter(field, schemas)
    document: dict[str, Any] = {
        "id": f"{NAME}.{method.id}",
        "path": f"{version}/{_path(method)}",
        "flatPath": f"{version}/{method.flat_path}",
        "httpMethod": method.rule.http_method,
        "description": method.summary,
        "parameters": parameters,
        "parameterOrder": order,
        "response": schemas.ref(method.rpc.output_type),
    }
    if is_download(method.rpc.output_type):
        document["supportsMediaDownload"] = True
    if method.body is not None:
        document["request"] = schemas.ref(method.body)
    return document


def _parameter(field: FieldDescriptor, schemas: Schemas) -> Schema:
    parameter = schemas.value(field) | {"location": "query"}
    if field.is_repeated:
        parameter["repeated"] = True
    if text := describe(field):
        parameter["description"] = text
    return parameter


def _pattern(method: Method, start: int, stop: int) -> list[str]:
    return ["[^/]+" if part == "*" else part for part in method.rule.segments[start:stop]]


def _path(method: Method) -> str:
    """Return the path with its variables as `{+name}`, which expands to several segments."""
    parts = list(method.rule.segments)
    for variable in reversed(method.variables):
        parts[variable.start : variable.stop] = [f"{{+{variable.name}}}"]
    path = "/".join(parts)
    return f"{path}:{method.rule.verb}" if method.rule.verb else path
