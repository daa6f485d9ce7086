"""Google's hyperparameters and our options: defaults, limits, and the arithmetic of steps and epochs."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tunesmith import protos

LARGE_DATASET = 1000
"""From this many examples on the defaults are the larger batch and the smaller learning rate."""
MAX_EPOCHS = 1000
MAX_BATCH_SIZE = 1024
MAX_LEARNING_RATE = 1.0
MAX_LEARNING_RATE_MULTIPLIER = 1000.0
MAX_VALIDATION_FRACTION = 0.5


@dataclass(frozen=True)
class Options:
    """What Google's hyperparameters have no word for.

    Attributes:
        validation_fraction: The share of the examples that is held out; None: the automatic one, 0: none.
        patience: Epochs in a row without a lower validation loss after which training ends; 0: it never does.
        keep: Which weights the model gets, those with the lowest validation loss or those of the last step.
    """

    validation_fraction: float | None = None
    patience: int = 0
    keep: Literal["best", "last"] = "best"


def violations(given: protos.Hyperparameters) -> Iterator[tuple[str, str]]:
    """Yield (field, reason) for each value that training cannot take."""
    if given.HasField("epoch_count") and not 1 <= given.epoch_count <= MAX_EPOCHS:
        yield "epoch_count", f"must be between 1 and {MAX_EPOCHS}, not {given.epoch_count}"
    if given.HasField("batch_size") and not 1 <= given.batch_size <= MAX_BATCH_SIZE:
        yield "batch_size", f"must be between 1 and {MAX_BATCH_SIZE}, not {given.batch_size}"
    for field, most in (
        ("learning_rate", MAX_LEARNING_RATE),
        ("learning_rate_multiplier", MAX_LEARNING_RATE_MULTIPLIER),
    ):
        value = getattr(given, field)
        # Written so that NaN, which compares false to everything, is refused too.
        if given.HasField(field) and not 0 < value <= most:
            yield field, f"must be a number above 0 and at most {most:g}, not {value:g}"


def resolve(given: protos.Hyperparameters, examples: int) -> protos.Hyperparameters:
    """Return the values that training uses: what was given, else the defaults for so many examples."""
    large = examples >= LARGE_DATASET
    learning_rate = 0.0002 if large else 0.001
    if given.HasField("learning_rate"):
        learning_rate = given.learning_rate
    elif given.HasField("learning_rate_multiplier"):
        learning_rate *= given.learning_rate_multiplier
    return protos.Hyperparameters(
        epoch_count=given.epoch_count if given.HasField("epoch_count") else 5,
        batch_size=given.batch_size if given.HasField("batch_size") else (16 if large else 4),
        learning_rate=learning_rate,
    )


def total_steps(examples: int, resolved: protos.Hyperparameters) -> int:
    """Return the number of batches: they run across the borders of epochs, and only the last may be short."""
    return math.ceil(examples * resolved.epoch_count / resolved.batch_size)


def epoch_of(step: int, examples: int, resolved: protos.Hyperparameters) -> int:
    """Return how many epochs are complete after a step (steps count from 1)."""
    return min(step * resolved.batch_size // examples, resolved.epoch_count)
