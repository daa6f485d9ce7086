"""Memory for keys and values in blocks, which requests take as they grow and give back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.kernels.decoding import BLOCK


class BlockPool:
    """The keys and values of layers that look equally far back.

    A request's worst case is set aside when it begins, so that none is stopped on its way.

    Args:
        layers: How many there are.
        keys: Of a token in a layer, and as many values.
        size: Of each.
        window: How many tokens, itself counted, a token sees; None for all.
        tokens: How many all requests together may hold.
        dtype: Number format.

    Attributes:
        layers: A layer's, (blocks, 2, BLOCK, keys, size).
    """

    def __init__(
        self, layers: int, keys: int, size: int, window: int | None, tokens: int, dtype: torch.dtype
    ) -> None:
        self.window = window
        self._blocks = -(-tokens // BLOCK)
        # Memory of the system that is not written to is only promised.
        self.layers = [torch.empty(self._blocks, 2, BLOCK, keys, size, dtype=dtype) for _ in range(layers)]
        self._free = list(range(self._blocks - 1, -1, -1))
        self._unpromised = self._blocks

    @property
    def blocks(self) -> tuple[int, int]:
        """How many are in use, and how many there are."""
        return self._blocks - len(self._free), self._blocks

    def most(self, tokens: int, at_once: int) -> int:
        """Return how many blocks a request of up to so many tokens holds at most, `at_once` new ones a pass."""
        if self.window is not None:
            tokens = min(tokens, self.window + at_once + 2 * BLOCK)  # it begins and ends within blocks
        return -(-tokens // BLOCK)

    def promise(self, blocks: int) -> bool:
        """Set blocks aside; return whether there are as many."""
        if blocks > self._unpromised:
            return False
        self._unpromised -= blocks
        return True

    def take_back(self, blocks: int, held: Sequence[int]) -> None:
        """End a promise, and free what was taken of it."""
        self._unpromised += blocks
        self._free += held

    def grow(self, table: list[int], length: int) -> None:
        """Take blocks for a request's first `length` tokens."""
        while len(table) * BLOCK < length:
            table.append(self._free.pop())

    def shed(self, table: list[int], first: int, length: int) -> int:
        """Free the blocks that no token after `length` sees; return the number of the first one that is left.

        Args:
            table: The request's blocks.
            first: The first one that was left before.
            length: Tokens seen.
        """
        if self.window is None:
            return first
        left = max(first, (length + 1 - self.window) // BLOCK)
        self._free += table[first:left]
        return left


def tables(rows: Sequence[list[int]]) -> Tensor:
    """Return block numbers as one tensor, (rows, longest)."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
