"""The scores of a pass's rows, and the largest of them."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

FEW = 64
"""Candidates of a row at most that `Scores.likeliest` finds."""


class Scores(Protocol):
    """The scores of all words for some rows.

    Attributes:
        words: How many words have a score.
    """

    words: int

    def whole(self, rows: Sequence[int]) -> Tensor:
        """Return all scores of some rows, float32 (rows, words), to be changed by the caller; each row once."""

    def likeliest(
        self, rows: Sequence[int], counts: Sequence[int], allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the largest scores of some rows, largest first, and their words.

        Args:
            rows: Which.
            counts: How many of each, at most `FEW`.
            allowed: Which words are looked at, a bit each, int32 (rows, words / 32); None for all of them.

        Returns:
            (rows, n) each, n the same for a count of 1 and for all above, so that a row does not depend on those
            that come with it; what follows a row's count is -infinity.
        """


class WholeScores:
    """See `Scores`; all are there.

    Args:
        scores: float32 (rows, words).
    """

    def __init__(self, scores: Tensor) -> None:
        self._scores = scores
        self.words = scores.shape[1]

    def whole(self, rows: Sequence[int]) -> Tensor:
        """See `Scores`."""
        return of_rows(self._scores, rows)

    def likeliest(
        self, rows: Sequence[int], counts: Sequence[int], allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Scores`."""
        scores = self.whole(rows)
        if allowed is not None:
            scores = scores.masked_fill(~bits(allowed.to(scores.device), self.words), -torch.inf)
        if max(counts) <= 1:
            # max, as topk takes three times as long
            best = scores.max(-1, keepdim=True)
            return best.values, best.indices
        values, tokens = top(scores, min(FEW, self.words))
        values[:, 0], tokens[:, 0] = scores.max(-1)  # of equal ones the same as where the best alone is asked for
        places = torch.arange(values.shape[1], device=values.device)
        beyond = places >= torch.tensor(counts, device=values.device)[:, None]
        return values.masked_fill(beyond, -torch.inf), tokens


def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
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


def of_rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Return some rows of a tensor; itself where they are all of them in their order."""
    return tensor if [*rows] == [*range(len(tensor))] else tensor[[*rows]]


def bits(words: Tensor, count: int) -> Tensor:
    """Return the bits of each row, lowest first, as bools (rows, count)."""
    places = torch.arange(32, device=words.device)
    return (words[:, :, None] >> places & 1).bool().flatten(1)[:, :count]
