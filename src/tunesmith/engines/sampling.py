"""Scores in, tokens out: how each row of a batch chooses its next token."""

import secrets
from collections.abc import Sequence

import torch

from tunesmith.engines.base import Sampling

FIRST_CANDIDATES = 1024
"""Tokens looked at first when only top_p limits them: to sort a large vocabulary takes 20 times as long."""


class Sampler:
    """The choices of one request.

    Each draws its random numbers from a generator of its own, one a token, so that a seed gives the same
    text whatever else is in the batch.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = torch.Generator()
        self._random.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken each time."""
        return self.sampling.temperature <= 0 or self.sampling.top_k == 1

    def choose(self, logits: torch.Tensor) -> int:
        """Draw a token: top_k first, then top_p of what is left, then by temperature.

        Args:
            logits: Scores of all tokens, float32 [vocabulary].
        """
        scores, tokens = self._candidates(logits)
        # float64, as the sum of a whole vocabulary's small probabilities is compared with a random number
        weights = torch.softmax(scores.double() / self.sampling.temperature, 0).cumsum(0)
        drawn = torch.rand((), generator=self._random, dtype=torch.float64).item() * weights[-1]
        place = min(int(torch.searchsorted(weights, drawn, right=True)), len(weights) - 1)
        return place if tokens is None else int(tokens[place])

    def _candidates(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the scores of the tokens to draw from and their ids; None when all are, in order."""
        top_k, top_p, total = self.sampling.top_k, self.sampling.top_p, len(logits)
        if 0 < top_k < total:
            scores, tokens = logits.topk(top_k)
            return _nucleus(scores, tokens, top_p, scores.logsumexp(0))
        if top_p >= 1:
            return logits, None
        normaliser, count = logits.logsumexp(0), FIRST_CANDIDATES
        while count < total:
            scores, tokens = logits.topk(count)
            if (scores - normaliser).exp().sum() >= top_p:
                return _nucleus(scores, tokens, top_p, normaliser)
            count *= 8
        scores, tokens = logits.sort(descending=True)
        return _nucleus(scores, tokens, top_p, normaliser)


def _nucleus(
    scores: torch.Tensor, tokens: torch.Tensor, top_p: float, normaliser: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the fewest of the sorted tokens whose probability sum is at least `top_p`."""
    if top_p < 1:
        sums = (scores - normaliser).exp().cumsum(0)
        kept = min(int(torch.searchsorted(sums, top_p)) + 1, len(scores))
        scores, tokens = scores[:kept], tokens[:kept]
    return scores, tokens


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Return the next token of each row.

    Args:
        logits: Scores, float32 [rows, vocabulary].
        samplers: Each row's.
    """
    # max, as argmax takes three times as long
    greedy = logits.max(-1).indices.tolist() if any(sampler.greedy for sampler in samplers) else []
    return [greedy[row] if sampler.greedy else sampler.choose(logits[row]) for row, sampler in enumerate(samplers)]
