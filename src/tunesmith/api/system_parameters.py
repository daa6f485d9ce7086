"""The query parameters and headers that every method takes, set apart from those of the method itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from tunesmith.caller import Credentials
from tunesmith.errors import InvalidArgument

_NAMES = {
    *("alt", "key", "access_token", "oauth_token", "prettyPrint", "quotaUser", "xgafv"),
    *("uploadType", "upload_protocol", "callback", "fields"),
}
_FORM = b"application/x-www-form-urlencoded"
_PROTOBUF = (b"application/x-protobuf", b"application/protobuf", b"application/vnd.google.protobuf")


@dataclass(frozen=True)
class Style:
    """How a response is to be written.

    Attributes:
        sse: A stream as server-sent events.
        protobuf: In protobuf's own encoding instead of JSON.
        media: As the bytes of a file.
        pretty: JSON with a key a line.
        enum_numbers: JSON with enums as numbers.
        fields: What of the response to keep, as sent; "" for all of it.
    """

    sse: bool = False
    protobuf: bool = False
    media: bool = False
    pretty: bool = True
    enum_numbers: bool = False
    fields: str = ""


@dataclass(frozen=True)
class SystemParameters:
    """What a request says besides its message.

    Attributes:
        query: The method's own parameters, each with its values in order.
        credentials: What the caller brings to prove who they are.
        style: How the response is to be written.
    """

    query: dict[str, list[str]] = field(default_factory=dict)
    credentials: Credentials = field(default_factory=Credentials)
    style: Style = field(default_factory=Style)


def http_method(method: str, headers: Mapping[bytes, bytes]) -> str:
    """Return the HTTP method that is meant: a POST may stand for another one."""
    override = headers.get(b"x-http-method-override")
    return override.decode("latin-1").strip().upper() if override and method == "POST" else method


def is_form(headers: Mapping[bytes, bytes]) -> bool:
    """Return whether the body is a query string, as Google's clients send one too long for a URL."""
    return headers.get(b"content-type", b"").lower().startswith(_FORM)


def is_protobuf(headers: Mapping[bytes, bytes]) -> bool:
    """Return whether the body is a message in protobuf's own encoding."""
    return headers.get(b"content-type", b"").partition(b";")[0].strip().lower() in _PROTOBUF


def system_parameters(query: bytes, headers: Mapping[bytes, bytes]) -> SystemParameters:
    """Split a query string, and read the headers that mean the same.

    Args:
        query: The query string as sent.
        headers: The headers, by lower-case name.

    Raises:
        InvalidArgument: A system parameter has a value that means nothing here.
    """
    own: dict[str, list[str]] = {}
    system: dict[str, str] = {}
    for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True) if query else ():
        plain = name.lstrip("$.")
        if plain in _NAMES:
            system[plain] = value
        else:
            own.setdefault(name, []).append(value)
    if system.get("callback"):
        raise InvalidArgument("JSONP is not supported: leave out the parameter callback.")
    fields = system.get("fields") or headers.get(b"x-goog-fieldmask", b"").decode("latin-1")
    return SystemParameters(own, _credentials(system, headers), _style(system, fields.strip()))


def _credentials(system: Mapping[str, str], headers: Mapping[bytes, bytes]) -> Credentials:
    scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").strip().partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else None
    if bearer is None:
        bearer = system.get("access_token") or system.get("oauth_token") or None
    api_key = headers.get(b"x-goog-api-key", b"").decode("latin-1") or system.get("key") or None
    project = headers.get(b"x-goog-user-project", b"").decode("latin-1") or None
    return Credentials(bearer=bearer, api_key=api_key, project=project)


def _style(system: Mapping[str, str], fields: str) -> Style:
    kind, *options = [part.strip() for part in system.get("alt", "json").split(";")]
    if kind not in ("", "json", "sse", "proto", "media"):
        raise InvalidArgument(f'Invalid value "{kind}" for parameter alt: expected json, sse or proto.')
    return Style(
        sse=kind == "sse",
        protobuf=kind == "proto",
        media=kind == "media",
        pretty=system.get("prettyPrint", "true").lower() not in ("false", "0"),
        enum_numbers="enum-encoding=int" in options,
        fields="" if fields == "*" else fields,
    )
