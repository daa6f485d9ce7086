"""What gRPC carries beside the messages: credentials and field masks in, google.rpc error details out."""

from collections.abc import Iterable
from urllib.parse import quote, unquote

import grpc

from tunesmith import protos
from tunesmith.caller import Credentials
from tunesmith.errors import ApiError

ROOM = 6000
"""Bytes that an error may take on the wire; clients refuse more than 8 KB of metadata and show another error."""

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_BAD_REQUEST = "type.googleapis.com/google.rpc.BadRequest"


def credentials(metadata: Iterable[tuple[str, str | bytes]]) -> Credentials:
    """Return what a call brings to prove who its caller is."""
    found = {key: value for key, value in metadata if isinstance(value, str)}
    scheme, _, token = found.get("authorization", "").strip().partition(" ")
    return Credentials(
        bearer=token.strip() if scheme.lower() == "bearer" else None,
        api_key=found.get("x-goog-api-key") or None,
        project=found.get("x-goog-user-project") or None,
    )


def address(peer: str) -> str:
    """Return the network address of a client, as in ipv4:192.0.2.1:1234 or ipv6:%5B2001:db8::1%5D:1234."""
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else kind


def fields(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """Return what of the response a call asks for, as `fields` has it over REST; "" for all of it."""
    given = next((value for key, value in metadata if key == "x-goog-fieldmask"), "")
    text = given.strip() if isinstance(given, str) else ""
    return "" if text == "*" else text


def abort(context: grpc.ServicerContext, error: ApiError) -> None:
    """End a call with an error: code and message, and all of it as a google.rpc.Status in the trailers.

    Raises:
        Exception: Always; grpc's way to leave a handler.
    """
    status = _fitting(error.to_status())
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(_CODES[error.code], status.message)


def _fitting(status: protos.Status) -> protos.Status:
    """Return an error that names as many of its violations as there is room for."""
    lines = status.message.split("\n")
    kept, shown = len(lines), status
    while _size(shown) > ROOM and kept > 1:
        kept = max(1, kept * 3 // 4)
        shown = _with_lines(status, kept, len(lines))
    if _size(shown) > ROOM:
        # One line is too long by itself: the details repeat it, so they go, and what is left is cut.
        text = shown.message
        while len(quote(text)) > ROOM // 3:
            text = text[: len(text) * 3 // 4]
        shown = protos.Status(code=status.code, message=f"{text} …")
    return shown


def _with_lines(status: protos.Status, kept: int, total: int) -> protos.Status:
    """Return an error with its first lines, and with the violations that stand in them."""
    lines = status.message.split("\n")[:kept]
    shown = protos.Status(code=status.code, message="\n".join([*lines, f"… and {total - kept} more."]))
    for detail in status.details:
        if detail.type_url == _BAD_REQUEST:
            request = protos.BadRequest.FromString(detail.value)
            del request.field_violations[kept:]
            shown.details.add().Pack(request)
        else:
            shown.details.add().CopyFrom(detail)
    return shown


def _size(status: protos.Status) -> int:
    """Return the bytes of an error on the wire: the message percent-encoded, the whole in base64."""
    return len(quote(status.message)) + status.ByteSize() * 4 // 3
