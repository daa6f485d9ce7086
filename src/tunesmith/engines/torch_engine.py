"""The engine in this process: PyTorch, with requests of all tuned models of a base in one batch."""

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from tokenizers import Tokenizer

from tunesmith import protos
from tunesmith.base_models import weights
from tunesmith.base_models.catalog import BaseModel
from tunesmith.base_models.device import compute_dtype, pick_device
from tunesmith.base_models.prompts import FORMATS, PromptFormat, Turn
from tunesmith.base_models.weights import Weights
from tunesmith.engines.adapter_cache import AdapterCache
from tunesmith.engines.base import Chunk, Sampling
from tunesmith.engines.runner import Ended, Request, Runner, closing
from tunesmith.engines.sampling import Sampler
from tunesmith.engines.text_stream import TextStream
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
    """

    def __init__(
        self,
        artifacts: ArtifactStore,
        cache_dir: Path,
        *,
        device: str = "auto",
        max_batch: int = 16,
        loaded_adapters: int = 32,
    ) -> None:
        self._artifacts = artifacts
        self._cache_dir = cache_dir
        self._device = pick_device(device)
        self._max_batch = max_batch
        self._adapters = AdapterCache(artifacts, loaded_adapters)
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
    ) -> Iterator[Chunk]:
        """Yield an answer's chunks; see `Engine.generate`."""
        runner = self._runner(model)
        with ExitStack() as in_use:
            loaded = None if adapter is None else in_use.enter_context(self._adapters.use(runner, adapter))
            prompt_format = FORMATS[loaded.prompt_format if loaded else model.untuned_prompt_format]
            tokenizer = self._tokenizer(runner.weights)
            request = Request(
                prompt=_checked(prompt_format.prompt(tokenizer, turns), model, runner),
                adapter=loaded,
                sampler=Sampler(sampling),
                max_output_tokens=sampling.max_output_tokens,
                stop_tokens=prompt_format.stop_tokens(tokenizer),
                gone=gone,
            )
            runner.submit(request)
            text = TextStream(tokenizer, prompt_format.answer, sampling.stop_sequences)
            try:
                yield from _chunks(request, text)
            finally:
                request.abandoned = True

    def count_tokens(self, model: BaseModel, adapter: str | None, turns: Sequence[Turn]) -> int:
        """Return the length of the prompt that `generate` would make.

        Raises:
            FailedPrecondition: The weights are not on this machine.
            NotFound: There is no such adapter.
        """
        tokenizer = self._tokenizer(weights.get(model, self._cache_dir))
        return len(self._format(model, adapter).prompt(tokenizer, turns))

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
                    compute_dtype(self._device),
                    self._max_batch,
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


def _chunks(request: Request, text: TextStream) -> Iterator[Chunk]:
    """Turn a request's events into chunks."""
    length, count = len(request.prompt), 0
    while True:
        event = request.events.get()
        if request.gone.is_set():
            raise Cancelled("The client went away.")
        if isinstance(event, ApiError):
            raise event
        if isinstance(event, Ended):
            yield Chunk(text.flush(), length, count, event.finish_reason)
            return
        certain = text.push(event)
        if text.stopped:
            yield Chunk(certain, length, count, protos.Candidate.STOP)
            return
        count += 1
        if certain:
            yield Chunk(certain, length, count)
