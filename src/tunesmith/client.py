"""A small client of our own REST API, for the commands."""

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import httpx2

POLL_SECONDS = 0.25
PATIENCE = 60.0  # seconds that a server may be away while its job is watched
TIMEOUT = httpx2.Timeout(30.0, read=600.0)  # seconds; a long answer takes its time


class ClientError(Exception):
    """The server refused; the message is for a person."""


class Unreachable(ClientError):
    """The server cannot be reached."""


class Client:
    """Calls one server with one credential; a context manager."""

    def __init__(self, url: str, token: str | None = None, api_key: str | None = None) -> None:
        headers = {"authorization": f"Bearer {token}"} if token else {"x-goog-api-key": api_key or ""}
        self._url = url.rstrip("/")
        self._http = httpx2.Client(base_url=self._url, headers=headers, timeout=TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._http.close()

    def call(self, method: str, path: str, body: Any = None, **parameters: Any) -> Any:
        """Call a method under /v1beta and return its JSON.

        Raises:
            ClientError: The call failed; with the server's own words.
            Unreachable: No server answered.
        """
        try:
            response = self._http.request(method, f"/v1beta/{path}", json=body, params=parameters)
        except httpx2.TransportError as error:
            raise Unreachable(
                f"No Tunesmith answers at {self._url} ({error}). Start one with: tunesmith serve"
            ) from error
        try:
            answer = response.json()
        except ValueError:
            raise ClientError(f"{self._url} answered {response.status_code}, and not in JSON.") from None
        if response.is_error:
            raise ClientError(answer["error"]["message"])
        return answer

    def tune(self, model: dict[str, Any], tuned_model_id: str | None = None) -> dict[str, Any]:
        """Create a tuned model and return its operation."""
        parameters = {"tunedModelId": tuned_model_id} if tuned_model_id else {}
        operation: dict[str, Any] = self.call("POST", "tunedModels", model, **parameters)
        return operation

    def watch(self, operation: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield an operation as it proceeds, until it is done; a server that restarts meanwhile is waited for."""
        answered = time.monotonic()
        while True:
            try:
                operation = self.call("GET", operation["name"])
                answered = time.monotonic()
            except Unreachable:
                if time.monotonic() - answered > PATIENCE:
                    raise
            yield operation
            if operation.get("done"):
                return
            time.sleep(POLL_SECONDS)

    def tuned_models(self) -> Iterator[dict[str, Any]]:
        """Yield the caller's tuned models, oldest first."""
        page: dict[str, Any] = {"pageSize": 100}
        while True:
            answer = self.call("GET", "tunedModels", **page)
            yield from answer.get("tunedModels", [])
            if not answer.get("nextPageToken"):
                return
            page["pageToken"] = answer["nextPageToken"]

    def generate(self, model: str, text: str, config: dict[str, Any] | None = None) -> str:
        """Return a model's answer to a text."""
        body = {"contents": [{"parts": [{"text": text}]}], "generationConfig": config or {}}
        answer = self.call("POST", f"{model}:generateContent", body)
        return "".join(part.get("text", "") for part in answer["candidates"][0]["content"]["parts"])
