"""A small client of our own REST API, for the commands."""

import json
import re
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2

PATIENCE = 60.0  # seconds that a server may be away while its job is watched
AWAY_SECONDS = 1.0  # between two attempts to reach one that is away
SILENCE = 60.0  # seconds; a watch that works gives a sign of life four times in them
UNAUTHORIZED = 401
GATEWAYS = {502, 503, 504}  # what answers while a server restarts
STOPPING = {"UNAVAILABLE", "CANCELLED"}  # with which a server that stops ends its streams
TIMEOUT = httpx2.Timeout(30.0, read=600.0)  # seconds; a long answer takes its time


class ClientError(Exception):
    """The server refused; the message is for a person.

    Attributes:
        violations: What is wrong with a request, field by field: its path, then the reason.
    """

    def __init__(self, message: str, violations: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.violations = violations


class Unreachable(ClientError):
    """The server cannot be reached."""


class TokenRefused(ClientError):
    """An OAuth endpoint refused; `code` is its word for why."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class Client:
    """Calls one server with one credential; a context manager.

    Args:
        url: The server's address.
        token: An access token.
        api_key: An API key, in place of a token.
        ca_file: The authority that signed the server's certificate, in PEM; None for those this machine trusts.
        refresh: Makes a new token when the server does not take the one there is.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        api_key: str | None = None,
        *,
        ca_file: str | None = None,
        refresh: Callable[[], str] | None = None,
    ) -> None:
        headers = {"authorization": f"Bearer {token}"} if token else {"x-goog-api-key": api_key or ""}
        self._url, self._refresh = url.rstrip("/"), refresh
        self._http = httpx2.Client(base_url=self._url, headers=headers, timeout=TIMEOUT, verify=_trust(ca_file))

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
        response = self._send(method, path, body, parameters)
        if response.status_code == UNAUTHORIZED and self._refresh is not None:
            self._http.headers["authorization"] = f"Bearer {self._refresh()}"
            response = self._send(method, path, body, parameters)
        try:
            answer = response.json()
        except ValueError:
            raise ClientError(f"{self._url} answered {response.status_code}, and not in JSON.") from None
        if response.is_error:
            raise _refusal(answer["error"])
        return answer

    def _send(self, method: str, path: str, body: Any, parameters: dict[str, Any]) -> httpx2.Response:
        try:
            return self._http.request(method, f"/v1beta/{path}", json=body, params=parameters)
        except httpx2.TransportError as error:
            raise _unreachable(self._url, error) from error

    def tune(
        self, model: dict[str, Any], tuned_model_id: str | None = None, options: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Create a tuned model and return its operation.

        Args:
            model: The tuned model.
            tuned_model_id: None: the server makes one.
            options: TuningOptions; None: ask with Google's own method.
        """
        parameters = {"tunedModelId": tuned_model_id} if tuned_model_id else {}
        if options is None:
            operation: dict[str, Any] = self.call("POST", "tunedModels", model, **parameters)
        else:
            operation = self.call(
                "POST", "tunedModels:tune", {"tunedModel": model, "options": options, **parameters}
            )
        return operation

    def events(self, model: str) -> Iterator[dict[str, Any] | None]:
        """Yield what happened and what happens to a tuned model's job, until it is done.

        A server that is away for a while is waited for: meanwhile this yields None, then goes on where it was.

        Raises:
            ClientError: The call failed; with the server's own words.
            Unreachable: The server stayed away.
        """
        last, away = 0, 0.0
        while True:
            heard = False
            try:
                for event in self._watch(model, last):
                    away = 0.0
                    if event is None:
                        continue
                    heard, last = True, event.get("eventId", last)
                    yield event
                    if "finished" in event:
                        return
                # A job that ended before events were kept has none to tell.
                if not heard and self.call("GET", model)["state"] != "CREATING":
                    return
            except Unreachable:
                away = away or time.monotonic()
                if time.monotonic() - away > PATIENCE:
                    raise
            yield None
            time.sleep(AWAY_SECONDS)

    def _watch(self, model: str, last: int) -> Iterator[dict[str, Any] | None]:
        """Yield events after the last one, and None for a sign of life, until the server ends the stream."""
        headers = {"last-event-id": str(last)} if last else {}
        try:
            with closing(self._open(f"{model}:watch", {"alt": "sse"}, headers, SILENCE)) as response:
                if response.status_code in GATEWAYS:
                    raise _unreachable(self._url, response.status_code)
                _refuse(response)
                yield None
                for line in response.iter_lines():
                    yield self._event(line)
        except httpx2.TransportError as error:
            raise _unreachable(self._url, error) from error

    def _event(self, line: str) -> dict[str, Any] | None:
        """Return the event of a line of server-sent events; None of one that has none."""
        name, _, value = line.partition(":")
        if name != "data":
            return None
        event: dict[str, Any] = json.loads(value)
        if error := event.get("error"):
            raise _unreachable(self._url, error["message"]) if error["status"] in STOPPING else _refusal(error)
        return event

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

    def download(self, path: str, out: Path | None, show: Callable[[int, int], None], **parameters: Any) -> Path:
        """Fetch a file from a method under /v1beta.

        Args:
            path: The method's path.
            out: The file to write, or the folder to write it into under the server's name for it; None for the
                current one. It is there once it is whole.
            show: Called with the bytes that have arrived, and with those that will in all, 0 if nobody knows.
            parameters: Of the query.

        Returns:
            The file.

        Raises:
            ClientError: The call failed, or broke off.
            Unreachable: No server answered.
        """
        try:
            with closing(self._open(path, parameters)) as response:
                return _save(response, out, show)
        except httpx2.ConnectError as error:
            raise _unreachable(self._url, error) from error
        except httpx2.TransportError as error:
            raise ClientError(f"The download broke off: {error}. Try again.") from error

    def _open(
        self,
        path: str,
        parameters: dict[str, Any],
        headers: dict[str, str] | None = None,
        silence: float | None = None,
    ) -> httpx2.Response:
        """Return a response of which only the head has been read; it may then be silent for so many seconds."""
        timeout = httpx2.Timeout(30.0, read=silence) if silence else TIMEOUT

        def send() -> httpx2.Response:
            request = self._http.build_request(
                "GET", f"/v1beta/{path}", params=parameters, headers=headers, timeout=timeout
            )
            return self._http.send(request, stream=True)

        response = send()
        if response.status_code == UNAUTHORIZED and self._refresh is not None:
            response.close()
            self._http.headers["authorization"] = f"Bearer {self._refresh()}"
            response = send()
        return response


def _save(response: httpx2.Response, out: Path | None, show: Callable[[int, int], None]) -> Path:
    """Write a response into a file, under another name until it is whole."""
    _refuse(response)
    named = re.search(r'filename="([^"/\\]+)"', response.headers.get("content-disposition", ""))
    name = named[1] if named else "download"
    file = (out or Path()) / name if out is None or out.is_dir() else out
    part = file.with_name(f"{file.name}.part")
    total, arrived = int(response.headers.get("content-length", 0)), 0
    try:
        with part.open("wb") as opened:
            for piece in response.iter_bytes():
                arrived += opened.write(piece)
                show(arrived, total)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return file


def _refuse(response: httpx2.Response) -> None:
    """Raise what a method that streams refuses with, if it does."""
    if response.is_error:
        response.read()
        try:
            answer = response.json()
        except ValueError:
            raise ClientError(f"{response.url} answered {response.status_code}, and not in JSON.") from None
        raise _refusal((answer[0] if isinstance(answer, list) else answer)["error"])


def _refusal(error: dict[str, Any]) -> ClientError:
    details: Iterable[dict[str, Any]] = error.get("details", [])
    wrong = [violation for detail in details for violation in detail.get("fieldViolations", [])]
    return ClientError(error["message"], [(one.get("field", ""), one.get("description", "")) for one in wrong])


def post_form(url: str, path: str, form: Mapping[str, str], ca_file: str | None = None) -> dict[str, Any]:
    """Post a form to an OAuth endpoint of a server and return its JSON.

    Raises:
        TokenRefused: The server refused.
        ClientError: No server answered, or not in JSON.
    """
    root = url.rstrip("/")
    try:
        response = httpx2.post(f"{root}{path}", data=dict(form), timeout=TIMEOUT, verify=_trust(ca_file))
        answer: dict[str, Any] = response.json()
    except httpx2.TransportError as error:
        raise _unreachable(root, error) from error
    except ValueError:
        raise ClientError(f"{root} is no Tunesmith: {path} answered {response.status_code}.") from None
    if response.is_error:
        code = str(answer.get("error"))
        raise TokenRefused(str(answer.get("error_description") or code), code)
    return answer


def _trust(ca_file: str | None) -> ssl.SSLContext | bool:
    return ssl.create_default_context(cafile=ca_file) if ca_file else True


def _unreachable(url: str, error: Exception | str | int) -> Unreachable:
    return Unreachable(f"No Tunesmith answers at {url} ({error}). Start one with: tunesmith serve")
