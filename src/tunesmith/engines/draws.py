"""Candidates in, a token out: top_k first, then top_p of what is left, then by temperature."""

from collections import defaultdict
from collections.abc import Sequence

import torch

from tunesmith.engines.base import Sampling
from tunesmith.engines.sampling import Sampler
from tunesmith.engines.scores import FEW, top

TOP_K_WIDTHS = (FEW, 1024)
"""Candidates that are sorted for rows with top_k, the fewest that hold them. Few widths, as how a tie is broken
depends on the width, and a row must not depend on the others that are sorted with it."""

FIRST_CANDIDATES = 1024
"""Tokens looked at first when only top_p limits them: to sort a large vocabulary takes 20 times as long."""

_BELOW_ONE = 1 - 2.0**-53


def drawn_of_few(values: torch.Tensor, tokens: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Draw a token for each row of its best candidates.

    Args:
        values: Their scores, largest first, (rows, n); those that top_k leaves out are -infinity.
        tokens: Which they are.
        samplers: Each row's.
    """
    return _Group(values, samplers).of_best(values, tokens)


def drawn(scores: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Draw a token for each row.

    Args:
        scores: Of all tokens, float32 [rows, vocabulary].
        samplers: Each row's.
    """
    total = scores.shape[1]
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for row, sampler in enumerate(samplers):
        groups[_width(sampler.sampling, total)].append(row)
    tokens = [0] * len(samplers)
    for width, rows in groups.items():
        group = _Group(scores if len(groups) == 1 else scores[rows], [samplers[row] for row in rows])
        for row, token in zip(rows, group.drawn(width), strict=True):
            tokens[row] = token
    return tokens


def _width(sampling: Sampling, total: int) -> int:
    """Return how many candidates are sorted for a row: 0 when none need to be, -1 when top_p says how many."""
    if 0 < sampling.top_k < total:
        return next((width for width in TOP_K_WIDTHS if sampling.top_k <= width < total), total)
    return 0 if sampling.top_p >= 1 else -1


class _Group:
    """Rows that are drawn in the same way, together.

    Args:
        scores: float32 [rows, vocabulary].
        samplers: Each row's.
    """

    def __init__(self, scores: torch.Tensor, samplers: Sequence[Sampler]) -> None:
        self._scores = scores
        self._samplers = samplers

    def drawn(self, width: int) -> list[int]:
        """Return a token a row; see `_width`."""
        rows = range(len(self._samplers))
        if width < 0:
            return self._by_top_p()
        if width == 0:
            places: list[int] = self._by_noise(self._scores, rows).tolist()
            return places
        values, tokens = top(self._scores, width)
        top_k = self._column([sampler.sampling.top_k for sampler in self._samplers])
        values = values.masked_fill(torch.arange(width, device=values.device) >= top_k, -torch.inf)
        return self.of_best(values, tokens)

    def of_best(self, values: torch.Tensor, tokens: torch.Tensor) -> list[int]:
        """Return a token a row, of all candidates that it has."""
        return self._nucleus(values, tokens, values.logsumexp(-1, keepdim=True), range(len(self._samplers)))

    def _by_top_p(self) -> list[int]:
        """Draw where only top_p limits the candidates, of more and more of them until they are enough."""
        total, count = self._scores.shape[1], FIRST_CANDIDATES
        normaliser = self._scores.logsumexp(-1, keepdim=True)
        drawn = [0] * len(self._samplers)
        left = list(range(len(self._samplers)))
        while left:
            count = min(count, total)
            values, tokens = top(self._scores[left], count)
            sums = (values - normaliser[left]).exp().sum(-1).tolist()
            enough = [
                place
                for place, row in enumerate(left)
                if count == total or sums[place] >= self._samplers[row].sampling.top_p
            ]
            if enough:
                rows = [left[place] for place in enough]
                found = self._nucleus(values[enough], tokens[enough], normaliser[rows], rows)
                for row, token in zip(rows, found, strict=True):
                    drawn[row] = token
                left = [row for row in left if row not in rows]
            count *= 8
        return drawn

    def _nucleus(
        self, values: torch.Tensor, tokens: torch.Tensor, normaliser: torch.Tensor, rows: Sequence[int]
    ) -> list[int]:
        """Draw of the fewest of the sorted candidates whose probability sum is at least top_p."""
        top_p = self._column([self._samplers[row].sampling.top_p for row in rows])
        sums = (values - normaliser).exp().cumsum(-1)
        cut = torch.zeros_like(values, dtype=torch.bool)
        cut[:, 1:] = (sums[:, :-1] >= top_p) & (top_p < 1)
        places = self._by_noise(values.masked_fill(cut, -torch.inf), rows)
        found: list[int] = tokens.gather(1, places[:, None])[:, 0].tolist()
        return found

    def _by_noise(self, values: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Return a place a row, drawn by temperature."""
        samplers = [self._samplers[row] for row in rows]
        temperature = self._column([sampler.sampling.temperature for sampler in samplers])
        noise = self._column([sampler.noise for sampler in samplers])
        # float64, as the sum of a whole vocabulary's small probabilities is compared with a random number
        weights = torch.softmax(values.double() / temperature, -1).cumsum(-1)
        sums = weights[:, -1:]
        return torch.searchsorted(weights, torch.minimum(noise * sums, sums * _BELOW_ONE), right=True)[:, 0]

    def _column(self, numbers: Sequence[float]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=self._scores.device)[:, None]
