"""Memory for keys and values in blocks, which requests take as they grow, share, and give back."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tunesmith.kernels.decoding import BLOCK

IDLE = 0.25
"""Share of the blocks that may hold what no request uses, in case that one comes that does."""


class BlockPool:
    """The keys and values of layers that look equally far back.

    A request's worst case is set aside when it begins, so that none is stopped on its way. A block may get a name,
    which says what it holds: then later requests share it, and it stays for a while when nobody uses it.

    Args:
        layers: How many there are.
        keys: Of a token in a layer, and as many values.
        size: Of each.
        window: How many tokens, itself counted, a token sees; None for all.
        tokens: How many all requests together may hold.
        dtype: Number format.

    Attributes:
        layers: A layer's, (blocks, 2, keys, BLOCK x size).
    """

    def __init__(
        self, layers: int, keys: int, size: int, window: int | None, tokens: int, dtype: torch.dtype
    ) -> None:
        self.window = window
        self._blocks = -(-tokens // BLOCK)
        # Memory of the system that is not written to is only promised.
        self.layers = [torch.empty(self._blocks, 2, keys, BLOCK * size, dtype=dtype) for _ in range(layers)]
        self._free = list(range(self._blocks - 1, -1, -1))
        self._unpromised = self._blocks
        self._users = [0] * self._blocks
        self._named: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Blocks with names that nobody uses, the first to go first."""

    @property
    def blocks(self) -> tuple[int, int]:
        """How many are in use, and how many there are."""
        return self._blocks - len(self._free) - len(self._idle), self._blocks

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
        """End a promise, and let go of what was taken of it, in the order of its tokens."""
        self._unpromised += blocks
        self._let_go(reversed(held))  # without its beginning a text is of no use: that is kept the longest

    def grow(self, table: list[int], length: int) -> None:
        """Take blocks for a request's first `length` tokens."""
        while len(table) * BLOCK < length:
            block = self._free.pop() if self._free else self._forget()
            self._users[block] = 1
            table.append(block)

    def first(self, length: int) -> int:
        """Return the number of the first of a request's blocks that tokens after `length` see."""
        return 0 if self.window is None else max((length + 1 - self.window) // BLOCK, 0)

    def shed(self, table: list[int], first: int, length: int) -> int:
        """Let go of the blocks that no token after `length` sees; return the number of the first one that is left.

        Args:
            table: The request's blocks.
            first: The first one that was left before.
            length: Tokens seen.
        """
        left = max(first, self.first(length))
        self._let_go(table[first:left])
        return left

    def name(self, block: int, name: bytes) -> None:
        """Say what a block holds, all of it; where another is said to hold the same, that one stays."""
        if name not in self._named and block not in self._names:
            self._named[name], self._names[block] = block, name

    def known(self, name: bytes) -> bool:
        """Return whether a block holds this."""
        return name in self._named

    def share(self, names: Sequence[bytes]) -> list[int]:
        """Use the blocks of these names, which are known, too."""
        blocks = [self._named[name] for name in names]
        for block in blocks:
            self._users[block] += 1
            self._idle.pop(block, None)
        return blocks

    def _let_go(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._users[block] -= 1
            if not self._users[block]:
                if block in self._names:
                    self._idle[block] = None
                else:
                    self._free.append(block)
        while len(self._idle) > IDLE * self._blocks:
            self._free.append(self._forget())

    def _forget(self) -> int:
        """Return the block that has been idle for longest, without its name."""
        block, _ = self._idle.popitem(last=False)
        del self._named[self._names.pop(block)]
        return block


def tables(rows: Sequence[list[int]]) -> Tensor:
    """Return block numbers as one tensor, (rows, longest)."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
