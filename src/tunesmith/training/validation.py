"""Validation: what the held-out rows say of the weights, which weights were the best, and when to stop."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.training.batches import collate, micro_batches
from tunesmith.training.examples import Row
from tunesmith.training.hyperparameters import Options
from tunesmith.training.network import Network


@dataclass(frozen=True)
class Scores:
    """How well rows are predicted, each token from what truly comes before it.

    Attributes:
        loss: Cross-entropy per output token, in nats.
        token_accuracy: The share of output tokens that are the likeliest.
        exact_match: The share of rows all of whose output tokens are the likeliest.
    """

    loss: float
    token_accuracy: float
    exact_match: float


def evaluate(network: Network, rows: Sequence[Row], device: torch.device, most_tokens: int) -> Scores:
    """Return how well a network predicts the rows' outputs, in fp32 and without gradients.

    Args:
        network: A base model with an adapter.
        rows: At least one.
        device: Where the model is.
        most_tokens: Tokens, padding counted, that go through the model at once.
    """
    loss, right, exact, tokens = 0.0, 0, 0, 0
    for part in micro_batches(rows, most_tokens):
        losses, hits = network.evaluate(collate(part, device))
        loss += losses.sum().item()
        tokens += len(hits)
        right += int(hits.sum())
        # The targets lie row after row.
        by_row = torch.split(hits.cpu(), [row.learnt for row in part])
        exact += sum(bool(of_row.all()) for of_row in by_row)
    return Scores(loss / tokens, right / tokens, exact / len(rows))


class Best:
    """The weights with the lowest validation loss so far, and for how long there were none better.

    Attributes:
        loss: Theirs, in nats; infinite before the first validation.
        step: Steps done when they were validated; 0 before.
        epoch: The last epoch that was validated.
        stale: Epochs validated since them.
        weights: The weights, unless only the last are to be kept.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self.loss, self.step, self.epoch, self.stale = math.inf, 0, 0, 0
        self.weights: Tensor | None = None

    @property
    def exhausted(self) -> bool:
        """Whether the patience is at its end."""
        return 0 < self._options.patience <= self.stale

    def offer(self, loss: float, step: int, epoch: int, weights: Tensor) -> bool:
        """Note a validation and return whether it is the best; the weights are copied then."""
        better = loss < self.loss
        self.stale = 0 if better else self.stale + epoch - self.epoch
        self.epoch = epoch
        if better:
            self.loss, self.step = loss, step
            if self._options.keep == "best":
                self.weights = weights.detach().clone()
        return better

    def state(self) -> dict[str, Tensor]:
        """Return it as tensors, for a checkpoint."""
        counts = torch.tensor([self.step, self.epoch, self.stale])
        tensors = {"loss": torch.tensor(self.loss, dtype=torch.float64), "counts": counts}
        return tensors if self.weights is None else {**tensors, "weights": self.weights}

    def restore(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Take over what `state` returned."""
        self.loss = float(tensors["loss"])
        self.step, self.epoch, self.stale = tensors["counts"].tolist()
        weights = tensors.get("weights")
        self.weights = None if weights is None else weights.to(device)
