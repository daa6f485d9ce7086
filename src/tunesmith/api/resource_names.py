"""Names of resources in requests that came without a path, held against the routes of the RPC."""

import re
from functools import cache
from typing import Any

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from tunesmith.api.http_rules import rules_of
from tunesmith.errors import InvalidArgument

# Names that clients send over gRPC, and that no route has: "" lists the operations of all models.
_OWN_PATTERNS = {
    "google.longrunning.Operations.ListOperations": [
        *("tunedModels/*", "tunedModels/*/operations", "operations", ""),
    ],
}


def check(rpc: MethodDescriptor, request: Message) -> None:
    """Refuse a name that no route of the RPC could have brought, so that services meet well-formed names only.

    Raises:
        InvalidArgument: Names the field, and what it must look like.
    """
    violations = []
    for path, patterns in _patterns(rpc).items():
        value: Any = request
        for name in path.split("."):
            value = getattr(value, name)
        if not any(_regex(pattern).fullmatch(value) for pattern in patterns):
            expected = " or ".join(patterns)
            reason = f"must look like {expected}, not {value!r}" if value else f"{path} is not specified"
            violations.append((f"{rpc.input_type.name}.{path}", reason))
    if violations:
        raise InvalidArgument.at(violations)


@cache
def _patterns(rpc: MethodDescriptor) -> dict[str, list[str]]:
    """Return what the value of each path variable may look like, by field path."""
    if rpc.full_name in _OWN_PATTERNS:
        return {"name": _OWN_PATTERNS[rpc.full_name]}
    patterns: dict[str, list[str]] = {}
    for rule in rules_of(rpc):
        for path, start, stop in rule.variables:
            known = patterns.setdefault(path, [])
            pattern = "/".join(rule.segments[start:stop])
            if pattern not in known:
                known.append(pattern)
    return patterns


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", "[^/]+"))
