"""Server-sent events: names, ids, and where a client goes on that was cut off.

An event is a message with the field `event_id` and the oneof `event`, whose case is its name; a request with the
field `after_event` takes what `Last-Event-ID` says. Both are so in our own protos only.
"""

from collections.abc import Mapping

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from tunesmith.api.body_formats import EVENT_STREAM

RETRY = b"retry: 2000\r\n\r\n"
"""How many milliseconds later browsers come back; before the first event."""

_AFTER, _AFTER_IN_JSON = "after_event", "afterEvent"


def are_events(kind: Descriptor) -> bool:
    """Return whether the messages of a kind have names and ids as events do."""
    return "event_id" in kind.fields_by_name and "event" in kind.oneofs_by_name


def part(message: Message, body: bytes) -> bytes:
    """Return an event as a part of the stream; one without an id leaves the client's last id as it was."""
    number: int = getattr(message, "event_id")  # noqa: B009 — messages of several kinds have it
    head = f"id: {number}\r\n" if number else ""
    return f"{head}event: {message.WhichOneof('event')}\r\n".encode() + EVENT_STREAM.part(body, first=False)


def wanted(headers: Mapping[bytes, bytes]) -> bool:
    """Return whether a client asks for events without `alt=sse`, as browsers' EventSource does."""
    return EVENT_STREAM.content_type in headers.get(b"accept", b"").lower()


def resumed(
    query: Mapping[str, list[str]], headers: Mapping[bytes, bytes], request: Descriptor
) -> dict[str, list[str]] | None:
    """Return the query of a client that comes back, with the last event that it has; None of one that does not."""
    last = headers.get(b"last-event-id", b"").decode("latin-1").strip()
    if not last or _AFTER not in request.fields_by_name:
        return None
    others = {name: values for name, values in query.items() if name not in (_AFTER, _AFTER_IN_JSON)}
    return {**others, _AFTER_IN_JSON: [last]}
