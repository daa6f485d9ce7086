"""Scores in, tokens out: how each row of a batch chooses its next token."""

from collections.abc import Sequence

import torch

from tunesmith.engines.draws import drawn, drawn_of_few
from tunesmith.engines.sampling import Chosen, Sampler
from tunesmith.engines.scores import Scores, bits, top


class Choices:
    """The next tokens of a pass's rows.

    Where the largest scores decide, only these are computed. A greedy row with a constraint asks for the best of
    all tokens first, as most often it is one that may come: to know all that may takes a thousand times as long.

    Args:
        scores: Of each row.
        samplers: Each row's; none is changed.
    """

    def __init__(self, scores: Scores, samplers: Sequence[Sampler]) -> None:
        self._scores, self._samplers = scores, samplers
        free = [sampler.largest if sampler.greedy or not sampler.matcher else 0 for sampler in samplers]
        self._values, self._tokens = torch.empty(0), torch.empty(0)
        if any(free):
            self._values, self._tokens = scores.likeliest(range(len(samplers)), free)

    def of(self, rows: Sequence[int]) -> list[Chosen]:
        """Return the next token of some rows; of each row once."""
        few = [row for row in rows if self._samplers[row].largest]
        chosen = {row: Chosen(token) for row, token in self._of_few(few).items()}
        if whole := [row for row in rows if not self._samplers[row].largest]:
            chosen |= self._of_whole(whole)
        return [chosen[row] for row in rows]

    def _of_few(self, rows: Sequence[int]) -> dict[int, int]:
        """Choose where the largest scores decide."""
        held, tokens = [], {}
        if greedy := [row for row in rows if self._samplers[row].greedy]:
            best = self._tokens[greedy, 0].tolist()
            for row, token in zip(greedy, best, strict=True):
                matcher = self._samplers[row].matcher
                if matcher is None or matcher.allows(token):
                    tokens[row] = token
                else:
                    held.append(row)
        drawing = [row for row in rows if not self._samplers[row].greedy]
        held += [row for row in drawing if self._samplers[row].matcher]
        if free := [row for row in drawing if not self._samplers[row].matcher]:
            tokens |= self._drawn(free, self._values[free], self._tokens[free])
        return tokens | self._held(held)

    def _held(self, rows: Sequence[int]) -> dict[int, int]:
        """Choose of what the rows' constraints allow."""
        if not rows:
            return {}
        counts = [self._samplers[row].largest for row in rows]
        values, tokens = self._scores.likeliest(rows, counts, self._allowed(rows))
        chosen = dict(zip(rows, tokens[:, 0].tolist(), strict=True))
        if drawing := [place for place, row in enumerate(rows) if not self._samplers[row].greedy]:
            chosen |= self._drawn([rows[place] for place in drawing], values[drawing], tokens[drawing])
        return chosen

    def _allowed(self, rows: Sequence[int]) -> torch.Tensor:
        """Return which words may come in each row, a bit each; all where there is no constraint."""
        allowed = torch.empty((len(rows), -(-self._scores.words // 32)), dtype=torch.int32)
        for row, words in zip(rows, allowed.numpy(), strict=True):
            matcher = self._samplers[row].matcher
            if matcher is None:
                words[:] = -1
            else:
                matcher.allowed(words)
        return allowed

    def _drawn(self, rows: Sequence[int], values: torch.Tensor, tokens: torch.Tensor) -> dict[int, int]:
        found = drawn_of_few(values, tokens, [self._samplers[row] for row in rows])
        return dict(zip(rows, found, strict=True))

    def _of_whole(self, rows: Sequence[int]) -> dict[int, Chosen]:
        """Choose where all scores decide, or are told."""
        scores, samplers = self._scores.whole(rows), [self._samplers[row] for row in rows]
        told = [place for place, sampler in enumerate(samplers) if sampler.sampling.logprobs is not None]
        logprobs = scores[told].log_softmax(-1) if told else scores
        for row, sampler in zip(scores, samplers, strict=True):
            if sampler.penalised:
                sampler.penalise(row)
        if any(sampler.matcher for sampler in samplers):
            allowed = bits(self._allowed(rows).to(scores.device), self._scores.words)
            scores = scores.masked_fill(~allowed, -torch.inf)
        tokens: list[int] = scores.max(-1).indices.tolist()
        if drawing := [place for place, sampler in enumerate(samplers) if not sampler.greedy]:
            found = drawn(scores[drawing], [samplers[place] for place in drawing])
            for place, token in zip(drawing, found, strict=True):
                tokens[place] = token
        chosen = [Chosen(token) for token in tokens]
        for place, row_logprobs in zip(told, logprobs, strict=False):
            chosen[place] = _told(tokens[place], row_logprobs, samplers[place].sampling.logprobs or 0)
        return dict(zip(rows, chosen, strict=True))


def _told(token: int, logprobs: torch.Tensor, count: int) -> Chosen:
    if not count:
        return Chosen(token, float(logprobs[token]))
    values, tokens = top(logprobs[None], min(count, len(logprobs)))
    return Chosen(token, float(logprobs[token]), tuple(zip(tokens[0].tolist(), values[0].tolist(), strict=True)))
