"""Products on Intel's matrix unit, of frozen matrices and low-rank adapters."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tunesmith.kernels.library import Compiled

TILE = 512
"""bfloat16 numbers of one tile of the matrix unit."""


class Pair(NamedTuple):
    """An adapter's A and B, packed."""

    a: Tensor
    b: Tensor


class Mix:
    """The adapters of a product's rows: each belongs to rows that follow one another.

    Args:
        pairs: Theirs.
        ranks: A's outputs, the same of all and a multiple of 32.
        firsts: Where each one's rows begin, int64; it may be changed later. None when one has all rows.
        ends: Where they end.
    """

    def __init__(
        self, pairs: Sequence[Pair], ranks: int, firsts: Tensor | None = None, ends: Tensor | None = None
    ) -> None:
        self.count, self.ranks = len(pairs), ranks
        self.a = torch.tensor([pair.a.data_ptr() for pair in pairs])
        self.b = torch.tensor([pair.b.data_ptr() for pair in pairs])
        self.firsts = torch.zeros(1, dtype=torch.int64) if firsts is None else firsts
        self.ends = torch.full((1,), torch.iinfo(torch.int64).max) if ends is None else ends
        self._pairs = pairs  # their memory is read


class MatrixUnit(Compiled):
    """Products with frozen matrices, packed."""

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether the products below take matrices of a shape, either way round."""
        return all(side % 32 == 0 for side in shape)

    def pack(
        self, weight: Tensor, packed: Tensor | None = None, shape: Sequence[int] | None = None, alone: bool = False
    ) -> Tensor:
        """Return matrices, (count, out, in) or one of them, as `product` takes them.

        Args:
            weight: bfloat16, of any strides.
            packed: What was made for earlier ones, to be overwritten.
            shape: What out and in are filled up to with 0: multiples of 16 and 32.
            alone: Whether it is done on the caller's thread alone.
        """
        *count, out, width = weight.shape
        all_out, all_in = shape or (out, width)
        if packed is None:
            packed = self.large(weight.new_empty((*count, all_out * all_in)))
        matrices, step = (count[0], weight.stride(0)) if count else (1, 0)
        sizes = matrices, step, out, width, all_out, all_in, weight.stride(-2), weight.stride(-1), int(alone)
        self._library.pack(*sizes, weight.data_ptr(), packed.data_ptr())
        return packed

    def large(self, memory: Tensor) -> Tensor:
        """Return memory that nothing is in yet, to lie in large pages: it is read faster then."""
        self._library.spread(memory.data_ptr(), memory.nbytes)
        return memory

    def product(self, x: Tensor, weight: Tensor, out: int, mix: Mix) -> tuple[Tensor, Tensor]:
        """Return `x W^T + (x A^T) B^T`, and x A^T of each adapter, (adapters, rows, ranks).

        Args:
            x: (rows, in); rows are a multiple of 16.
            weight: W, packed.
            out: Its outputs.
            mix: The rows' adapters. What is returned of other adapters' rows means nothing.
        """
        rows, width = rows_of(x)
        y, low = x.new_empty((rows, out)), x.new_empty((mix.count, rows, mix.ranks))
        sizes = rows, out, width, mix.count, mix.ranks
        given = x, weight, mix.a, mix.b, mix.firsts, mix.ends
        self._call("product", *sizes, *given, low, y, self._scratch(x, sizes))
        return y, low

    def product_alone(self, x: Tensor, weight: Tensor, out: int) -> Tensor:
        """Return `x W^T`; see `product`."""
        rows, width = rows_of(x)
        y, sizes = x.new_empty((rows, out)), (rows, out, width, 0, 0)
        self._call("product", *sizes, x, weight, None, None, None, None, None, y, self._scratch(x, sizes))
        return y

    def _scratch(self, x: Tensor, sizes: tuple[int, int, int, int, int]) -> Tensor:
        return x.new_empty(self._library.product_scratch(*sizes))


def rows_of(x: Tensor) -> tuple[int, int]:
    """Return a matrix's rows, which the matrix unit takes 16 at a time, and its width."""
    rows, width = x.shape
    if rows % 16:
        raise ValueError(f"the matrix unit takes 16 rows at a time, not {rows}")
    return rows, width
