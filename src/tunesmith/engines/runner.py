"""One base model and the thread that runs it: requests join and leave the batch between two steps.

    submit -> waiting -> prefilling -> running -> ended
                 |            |           |
                 +------------+-----------+--- gone: leaves at the next step

A step takes some of the waiting into a prefill, computes one chunk of the prefill whose turn it is, and then
one token for all that are running. Of the waiting, callers take turns: who has the fewest under way comes first.
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from tunesmith import protos
from tunesmith.base_models import decoder
from tunesmith.base_models.weights import Weights
from tunesmith.engines.kv_cache import KVCache, causal_mask
from tunesmith.engines.linear import linear
from tunesmith.engines.lora import Adapter, AdapterMix, adapt
from tunesmith.engines.sampling import Sampler, choose
from tunesmith.engines.turns import Turns
from tunesmith.errors import ApiError, Cancelled, FailedPrecondition, Internal, Unavailable

CHUNK = 512
"""Tokens of one prefill pass: what the running requests wait for at most between two of their tokens."""

SCORED_AT_ONCE = 64
"""Positions of a probe whose scores of the whole vocabulary are in memory together."""

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Ended:
    """The last event of a request.

    Attributes:
        finish_reason: `Candidate.STOP` or `MAX_TOKENS`.
    """

    finish_reason: int


Events = SimpleQueue[tuple[int, int | Ended | ApiError]]
"""What happens to requests, each event with the request's index: a token, the end, or an error."""


@dataclass(eq=False)
class Request:
    """One answer to make.

    Attributes:
        prompt: Token ids, at least one.
        adapter: None for the base model itself.
        sampler: How tokens are chosen.
        max_output_tokens: When to end, if no stop token comes first.
        stop_tokens: Ids that end the answer.
        gone: Set when nobody waits for the answer any more.
        events: The answer's tokens one by one, then `Ended`, or an error instead; each with `index`.
        index: Which of the requests that share `events` it is.
        caller: Who asks; callers take turns.
        abandoned: Set when the reader has stopped reading.
        tokens: Ids generated so far.
    """

    prompt: Sequence[int]
    adapter: Adapter | None
    sampler: Sampler
    max_output_tokens: int
    stop_tokens: frozenset[int]
    gone: threading.Event
    events: Events = field(default_factory=SimpleQueue)
    index: int = 0
    caller: str = ""
    abandoned: bool = False
    ended: bool = False
    tokens: list[int] = field(default_factory=list)

    def end(self, event: Ended | ApiError) -> None:
        """Say how the request ended, once."""
        if not self.ended:
            self.ended = True
            self.events.put((self.index, event))

    def take(self, token: int, longest: int) -> None:
        """Hand out the next token; `longest` is how many tokens the model can hold."""
        if token in self.stop_tokens:
            return self.end(Ended(protos.Candidate.STOP))
        self.tokens.append(token)
        self.events.put((self.index, token))
        if len(self.tokens) >= self.max_output_tokens or len(self.prompt) + len(self.tokens) >= longest:
            self.end(Ended(protos.Candidate.MAX_TOKENS))
        return None

    def leave(self) -> bool:
        """Return whether the request has ended or nobody waits for it."""
        if self.abandoned or self.gone.is_set():
            self.end(Cancelled("The client went away."))
        return self.ended


@dataclass(eq=False)
class _Prefill:
    """Prompts that are computed together: several short ones in one pass, or a long one chunk by chunk.

    Attributes:
        requests: Whose prompts.
        cache: Their keys and values, a cache of their own until the prompts are whole.
    """

    requests: list[Request]
    cache: KVCache

    @property
    def done(self) -> int:
        """How many tokens have been computed when some are left: only a prompt alone has several passes."""
        return self.cache.lengths[0]


class Runner:
    """A base model in memory, and its thread.

    Args:
        weights: Where the model lies.
        device: Where it runs.
        dtype: Number format of its weights.
        max_batch: Requests under way together.
    """

    def __init__(self, weights: Weights, device: torch.device, dtype: torch.dtype, max_batch: int) -> None:
        self.weights = weights
        self.device = device
        self._dtype = dtype
        self._mix = AdapterMix()
        self._max_batch = max_batch
        self._waiting: Turns[Request] = Turns()
        self._prefilling: deque[_Prefill] = deque()
        self._running: list[Request] = []
        self._cache = KVCache(0, device)
        """Row i is the i-th running request's."""
        self._tasks: Turns[tuple[Future[Any], Callable[[], Any]]] = Turns()
        """What is no request: computed between two steps, one at a time."""
        self._closing = False
        self._wake = threading.Condition()
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name=f"runner-{weights.model.id}", daemon=True
        )
        self._thread.start()
        ready.result()

    def submit(self, *requests: Request) -> None:
        """Put requests in the queue, together: what fits one pass is computed in one.

        Raises:
            Unavailable: The runner is closing.
        """
        with self._wake:
            self._refuse_when_closing()
            for request in requests:
                self._waiting.add(request.caller, [request])
            self._wake.notify()

    def logprob(self, tokens: Sequence[int], prompt_length: int, adapter: Adapter | None) -> float:
        """Return the mean log-probability of an answer's tokens, all that follow the prompt.

        Raises:
            Unavailable: The runner is closing.
        """
        return self._between_steps(lambda: self._logprob(tokens, prompt_length, adapter))

    def embed(
        self, texts: Sequence[Sequence[int]], skip: int, gone: threading.Event, caller: str = ""
    ) -> torch.Tensor:
        """Return the mean of each text's last hidden states, float32 [texts, size].

        Args:
            texts: Token ids, more than `skip` each.
            skip: How many tokens at each text's beginning are not counted.
            gone: Set when nobody waits for the result any more.
            caller: Who asks; callers take turns.

        Raises:
            Cancelled: `gone` was set.
            Unavailable: The runner is closing.
        """
        means = []
        for group in _groups(texts):
            cache, total = KVCache(len(group), self.device), torch.zeros(())
            for start in range(0, max(map(len, group)), CHUNK):
                if gone.is_set():
                    raise Cancelled("The client went away.")
                chunks = [text[start : start + CHUNK] for text in group]
                summed = partial(self._summed, cache, chunks, max(skip - start, 0))
                total = total + self._between_steps(summed, caller)
            counts = torch.tensor([len(text) - skip for text in group], device=self.device)
            means.append(total / counts[:, None])
        return torch.cat(means)

    def close(self) -> None:
        """Stop after the current step; all requests end with Unavailable."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _between_steps(self, compute: Callable[[], _Result], caller: str = "") -> _Result:
        """Compute something on the runner's thread and wait for it.

        Raises:
            Unavailable: The runner is closing.
        """
        result: Future[_Result] = Future()
        with self._wake:
            self._refuse_when_closing()
            self._tasks.add(caller, [(result, compute)])
            self._wake.notify()
        return result.result()

    def _refuse_when_closing(self) -> None:
        if self._closing:
            raise closing()

    def _run(self, ready: Future[None]) -> None:
        # All of it on one thread: each thread that computes gets helpers from OpenMP, and as soon as there are
        # more of them than cores they sleep between two products instead of spinning: half the speed.
        with torch.inference_mode():
            try:
                self._load()
            except BaseException as error:  # noqa: BLE001 — raised by the constructor
                ready.set_exception(error)
                return
            ready.set_result(None)
            self._loop()

    def _load(self) -> None:
        causal_lm = decoder.load(self.weights.path, self.device, self._dtype)
        config, head = causal_lm.config, causal_lm.get_output_embeddings()
        self._windows = _windows(self.weights, config)
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.longest: int = config.max_position_embeddings
        """Tokens that the model can hold, prompt and answer together."""
        self.linears = adapt(causal_lm, head, self._mix)
        """Path of each linear layer that an adapter may change, with its numbers of inputs and outputs."""
        self._head = linear(head.weight, head.bias)
        self._body: nn.Module = causal_lm.base_model

    def _loop(self) -> None:
        try:
            while self._work_to_do():
                try:
                    self._step()
                except Exception:
                    logger.exception("A step of %s failed.", self.weights.model.id)
                    self._end_all_under_way(_failed())
        finally:
            with self._wake:
                self._closing = True
            self._end_all_under_way(closing())
            for request in self._waiting:
                request.end(closing())
            for result, _ in self._tasks:
                result.set_exception(closing())

    def _work_to_do(self) -> bool:
        """Wait for something to do; False when there will be nothing more."""
        with self._wake:
            if not self._running and not self._prefilling:
                self._mix.clear()
                self._wake.wait_for(lambda: self._waiting or self._tasks or self._closing)
            return not self._closing

    def _end_all_under_way(self, error: ApiError) -> None:
        """End what has left the queue; its keys and values may be in any state."""
        for request in [*self._running, *(one for prefill in self._prefilling for one in prefill.requests)]:
            request.end(error)
        self._prefilling.clear()
        self._running.clear()
        self._cache = KVCache(0, self.device)

    def _step(self) -> None:
        self._drop_ended()
        self._do_a_task()
        self._admit()
        self._prefill()
        self._drop_ended()
        self._decode()
        self._drop_ended()

    def _do_a_task(self) -> None:
        with self._wake:
            turn = self._tasks.next({})
            if turn is None:
                return
            result, compute = self._tasks.take(turn[0])
        try:
            result.set_result(compute())
        except Exception as error:
            logger.exception("A task of %s failed.", self.weights.model.id)
            failed = _failed()
            failed.__cause__ = error
            result.set_exception(failed)

    def _drop_ended(self) -> None:
        """Take out the requests that have ended, and those that nobody waits for."""
        with self._wake:
            self._waiting.keep(lambda request: not request.leave())
        self._prefilling = deque(
            prefill for prefill in self._prefilling if not all(request.leave() for request in prefill.requests)
        )
        for row in reversed(range(len(self._running))):
            if self._running[row].leave():
                self._running[row] = self._running[-1]
                self._running.pop()
                self._cache.remove(row)
        if not self._running:
            self._cache = KVCache(0, self.device)

    def _admit(self) -> None:
        """Take from those that wait, into one prefill, what fits the batch and one pass."""
        under_way = [*self._running, *(request for prefill in self._prefilling for request in prefill.requests)]
        held = Counter(request.caller for request in under_way)
        admitted: list[Request] = []
        longest = 0
        with self._wake:
            while len(under_way) + len(admitted) < self._max_batch and (turn := self._waiting.next(held)):
                caller, request = turn
                longest = max(longest, len(request.prompt))
                if admitted and longest * (len(admitted) + 1) > CHUNK:
                    break
                admitted.append(self._waiting.take(caller))
                held[caller] += 1
        if admitted:
            self._prefilling.append(_Prefill(admitted, KVCache(len(admitted), self.device)))

    def _prefill(self) -> None:
        """Compute the next chunk of the prefill whose turn it is."""
        if not self._prefilling:
            return
        prefill = self._prefilling.popleft()
        try:
            tokens = self._prefill_chunk(prefill)
        except Exception:
            logger.exception("A prefill of %s failed.", self.weights.model.id)
            for request in prefill.requests:
                request.end(_failed())
            return
        if tokens is None:
            self._prefilling.append(prefill)  # the others take their turns before its next chunk
            return
        self._running += prefill.requests
        self._cache.append(prefill.cache)
        self._hand_out(prefill.requests, tokens)

    def _prefill_chunk(self, prefill: _Prefill) -> list[int] | None:
        """Compute a chunk; return the answers' first tokens when the prompts are whole."""
        start = prefill.done
        chunks = [request.prompt[start : start + CHUNK] for request in prefill.requests]
        lengths = [len(chunk) for chunk in chunks]
        width = max(lengths)
        tokens = torch.tensor([[*chunk, *[0] * (width - len(chunk))] for chunk in chunks], device=self.device)
        hidden = self._forward(prefill.cache, tokens, [request.adapter for request in prefill.requests])
        prefill.cache.advance(lengths)
        if prefill.done < len(prefill.requests[0].prompt):
            return None
        last = hidden[torch.arange(len(chunks)), torch.tensor(lengths) - 1]
        return choose(self._scores(last), [request.sampler for request in prefill.requests])

    def _decode(self) -> None:
        """Compute one more token of every running request."""
        if not self._running:
            return
        tokens = torch.tensor([[request.tokens[-1]] for request in self._running], device=self.device)
        hidden = self._forward(self._cache, tokens, [request.adapter for request in self._running])
        self._cache.advance([1] * len(self._running))
        chosen = choose(self._scores(hidden[:, 0]), [request.sampler for request in self._running])
        self._hand_out(self._running, chosen)

    def _hand_out(self, requests: Sequence[Request], tokens: Sequence[int]) -> None:
        for request, token in zip(requests, tokens, strict=True):
            request.take(token, self.longest)

    def _forward(self, cache: KVCache, tokens: torch.Tensor, adapters: Sequence[Adapter | None]) -> torch.Tensor:
        """Run the model's body over new tokens of each row.

        Args:
            cache: What the rows have seen; takes the new tokens in, which `advance` then counts.
            tokens: Ids [rows, width].
            adapters: Each row's.

        Returns:
            The last hidden states, [rows, width, size].
        """
        self._mix.select(adapters)
        positions = cache.begin(tokens.shape[1])
        masks = {
            kind: causal_mask(positions, cache.end, window, self._dtype) for kind, window in self._windows.items()
        }
        output = self._body(
            input_ids=tokens,
            # Models whose layers differ take a mask for each kind of layer, the others one mask.
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def _scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the scores of all tokens, float32 [rows, vocabulary], for hidden states [rows, size].

        The head is applied here and not by the model: its product of a three-dimensional, non-contiguous
        bfloat16 input takes forty times as long.
        """
        scores = self._head(hidden.contiguous()).float()
        return scores if self._softcap is None else torch.tanh(scores / self._softcap) * self._softcap

    def _summed(self, cache: KVCache, chunks: Sequence[Sequence[int]], skip: int) -> torch.Tensor:
        """Return the sum of each row's last hidden states for new tokens, the first `skip` left out."""
        lengths = [len(chunk) for chunk in chunks]
        width = max(lengths)
        tokens = torch.tensor([[*chunk, *[0] * (width - len(chunk))] for chunk in chunks], device=self.device)
        hidden = self._forward(cache, tokens, [None] * len(chunks)).float()
        cache.advance(lengths)
        places = torch.arange(width, device=self.device)
        counted = (places >= skip) & (places < torch.tensor(lengths, device=self.device)[:, None])
        return (hidden * counted[:, :, None]).sum(1)

    def _logprob(self, tokens: Sequence[int], prompt_length: int, adapter: Adapter | None) -> float:
        cache, hidden = KVCache(1, self.device), []
        for start in range(0, len(tokens) - 1, CHUNK):
            chunk = tokens[start : min(start + CHUNK, len(tokens) - 1)]
            hidden.append(self._forward(cache, torch.tensor([chunk], device=self.device), [adapter])[0])
            cache.advance([len(chunk)])
        total = 0.0
        answer = torch.tensor(tokens[prompt_length:], device=self.device)
        before_answer = torch.cat(hidden)[prompt_length - 1 :]
        for start in range(0, len(answer), SCORED_AT_ONCE):
            scores = self._scores(before_answer[start : start + SCORED_AT_ONCE])
            targets = answer[start : start + SCORED_AT_ONCE]
            total -= float(functional.cross_entropy(scores, targets, reduction="sum"))
        return total / len(answer)


def _groups(texts: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    """Split texts, in order, into groups that fit one pass each, padding counted; a longer one is alone."""
    group: list[Sequence[int]] = []
    for text in texts:
        if group and max(len(text), *map(len, group)) * (len(group) + 1) > CHUNK:
            yield group
            group = []
        group.append(text)
    if group:
        yield group


def _windows(weights: Weights, config: Any) -> dict[str, int | None]:
    """Return the kinds of a model's layers, each with how many tokens its attention looks back."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or [])
    if not kinds:
        return {"all": window}
    if unknown := kinds.keys() - {"full_attention", "sliding_attention"}:
        raise FailedPrecondition(f"models/{weights.model.id} has {min(unknown)} layers, which are not served.")
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def _failed() -> Internal:
    return Internal("An internal error has occurred. Please retry or report it to the operator of this server.")


def closing() -> Unavailable:
    """Return the error that ends requests when the engine closes."""
    return Unavailable("The server is shutting down.")
