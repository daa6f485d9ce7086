"""Scores in, tokens out: how each row of a batch chooses its next token."""

import math
import secrets
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tunesmith.engines.base import Sampling
from tunesmith.engines.constraint import Matcher
from tunesmith.errors import ApiError

TOP_K_WIDTHS = (64, 1024)
"""Candidates that are sorted for rows with top_k, the fewest that hold them. Few widths, as how a tie is broken
depends on the width, and a row must not depend on the others that are sorted with it."""

FIRST_CANDIDATES = 1024
"""Tokens looked at first when only top_p limits them: to sort a large vocabulary takes 20 times as long."""

_ALL_BITS = (1 << 64) - 1
_BELOW_ONE = 1 - 2.0**-53


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

    `choose` reads it and `take` changes it, so that what is not taken leaves no trace.

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
        """How many of the largest scores decide; 0 when all do."""
        if self.penalised or self.matcher is not None or self.sampling.logprobs is not None:
            return 0
        if self.greedy:
            return 1
        return self.sampling.top_k if self.sampling.top_k <= TOP_K_WIDTHS[0] else 0

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
        """Why no further token can be chosen, if so; what `choose` returns then means nothing."""
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


def choose(scores: torch.Tensor, samplers: Sequence[Sampler]) -> list[Chosen]:
    """Return the next token of each row.

    Args:
        scores: Of all tokens, float32 [rows, vocabulary]; penalties and constraints are applied in place.
        samplers: Each row's; none is changed.
    """
    told = [row for row, sampler in enumerate(samplers) if sampler.sampling.logprobs is not None]
    logprobs = scores[told].log_softmax(-1) if told else scores
    for row, sampler in enumerate(samplers):
        if sampler.penalised:
            sampler.penalise(scores[row])
    tokens = _greedy(scores, samplers) if any(sampler.greedy for sampler in samplers) else [0] * len(samplers)
    if drawing := [row for row, sampler in enumerate(samplers) if not sampler.greedy]:
        for row in drawing:
            _constrain(scores[row], samplers[row].matcher)
        drawn = _drawn(
            scores if len(drawing) == len(samplers) else scores[drawing], [samplers[row] for row in drawing]
        )
        for row, token in zip(drawing, drawn, strict=True):
            tokens[row] = token
    chosen = [Chosen(token) for token in tokens]
    for row, told_logprobs in zip(told, logprobs, strict=False):
        chosen[row] = _with_logprobs(tokens[row], told_logprobs, samplers[row].sampling.logprobs or 0)
    return chosen


def _greedy(scores: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Return the most probable token of each row; those of rows that are drawn mean nothing."""
    # max, as argmax takes three times as long
    tokens: list[int] = scores.max(-1).indices.tolist()
    for row, sampler in enumerate(samplers):
        # Most often the best of all tokens is one that may come: then nobody needs to know the others.
        if sampler.greedy and sampler.matcher and not sampler.matcher.allows(tokens[row]):
            _constrain(scores[row], sampler.matcher)
            tokens[row] = int(scores[row].max(-1).indices)
    return tokens


def _constrain(scores: torch.Tensor, matcher: Matcher | None) -> None:
    """Rule out the tokens that may not come next, in place; scores [vocabulary]."""
    if matcher is not None:
        forbidden = torch.from_numpy(matcher.forbidden(len(scores)))
        scores.masked_fill_(forbidden.to(scores.device), -torch.inf)


def _with_logprobs(token: int, logprobs: torch.Tensor, count: int) -> Chosen:
    if not count:
        return Chosen(token, float(logprobs[token]))
    values, tokens = _top(logprobs[None], min(count, len(logprobs)))
    return Chosen(token, float(logprobs[token]), tuple(zip(tokens[0].tolist(), values[0].tolist(), strict=True)))


def _drawn(scores: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Draw a token for each row: top_k first, then top_p of what is left, then by temperature."""
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
        values, tokens = _top(self._scores, width)
        top_k = self._column([sampler.sampling.top_k for sampler in self._samplers])
        values = values.masked_fill(torch.arange(width, device=values.device) >= top_k, -torch.inf)
        return self._nucleus(values, tokens, values.logsumexp(-1, keepdim=True), rows)

    def _by_top_p(self) -> list[int]:
        """Draw where only top_p limits the candidates, of more and more of them until they are enough."""
        total, count = self._scores.shape[1], FIRST_CANDIDATES
        normaliser = self._scores.logsumexp(-1, keepdim=True)
        drawn = [0] * len(self._samplers)
        left = list(range(len(self._samplers)))
        while left:
            count = min(count, total)
            values, tokens = _top(self._scores[left], count)
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


def _top(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best scores of each row and their tokens, best first, as topk does.

    The best lie in the blocks with the highest maxima: topk of these, and then of what lies in them, takes a part
    of the time that topk of a large vocabulary takes.

    Args:
        scores: [rows, vocabulary].
        count: How many of each row.
    """
    rows, total = scores.shape
    block: int = 2 ** (int(math.log2(total / count)) // 2)
    if block < 32 or total % block:  # small blocks have too many maxima
        values, tokens = scores.topk(count)
        return values, tokens
    blocks = scores.reshape(rows, -1, block)
    best = blocks.amax(-1).topk(count, sorted=False).indices
    inside = blocks.gather(1, best[:, :, None].expand(-1, -1, block)).flatten(1)
    values, places = inside.topk(count)
    return values, best.gather(1, places // block) * block + places % block


def _mixed(number: int) -> int:
    """Return 64 bits that look random, other ones for each number: SplitMix64's finisher."""
    number &= _ALL_BITS
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _ALL_BITS
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _ALL_BITS
    return number ^ (number >> 31)
