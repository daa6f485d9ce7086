"""`tunesmith` that keeps what it answers: python tests/recording.py FILE serve …

Each answer becomes a line of FILE once it is sent, so that those of a killed server are there too.
"""

import base64
import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import grpc
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith import protos
from tunesmith.api import rest_server
from tunesmith.api.system_parameters import http_method, system_parameters
from tunesmith.api.transcoding import Router
from tunesmith.errors import NotFound


class Recording:
    """The file; safe to share between threads and processes."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def add(self, **record: Any) -> None:
        """Add a line, in one write."""
        os.write(self._file, f"{json.dumps(record)}\n".encode())


class RecordedApp:
    """An ASGI app whose whole answers to RPCs are kept: text as it is, messages in base64."""

    def __init__(self, app: ASGIApp, recording: Recording) -> None:
        self._app, self._recording, self._router = app, recording, Router()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent: list[Message] = []

        async def keep(message: Message) -> None:
            sent.append(message)
            await send(message)

        await self._app(scope, receive, keep)
        if scope["type"] == "http" and sent and not sent[-1].get("more_body", False):
            self._record(scope, sent)

    def _record(self, scope: Scope, sent: list[Message]) -> None:
        asked, answered = dict(scope["headers"]), dict(sent[0]["headers"])
        body = b"".join(message["body"] for message in sent[1:])
        if answered.get(b"content-encoding") == b"gzip":
            body = gzip.decompress(body)
        try:
            path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
            rpc = self._router.match(http_method(scope["method"], asked), path).rule.rpc
        except NotFound:
            return
        if body and sent[0]["status"] == 200 and not _unknown_to_google(rpc.output_type.full_name):
            self._recording.add(
                rpc=rpc.full_name,
                message=rpc.output_type.full_name,
                stream=rpc.server_streaming,
                kind=answered[b"content-type"].decode(),
                enum_numbers=system_parameters(scope["query_string"], asked).style.enum_numbers,
                **_body(body, answered[b"content-type"]),
            )


class RecordedRpcs(grpc.ServerInterceptor):
    """Keeps each message that a gRPC server sends, in base64."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        if handler is None or handler.response_serializer is None:
            return handler

        def serialize(message: Any) -> bytes:
            data: bytes = handler.response_serializer(message)
            name = message.DESCRIPTOR.full_name
            if message.DESCRIPTOR.file.pool is protos.POOL and not _unknown_to_google(name):
                self._recording.add(rpc=handler_call_details.method, message=name, data=_text(data))
            return data

        return handler._replace(response_serializer=serialize)


def _unknown_to_google(message: str) -> bool:
    """Whether a message is ours alone, or the bytes of a file."""
    return message.startswith("tunesmith.") or message == "google.api.HttpBody"


def _body(body: bytes, kind: bytes) -> dict[str, str]:
    return {"data": _text(body)} if b"protobuf" in kind else {"text": body.decode()}


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def main() -> None:
    """Run the command with both of its servers recorded."""
    from tunesmith import cli

    recording = Recording(Path(sys.argv.pop(1)))
    rest_app, grpc_server = rest_server.rest_app, grpc.server
    rest_server.rest_app = lambda *given, **named: RecordedApp(rest_app(*given, **named), recording)  # type: ignore
    grpc.server = lambda *given, **named: grpc_server(*given, interceptors=[RecordedRpcs(recording)], **named)
    cli.main()


if __name__ == "__main__":
    main()
