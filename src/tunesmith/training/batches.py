"""Rows of tokens to batches: all rows behind one another, without padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from tunesmith.kernels.passes import ShortRows
from tunesmith.training.examples import Row

FEW_TOKENS, STEP_OF_FEW, STEP_OF_MANY, STEP_OF_TARGETS = 128, 16, 32, 16
"""A batch is filled up to multiples of these: matrix units take 16 rows at a time, and a number of tokens that was
not seen before costs the making of some kernels."""


@dataclass(frozen=True)
class Batch:
    """Rows behind one another; a row sees only itself.

    Attributes:
        tokens: (tokens,) ids; at the end some that belong to no row, but make one of their own.
        positions: (tokens,) where in its row each token stands.
        lengths: The rows' lengths, with the last one's.
        places: (places,) which tokens' hidden states predict a target; at the end some that predict none.
        targets: (places,) answers' tokens to be predicted, and 0 where there is none.
        learnt: How many of them count.
    """

    tokens: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    places: Tensor
    targets: Tensor
    learnt: int

    @property
    def width(self) -> int:
        """The longest row's length."""
        return max(self.lengths)

    @cached_property
    def _cells(self) -> Tensor | None:
        """(tokens,) where the tokens stand when each row is padded to the width; None when none needs it."""
        if len(set(self.lengths)) == 1:
            return None
        starts = torch.arange(0, len(self.lengths) * self.width, self.width, device=self.tokens.device)
        lengths = torch.tensor(self.lengths, device=self.tokens.device)
        return starts.repeat_interleave(lengths) + self.positions

    @cached_property
    def rows(self) -> ShortRows:
        """Where the rows lie, for compiled kernels."""
        return ShortRows.of(self.lengths)

    def padded(self, x: Tensor) -> Tensor:
        """Return what belongs to the tokens, (tokens, ...), as (rows, width, ...) with 0 behind short rows."""
        shape = (len(self.lengths), self.width, *x.shape[1:])
        if self._cells is None:
            return x.reshape(shape)
        cells = x.new_zeros(shape[0] * shape[1], *x.shape[1:])
        return cells.index_copy_(0, self._cells, x).view(shape)

    def unpadded(self, x: Tensor) -> Tensor:
        """Return what `padded` was given."""
        cells = x.reshape(-1, *x.shape[2:])
        return cells if self._cells is None else cells.index_select(0, self._cells)


def collate(rows: Sequence[Row], device: torch.device) -> Batch:
    """Return the rows as one batch."""
    starts = accumulate(map(len, rows), initial=0)
    tokens: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    for row, start in zip(rows, starts, strict=False):
        ids = row.prompt + row.output
        tokens += ids
        positions += range(len(ids))
        for first, end in row.answers:
            places += range(start + first - 1, start + end - 1)
            targets += ids[first:end]
    learnt, length = len(targets), len(tokens)
    spare = -learnt % STEP_OF_TARGETS
    fill = spare + -(length + spare) % (STEP_OF_FEW if length <= FEW_TOKENS else STEP_OF_MANY)
    places += range(length, length + spare)
    return Batch(
        torch.tensor(tokens + [0] * fill, device=device),
        torch.tensor([*positions, *range(fill)], device=device),
        (*map(len, rows), fill) if fill else tuple(map(len, rows)),
        torch.tensor(places, device=device),
        torch.tensor(targets + [0] * spare, device=device),
        learnt,
    )


def micro_batches(rows: Sequence[Row], most_tokens: int) -> Iterator[list[Row]]:
    """Split a batch into parts of at most `most_tokens` tokens, padding counted (or one row), long rows first."""
    part: list[Row] = []
    for row in sorted(rows, key=len, reverse=True):
        if part and len(part[0]) * (len(part) + 1) > most_tokens:
            yield part
            part = []
        part.append(row)
    if part:
        yield part
