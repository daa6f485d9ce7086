"""Causal attention, forwards and backwards, on rows of different lengths."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tunesmith.kernels.passes import CompiledKernels, Kernels
from tunesmith.training.batches import Batch


class Heads(NamedTuple):
    """The heads of a layer.

    Attributes:
        queries: How many a token has.
        keys: How many keys and, as many, values; queries share them in groups.
        size: Of each.
        scale: What scores are multiplied by.
    """

    queries: int
    keys: int
    size: int
    scale: float


class Attention(Protocol):
    """The attention of one batch."""

    def forward(self, turned: Tensor, heads: Tensor) -> tuple[Tensor, Any]:
        """Return what each token gathers, (tokens, queries x size), and what `backward` takes.

        Args:
            turned: (tokens, queries and keys, size), turned by their positions.
            heads: (tokens, queries and keys and values, size), of which the values count.
        """

    def backward(self, gradient: Tensor, kept: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of turned queries, turned keys and values, (tokens, heads, size) each.

        Args:
            gradient: Of what the tokens gather.
            kept: What `forward` returned.
        """


def attention(batch: Batch, heads: Heads, window: int | None, kernels: Kernels) -> Attention:
    """Return the fastest attention for a batch.

    Args:
        batch: Where the rows end.
        heads: Of the layers.
        window: How many tokens, itself counted, a token sees; None for all before it.
        kernels: For the device and the precision.
    """
    narrow = window is not None and batch.width > window
    if (
        isinstance(kernels, CompiledKernels)
        and batch.width <= kernels.most_attended
        and heads.size <= 256
        and not narrow
    ):
        return ShortAttention(batch, heads, kernels)
    return PaddedAttention(batch, heads, window)


class ShortAttention:
    """Attention row by row, without padding."""

    def __init__(self, batch: Batch, heads: Heads, kernels: CompiledKernels) -> None:
        self._batch, self._heads, self._kernels = batch, heads, kernels

    def forward(self, turned: Tensor, heads: Tensor) -> tuple[Tensor, Any]:
        """See `Attention`."""
        queries, scale = self._heads.queries, self._heads.scale
        gathered, probabilities = self._kernels.attend(turned, heads, queries, scale, self._batch.rows)
        return gathered, (turned, heads, probabilities)

    def backward(self, gradient: Tensor, kept: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See `Attention`."""
        turned, heads, probabilities = kept
        scale, rows = self._heads.scale, self._batch.rows
        return self._kernels.attend_back(gradient, turned, heads, probabilities, scale, rows)


class _Kept(NamedTuple):
    """Padded queries, keys, values and probabilities: a matrix a row and key."""

    query: Tensor  # (rows x keys, width x queries of a key, size)
    key: Tensor  # (rows x keys, width, size)
    value: Tensor
    probabilities: Tensor  # (rows x keys, width x queries of a key, width)


class PaddedAttention:
    """Attention as products of padded rows, with the queries that share a key as rows of one matrix.

    torch's own kernel takes ten times as long backwards for rows of some dozen tokens.
    """

    def __init__(self, batch: Batch, heads: Heads, window: int | None) -> None:
        self._batch, self._heads = batch, heads
        places = torch.arange(batch.width, device=batch.tokens.device)
        distance = places[:, None] - places
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        mask = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)
        self._mask = mask.repeat_interleave(heads.queries // heads.keys, 0)

    def forward(self, turned: Tensor, heads: Tensor) -> tuple[Tensor, Any]:
        """See `Attention`."""
        queries = self._heads.queries
        rows = self._batch.padded(turned)
        query, key = self._fold(rows[:, :, :queries]), self._fold(rows[:, :, queries:])
        value = self._fold(self._batch.padded(heads[:, turned.shape[1] :]))
        # In float32, as a score's rounding error is its probability's relative error.
        scores = torch.baddbmm(self._mask, query.float(), key.float().mT, alpha=self._heads.scale)
        probabilities = scores.softmax(-1).to(query.dtype)
        gathered = self._unfold(probabilities @ value, queries).flatten(1)
        return gathered, _Kept(query, key, value, probabilities)

    def backward(self, gradient: Tensor, kept: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See `Attention`."""
        query, key, value, probabilities = kept
        queries, keys, size, scale = self._heads
        upstream = self._fold(self._batch.padded(gradient.view(len(gradient), queries, size)))
        of_value = probabilities.mT @ upstream
        of_probabilities = (upstream @ value.mT).float()
        of_scores = torch._softmax_backward_data(of_probabilities, probabilities.float(), -1, torch.float32)
        of_scores = of_scores.mul_(scale).to(query.dtype)
        of_query, of_key = of_scores @ key, of_scores.mT @ query
        return self._unfold(of_query, queries), self._unfold(of_key, keys), self._unfold(of_value, keys)

    def _fold(self, states: Tensor) -> Tensor:
        """(rows, width, heads, size) -> (rows x keys, width x heads of one key, size)."""
        rows, width, heads, size = states.shape
        if self._heads.keys == 1:
            return states.reshape(rows, width * heads, size)
        split = states.reshape(rows, width, self._heads.keys, -1, size).transpose(1, 2)
        return split.reshape(rows * self._heads.keys, -1, size)

    def _unfold(self, states: Tensor, heads: int) -> Tensor:
        """`_fold` and the padding undone: (tokens, heads, size)."""
        rows, width = len(self._batch.lengths), self._batch.width
        split = states.view(rows, self._heads.keys, width, heads // self._heads.keys, -1)
        return self._batch.unpadded(split.transpose(1, 2).reshape(rows, width, heads, -1))
