"""The training loop: yields a snapshot a step; whoever iterates decides what happens between two steps."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, Self

import torch
from safetensors.torch import load, save
from tokenizers import Tokenizer
from torch import Tensor, nn

from tunesmith import protos
from tunesmith.base_models import decoder
from tunesmith.base_models.device import compute_dtype
from tunesmith.base_models.weights import Weights
from tunesmith.errors import FailedPrecondition
from tunesmith.training import hyperparameters, lora
from tunesmith.training.adam import Adam
from tunesmith.training.examples import Row, collate, micro_batches, order
from tunesmith.training.loss import output_loss

MICRO_BATCH_TOKENS = 4096
"""Padded tokens that go through the model at once: bounds the memory, changes no result."""
PROBE_ROWS = 4
CHECKPOINT_FILE = "state.safetensors"


@dataclass(frozen=True)
class Recipe:
    """What is not a hyperparameter of the API.

    The learning rate falls linearly from its full value to 0 over all steps; Adam; the gradient's norm is
    clipped.
    """

    rank: int = 16
    alpha: float = 16.0
    clip_norm: float = 1.0


@dataclass(frozen=True)
class Step:
    """One finished step.

    Attributes:
        step: Its number, from 1.
        epoch: Epochs complete after it.
        mean_loss: Cross-entropy per output token of its batch, before the update, in nats.
    """

    step: int
    epoch: int
    mean_loss: float


@dataclass(frozen=True)
class Base:
    """A base model in memory, frozen; jobs take turns on it."""

    weights: Weights
    model: Any  # a `decoder.CausalLM`, or transformers' own
    tokenizer: Tokenizer
    device: torch.device

    @classmethod
    def load(cls, weights: Weights, device: torch.device) -> Self:
        """Load a base model from the cache."""
        model = decoder.load(weights.path, device, compute_dtype(device))
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(model.config, name, None) not in (None, 1, 1.0):
                raise FailedPrecondition(
                    f"models/{weights.model.id} cannot be tuned: its {name} is not supported."
                )
        return cls(weights, model, weights.tokenizer(), device)


class TuningRun:
    """One tuning job in progress: iterate it for its steps, leave the loop to stop.

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
    ) -> None:
        self._base, self._rows, self._seed = base, rows, seed
        self._given = given
        self.recipe = recipe or Recipe()
        self.total_steps = hyperparameters.total_steps(len(rows), given)
        self.step = 0
        self._stack = ExitStack()
        self.adapter = self._stack.enter_context(lora.attached(base.model, self.recipe.rank, self.recipe.alpha))
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

    def __iter__(self) -> Iterator[Step]:
        """Train from the current step to the last.

        Raises:
            FailedPrecondition: The loss is no longer a number.
        """
        size = self._given.batch_size
        wanted = len(self._rows) * self._given.epoch_count
        numbers = order(len(self._rows), self._seed, first=self.step * size)
        while self.step < self.total_steps:
            batch = [self._rows[n] for n in islice(numbers, min(size, wanted - self.step * size))]
            loss = self._train(batch)
            self.step += 1
            if not math.isfinite(loss):
                raise FailedPrecondition(
                    f"Training diverged: the loss of step {self.step} is not a number. Tune again with a "
                    f"learning rate below {self._given.learning_rate:g}."
                )
            epoch = hyperparameters.epoch_of(self.step, len(self._rows), self._given)
            yield Step(self.step, epoch, loss)

    def _train(self, batch: Sequence[Row]) -> float:
        """Do one step and return the batch's mean loss."""
        tokens = sum(row.learnt for row in batch)
        total = 0.0
        for rows in micro_batches(batch, MICRO_BATCH_TOKENS):
            loss = self._loss(rows) / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        nn.utils.clip_grad_norm_([self.adapter.weights], self.recipe.clip_norm)
        rate = self._given.learning_rate * (1 - self.step / self.total_steps)
        self._optimizer.step(self.adapter.gradient, rate)
        self.adapter.refresh()
        self.adapter.gradient.zero_()
        return total

    def _loss(self, rows: Sequence[Row]) -> Tensor:
        """Return the summed cross-entropy of the rows' answers, a scalar in fp32."""
        batch = collate(rows, self._base.device)
        # The padding is on the right, where no token looks: it needs no mask.
        hidden = self._base.model.base_model(input_ids=batch.tokens, use_cache=False).last_hidden_state
        at_outputs = hidden[batch.positions[:, 0], batch.positions[:, 1]]
        return output_loss(at_outputs, self._base.model.get_output_embeddings().weight, batch.targets)

    def probe(self) -> dict[str, Any]:
        """Return a question whose answer tells this adapter from the base model.

        A server that loads the adapter asks it and refuses an adapter that does not answer as recorded.
        """
        found: list[tuple[float, float, Row]] = []
        with torch.inference_mode():
            for row in (replace(row, earlier=()) for row in self._rows[:PROBE_ROWS]):
                tuned = -self._loss([row]).item() / len(row.output)
                with self.adapter.disabled():
                    found.append((tuned, -self._loss([row]).item() / len(row.output), row))
        tuned, untuned, row = max(found, key=lambda answer: abs(answer[0] - answer[1]))
        return {
            "tokens": row.prompt + row.output,
            "prompt_length": len(row.prompt),
            "logprob": tuned,
            "base_logprob": untuned,
        }

    def manifest(self) -> dict[str, Any]:
        """Return what a server must know to use the adapter rightly."""
        model = self._base.weights.model
        return {
            "kind": "adapter",
            "base_model": model.id,
            "weights_sha256": self._base.weights.sha256,
            "prompt_format": model.prompt_format,
            "recipe": {**asdict(self.recipe), "seed": self._seed, "steps": self.step},
            "probe": self.probe(),
        }

    def checkpoint(self) -> dict[str, bytes]:
        """Return all that a later run needs to go on from here."""
        tensors = {"weights": self.adapter.weights.detach(), "steps": torch.tensor(self.step)}
        for name, value in self._optimizer.state.items():
            tensors[f"optimizer.{name}"] = value
        return {CHECKPOINT_FILE: save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})}

    def restore(self, files: Mapping[str, bytes]) -> None:
        """Go on from a checkpoint of a run with the same rows, hyperparameters and seed."""
        tensors = load(files[CHECKPOINT_FILE])
        self.step = int(tensors["steps"])
        with torch.no_grad():
            self.adapter.weights.copy_(tensors["weights"])
        self.adapter.refresh()
        self._optimizer.state = {
            name.removeprefix("optimizer."): value.to(self._base.device)
            for name, value in tensors.items()
            if name.startswith("optimizer.")
        }
