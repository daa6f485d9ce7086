"""The API as its readers see it: one entry for each way to call an RPC over HTTP, from the descriptors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor

from tunesmith import protos
from tunesmith.api.http_rules import HttpRule, rules_of

REQUIRED, OUTPUT_ONLY, INPUT_ONLY, IMMUTABLE = 2, 3, 4, 5
"""google.api.FieldBehavior."""

_STANDARD = {"GET": "get", "POST": "create", "PATCH": "patch", "DELETE": "delete"}
_ORDER = ("create", "list", "get", "patch", "delete", "cancel")
_WELL_KNOWN_TEXT = {"google.protobuf.Timestamp", "google.protobuf.Duration", "google.protobuf.FieldMask"}
_SINGULAR = {"corpora": "corpus"}


@dataclass(frozen=True)
class PathVariable:
    """A variable of the path as Google's documents have it: `name`, which is `tunedModels/{id}`."""

    name: str
    field: str  # path of the request's field, such as tuned_model.name
    start: int
    stop: int


@dataclass(frozen=True)
class Method:
    """One way to call an RPC.

    Attributes:
        rule: The HTTP rule.
        resource: Where it belongs, such as ("tunedModels", "permissions").
        name: What it is called there, such as `list`.
        summary: A sentence that says what it does.
    """

    rule: HttpRule
    resource: tuple[str, ...]
    name: str
    summary: str

    @property
    def rpc(self) -> MethodDescriptor:
        """The RPC."""
        return self.rule.rpc

    @property
    def id(self) -> str:
        """A name that no other method has."""
        return ".".join((*self.resource, self.name))

    @cached_property
    def variables(self) -> tuple[PathVariable, ...]:
        """The variables of the path."""
        return tuple(
            PathVariable(path.rpartition(".")[2], path, start, stop) for path, start, stop in self.rule.variables
        )

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The path's wildcards by name, such as ("tunedModel", "permission")."""
        segments = self.rule.segments
        return tuple(singular(segments[at - 1]) for at, segment in enumerate(segments) if segment == "*")

    @cached_property
    def flat_path(self) -> str:
        """The path after the version, a variable for each id: `tunedModels/{tunedModel}:generateContent`."""
        names = iter(self.ids)
        path = "/".join(f"{{{next(names)}}}" if part == "*" else part for part in self.rule.segments)
        return f"{path}:{self.rule.verb}" if self.rule.verb else path

    @cached_property
    def body(self) -> Descriptor | None:
        """The type of the body."""
        if not self.rule.body:
            return None
        request: Any = self.rpc.input_type
        field = None if self.rule.body == "*" else request.fields_by_name[self.rule.body]
        kind: Descriptor = field.message_type if field is not None else request
        return kind

    @cached_property
    def query(self) -> tuple[tuple[str, FieldDescriptor], ...]:
        """The query parameters, by their names in camelCase."""
        if self.rule.body == "*":
            return ()
        taken = {path.partition(".")[0] for path, _, _ in self.rule.variables} | {self.rule.body}
        return tuple(
            (field.json_name, field)
            for field in self.rpc.input_type.fields
            if field.name not in taken
            and (field.message_type is None or field.message_type.full_name in _WELL_KNOWN_TEXT)
        )


def methods(summaries: Mapping[str, str]) -> list[Method]:
    """Return the methods of the RPCs that have a summary, which are those that are implemented.

    Args:
        summaries: A sentence for each RPC, by the RPC's full name.
    """
    served = _served_collections(summaries)
    found = [
        _method(rule, summaries[rpc.full_name])
        for service in protos.SERVICES.values()
        for rpc in service.methods
        if rpc.full_name in summaries
        for rule in rules_of(rpc)
        if rule.segments[0] in served
    ]
    return sorted(found, key=_place)


def singular(collection: str) -> str:
    """Return what one of a collection is called: `tunedModel` of `tunedModels`."""
    return _SINGULAR.get(collection, collection.removesuffix("s"))


def has_behavior(field: FieldDescriptor, behavior: int) -> bool:
    """Return whether a field is declared with one of google.api.FieldBehavior."""
    return behavior in protos.extension(field, "google.api.field_behavior")


def words(name: str) -> str:
    """Return a camelCase name as words."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower()


def _place(method: Method) -> tuple[bool, tuple[str, ...], int]:
    """Tuned models first; what can be done with a resource in the order of its life."""
    order = _ORDER.index(method.name) if method.name in _ORDER else len(_ORDER)
    return method.resource[0] != "tunedModels", method.resource, order


def _served_collections(summaries: Mapping[str, str]) -> set[str]:
    """Return the first path segments of resources that can be had: rules for corpora and dynamic models cannot."""
    served = set()
    for service in protos.SERVICES.values():
        for rpc in service.methods:
            if rpc.full_name in summaries and rpc.name.startswith("Get"):
                served |= {rule.segments[0] for rule in rules_of(rpc) if len(rule.segments) == 2}
    return served


def _method(rule: HttpRule, summary: str) -> Method:
    segments = rule.segments
    resource = tuple(segment for segment in segments if segment != "*")
    ends_in_id = segments[-1] == "*"
    if rule.verb:
        name = rule.verb
    elif rule.http_method == "GET" and not ends_in_id:
        name = "list"
    else:
        name = _STANDARD[rule.http_method]
    return Method(rule, resource, name, summary)
