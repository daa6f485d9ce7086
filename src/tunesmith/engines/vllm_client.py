"""A running vLLM server, over HTTP: its OpenAI API, and how adapters are put onto it."""

import json
import math
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from tunesmith import protos
from tunesmith.engines.admission import closing
from tunesmith.engines.leavers import Leavers
from tunesmith.errors import ApiError, Cancelled, FailedPrecondition, Internal, InvalidArgument, Unavailable

CONNECT_SECONDS = 5.0
RETRY_SECONDS = 10.0  # what refused callers are told to wait; to start takes vLLM about a minute

DOWN = (HTTP_BAD_GATEWAY, HTTP_UNAVAILABLE, HTTP_GATEWAY_TIMEOUT) = (502, 503, 504)


class ConnectionLost(Unavailable):
    """The server ended, or was started again, while it was asked."""


class UnknownModel(Unavailable):
    """The server does not know the model's name: it was started again since the name was given to it."""


@dataclass(frozen=True)
class Served:
    """A model of the server.

    Attributes:
        name: What requests call it.
        root: Where its files lie, as the server sees them.
        adapter: Whether it is an adapter, and not the base model.
        longest: Tokens of a prompt with its answer, at most; 0 when the server does not say.
    """

    name: str
    root: str
    adapter: bool
    longest: int


class VllmClient:
    """Asks one vLLM server; safe to share between threads.

    Args:
        url: Its address, without /v1.
        api_key: What it was started with as --api-key; empty when nothing.
        silence_seconds: How long it may say nothing before it counts as down.
    """

    def __init__(self, url: str, api_key: str = "", silence_seconds: float = 120.0) -> None:
        self.url = url.rstrip("/")
        self._http = httpx2.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx2.Timeout(silence_seconds, connect=CONNECT_SECONDS),
            # A limit would make requests wait here, and where they wait the server cannot see them.
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=16),
        )
        self._left = Leavers()

    def version(self) -> str:
        """Return the server's version."""
        return str(self._json("GET", "/version").get("version", ""))

    def served(self) -> list[Served]:
        """Return the server's models."""
        return [
            Served(one["id"], one.get("root") or "", one.get("parent") is not None, one.get("max_model_len") or 0)
            for one in self._json("GET", "/v1/models")["data"]
        ]

    def load(self, name: str, path: str) -> None:
        """Give the server an adapter.

        Args:
            name: What requests will call it.
            path: Its folder, as the server sees it.
        """
        try:
            self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        except UnknownModel as error:  # what a server without the route says, and one that does not see the folder
            raise FailedPrecondition(
                f"The vLLM server at {self.url} does not take the adapter in {path}: {error.message} Start it "
                "with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and let it see vllm_adapters_dir."
            ) from error

    def unload(self, name: str) -> None:
        """Take an adapter away; one that the server does not have is no error."""
        try:
            self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except UnknownModel:
            return

    def logprob(self, name: str, tokens: Sequence[int], prompt_length: int) -> float:
        """Return the mean log-probability of the tokens that follow the prompt."""
        body = {"model": name, "prompt": list(tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        told = self._json("POST", "/v1/completions", body)["choices"][0]["prompt_logprobs"]
        places = range(prompt_length, len(tokens))
        try:
            return math.fsum(told[place][str(tokens[place])]["logprob"] for place in places) / len(places)
        except (TypeError, KeyError, IndexError) as error:
            raise Internal(f"The vLLM server at {self.url} tells no log-probabilities of prompts.") from error

    def stream(self, body: Mapping[str, Any], gone: threading.Event) -> Iterator[dict[str, Any]]:
        """Yield the parts of an answer as they come; closing the iterator ends the answer at the server, too.

        Raises:
            Cancelled: `gone` was set.
            Others: As the server's errors say.
        """
        with (
            self._troubles(gone),
            self._http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response,
            self._left.watched(gone, _hang_up(response)),
        ):
            if response.is_error:
                response.read()
            self._check(response)
            for line in response.iter_lines():
                if gone.is_set():
                    raise Cancelled("The client went away.")
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    part = json.loads(line.removeprefix("data: "))
                    if "error" in part:
                        raise self._error(int(part["error"].get("code") or 500), part["error"].get("message", ""))
                    yield part
            raise self._lost("it ended in the middle of an answer")

    def close(self) -> None:
        """End all answers under way."""
        self._left.close()
        self._http.close()

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = self._ask(method, path, body).json()
        except ValueError as error:
            raise Internal(f"{self.url}{path} does not answer as a vLLM server does. Check vllm_url.") from error
        if not isinstance(answer, dict):
            raise Internal(f"{self.url}{path} does not answer as a vLLM server does. Check vllm_url.")
        return answer

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx2.Response:
        with self._troubles():
            response = self._http.request(method, path, json=body)
            self._check(response)
            return response

    @contextmanager
    def _troubles(self, gone: threading.Event | None = None) -> Iterator[None]:
        """Say in our words what goes wrong on the way to the server."""
        try:
            yield
        except (httpx2.TransportError, RuntimeError) as error:  # RuntimeError: the client is closed
            if gone is not None and gone.is_set():
                raise Cancelled("The client went away.") from error
            if self._left.closed:
                raise closing() from error
            if isinstance(error, RuntimeError):
                raise
            if isinstance(error, httpx2.ReadTimeout):
                raise self._unavailable("says nothing for longer than vllm_silence_seconds") from error
            if isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout)):
                raise self._unavailable(f"cannot be reached ({error})") from error
            raise self._lost(str(error) or type(error).__name__) from error

    def _check(self, response: httpx2.Response) -> None:
        if not response.is_error:
            return
        try:
            told = response.json()
            message = told.get("error", {}).get("message") or told.get("detail") or response.text
        except (ValueError, AttributeError):
            message = response.text
        raise self._error(response.status_code, str(message))

    def _error(self, code: int, message: str) -> ApiError:
        """Return an error of the server as one of ours."""
        message = " ".join(message.split())[:500]
        if code == 404:
            return UnknownModel(message, [_retry()])
        if code in (401, 403):
            return FailedPrecondition(
                f"The vLLM server at {self.url} wants another key: set vllm_api_key to its --api-key."
            )
        if code in DOWN or "EngineDeadError" in message or "EngineCore encountered" in message:
            return self._lost(message or f"it answers {code}")
        if code < 500:
            return InvalidArgument(f"The vLLM server does not take the request: {message}")
        return Internal(f"The vLLM server at {self.url} answers {code}: {message}")

    def _lost(self, why: str) -> ConnectionLost:
        return ConnectionLost(f"The vLLM server at {self.url} is not there ({why}). Please retry.", [_retry()])

    def _unavailable(self, why: str) -> Unavailable:
        return Unavailable(f"The vLLM server at {self.url} {why}. Please retry.", [_retry()])


def base_of(client: VllmClient, name: str, model_id: str) -> Served:
    """Return a server's base model.

    Args:
        client: The server.
        name: What the server calls it; empty for the only one that it has.
        model_id: What the catalog calls it.

    Raises:
        FailedPrecondition: It has none of the name, or several.
    """
    bases = [one for one in client.served() if not one.adapter]
    named = [one for one in bases if not name or one.name == name]
    if len(named) != 1:
        raise FailedPrecondition(
            f"Set vllm_model to what the vLLM server at {client.url} calls models/{model_id}; it has "
            f"{', '.join(one.name for one in bases) or 'no base model'}."
        )
    return named[0]


def _hang_up(response: httpx2.Response) -> Callable[[], None]:
    """Return what wakes the thread that reads a response: to close the socket would not."""
    connection = response.extensions["network_stream"].get_extra_info("socket")

    def end() -> None:
        try:
            socket.socket.shutdown(connection, socket.SHUT_RDWR)
        except OSError:  # it has ended by itself
            return

    return end


def _retry() -> protos.RetryInfo:
    retry = protos.RetryInfo()
    retry.retry_delay.FromSeconds(int(RETRY_SECONDS))
    return retry
