"""Whether an adapter fits the base model, and answers as it did when it was trained."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tunesmith.base_models.weights import Weights
from tunesmith.errors import FailedPrecondition, Internal

TOLERANCE = 0.1
RELATIVE_TOLERANCE = 0.05
"""How far a probe's mean log-probability may lie from the recorded one. bfloat16 scores are rounded to steps
of up to 0.125, and another number format or device rounds differently; an adapter that was trained at all
moves its own probe by far more."""

Measure = Callable[[Sequence[int], int], float]
"""Given tokens and the length of the prompt that they begin with, returns the others' mean log-probability."""


def check_base(path: str, manifest: Mapping[str, Any], weights: Weights) -> None:
    """Raise FailedPrecondition when an adapter was trained on other weights."""
    if manifest.get("base_model") != weights.model.id:
        raise FailedPrecondition(
            f"Adapter {path} was trained on models/{manifest.get('base_model')} and does not fit "
            f"models/{weights.model.id}."
        )
    if manifest.get("weights_sha256") != weights.sha256:
        raise FailedPrecondition(
            f"Adapter {path} was trained on other weights of models/{weights.model.id} (SHA-256 "
            f"{manifest.get('weights_sha256')}) than those on this machine ({weights.sha256}). "
            "Tune the model again, or bring back the weights that it was tuned on."
        )


def check_probe(path: str, manifest: Mapping[str, Any], measure: Measure) -> None:
    """Ask an adapter what it was asked at the end of its training.

    Raises:
        Internal: It does not answer as it did then, or nobody has recorded how it did.
    """
    probe = manifest.get("probe")
    if probe is None:
        raise Internal(f"Adapter {path} has no probe in its manifest: nothing shows that it would answer.")
    recorded, without = probe["logprob"], probe["base_logprob"]
    measured = measure(probe["tokens"], probe["prompt_length"])
    if near(measured, recorded):
        return
    message = (
        f"Adapter {path} does not answer as it did when it was trained: the mean log-probability of its "
        f"probe is {measured:.3f} and was {recorded:.3f}."
    )
    if near(measured, without):
        message += " That is what the base model alone gives: the adapter has no effect."
    raise Internal(message)


def near(measured: float, recorded: float) -> bool:
    """Return whether two mean log-probabilities may be the same model's; never those of a NaN."""
    if not math.isfinite(measured):
        return False
    return abs(measured - recorded) <= TOLERANCE + RELATIVE_TOLERANCE * abs(recorded)
