"""The engine in this process: PyTorch, with requests of all tuned models of a base in one batch."""

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import torch
from tokenizers import Tokenizer
from torch.nn import functional

from tunesmith import protos
from tunesmith.base_models import weights
from tunesmith.base_models.catalog import BaseModel
from tunesmith.base_models.device import compute_dtype, pick_device
from tunesmith.base_models.prompts import FORMATS, PromptFormat, Turn
from tunesmith.base_models.weights import Weights
from tunesmith.engines.adapter_cache import AdapterCache
from tunesmith.engines.admission import Admission, closing
from tunesmith.engines.answer import Answer
from tunesmith.engines.base import Chunk, Sampling
from tunesmith.engines.constraint import Constraints
from tunesmith.engines.drafts import Drafter
from tunesmith.engines.metrics import EngineMetrics
from tunesmith.engines.request import Events, Request
from tunesmith.engines.runner import Runner
from tunesmith.engines.sampling import Sampler
from tunesmith.errors import ApiError, Cancelled, Internal, InvalidArgument
from tunesmith.store.artifacts import ArtifactStore


class TorchEngine:
    """Serves base models and their adapters from this process; see `Engine`.

    Prompts are built, adapters loaded and text made on the callers' threads; each base model has one thread
    that computes.

    Args:
        artifacts: Where adapters are published.
        cache_dir: Where the base models' weights lie.
        device: torch device, or `auto`.
        max_batch: Requests of one base model that are generated together; more wait.
        loaded_adapters: Adapters kept in memory.
        kv_bytes: Memory for keys and values of a base model's requests, at most.
        waiting: Requests of one base model that may wait for their turn.
        waiting_seconds: How long.
        metrics: What is told of them.
        drafts: Whether tokens are guessed and checked, which changes no answer.
        dtype: Number format of the weights; what the device is fast in if not given.
    """

    def __init__(
        self,
        artifacts: ArtifactStore,
        cache_dir: Path,
        *,
        device: str = "auto",
        max_batch: int = 16,
        loaded_adapters: int = 32,
        kv_bytes: int = 1 << 30,
        waiting: int = 1024,
        waiting_seconds: float = 3600.0,
        metrics: EngineMetrics | None = None,
        drafts: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._artifacts = artifacts
        self._cache_dir = cache_dir
        self._device = pick_device(device)
        self._dtype = dtype or compute_dtype(self._device)
        self._max_batch, self._kv_bytes = max_batch, kv_bytes
        self._waiting, self._drafts = (waiting, waiting_seconds), drafts
        self._metrics = metrics or EngineMetrics()
        self._adapters = AdapterCache(artifacts, loaded_adapters, self._metrics)
        self._constraints = Constraints()
        self._lock = threading.Lock()
        self._loading: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        """By model id: of two first requests one loads and the other waits; other models' do not."""
        self._tokenizers: dict[str, Tokenizer] = {}
        self._runners: dict[str, Runner] = {}
        self._closed = False

    def preload(self, model: BaseModel) -> None:
        """Load a base model now instead of at its first request.

        Raises:
            FailedPrecondition: Its weights are not on this machine.
        """
        self._tokenizer(self._runner(model).weights)

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
        runner = self._runner(model)
        runner.check(caller)
        with ExitStack() as in_use:
            loaded = None if adapter is None else in_use.enter_context(self._adapters.use(runner, adapter))
            prompt_format = FORMATS[loaded.prompt_format if loaded else model.untuned_prompt_format]
            tokenizer = self._tokenizer(runner.weights)
            prompt = _checked(prompt_format.prompt(tokenizer, turns), model, runner)
            stop_tokens, most = prompt_format.stop_tokens(tokenizer), sampling.max_output_tokens
            samplers = self._samplers(sampling, prompt_format, runner.weights, stop_tokens)
            events: Events = SimpleQueue()
            outputs = loaded.outputs if loaded else None
            requests = [
                Request(
                    prompt,
                    loaded,
                    sampler,
                    Drafter(outputs, prompt),
                    most,
                    stop_tokens,
                    gone,
                    events,
                    index,
                    caller,
                )
                for index, sampler in enumerate(samplers)
            ]
            answers = [Answer(tokenizer, prompt_format.answer, sampling) for _ in requests]
            try:
                runner.submit(*requests)
                yield from _chunks(requests, answers)
            finally:
                for request in requests:
                    request.abandoned = True

    def count_tokens(self, model: BaseModel, adapter: str | None, turns: Sequence[Turn]) -> int:
        """Return the length of the prompt that `generate` would make.

        Raises:
            FailedPrecondition: The weights are not on this machine.
            NotFound: There is no such adapter.
        """
        tokenizer = self._tokenizer(weights.get(model, self._cache_dir))
        return len(self._format(model, adapter).prompt(tokenizer, turns))

    def embed(
        self, model: BaseModel, texts: Sequence[str], gone: threading.Event, caller: str = ""
    ) -> list[list[float]]:
        """Return a vector of length 1 for each text; see `Engine.embed`."""
        runner = self._runner(model)
        tokenizer = self._tokenizer(runner.weights)
        passages = [FORMATS[model.untuned_prompt_format].passage(tokenizer, text) for text in texts]
        tokens = [_checked(passage, model, runner) for passage, _ in passages]
        means = runner.embed(tokens, passages[0][1], gone, caller)
        vectors: list[list[float]] = functional.normalize(means, dim=-1).tolist()
        return vectors

    def close(self) -> None:
        """Stop; requests that are under way end with Unavailable."""
        self._closed = True
        for runner in list(self._runners.values()):
            runner.close()

    def _runner(self, model: BaseModel) -> Runner:
        with self._lock:
            loading = self._loading[model.id]
        with loading:
            runner = self._runners.get(model.id)
            if runner is None and not self._closed:
                runner = Runner(
                    weights.get(model, self._cache_dir),
                    self._device,
                    self._dtype,
                    self._max_batch,
                    self._kv_bytes,
                    Admission(*self._waiting),
                    self._metrics,
                    drafts=self._drafts,
                )
                self._runners[model.id] = runner
        if runner is None or self._closed:
            self.close()  # of a runner that was loading when the engine was closed
            raise closing()
        return runner

    def _tokenizer(self, model_weights: Weights) -> Tokenizer:
        model_id = model_weights.model.id
        with self._lock:
            loading = self._loading[model_id]
        with loading:
            if model_id not in self._tokenizers:
                self._tokenizers[model_id] = model_weights.tokenizer()
            return self._tokenizers[model_id]

    def _samplers(
        self, sampling: Sampling, prompt_format: PromptFormat, model_weights: Weights, stop_tokens: frozenset[int]
    ) -> list[Sampler]:
        """Return a sampler a candidate."""
        samplers = []
        for index in range(sampling.candidates):
            seed = None if sampling.seed is None else sampling.seed + index
            constraint, matcher = sampling.constraint, None
            if constraint is not None:
                tokenizer = model_weights.path / "tokenizer.json"
                matcher = self._constraints.matcher(constraint, prompt_format.answer, tokenizer, stop_tokens)
            samplers.append(Sampler(replace(sampling, seed=seed), matcher))
        return samplers

    def _format(self, model: BaseModel, adapter: str | None) -> PromptFormat:
        if adapter is None:
            return FORMATS[model.untuned_prompt_format]
        name = self._artifacts.manifest(adapter).get("prompt_format")
        if name not in FORMATS:
            raise Internal(f"Adapter {adapter} names the unknown prompt format {name!r}.")
        return FORMATS[name]


def _checked(prompt: list[int], model: BaseModel, runner: Runner) -> list[int]:
    limit = min(model.input_token_limit, runner.longest - 1)
    if len(prompt) > limit:
        raise InvalidArgument(
            f"The input token count ({len(prompt)}) exceeds the maximum number of tokens allowed ({limit})."
        )
    return prompt


def _chunks(requests: Sequence[Request], answers: Sequence[Answer]) -> Iterator[Chunk]:
    """Turn the events of one answer's candidates, which share a queue, into chunks."""
    length, left = len(requests[0].prompt), set(range(len(requests)))
    while left:
        event = requests[0].events.get()
        index, reason = event.index, 0
        if requests[0].gone.is_set():
            raise Cancelled("The client went away.")
        if index not in left:
            continue  # a stop sequence ended it before the runner noticed
        answer = answers[index]
        certain = answer.push(event.tokens)
        if isinstance(event.end, ApiError):
            raise event.end
        if event.end:
            certain, reason = certain + answer.text.flush(), event.end.finish_reason
        if answer.text.stopped:
            requests[index].abandoned, reason = True, protos.Candidate.STOP
        if reason:
            left.remove(index)
        if certain or reason:
            yield answer.chunk(certain, length, index, reason)
