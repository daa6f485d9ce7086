"""Memory: what tells that it ran out, and how much less of a batch goes through the model at once then."""

from collections.abc import Sequence

import torch

from tunesmith.training.batches import micro_batches
from tunesmith.training.examples import Row

_SIGNS = (
    "can't allocate memory",
    "Cannot allocate memory",
    "out of memory",
    "not enough memory",
    "bad_alloc",
    "could not create a primitive",  # oneDNN's word for it
)
"""What torch's errors say on CPUs, CUDA and MPS; only CUDA's have a class of their own."""


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def less(rows: Sequence[Row], most_tokens: int) -> int | None:
    """Return how many tokens may go through the model at once so that about half as many do as now.

    Args:
        rows: The batch.
        most_tokens: How many may do so now.

    Returns:
        None when rows already go through one by one.
    """
    parts = micro_batches(rows, most_tokens)
    largest = max((len(part[0]) * len(part) for part in parts if len(part) > 1), default=0)
    return largest // 2 or None


def give_back(device: torch.device) -> None:
    """Return to the device what torch keeps for later: in pieces that are too small now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
