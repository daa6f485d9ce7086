"""The engine on a vLLM server: it computes, and prompts, text and checks of what it answers are made here."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tunesmith import protos
from tunesmith.base_models import weights
from tunesmith.base_models.catalog import BaseModel
from tunesmith.base_models.prompts import FORMATS, PromptFormat, Turn
from tunesmith.base_models.weights import Weights
from tunesmith.engines.admission import closing
from tunesmith.engines.answer import Answer
from tunesmith.engines.base import Chunk, Sampling
from tunesmith.engines.constraint import Constraints, Matcher, grammar_of
from tunesmith.engines.metrics import EngineMetrics
from tunesmith.engines.places import Places
from tunesmith.engines.sampling import Chosen
from tunesmith.engines.vllm_adapters import VllmAdapters
from tunesmith.engines.vllm_client import ConnectionLost, Served, UnknownModel, VllmClient, base_of
from tunesmith.errors import FailedPrecondition, Internal, InvalidArgument, Unavailable, Unimplemented
from tunesmith.store.artifacts import ArtifactStore

# How the server writes a token's id where it would write its text.
TOKEN = "token_id:"  # noqa: S105 # nosec B105
LOOK_SECONDS = 2.0  # between two looks whether the server answers, before this one is ready
SEED_OFFSET = 1 << 31  # the server takes -1 for none, and counts up from a seed

logger = logging.getLogger(__name__)


class VllmEngine:
    """Serves one base model and its adapters from a vLLM server; see `Engine`.

    Args:
        artifacts: Where adapters are published.
        cache_dir: Where the base models' weights lie; their tokenizers are used here.
        client: The server.
        model_id: The base model that the server has, by its name in the catalog.
        served_name: What the server calls it; empty for the only one that is no adapter.
        adapters: The adapters that the server is given.
        places: How many requests it is given at a time.
        metrics: What is told of them.
    """

    def __init__(
        self,
        artifacts: ArtifactStore,
        cache_dir: Path,
        client: VllmClient,
        model_id: str,
        served_name: str,
        adapters: VllmAdapters,
        places: Places,
        metrics: EngineMetrics,
    ) -> None:
        self._artifacts, self._cache_dir = artifacts, cache_dir
        self._client, self._adapters, self._places, self._metrics = client, adapters, places, metrics
        self._model_id, self._served_name = model_id, served_name
        self._constraints = Constraints()
        self._lock = threading.Lock()
        self._tokenizers: dict[str, Tokenizer] = {}
        self._found: Served | None = None
        self._closed = threading.Event()

    def preload(self, model: BaseModel) -> None:
        """Wait until the server answers.

        Raises:
            FailedPrecondition: It has no such base model, or the weights' tokenizer is not on this machine.
            Unavailable: The engine is closing.
        """
        self._tokenizer(self._weights(model))
        told = False
        while not self._closed.is_set():
            try:
                self._base()
                return
            except Unavailable as error:
                if not told:
                    logger.warning("%s Waiting for it.", error.message)
                told = True
            self._closed.wait(LOOK_SECONDS)
        raise closing()

    def generate(
        self,
        model: BaseModel,
        adapter: str | None,
        turns: Sequence[Turn],
        sampling: Sampling,
        gone: threading.Event,
        caller: str = "",
    ) -> Iterator[Chunk]:
        """Yield an answer's chunks; see `Engine.generate`."""
        base_weights, asked = self._weights(model), time.monotonic()
        with self._places.held(caller, gone):
            attempt = partial(self._generate, base_weights, adapter, turns, sampling, gone, asked)
            try:
                yield from attempt()
            except _StartedAgain:
                yield from attempt()

    def count_tokens(self, model: BaseModel, adapter: str | None, turns: Sequence[Turn]) -> int:
        """Return the length of the prompt that `generate` would make.

        Raises:
            FailedPrecondition: The weights are not on this machine.
            NotFound: There is no such adapter.
        """
        name = model.untuned_prompt_format
        if adapter is not None:
            name = self._artifacts.manifest(adapter).get("prompt_format", "")
        if name not in FORMATS:
            raise Internal(f"Adapter {adapter} names the unknown prompt format {name!r}.")
        return len(FORMATS[name].prompt(self._tokenizer(weights.get(model, self._cache_dir)), turns))

    def embed(
        self,
        model: BaseModel,
        texts: Sequence[str],  # noqa: ARG002
        gone: threading.Event,  # noqa: ARG002
        caller: str = "",  # noqa: ARG002
    ) -> list[list[float]]:
        """Raise Unimplemented: a vLLM server that answers does not embed."""
        raise Unimplemented(
            f"Embeddings of models/{model.id} are not implemented with engine = vllm, whose server only answers. "
            "The operator gets them with engine = torch."
        )

    def close(self) -> None:
        """Stop; requests that are under way end with Unavailable."""
        self._closed.set()
        self._places.close()
        self._adapters.close()
        self._client.close()

    def _generate(
        self,
        base_weights: Weights,
        adapter: str | None,
        turns: Sequence[Turn],
        sampling: Sampling,
        gone: threading.Event,
        asked: float,
    ) -> Iterator[Chunk]:
        """Yield an answer's chunks; _StartedAgain, before the first, when another try may find the server."""
        base, tokenizer = self._base(), self._tokenizer(base_weights)
        with ExitStack() as in_use:
            pushed = None
            if adapter is not None:
                pushed = in_use.enter_context(self._adapters.use(base_weights, base.name, adapter))
            name = pushed.prompt_format if pushed else base_weights.model.untuned_prompt_format
            answers = _Answers(FORMATS[name], tokenizer, base_weights, sampling, self._constraints)
            body = answers.request(turns, base.longest) | {"model": pushed.name if pushed else base.name}
            begun = False
            try:
                for part in self._observed(self._client.stream(body, gone), len(body["prompt"]), asked):
                    for chunk in answers.chunks(part):
                        begun = True
                        yield chunk
                    if not answers.left:
                        return
            except (ConnectionLost, UnknownModel) as error:
                self._found = None  # it may be another one that is there next
                if pushed is not None and adapter is not None and isinstance(error, UnknownModel):
                    self._adapters.forget(adapter, pushed)
                if begun:
                    raise
                raise _StartedAgain(error.message, error.details) from error
            raise Internal(f"The vLLM server at {self._client.url} ended an answer without a reason.")

    def _observed(
        self, parts: Iterator[dict[str, Any]], prompt_length: int, asked: float
    ) -> Iterator[dict[str, Any]]:
        """Pass the parts of an answer on, and tell the metrics of them."""
        begun = False
        for part in parts:
            computed = sum(len(choice.get("token_ids") or ()) for choice in part.get("choices", ()))
            if computed and not begun:
                begun = True
                self._metrics.first_token.labels(self._model_id).observe(time.monotonic() - asked)
                self._metrics.prompt_tokens.labels(self._model_id).inc(prompt_length)
            self._metrics.output_tokens.labels(self._model_id).inc(computed)
            yield part

    def _weights(self, model: BaseModel) -> Weights:
        if model.id != self._model_id:
            raise FailedPrecondition(
                f"models/{model.id} is not served here: the vLLM server at {self._client.url} has "
                f"models/{self._model_id}. The operator says which with vllm_base_model."
            )
        return weights.get(model, self._cache_dir)

    def _base(self) -> Served:
        """Return the server's base model."""
        found = self._found
        if found is None:
            found = self._found = base_of(self._client, self._served_name, self._model_id)
        return found

    def _tokenizer(self, model_weights: Weights) -> Tokenizer:
        with self._lock:
            tokenizer = self._tokenizers.get(model_weights.model.id)
            if tokenizer is None:
                tokenizer = self._tokenizers[model_weights.model.id] = model_weights.tokenizer()
            return tokenizer


class _StartedAgain(Unavailable):
    """The server went away before it said anything."""


class _Answers:
    """The candidates of one request: what the server is asked, and what becomes of what it answers.

    Args:
        prompt_format: How the model is asked.
        tokenizer: The model's.
        model_weights: The base model's.
        sampling: How tokens are chosen.
        constraints: Compiles the answer's constraint.
    """

    def __init__(
        self,
        prompt_format: PromptFormat,
        tokenizer: Tokenizer,
        model_weights: Weights,
        sampling: Sampling,
        constraints: Constraints,
    ) -> None:
        self._format, self._tokenizer, self._model = prompt_format, tokenizer, model_weights.model
        self._sampling, self._stops = sampling, prompt_format.stop_tokens(tokenizer)
        self._greedy = sampling.temperature <= 0 or sampling.top_p <= 0
        self._prompt: list[int] = []
        self._answers = [Answer(tokenizer, prompt_format.answer, sampling) for _ in range(sampling.candidates)]
        self._matchers: list[Matcher] = []
        if sampling.constraint is not None:
            asked = sampling.constraint, prompt_format.answer, model_weights.path / "tokenizer.json", self._stops
            self._matchers = [constraints.matcher(*asked) for _ in self._answers]
        self.left = set(range(sampling.candidates))
        """The candidates that have not ended."""

    def request(self, turns: Sequence[Turn], longest: int) -> dict[str, Any]:
        """Return what the server is asked, all but the model's name.

        Args:
            turns: The conversation.
            longest: Tokens of a prompt with its answer, at most; 0 when that is not known.

        Raises:
            InvalidArgument: The prompt is longer than the model takes.
        """
        sampling, self._prompt = self._sampling, self._format.prompt(self._tokenizer, turns)
        limit = min(self._model.input_token_limit, longest - 1 if longest else self._model.input_token_limit)
        if (length := len(self._prompt)) > limit:
            raise InvalidArgument(
                f"The input token count ({length}) exceeds the maximum number of tokens allowed ({limit})."
            )
        room = longest - length if longest else sampling.max_output_tokens
        body = {
            "prompt": self._prompt,
            "max_tokens": min(sampling.max_output_tokens, room),
            # Everything that the model's generation_config.json could otherwise say.
            "temperature": 0.0 if self._greedy else sampling.temperature,
            "top_p": 1.0 if self._greedy else min(sampling.top_p, 1.0),
            "top_k": 0 if self._greedy else max(sampling.top_k, 0),
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            # Greedy candidates are all the same, and the server makes only one.
            "n": 1 if self._greedy else sampling.candidates,
            "stop_token_ids": sorted(self._stops),
            "stop": self._safe_stops(),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # texts of different tokens may be the same
        }
        if sampling.seed is not None:
            body["seed"] = sampling.seed + SEED_OFFSET
        if sampling.logprobs is not None:
            body["logprobs"] = sampling.logprobs
        if sampling.constraint is not None:
            grammar = grammar_of(sampling.constraint, self._format.answer, one_line=True)
            body["structured_outputs"] = {"grammar": grammar}
        return body

    def chunks(self, part: Mapping[str, Any]) -> Iterator[Chunk]:
        """Yield what a part of the server's answer makes certain."""
        for choice in part.get("choices", ()):
            indexes = range(self._sampling.candidates) if self._greedy else (choice["index"],)
            tokens = _tokens(choice, self._sampling.logprobs)
            for index in indexes:
                if index in self.left:
                    yield from self._take(index, tokens, choice.get("finish_reason"))

    def _safe_stops(self) -> list[str]:
        """Return the stop sequences that the server may look for.

        It does not know that the answer's opening is no part of it, and would find one there.
        """
        opening = self._format.answer
        tails = [opening[at:] for at in range(len(opening))]
        return [stop for stop in self._sampling.stop_sequences if stop and not any(map(stop.startswith, tails))]

    def _take(self, index: int, tokens: Sequence[Chosen], ended: str | None) -> Iterator[Chunk]:
        answer, text, reason = self._answers[index], "", 0
        for chosen in tokens:
            if chosen.token in self._stops:
                reason = protos.Candidate.STOP
                break
            self._follow(index, chosen.token)
            text += answer.push([chosen])
            if answer.text.stopped or (self._matchers and self._matchers[index].finished):
                reason = protos.Candidate.STOP
                break
        if not reason and ended:
            reason = _reason(ended)
        if reason:
            self.left.remove(index)
            text += answer.text.flush()
        if text or reason:
            yield answer.chunk(text, len(self._prompt), index, reason)

    def _follow(self, index: int, token: int) -> None:
        """Raise when the server does not hold an answer to its constraint: some ignore it, others loosen it."""
        if not self._matchers:
            return
        matcher = self._matchers[index]
        if failed := matcher.failed:
            raise failed
        if not matcher.allows(token):
            raise Internal(
                "The vLLM server does not hold answers to a schema or to texts. The operator needs vLLM 0.12 or "
                """newer, started with --structured-outputs-config '{"backend": "guidance"}'."""
            )
        matcher.take(token)


def _reason(ended: str) -> int:
    """Return `Candidate.FinishReason` of a server's word for it."""
    if ended == "length":
        return protos.Candidate.MAX_TOKENS
    if ended == "stop":
        return protos.Candidate.STOP
    raise Unavailable(f"The vLLM server gave an answer up ({ended}). Please retry.")


def _tokens(choice: Mapping[str, Any], wanted: int | None) -> list[Chosen]:
    """Return the tokens of a part of an answer."""
    tokens, told = choice.get("token_ids") or [], choice.get("logprobs")
    if wanted is None or told is None:
        return [Chosen(token) for token in tokens]
    found = []
    for token, logprob, top in zip(tokens, told["token_logprobs"], told["top_logprobs"], strict=True):
        # The chosen token is among them even when it is not among the most probable.
        best = sorted((top or {}).items(), key=lambda one: -one[1])[:wanted]
        ids = tuple((int(name.removeprefix(TOKEN)), value) for name, value in best)
        found.append(Chosen(token, logprob, ids))
    return found
