"""The training loop: yields a snapshot a step; whoever iterates decides what happens between two steps."""

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Self, TypeVar

import torch
from safetensors.torch import load, save
from tokenizers import Tokenizer
from torch import Tensor

from tunesmith import protos
from tunesmith.base_models import decoder
from tunesmith.base_models.device import compute_dtype
from tunesmith.base_models.weights import Weights
from tunesmith.engines import drafts
from tunesmith.engines.drafts import OutputTrie
from tunesmith.errors import FailedPrecondition
from tunesmith.kernels import passes
from tunesmith.training import hyperparameters, memory
from tunesmith.training.adam import Adam
from tunesmith.training.batches import collate, micro_batches
from tunesmith.training.examples import Row, order
from tunesmith.training.hyperparameters import Options
from tunesmith.training.network import FrozenNetwork, freeze
from tunesmith.training.validation import Best, Scores, evaluate

MICRO_BATCH_TOKENS = 512
"""Tokens, padding counted, that go through the model at once: bounds the memory, changes no result."""
STRENGTHS = (1.0, 0.8, 0.6)
"""What is tried on held-out rows."""
PROBE_ROWS = 4
CHECKPOINT_FILE = "checkpoint.safetensors"

_Found = TypeVar("_Found")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """What is not a hyperparameter of the API.

    The learning rate falls linearly from its full value to 0 over all steps; Adam; the gradient's norm is
    clipped.

    Attributes:
        rank: Of each layer's adapter.
        alpha: What the adapter's products are multiplied by, times the rank.
        clip_norm: The gradient's largest norm.
        strength: What B is multiplied by once training is done, where no rows are held out to tell: an adapter
            trained to the end on a few examples answers others better when it says less (docs/training.md).
    """

    rank: int = 16
    alpha: float = 16.0
    clip_norm: float = 1.0
    strength: float = 0.6


@dataclass(frozen=True)
class Step:
    """One finished step.

    Attributes:
        step: Its number, from 1.
        epoch: Epochs complete after it.
        mean_loss: Cross-entropy per output token of its batch, before the update, in nats.
        learning_rate: That of its update.
        gradient_norm: Of the whole gradient, before it was clipped.
        tokens: All tokens of its rows, without padding.
        seconds: How long it took.
    """

    step: int
    epoch: int
    mean_loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Validation:
    """What the held-out rows say after an epoch; each answer is predicted from what truly comes before it.

    Attributes:
        step: Steps done.
        epoch: Epochs complete.
        loss: Cross-entropy per output token, in nats.
        token_accuracy: The share of output tokens that are the likeliest.
        exact_match: The share of rows all of whose output tokens, ends included, are the likeliest: greedy
            generation would write exactly these outputs.
        best: Whether no loss before was as low.
    """

    step: int
    epoch: int
    loss: float
    token_accuracy: float
    exact_match: float
    best: bool


@dataclass(frozen=True)
class Base:
    """A base model in memory, frozen; jobs take turns on it."""

    weights: Weights
    network: FrozenNetwork
    tokenizer: Tokenizer
    device: torch.device

    @classmethod
    def load(cls, weights: Weights, device: torch.device) -> Self:
        """Load a base model from the cache."""
        dtype = compute_dtype(device)
        load = partial(decoder.load, weights.path, device, dtype)
        fastest = passes.find(device, dtype, weights.path.parent.parent / "kernels")
        return cls(weights, freeze(load, fastest), weights.tokenizer(), device)


class TuningRun:
    """One tuning job in progress: iterate it for its steps and validations, leave the loop to stop.

    Use as a context manager: at its end the base model is free for the next job. With the same rows,
    hyperparameters, seed, machine and number of threads the losses are equal to the last bit, also when the
    run is interrupted and another one restores its checkpoint. Nothing is drawn at random after the start.

    Args:
        base: The base model.
        rows: The examples.
        given: Resolved hyperparameters.
        seed: Of the examples' order and of a new adapter's weights.
        recipe: What is not a hyperparameter.
        start: Files of an adapter whose weights training goes on from, instead of new ones; the optimizer
            starts afresh.
        options: When to stop early, and which weights to keep.
        held_out: Numbers of the rows that are not learnt but validate each epoch, as `split.held_out` picks
            them: steps and epochs count the others. They stay the same when a run is resumed.

    Attributes:
        adapter: The weights as they are; once settled, those to keep.
        step: Steps done.
        kept_step: After which step, once settled, the weights were those of the adapter.
        strength: What B was multiplied by then.
        total_steps: Steps in all, unless training stops early.
        micro_batch_tokens: How many tokens, padding counted, may go through the model at once. Halved when memory
            runs out, down to one row at a time: up to rounding that changes no result.

    Raises:
        FailedPrecondition: The adapter to start from has another shape.
    """

    def __init__(
        self,
        base: Base,
        rows: Sequence[Row],
        given: protos.Hyperparameters,
        seed: int,
        recipe: Recipe | None = None,
        start: Mapping[str, bytes] | None = None,
        options: Options | None = None,
        held_out: Collection[int] = (),
    ) -> None:
        self._base, self._seed, self._given = base, seed, given
        held_out = frozenset(held_out)
        self._rows = [row for number, row in enumerate(rows) if number not in held_out]
        self._held_out = [row for number, row in enumerate(rows) if number in held_out]
        self.recipe = recipe or Recipe()
        self.total_steps = hyperparameters.total_steps(len(self._rows), given)
        self.step = self.kept_step = 0
        self.strength = 1.0
        self.micro_batch_tokens = MICRO_BATCH_TOKENS
        self._best = Best(options or Options())
        self._stack = ExitStack()
        self._network = self._stack.enter_context(base.network.adapted(self.recipe.rank, self.recipe.alpha))
        self.adapter = self._network.adapter
        self.adapter.initialise(seed)
        if start is not None:
            try:
                self.adapter.from_files(start)
            except BaseException:
                self._stack.close()  # nobody else can: there is no run to enter
                raise
        self._optimizer = Adam(self.adapter.weights)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def finished(self) -> bool:
        """Whether no step is left: all are done, or validation ended them early."""
        return self.step >= self.total_steps or self._best.exhausted

    @property
    def epoch(self) -> int:
        """How many epochs are complete."""
        return hyperparameters.epoch_of(self.step, len(self._rows), self._given)

    def __iter__(self) -> Iterator[Step | Validation]:
        """Train from the current step to the last; then the adapter gets the weights to keep.

        Raises:
            FailedPrecondition: The loss or the gradient is no longer a number, or there is no memory for a single
                row.
        """
        size = self._given.batch_size
        wanted = len(self._rows) * self._given.epoch_count
        numbers = order(len(self._rows), self._seed, first=self.step * size)
        yield from self._validate()  # a checkpoint may lie between a step and its validation
        while not self.finished:
            batch = [self._rows[n] for n in islice(numbers, min(size, wanted - self.step * size))]
            started = time.perf_counter()
            rate = self._learning_rate()
            loss, norm = self._train(batch)
            self.step += 1
            self._check(loss, f"the loss of step {self.step}")
            self._check(norm, f"the gradient of step {self.step}")
            seconds = time.perf_counter() - started
            yield Step(self.step, self.epoch, loss, rate, norm, sum(map(len, batch)), seconds)
            yield from self._validate()
        self.settle()

    def settle(self) -> None:
        """Give the adapter the weights to keep; who leaves the iteration for good before its end calls it."""
        if self.kept_step:
            return
        self.kept_step = self.step
        if self._best.weights is not None:
            self.kept_step = self._best.step
            self.adapter.weights.copy_(self._best.weights)
        self.strength = self._best_strength() if self._held_out else self.recipe.strength
        self.adapter.weaken(self.strength)

    def _best_strength(self) -> float:
        """Return the strength at which the held-out rows are the likeliest."""
        weights, losses = self.adapter.weights.clone(), {}
        for strength in STRENGTHS:
            self.adapter.weaken(strength)
            losses[strength] = self._scores().loss
            self.adapter.weights.copy_(weights)
        return min(losses, key=losses.__getitem__)

    def _scores(self) -> Scores:
        """Return how well the adapter, as it is, predicts the held-out rows."""
        return self._within_memory(
            self._held_out, lambda most: evaluate(self._network, self._held_out, self._base.device, most)
        )

    def _learning_rate(self) -> float:
        """Return that of the next step."""
        return self._given.learning_rate * (1 - self.step / self.total_steps)

    def _check(self, value: float, name: str) -> None:
        if not math.isfinite(value):
            raise FailedPrecondition(
                f"Training diverged: {name} is not a number. Tune again with a learning rate below "
                f"{self._given.learning_rate:g}."
            )

    def _validate(self) -> Iterator[Validation]:
        """Validate when the last step completed an epoch."""
        if not self._held_out or self.epoch == self._best.epoch:
            return
        scores = self._scores()
        self._check(scores.loss, f"the validation loss after step {self.step}")
        best = self._best.offer(scores.loss, self.step, self.epoch, self.adapter.weights)
        yield Validation(self.step, self.epoch, scores.loss, scores.token_accuracy, scores.exact_match, best)

    def _train(self, batch: Sequence[Row]) -> tuple[float, float]:
        """Do one step; return the batch's mean loss, and the gradient's norm before it was clipped."""
        total = self._within_memory(batch, lambda most: self._learn(batch, most))
        norm = torch.linalg.vector_norm(self.adapter.gradient)
        self.adapter.gradient.mul_((self.recipe.clip_norm / (norm + 1e-6)).clamp_(max=1.0))
        self._optimizer.step(self.adapter.gradient, self._learning_rate())
        self.adapter.refresh()
        return total, norm.item()

    def _learn(self, batch: Sequence[Row], most_tokens: int) -> float:
        """Return the batch's mean loss; its gradient, and nothing else, is the adapter's."""
        self.adapter.gradient.zero_()  # also of what was left unfinished
        weight = 1 / sum(row.learnt for row in batch)
        total = 0.0
        for rows in micro_batches(batch, most_tokens):
            total += weight * self._network.learn(collate(rows, self._base.device), weight)
        return total

    def _within_memory(self, rows: Sequence[Row], act: Callable[[int], _Found]) -> _Found:
        """Do something with rows that takes so many tokens at once; again with fewer when memory runs out."""
        while True:
            try:
                return act(self.micro_batch_tokens)
            except (MemoryError, RuntimeError) as error:
                if not memory.ran_out(error):
                    raise
                logger.warning("step %d: %s", self.step + 1, error)
            # Not in the handler: the error holds on to what was computed until then.
            fewer = memory.less(rows, self.micro_batch_tokens)
            if fewer is None:
                raise FailedPrecondition(self._too_long(max(map(len, rows))))
            self.micro_batch_tokens = fewer
            memory.give_back(self._base.device)

    def _too_long(self, tokens: int) -> str:
        every = self._rows + self._held_out
        alike = sum(len(row) >= tokens for row in every)
        return (
            f"There is not enough memory for step {self.step + 1}, not even for one example at a time. Its "
            f"longest example has {tokens:,} tokens, and {alike:,} of all {len(every):,} are as long or longer: "
            "shorten or split them, or ask the server's operator for more memory."
        )

    def be_frugal(self, one_by_one: bool) -> None:
        """Take half the memory, or as little as possible: a process was killed, perhaps for taking too much.

        Args:
            one_by_one: Whether one row at a time goes through the model from now on.
        """
        self.micro_batch_tokens = 1 if one_by_one else max(1, self.micro_batch_tokens // 2)

    def probe(self) -> dict[str, Any]:
        """Return a question whose answer tells this adapter from the base model.

        A server that loads the adapter asks it and refuses an adapter that does not answer as recorded.
        """
        rows = [replace(row, earlier=()) for row in self._rows[:PROBE_ROWS]]
        tuned_by_row = self._mean_logprobs(rows)
        with self.adapter.disabled():
            found = list(zip(tuned_by_row, self._mean_logprobs(rows), rows, strict=True))
        tuned, untuned, row = max(found, key=lambda answer: abs(answer[0] - answer[1]))
        return {
            "tokens": row.prompt + row.output,
            "prompt_length": len(row.prompt),
            "logprob": tuned,
            "base_logprob": untuned,
        }

    def _mean_logprobs(self, rows: Sequence[Row]) -> list[float]:
        """Return the mean log-probability of each row's answer."""
        losses, _ = self._network.evaluate(collate(rows, self._base.device))
        return [-part.mean().item() for part in torch.split(losses, [row.learnt for row in rows])]

    def files(self) -> dict[str, bytes]:
        """Return the adapter as it is served: PEFT's files, and what its answers are guessed from."""
        texts = [(row.prompt + row.output, row.answers) for row in self._rows]
        outputs = OutputTrie.of([text[start:end] for text, answers in texts for start, end in answers])
        return {**self.adapter.to_files(self._base.weights.model.id), drafts.FILE: outputs.content}

    def manifest(self) -> dict[str, Any]:
        """Return what a server must know to use the adapter rightly."""
        model = self._base.weights.model
        return {
            "kind": "adapter",
            "base_model": model.id,
            "weights_sha256": self._base.weights.sha256,
            "prompt_format": model.prompt_format,
            "recipe": {
                **asdict(self.recipe),
                "strength": self.strength,
                "seed": self._seed,
                "steps": self.step,
                "kept_step": self.kept_step,
            },
            "probe": self.probe(),
        }

    def checkpoint(self) -> dict[str, bytes]:
        """Return all that a later run needs to go on from here."""
        tensors = {"weights": self.adapter.weights, "steps": torch.tensor(self.step)}
        for name, value in self._optimizer.state.items():
            tensors[f"optimizer.{name}"] = value
        for name, value in self._best.state().items():
            tensors[f"best.{name}"] = value
        return {CHECKPOINT_FILE: save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})}

    def restore(self, files: Mapping[str, bytes]) -> None:
        """Go on from a checkpoint of a run with the same rows, hyperparameters, options and seed.

        What an earlier version wrote has another layout: then the run begins anew.
        """
        if CHECKPOINT_FILE not in files:
            return
        tensors = load(files[CHECKPOINT_FILE])
        self.step = int(tensors["steps"])
        self.adapter.weights.copy_(tensors["weights"])
        self.adapter.refresh()
        device = self._base.device
        self._optimizer.state = {name: value.to(device) for name, value in _part(tensors, "optimizer.").items()}
        self._best.restore(_part(tensors, "best."), device)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return a checkpoint's tensors whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
