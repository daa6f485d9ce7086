"""One base model and the thread that runs it: requests join and leave the batch between two steps.

    submit -> waiting -> prefilling -> running -> ended
                 |            |           |
                 +------------+-----------+--- gone: leaves at the next step

A step takes some of the waiting into a prefill, computes one chunk of the prefill whose turn it is, and then
one token for all that are running. Of the waiting, callers take turns: who has the fewest under way comes first.
So many may wait, and none for too long: see `admission`.
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, count
from typing import Any, TypeVar

import torch
from torch.nn import functional

from tunesmith.base_models import decoder
from tunesmith.base_models.weights import Weights
from tunesmith.engines.admission import Admission, closing
from tunesmith.engines.choices import Choices
from tunesmith.engines.drafts import Guess, worth
from tunesmith.engines.lora import Adapter
from tunesmith.engines.metrics import EngineMetrics
from tunesmith.engines.module_network import ModuleNetwork
from tunesmith.engines.network import Network, Piece
from tunesmith.engines.packed_network import PackedNetwork
from tunesmith.engines.queue import Queue
from tunesmith.engines.request import Request
from tunesmith.engines.sampling import Chosen, Sampler
from tunesmith.engines.turns import Turns
from tunesmith.errors import ApiError, Cancelled, Internal, Unavailable
from tunesmith.kernels.decoding import DecodingKernels

CHUNK = 512
"""Tokens of one prefill pass: what the running requests wait for at most between two of their tokens."""

TOLD_AT_ONCE = 6
"""Of so many requests each token is told as it comes; of twice as many two at a time, and so on."""

GUESSED = 64
"""Tokens of a pass at most: to find more takes longer than they gain."""

LEAST_CHANCE = 0.1
"""Of being right: a guess that is less likely is not worth its room."""

SCORED_AT_ONCE = 64
"""Positions of a probe whose scores of the whole vocabulary are in memory together."""

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


@dataclass(eq=False)
class _Prefill:
    """Prompts that are computed together: several short ones in one pass, or a long one chunk by chunk.

    Attributes:
        requests: Whose prompts.
    """

    requests: list[Request]

    @property
    def done(self) -> int:
        """How many tokens have been computed when some are left: only a prompt alone has several passes."""
        length: int = self.requests[0].slot.length
        return length


class Runner:
    """A base model in memory, and its thread.

    Args:
        weights: Where the model lies.
        device: Where it runs.
        dtype: Number format of its weights.
        max_batch: Requests under way together.
        kv_bytes: Memory for their keys and values, at most; not where the model is run as modules.
        admission: Which requests may wait.
        metrics: What is told of them.
        drafts: Whether tokens are guessed.
    """

    def __init__(
        self,
        weights: Weights,
        device: torch.device,
        dtype: torch.dtype,
        max_batch: int,
        kv_bytes: int,
        admission: Admission,
        metrics: EngineMetrics,
        *,
        drafts: bool = True,
    ) -> None:
        self.weights = weights
        self.device = device
        self._dtype = dtype
        self._max_batch, self._kv_bytes, self._drafts = max_batch, kv_bytes, drafts
        self._admission, self._metrics, self._label = admission, metrics, weights.model.id
        self._under_way = 0
        """How many requests have left the queue; changed with the lock held."""
        self._waiting: Queue[Request] = Queue(max_batch, admission, metrics, weights.model.id)
        self._prefilling: deque[_Prefill] = deque()
        self._running: list[Request] = []
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
        """Put requests of one caller in the queue, together: what fits one pass is computed in one.

        Raises:
            ResourceExhausted: Too many wait, or these would for too long.
            Unavailable: The runner is closing.
        """
        with self._wake:
            self._refuse_when_closing()
            self._let_in(requests[0].caller)
            for request in requests:
                self._waiting.add(request)
            self._wake.notify()

    def check(self, caller: str) -> None:
        """Refuse a caller who would be refused anyhow, before anything is prepared.

        Raises:
            ResourceExhausted: As `submit`.
        """
        with self._wake:
            self._let_in(caller)

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
            ResourceExhausted: Too many wait.
            Unavailable: The runner is closing.
        """
        self.check(caller)
        means = []
        for group in _groups(texts):
            slots: list[Any] = self._between_steps(partial(self._open, [len(text) for text in group]), caller)
            try:
                total = torch.zeros(())
                for start in range(0, max(map(len, group)), CHUNK):
                    chunks = [text[start : start + CHUNK] for text in group]
                    summed = partial(self._summed, slots, chunks, max(skip - start, 0), gone)
                    total = total + self._between_steps(summed, caller)
            finally:
                with suppress(Unavailable):  # it is closing, and all memory with it
                    self._between_steps(partial(self._close, slots), caller)
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

    def _let_in(self, caller: str) -> None:
        """Make sure that one more of a caller's may wait; the lock is held.

        Raises:
            ResourceExhausted: It may not.
        """
        self._waiting.let_in(caller, self._under_way, len(self._tasks))

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
        model = decoder.load(self.weights.path, self.device, self._dtype)
        kernels = DecodingKernels.find(self.device, self._dtype, self.weights.path.parent.parent / "kernels")
        if kernels and isinstance(model, decoder.CausalLM) and PackedNetwork.fits(model, kernels):
            self._network: Network = PackedNetwork(model, kernels, self._kv_bytes, CHUNK)
        else:
            self._network = ModuleNetwork(model, self.weights, self.device, self._dtype)
        self.longest = self._network.longest
        """Tokens that the model can hold, prompt and answer together."""
        self.linears = self._network.linears
        """Path of each linear layer that an adapter may change, with its numbers of inputs and outputs."""

    def prepare(self, adapter: Adapter) -> Adapter:
        """Bring an adapter into the layout that passes read, on the caller's thread; return what is to be kept."""
        return self._network.prepare(adapter)

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
                self._wake.wait_for(lambda: self._waiting or self._tasks or self._closing)
            return not self._closing

    def _end_all_under_way(self, error: ApiError) -> None:
        """End what has left the queue."""
        for request in [*self._running, *(one for prefill in self._prefilling for one in prefill.requests)]:
            request.end(error)
            self._close([request.slot])
        self._prefilling.clear()
        self._running.clear()
        with self._wake:
            self._under_way = 0

    def _step(self) -> None:
        self._drop_ended()
        self._do_a_task()
        self._admit()
        self._prefill()
        self._drop_ended()
        self._decode()
        self._tell()
        self._drop_ended()
        self._observe()

    def _do_a_task(self) -> None:
        with self._wake:
            turn = self._tasks.next({})
            if turn is None:
                return
            result, compute = self._tasks.take(turn[0])
        try:
            result.set_result(compute())
        except _NoRoom:
            with self._wake:
                self._tasks.add(turn[0], [(result, compute)])  # those that run make room when they end
        except ApiError as error:
            result.set_exception(error)
        except Exception as error:
            logger.exception("A task of %s failed.", self.weights.model.id)
            failed = _failed()
            failed.__cause__ = error
            result.set_exception(failed)

    def _drop_ended(self) -> None:
        """Take out the requests that have ended, and those that nobody waits for."""
        with self._wake:
            self._waiting.drop(self._under_way)
        gone = [prefill for prefill in self._prefilling if self._all_leave(prefill)]
        for prefill in gone:
            self._prefilling.remove(prefill)
            self._close([request.slot for request in prefill.requests])
        left = [request for request in self._running if request.leave()]
        self._close([request.slot for request in left])
        for request in left:
            self._waiting.ended(request)
        self._running = [request for request in self._running if not request.ended]

    def _observe(self) -> None:
        """Tell how a step left things."""
        blocks, label = self._network.blocks(), self._label
        with self._wake:
            self._under_way = len(self._running) + sum(len(prefill.requests) for prefill in self._prefilling)
            waiting = len(self._waiting) + len(self._tasks)
        self._metrics.waiting.labels(label).set(waiting)
        self._metrics.under_way.labels(label).set(self._under_way)
        self._metrics.blocks_in_use.labels(label).set(blocks[0])
        self._metrics.blocks.labels(label).set(blocks[1])

    def _tell(self) -> None:
        """Let readers hear of new tokens: each wakes a thread, so where many run they hear of some at a time."""
        for request in self._running:
            request.tell(len(self._running) // TOLD_AT_ONCE)

    def _all_leave(self, prefill: _Prefill) -> bool:
        """Return whether all have left; each is asked, so that its reader hears of it."""
        return len([request for request in prefill.requests if request.leave()]) == len(prefill.requests)

    def _admit(self) -> None:
        """Take from those that wait, into one prefill, what fits the batch and one pass."""
        under_way = [*self._running, *(request for prefill in self._prefilling for request in prefill.requests)]
        held = Counter(request.caller for request in under_way)
        admitted: list[Request] = []
        longest = 0
        with self._wake:
            while len(under_way) + len(admitted) < self._max_batch and (request := self._waiting.next(held)):
                if self._is_computed(request, admitted):
                    break
                longest = max(longest, len(request.prompt))
                if admitted and longest * (len(admitted) + 1) > CHUNK:
                    break
                most = min(len(request.prompt) + request.max_output_tokens, self.longest)
                request.slot = self._network.open(most)
                if request.slot is None:
                    break  # those that run make room when they end
                self._waiting.take(request)
                admitted.append(request)
                held[request.caller] += 1
            self._under_way = len(under_way) + len(admitted)
        if admitted:
            self._prefilling.append(_Prefill(admitted))

    def _is_computed(self, request: Request, admitted: Sequence[Request]) -> bool:
        """Return whether a request's prompt is being computed for another: it waits, and then recalls it."""
        if not 0 < self._network.recalls < len(request.prompt):
            return False
        computed = [*admitted, *(one for prefill in self._prefilling for one in prefill.requests)]
        return any(
            one.prompt == request.prompt and one.adapter is request.adapter and one.caller == request.caller
            for one in computed
        )

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
            self._close([request.slot for request in prefill.requests])
            return
        if tokens is None:
            self._prefilling.append(prefill)  # the others take their turns before its next chunk
            return
        self._running += prefill.requests
        self._hand_out(prefill.requests, tokens)
        self._tell()
        for request in prefill.requests:
            self._metrics.first_token.labels(self._label).observe(self._admission.now() - request.since)
            self._metrics.prompt_tokens.labels(self._label).inc(len(request.prompt))

    def _prefill_chunk(self, prefill: _Prefill) -> list[Chosen] | None:
        """Compute a chunk; return the answers' first tokens when the prompts are whole."""
        pieces = []
        for request in prefill.requests:
            if not request.slot.length:
                self._network.recall(request.slot, request.prompt, request.adapter, request.caller)
                self._metrics.recalled_tokens.labels(self._label).inc(request.slot.length)
            start = request.slot.length
            pieces.append(Piece(request.slot, request.prompt[start : start + CHUNK], request.adapter))
        hidden = self._network.forward(pieces)
        if prefill.done < len(prefill.requests[0].prompt):
            return None
        samplers = [request.sampler for request in prefill.requests]
        return self._choices(hidden, samplers).of(range(len(samplers)))

    def _decode(self) -> None:
        """Compute one more token of every running request, and those after it that are guessed rightly."""
        if not self._running:
            return
        self._metrics.batch.labels(self._label).observe(len(self._running))
        guesses = self._guesses()
        pieces = [
            Piece(
                request.slot,
                [request.tokens[-1], *(guess.token for guess in guessed)],
                request.adapter,
                wanted=1 + len(guessed),
                guessed=len(guessed),
            )
            for request, guessed in zip(self._running, guesses, strict=True)
        ]
        self._verify(self._network.forward(pieces), guesses)

    def _guesses(self) -> list[list[Guess]]:
        """Return what is guessed of each running request's next tokens, as far as it is worth its time."""
        step = self._network.step
        if step == 1 or not self._drafts:
            return [[] for _ in self._running]
        most = min(step - 1, GUESSED // len(self._running))
        guesses = [
            request.drafter.guesses(min(request.left(self.longest) - 1, most), LEAST_CHANCE)
            for request in self._running
        ]
        return [guessed[:count] for guessed, count in zip(guesses, worth(guesses, step), strict=True)]

    def _verify(self, hidden: torch.Tensor, guesses: Sequence[Sequence[Guess]]) -> None:
        """Hand out the next token of each running request, and what follows as long as the guesses are right.

        Args:
            hidden: Of each request's last token, and of each of its guesses.
            guesses: Of each request.
        """
        samplers = [
            request.sampler for request, guessed in zip(self._running, guesses, strict=True) for _ in [0, *guessed]
        ]
        choices = self._choices(hidden, samplers)
        firsts = accumulate((1 + len(guessed) for guessed in guesses), initial=0)
        going = list(zip(self._running, guesses, firsts, strict=False))
        for place in count():
            if not going:
                break
            requests = [request for request, *_ in going]
            chosen = choices.of([first + place for *_, first in going])
            self._hand_out(requests, chosen)
            still = []
            for one, choice in zip(going, chosen, strict=True):
                request, guessed, _ = one
                if self._right(request, guessed, place, choice) and not request.ended:
                    still.append(one)
                else:
                    self._network.take_back(request.slot, len(guessed) - place)
            going = still

    def _right(self, request: Request, guessed: Sequence[Guess], place: int, choice: Chosen) -> bool:
        """Return whether a place was guessed, and rightly."""
        if place == len(guessed):
            return False
        right = guessed[place].token == choice.token
        request.drafter.learn(guessed[place], right)
        self._metrics.guesses.labels(self._label, "right" if right else "wrong").inc()
        return right

    def _choices(self, hidden: torch.Tensor, samplers: Sequence[Sampler]) -> Choices:
        whole = any(not sampler.largest for sampler in samplers)
        return Choices(self._network.scored(hidden, whole=whole), samplers)

    def _hand_out(self, requests: Sequence[Request], choices: Sequence[Chosen]) -> None:
        self._metrics.output_tokens.labels(self._label).inc(len(requests))
        for request, chosen in zip(requests, choices, strict=True):
            request.take(chosen, self.longest)

    def _open(self, lengths: Sequence[int]) -> list[Any]:
        """Return a slot for each of some texts.

        Raises:
            _NoRoom: Others hold the memory.
        """
        slots: list[Any] = []
        for length in lengths:
            slots.append(self._network.open(length))
            if slots[-1] is None:
                self._close(slots[:-1])
                raise _NoRoom
        return slots

    def _close(self, slots: Iterable[Any]) -> None:
        for slot in slots:
            self._network.close(slot)

    def _summed(
        self, slots: Sequence[Any], chunks: Sequence[Sequence[int]], skip: int, gone: threading.Event
    ) -> torch.Tensor:
        """Return the sum of each row's last hidden states for new tokens, the first `skip` left out.

        Raises:
            Cancelled: Nobody waits for it any more.
        """
        if gone.is_set():
            raise Cancelled("The client went away.")
        pieces = [Piece(slot, chunk, None, len(chunk)) for slot, chunk in zip(slots, chunks, strict=True) if chunk]
        hidden = self._network.forward(pieces).float()
        parts = iter(torch.split(hidden, [len(piece.tokens) for piece in pieces]))
        zero = torch.zeros((), device=self.device)
        return torch.stack([next(parts)[skip:].sum(0) if chunk else zero for chunk in chunks])

    def _logprob(self, tokens: Sequence[int], prompt_length: int, adapter: Adapter | None) -> float:
        (slot,) = self._open([len(tokens)])
        try:
            hidden = []
            for start in range(0, len(tokens) - 1, CHUNK):
                chunk = tokens[start : min(start + CHUNK, len(tokens) - 1)]
                hidden.append(self._network.forward([Piece(slot, chunk, adapter, len(chunk))]))
        finally:
            self._close([slot])
        total = 0.0
        answer = torch.tensor(tokens[prompt_length:], device=self.device)
        before_answer = torch.cat(hidden)[prompt_length - 1 :]
        for start in range(0, len(answer), SCORED_AT_ONCE):
            scores = self._network.scores(before_answer[start : start + SCORED_AT_ONCE])
            targets = answer[start : start + SCORED_AT_ONCE]
            total -= float(functional.cross_entropy(scores, targets, reduction="sum"))
        return total / len(answer)


class _NoRoom(Exception):
    """All memory for keys and values is held by requests that are under way."""


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


def _failed() -> Internal:
    return Internal("An internal error has occurred. Please retry or report it to the operator of this server.")
