"""Keys and values of the tokens that requests have seen, a row each, for models run as modules."""

from collections.abc import Sequence

import torch

BLOCK = 256
"""Positions by which the rows grow."""


class KVCache:
    """Rows of different lengths: each belongs to a request for as long as that takes.

    Each layer holds two tensors [rows, positions, heads, head size]; the model's attention layers write to
    them and read them through `update`, the one method of transformers' Cache that they call. A forward pass
    is `begin`, the model, `advance`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._clear()

    def _clear(self) -> None:
        self.lengths: list[int] = []
        """Tokens seen by each row."""
        self._free: list[int] = []
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._capacity = (1, BLOCK)
        self.end = 0
        """Length of the longest row of the pass that has begun, its tokens included."""
        self._rows = torch.empty(0)
        self._in_order = True
        self._written = torch.empty(0)

    def take(self) -> int:
        """Return an empty row."""
        if self._free:
            row = min(self._free)
            self._free.remove(row)
            self.lengths[row] = 0
            return row
        self.lengths.append(0)
        return len(self.lengths) - 1

    def give_back(self, row: int) -> None:
        """End a row; the memory of all is freed with the last one."""
        self._free.append(row)
        if len(self._free) == len(self.lengths):
            self._clear()

    def begin(self, rows: Sequence[int], width: int) -> torch.Tensor:
        """Make room for `width` more tokens in some rows and return their positions, [rows, width]."""
        lengths = [self.lengths[row] for row in rows]
        self.end = max(lengths) + width
        self._reserve(len(self.lengths), self.end)
        self._rows = torch.tensor(rows, device=self._device)
        self._in_order = list(rows) == list(range(len(rows)))
        starts = torch.tensor(lengths, device=self._device)
        positions = starts[:, None] + torch.arange(width, device=self._device)
        self._written = (self._rows[:, None] * self._capacity[1] + positions).flatten()
        return positions

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values and return all that attention may look at.

        Args:
            key: [rows, heads, width, head size].
            value: The same shape.
            layer: Index of the layer.

        Returns:
            Keys and values [rows, heads, longest row, head size]; what lies behind a row's own tokens is for
            the mask to hide.
        """
        if layer == len(self._layers):
            self._layers.append((self._allocate(key), self._allocate(value)))
        keys, values = self._layers[layer]
        return self._store(keys, key), self._store(values, value)

    def get_seq_length(self, _layer: int = 0) -> int:
        """Return the tokens that the longest row has seen; transformers asks when it has no positions."""
        return max(self.lengths)

    def advance(self, rows: Sequence[int], widths: Sequence[int]) -> None:
        """Count the tokens that were really new in each row; the others were padding."""
        for row, width in zip(rows, widths, strict=True):
            self.lengths[row] += width

    def _store(self, stored: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        rows, heads, _, size = new.shape
        stored.view(-1, heads, size).index_copy_(0, self._written, new.transpose(1, 2).reshape(-1, heads, size))
        seen = stored[:, : self.end]
        return (seen[:rows] if self._in_order else seen.index_select(0, self._rows)).transpose(1, 2)

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        # Zeros, as attention multiplies what the mask hides by zero, and zero times a NaN is NaN.
        return like.new_zeros((*self._capacity, like.shape[1], like.shape[3]))

    def _reserve(self, rows: int, positions: int) -> None:
        """Grow to at least this many rows, in powers of two, and positions, in blocks."""
        held_rows, held_positions = self._capacity
        if rows <= held_rows and positions <= held_positions:
            return
        rows = held_rows if rows <= held_rows else 1 << (rows - 1).bit_length()
        positions = max(held_positions, -(-positions // BLOCK) * BLOCK)
        self._capacity = (rows, positions)
        self._layers = [(self._grown(keys), self._grown(values)) for keys, values in self._layers]

    def _grown(self, stored: torch.Tensor) -> torch.Tensor:
        grown = stored.new_zeros((*self._capacity, *stored.shape[2:]))
        grown[: stored.shape[0], : stored.shape[1]] = stored
        return grown


def causal_mask(positions: torch.Tensor, length: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Return what hides from each token the tokens after it, and those before its window.

    Args:
        positions: The tokens' own positions, [rows, width].
        length: Length of the longest row.
        window: How many tokens, itself counted, a token sees; None for all before it.
        dtype: The model's.

    Returns:
        0 or -inf to be added to attention scores, [rows, 1, width, length].
    """
    seen = torch.arange(length, device=positions.device)
    own = positions[:, None, :, None]
    hidden = seen > own
    if window is not None:
        hidden |= seen <= own - window
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, -torch.inf)
