"""Google's own types as a judge of what a server said: they parse it strictly, and print the same."""

import base64
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from google.ai import generativelanguage_v1beta  # noqa: F401 — puts its types into the default pool
from google.longrunning import operations_pb2  # noqa: F401
from google.protobuf import descriptor_pool, json_format
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.unknown_fields import UnknownFieldSet
from google.rpc import error_details_pb2  # noqa: F401

from tunesmith import protos
from tunesmith.api.json_writer import JsonWriter


def disagreements(recording: Path) -> list[str]:
    """Return what Google's types do not accept, or print otherwise, of what `recording.py` has kept."""
    lines = {*recording.read_text().splitlines()} if recording.exists() else set()
    return [
        f"{record['rpc']}: {reason}" for record in map(json.loads, sorted(lines)) for reason in _objections(record)
    ]


def _objections(record: dict[str, Any]) -> Iterator[str]:
    for data in _messages(record):
        yield from _wire(record["message"], data)
    for answer in _answers(record):
        if record.get("stream") and "error" in answer:  # it failed on the way
            for detail in answer["error"].get("details", []):
                yield from _json("google.protobuf.Any", detail)
        else:
            yield from _json(record["message"], answer, enum_numbers=record.get("enum_numbers", False))


def _messages(record: dict[str, Any]) -> list[bytes]:
    """Return the encoded messages of an answer, one or those of a stream."""
    if "data" not in record:
        return []
    data = base64.b64decode(record["data"])
    if not record.get("stream"):
        return [data]
    # A google.rpc.StreamBody, which Google's packages lack: `repeated bytes messages = 1; Status status = 2`.
    return [field.data for field in UnknownFieldSet(Empty.FromString(data)) if field.field_number == 1]


def _answers(record: dict[str, Any]) -> list[Any]:
    """Return the JSON messages of an answer, one or those of a stream."""
    if "text" not in record:
        return []
    if record["kind"].startswith("text/event-stream"):
        return [json.loads(part.removeprefix("data: ")) for part in record["text"].split("\r\n\r\n") if part]
    answer = json.loads(record["text"])
    return answer if record.get("stream") else [answer]


def _json(name: str, answer: Any, *, enum_numbers: bool = False) -> Iterator[str]:
    try:
        message = json_format.ParseDict(answer, _google(name)())
    except json_format.ParseError as error:
        yield f"{name}: {error}: {json.dumps(answer)[:500]}"
        return
    printed = json_format.MessageToDict(message, use_integers_for_enums=enum_numbers)
    if printed != answer:
        yield f"{name}: Google prints {json.dumps(printed)[:500]}, not {json.dumps(answer)[:500]}"


def _wire(name: str, data: bytes) -> Iterator[str]:
    try:
        message = _google(name).FromString(data)
    except DecodeError as error:
        yield f"{name}: {error}: {data[:200]!r}"
        return
    message.DiscardUnknownFields()
    if message.ByteSize() != len(data):
        yield f"{name}: {len(data) - message.ByteSize()} bytes are unknown to Google: {data[:200]!r}"
    ours = protos.message_class(protos.POOL.FindMessageTypeByName(name)).FromString(data)
    yield from _json(name, json.loads(JsonWriter().text(ours)))


@cache
def _google(name: str) -> Any:
    return GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(name))
