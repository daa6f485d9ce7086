"""How messages and errors become bodies: JSON or protobuf, one or a stream of them."""

from dataclasses import dataclass
from typing import Protocol

from google.protobuf.message import Message

from tunesmith.api.json_writer import JsonWriter
from tunesmith.errors import ApiError

JSON = b"application/json; charset=UTF-8"
PROTOBUF = b"application/x-protobuf"
EVENTS = b"text/event-stream"


class BodyFormat(Protocol):
    """Writes one response body."""

    @property
    def content_type(self) -> bytes:
        """The Content-Type of a body."""
        ...

    def message(self, message: Message) -> bytes:
        """Return a message, whole."""
        ...

    def error(self, error: ApiError) -> bytes:
        """Return an error, whole."""
        ...


@dataclass(frozen=True)
class JsonFormat:
    """JSON in the style of its writer."""

    writer: JsonWriter
    content_type: bytes = JSON

    def message(self, message: Message) -> bytes:
        """See BodyFormat."""
        return self.writer.text(message).encode()

    def error(self, error: ApiError) -> bytes:
        """See BodyFormat."""
        return self.writer.error_text(error).encode()


@dataclass(frozen=True)
class ProtobufFormat:
    """The messages' own encoding; an error is a google.rpc.Status."""

    content_type: bytes = PROTOBUF

    def message(self, message: Message) -> bytes:
        """See BodyFormat."""
        return message.SerializeToString()

    def error(self, error: ApiError) -> bytes:
        """See BodyFormat."""
        return error.to_status().SerializeToString()


@dataclass(frozen=True)
class StreamFormat:
    """How the messages of a stream are set apart from each other."""

    content_type: bytes
    before_first: bytes
    before_next: bytes
    after_each: bytes
    end: bytes
    empty: bytes  # the whole of a stream without messages
    messages_have_lengths: bool = False
    alive: bytes = b""  # what may stand between messages and means nothing, for proxies that end silent streams

    def part(self, body: bytes, *, first: bool, failed: bool = False) -> bytes:
        """Return one message, or the error that ends the stream, as a part of it."""
        if self.messages_have_lengths:
            return (_ERROR_TAG if failed else _MESSAGE_TAG) + _varint(len(body)) + body
        before = self.before_first if first else self.before_next
        return before + body.rstrip(b"\n") + self.after_each


# google.rpc.StreamBody: `repeated bytes messages = 1; Status status = 2`.
_MESSAGE_TAG, _ERROR_TAG = b"\x0a", b"\x12"

EVENT_STREAM = StreamFormat(EVENTS, b"data: ", b"data: ", b"\r\n\r\n", b"", b"", alive=b":\r\n\r\n")
ARRAY_STREAM = StreamFormat(JSON, b"[", b",\r\n", b"", b"]", b"[]", alive=b"\r\n")
PROTOBUF_STREAM = StreamFormat(PROTOBUF, b"", b"", b"", b"", b"", messages_have_lengths=True)
PROTOBUF_FORMAT = ProtobufFormat()
JSON_FORMATS = {
    (pretty, numbers): JsonFormat(JsonWriter(pretty=pretty, enum_numbers=numbers))
    for pretty in (True, False)
    for numbers in (True, False)
}


def _varint(number: int) -> bytes:
    groups = [number >> shift & 0x7F for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([group | 0x80 for group in groups[:-1]] + groups[-1:])
