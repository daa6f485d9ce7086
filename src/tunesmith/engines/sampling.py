"""How a request's tokens are to be chosen, and what has come of it so far."""

import secrets
from collections import Counter
from dataclasses import dataclass

import torch

from tunesmith.engines.base import Sampling
from tunesmith.engines.constraint import Matcher
from tunesmith.engines.scores import FEW
from tunesmith.errors import ApiError

_ALL_BITS = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Chosen:
    """A row's next token.

    Attributes:
        token: Its id.
        logprob: Its log-probability, when the row asks for that; the model's own, as in `TokenLogprob`.
        top: The most probable tokens' ids and log-probabilities, best first, as many as the row asks for.
    """

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """The choices of one request: what it asks for, and what it has come to.

    To choose reads it and `take` changes it, so that what is not taken leaves no trace.

    Args:
        sampling: How tokens are chosen.
        matcher: Follows the answer's constraint, from the answer's beginning.
    """

    def __init__(self, sampling: Sampling, matcher: Matcher | None = None) -> None:
        self.sampling = sampling
        self.matcher = matcher
        self.greedy = sampling.temperature <= 0 or sampling.top_k == 1
        """Whether the most probable token is taken each time."""
        self.penalised = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        self._counts: Counter[int] = Counter()
        self._key = _mixed(secrets.randbits(63) if sampling.seed is None else sampling.seed)
        self._position = 0

    @property
    def largest(self) -> int:
        """How many of the largest scores decide, of those that may come; 0 when all do."""
        if self.penalised or self.sampling.logprobs is not None:
            return 0
        if self.greedy:
            return 1
        return self.sampling.top_k if self.sampling.top_k <= FEW else 0

    def take(self, token: int) -> None:
        """Go on by a token of the answer; not by the one that ends it."""
        self._position += 1
        if self.penalised:
            self._counts[token] += 1
        if self.matcher is not None:
            self.matcher.take(token)

    @property
    def finished(self) -> bool:
        """Whether the answer is whole though the model has not ended it: its constraint allows nothing more."""
        return self.matcher is not None and self.matcher.finished

    @property
    def failed(self) -> ApiError | None:
        """Why no further token can be chosen, if so; what is chosen then means nothing."""
        return None if self.matcher is None else self.matcher.failed

    @property
    def noise(self) -> float:
        """The random number of the answer's next place, from 0 to below 1: the same whenever it is asked for."""
        # SplitMix64 is a counter that is mixed: its n-th number needs none of those before.
        return (_mixed(self._key + self._position * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53

    def penalise(self, scores: torch.Tensor) -> None:
        """Lower the scores of the tokens that the answer has, in place.

        Args:
            scores: Of all tokens, [vocabulary].
        """
        if self._counts:
            tokens = torch.tensor(list(self._counts), device=scores.device)
            counts = torch.tensor(list(self._counts.values()), device=scores.device)
            sampling = self.sampling
            scores[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def _mixed(number: int) -> int:
    """Return 64 bits that look random, other ones for each number: SplitMix64's finisher."""
    number &= _ALL_BITS
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _ALL_BITS
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _ALL_BITS
    return number ^ (number >> 31)
