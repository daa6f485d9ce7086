"""What serving needs of the matrix unit: attention over cached keys and values, and a fast output head."""

from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from tunesmith.kernels.library import library
from tunesmith.kernels.passes import MatrixUnitKernels

BLOCK = 32
"""Tokens of one block of keys and values."""
ROWS = 16
"""Rows that the head takes at a time."""


class Seen(NamedTuple):
    """What the requests of a pass have seen, and where it lies; int64 all.

    Attributes:
        starts: Where each request's new tokens begin among all.
        counts: How many they are.
        lengths: How many tokens it has seen before.
        tables: The numbers of its blocks, in the order of its tokens, (requests, most blocks).
    """

    starts: Tensor
    counts: Tensor
    lengths: Tensor
    tables: Tensor


class Head:
    """An output head, packed with 16 bits a weight and with 8.

    Args:
        weight: (words, size) bfloat16; kept.
        kernels: Of this machine.
    """

    def __init__(self, weight: Tensor, kernels: "DecodingKernels") -> None:
        self.weight = weight
        self.words, self.size = weight.shape
        self._kernels = kernels
        self._packed = kernels.pack(weight)
        self._shrunk = kernels.large(torch.empty(weight.shape, dtype=torch.int8))
        self._scales = torch.empty(self.words)
        kernels.shrink(weight, self._shrunk, self._scales)

    def scores(self, hidden: Tensor) -> Tensor:
        """Return all scores, float32 (rows, words), of hidden states (rows, size)."""
        return self._kernels.head(hidden, self._packed, None, self.words)

    def likeliest(self, hidden: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores of which the `counts` largest of each row are as `scores` has them, and the best words.

        Args:
            hidden: (rows, size).
            counts: (rows,) int64, at least 1.
        """
        scores = self._kernels.head(hidden, self._shrunk, self._scales, self.words)
        return scores, self._kernels.refine(scores, hidden, counts, self.weight, self._scales)


class DecodingKernels(MatrixUnitKernels):
    """The kernels of training's forward pass, and those of serving."""

    @classmethod
    def find(cls, device: torch.device, dtype: torch.dtype, cache: Path) -> Self | None:
        """Return them where this machine has them; `cache` is the directory of compiled libraries."""
        if device.type != "cpu" or dtype != torch.bfloat16 or (compiled := library(cache)) is None:
            return None
        return cls(compiled) if compiled.has_matrix_unit() else None

    def attend_cached(
        self, turned: Tensor, heads: Tensor, pool: Tensor, seen: Seen, scale: float, window: int, out: Tensor
    ) -> None:
        """Store new tokens' keys and values, and let the tokens attend to those of their request.

        Args:
            turned: (tokens, queries and keys, size), turned by their positions.
            heads: (tokens, queries and keys and values, size), of which the values count.
            pool: Of the layer, (blocks, 2, BLOCK, keys, size).
            seen: Of the requests.
            scale: What scores are multiplied by.
            window: How many tokens, itself counted, a token sees.
            out: What each token gathers, (tokens, queries x size); other rows stay as they are.
        """
        _, turning, size = turned.shape
        keys = heads.shape[1] - turning
        shape = len(seen.counts), turning - keys, keys, size, window, seen.tables.shape[1]
        counted = self._call("cache_scratch", len(seen.counts), keys, size, window, seen.counts, seen.lengths)
        self._call("attend_cached", *shape, *seen, pool, turned, heads, scale, turned.new_empty(counted), out)

    def shrink(self, weight: Tensor, shrunk: Tensor, scales: Tensor) -> None:
        """Write a matrix with 8 bits a weight, (out, in), and each output's scale."""
        self._call("shrink", *weight.shape, weight, shrunk, scales)

    def head(self, x: Tensor, packed: Tensor, scales: Tensor | None, words: int) -> Tensor:
        """Return `x W^T` in float32, (rows, words); W has 8 bits where there are scales."""
        rows, size = x.shape
        filled = x.new_zeros((-(-rows // ROWS) * ROWS, size))
        filled[:rows] = x
        y, scratch = x.new_empty((len(filled), words), dtype=torch.float32), x.new_empty(ROWS * size)
        for first in range(0, rows, ROWS):
            part, found = filled[first : first + ROWS], y[first : first + ROWS]
            if scales is None:
                self._call("head", words, size, part, packed, found, scratch)
            else:
                self._call("head_of_8_bits", words, size, part, packed, scales, found, scratch)
        return y[:rows]

    def refine(self, scores: Tensor, x: Tensor, counts: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        """Make the largest scores exact, in place, and return the best word of each row.

        Args:
            scores: (rows, words), of a head with 8 bits a weight.
            x: (rows, size) what they were computed from.
            counts: (rows,) how many of each row's largest; int64.
            weight: (words, size) the head's.
            scales: Of 8 bits.
        """
        best = torch.empty(len(x), dtype=torch.int64)
        self._call("refine", len(x), *weight.shape, counts, x.contiguous(), weight, scales, scores, best)
        return best
