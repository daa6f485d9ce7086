"""Which HTTP request means which RPC: the rules of the descriptors, and those that Google keeps elsewhere."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import MethodDescriptor

from tunesmith import protos

VERSIONS = ("v1", "v1beta", "v1alpha", "v1beta3")
"""The version prefixes; every rule holds under each, because each has clients that use it for tuning."""

_OPERATIONS = "google.longrunning.Operations"
_GENERATIVE = "google.ai.generativelanguage.v1beta.GenerativeService"

_TEXT = "google.ai.generativelanguage.v1beta.TextService"

# Google keeps the rules of operations in a service file; the generic ones of the protos would claim
# `/v1/operations`. Two rules exist only in clients: they count the tokens of tuned models, and they cancel
# by the model's name. Two are ours alone, for what Google has over gRPC or for base models only: waiting, and
# counting the tokens of a tuned model the old way.
_OWN_RULES: tuple[tuple[str, str, str, str, str], ...] = (
    (_OPERATIONS, "GetOperation", "GET", "/v1beta/{name=tunedModels/*/operations/*}", ""),
    (_OPERATIONS, "ListOperations", "GET", "/v1beta/{name=tunedModels/*}/operations", ""),
    (_OPERATIONS, "CancelOperation", "POST", "/v1beta/{name=tunedModels/*/operations/*}:cancel", "*"),
    (_OPERATIONS, "CancelOperation", "POST", "/v1beta/{name=tunedModels/*}:cancel", "*"),
    (_OPERATIONS, "WaitOperation", "POST", "/v1beta/{name=tunedModels/*/operations/*}:wait", "*"),
    (_OPERATIONS, "DeleteOperation", "DELETE", "/v1beta/{name=tunedModels/*/operations/*}", ""),
    (_GENERATIVE, "CountTokens", "POST", "/v1beta/{model=tunedModels/*}:countTokens", "*"),
    (_TEXT, "CountTextTokens", "POST", "/v1beta/{model=tunedModels/*}:countTextTokens", "*"),
)


@dataclass(frozen=True)
class HttpRule:
    """One way to call an RPC over HTTP.

    Attributes:
        rpc: The RPC.
        http_method: GET, POST, PATCH, PUT or DELETE.
        segments: The path after the version; `*` stands for any one segment.
        verb: What follows the colon, or "".
        variables: Field path, and the slice of `segments` that is its value.
        body: The request's field that the body is; `*` for the whole request, "" for no body.
    """

    rpc: MethodDescriptor
    http_method: str
    segments: tuple[str, ...]
    verb: str
    variables: tuple[tuple[str, int, int], ...]
    body: str


def rules_of(rpc: MethodDescriptor) -> Iterator[HttpRule]:
    """Yield the rules of one RPC."""
    service = rpc.containing_service.full_name
    if service != _OPERATIONS:
        option = protos.extension(rpc, "google.api.http")
        for binding in (option, *option.additional_bindings):
            kind = binding.WhichOneof("pattern")
            if kind:
                yield _rule(rpc, kind.upper(), getattr(binding, kind), binding.body)
    for own_service, name, http_method, template, body in _OWN_RULES:
        if (own_service, name) == (service, rpc.name):
            yield _rule(rpc, http_method, template, body)


def all_rules() -> Iterator[HttpRule]:
    """Yield the rules of every RPC of every service."""
    for service in protos.SERVICES.values():
        for rpc in service.methods:
            yield from rules_of(rpc)


def _rule(rpc: Any, http_method: str, template: str, body: str) -> HttpRule:
    path, _, verb = template.partition(":")
    segments: list[str] = []
    variables: list[tuple[str, int, int]] = []
    rest = path.removeprefix("/").partition("/")[2]  # without the version
    while rest:
        if rest.startswith("{"):
            variable, _, rest = rest[1:].partition("}")
            name, _, pattern = variable.partition("=")
            parts = pattern.split("/") if pattern else ["*"]
            variables.append((name, len(segments), len(segments) + len(parts)))
            segments += parts
        else:
            literal, slash, rest = rest.partition("/")
            segments.append(literal)
            rest = slash + rest
        rest = rest.removeprefix("/")
    if "**" in segments:
        raise ValueError(f"{rpc.full_name}: {template}: ** is not supported")
    return HttpRule(rpc, http_method, tuple(segments), verb, tuple(variables), body)
