"""HTTP request to official message: path to RPC, then path, query and body to fields."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from google.protobuf.message import DecodeError, Message

from tunesmith import protos
from tunesmith.api import json_text
from tunesmith.api.http_rules import VERSIONS, HttpRule, all_rules
from tunesmith.api.json_reader import MessageReader
from tunesmith.errors import InvalidArgument, NotFound

_SLASH = re.compile("%2f", re.IGNORECASE)


@dataclass(frozen=True)
class Match:
    """A rule that a request fits, and the values of the rule's variables."""

    rule: HttpRule
    variables: tuple[tuple[str, str], ...]


@dataclass
class _Node:
    """A place in the tree of path segments; `rules` has those that end here, by verb and HTTP method."""

    literals: dict[str, "_Node"] = field(default_factory=dict)
    wildcard: "_Node | None" = None
    rules: dict[str, dict[str, HttpRule]] = field(default_factory=dict)


class Router:
    """Finds the rule for a path; the tree is built once."""

    def __init__(self, rules: Iterable[HttpRule] | None = None) -> None:
        self._root = _Node()
        for rule in all_rules() if rules is None else rules:
            self._add(rule)

    def match(self, http_method: str, path: str) -> Match:
        """Return the rule for a request.

        Args:
            http_method: The HTTP method; HEAD counts as GET.
            path: The path as sent, percent-encoded.

        Raises:
            NotFound: No rule has this path, or none has it with this method.
        """
        rules, segments = self._find(path)
        rule = rules.get("GET" if http_method == "HEAD" else http_method)
        if rule is None:
            if rules:
                raise NotFound(
                    f"{http_method} is not served at {path}; this path answers to {', '.join(sorted(rules))}."
                )
            raise NotFound(f"There is nothing at {path}.")
        values = ((name, "/".join(segments[start:stop])) for name, start, stop in rule.variables)
        return Match(rule, tuple(values))

    def methods(self, path: str) -> list[str]:
        """Return the HTTP methods that a path answers to; none for an unknown path."""
        return sorted(self._find(path)[0])

    def _add(self, rule: HttpRule) -> None:
        node = self._root
        for segment in rule.segments:
            if segment == "*":
                node.wildcard = node.wildcard or _Node()
                node = node.wildcard
            else:
                node = node.literals.setdefault(segment, _Node())
        node.rules.setdefault(rule.verb, {})[rule.http_method] = rule

    def _find(self, path: str) -> tuple[Mapping[str, HttpRule], list[str]]:
        version, _, rest = path.removeprefix("/").partition("/")
        if version not in VERSIONS or not rest:
            return {}, []
        segments = [_decode(segment) for segment in rest.split("/")]
        if segments[:2] == ["models", "tunedModels"] and len(segments) > 2:
            del segments[0]  # litellm puts models/ before every model's name
        segments[-1], _, verb = segments[-1].partition(":")
        return _search(self._root, segments, 0, verb), segments


def _search(node: _Node, segments: list[str], depth: int, verb: str) -> Mapping[str, HttpRule]:
    if depth == len(segments):
        return node.rules.get(verb, {})
    segment = segments[depth]
    literal = node.literals.get(segment)
    found = _search(literal, segments, depth + 1, verb) if literal else {}
    if not found and node.wildcard and segment:
        found = _search(node.wildcard, segments, depth + 1, verb)
    return found


def _decode(segment: str) -> str:
    """Undo the percent-encoding, but for slashes, which would make two segments of one."""
    return unquote(_SLASH.sub("%252F", segment)) if "%" in segment else segment


def to_message(match: Match, query: Mapping[str, list[str]], body: bytes, *, protobuf: bool = False) -> Message:
    """Return the request message that a matched HTTP request means.

    The path wins over the body, and the body over the query.

    Args:
        match: What the router found.
        query: The query parameters that are not system parameters.
        body: The request's body; ignored if the rule has none.
        protobuf: Whether the body is in protobuf's own encoding, not JSON.

    Raises:
        InvalidArgument: Names everything that does not fit the message.
    """
    rule = match.rule
    message = protos.message_class(rule.rpc.input_type)()
    reader = MessageReader(message)
    if query:
        reader.read_query(query, body=rule.body)
    if rule.body and protobuf:
        _merge(message if rule.body == "*" else getattr(message, rule.body), body)
    elif rule.body:
        reader.read_body(json_text.parse(body), rule.body)
    reader.finish()
    for path, value in match.variables:
        *outer, name = path.split(".")
        target = message
        for part in outer:
            target = getattr(target, part)
        setattr(target, name, value)
    return message


def _merge(message: Message, body: bytes) -> None:
    """Read an encoded message.

    Raises:
        InvalidArgument: It is not one.
    """
    message.SetInParent()
    try:
        message.MergeFromString(body)
    except DecodeError:
        kind: Any = message.DESCRIPTOR
        raise InvalidArgument(f"The body is not an encoded {kind.full_name}.") from None
