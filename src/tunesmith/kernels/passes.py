"""The small operations of a training step: in torch, or compiled for this CPU where there is a C compiler.

Products of matrices are torch's own either way. What lies between them is bound by memory and by the number of
operations: `passes.c` passes over each row once where torch takes ten operations.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from tunesmith.base_models.decoder import Turns, normalise, turn
from tunesmith.kernels.library import Compiled, library
from tunesmith.kernels.products import TILE, MatrixUnit, rows_of


class ShortRows(NamedTuple):
    """Where a batch's rows lie, as int64 tensors.

    Attributes:
        starts: Of the rows among the tokens.
        lengths: In tokens.
        places: Of their squares behind one another: the sums of the squared lengths before them.
        squares: The sum of all.
        tile_places: The same of the tiles that cover the squares, 16 x 32 each.
        tiles: How many there are.
        chunk_places: The same of the rows' chunks of 32 tokens.
        chunks: How many there are.
    """

    starts: Tensor
    lengths: Tensor
    places: Tensor
    squares: int
    tile_places: Tensor
    tiles: int
    chunk_places: Tensor
    chunks: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "ShortRows":
        """Return where rows of these lengths lie, one behind another."""
        each = torch.tensor(lengths)
        chunks = (each + 31) // 32
        starts, _ = _before(each)
        squares, tiles = _before(each * each), _before((each + 15) // 16 * chunks)
        return cls(starts, each, *squares, *tiles, *_before(chunks))


class Share(NamedTuple):
    """A layer's share in the gradients of its adapters: A's are `low_gradient^T x`, B's `gradient^T low`.

    Attributes:
        x: Its input, (tokens, in_features).
        gradient: Its output's, (tokens, out_features).
        low: A x, (tokens, ranks).
        low_gradient: That of A x.
    """

    x: Tensor
    gradient: Tensor
    low: Tensor
    low_gradient: Tensor


class Kernels(Protocol):
    """Forward and backward passes of what lies between a layer's products.

    Activations are (tokens, ...) in the base's precision, and are computed with in float32. Gradients of the
    residual stream are float32, others in the base's precision.

    Attributes:
        name: What people call them.
    """

    name: str

    def norm(self, x: Tensor, factor: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return the root mean square norm of x times a factor, and what x was multiplied by."""

    def add_norm(self, x: Tensor, y: Tensor, factor: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return x plus the norm of y, and what y was multiplied by."""

    def norm_back(self, gradient: Tensor, x: Tensor, inverse: Tensor, factor: Tensor) -> Tensor:
        """Return the gradient of x, in its precision, from the float32 one of its norm."""

    def norm_back_add(self, gradient: Tensor, x: Tensor, inverse: Tensor, factor: Tensor, total: Tensor) -> None:
        """Add the gradient of x to a float32 total, from the one of its norm."""

    def turn(
        self, heads: Tensor, turning: int, turns: Turns, factor: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor | None]:
        """Normalise, where there is a factor, and turn by their positions the first heads of each token.

        Args:
            heads: (tokens, queries and keys and values, size).
            turning: How many are queries or keys.
            turns: Of the tokens.
            factor: (turning, size).
            eps: Of the norm.

        Returns:
            (tokens, turning, size), and what they were multiplied by.
        """

    def turn_back(
        self,
        gradients: tuple[Tensor, Tensor, Tensor],
        heads: Tensor,
        inverse: Tensor | None,
        turns: Turns,
        factor: Tensor | None,
    ) -> Tensor:
        """Return the gradient of `turn`'s heads from those of turned queries, of turned keys and of values."""

    def gate(self, kind: str, gate_and_up: Tensor) -> Tensor:
        """Return the activated first half times the second."""

    def gate_back(self, kind: str, gradient: Tensor, gate_and_up: Tensor) -> Tensor:
        """Return the gradient of both halves."""

    def softmax(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return each row's cross-entropy at its target, e to its logits less their largest, and their sums."""


class TorchKernels:
    """Everywhere, in torch's operations."""

    name = "torch"

    def norm(self, x: Tensor, factor: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        y, inverse = normalise(x, eps)
        return y.mul_(factor).to(x.dtype), inverse

    def add_norm(self, x: Tensor, y: Tensor, factor: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        normed, inverse = self.norm(y, factor, eps)
        return x + normed, inverse

    def norm_back(self, gradient: Tensor, x: Tensor, inverse: Tensor, factor: Tensor) -> Tensor:
        """See `Kernels`."""
        return _through_norm(gradient * factor, x, inverse).to(x.dtype)

    def norm_back_add(self, gradient: Tensor, x: Tensor, inverse: Tensor, factor: Tensor, total: Tensor) -> None:
        """See `Kernels`."""
        total.add_(_through_norm(gradient * factor, x, inverse))

    def turn(
        self, heads: Tensor, turning: int, turns: Turns, factor: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor | None]:
        """See `Kernels`."""
        both = heads[:, :turning]
        if factor is None:
            return turn(both, *turns).to(heads.dtype), None
        scaled, inverse = normalise(both, eps)
        return turn(scaled.mul_(factor), *turns).to(heads.dtype), inverse

    def turn_back(
        self,
        gradients: tuple[Tensor, Tensor, Tensor],
        heads: Tensor,
        inverse: Tensor | None,
        turns: Turns,
        factor: Tensor | None,
    ) -> Tensor:
        """See `Kernels`."""
        *turned, of_value = gradients
        upstream = torch.cat(turned, 1)
        half = upstream.shape[-1] // 2
        back = (upstream * turns.cosine).add_((upstream * turns.sine).roll(half, -1))
        if factor is not None and inverse is not None:
            back = _through_norm(back.mul_(factor), heads[:, : back.shape[1]], inverse)
        return torch.cat((back.to(heads.dtype), of_value), 1)

    def gate(self, kind: str, gate_and_up: Tensor) -> Tensor:
        """See `Kernels`."""
        gate, up = gate_and_up.chunk(2, -1)
        return _activated(kind, gate).mul_(up)

    def gate_back(self, kind: str, gradient: Tensor, gate_and_up: Tensor) -> Tensor:
        """See `Kernels`."""
        gate, up = gate_and_up.chunk(2, -1)
        upstream = gradient * up
        if kind == "silu":
            of_gate = torch.ops.aten.silu_backward(upstream, gate)
        else:
            of_gate = torch.ops.aten.gelu_backward(upstream, gate, approximate="tanh")
        return torch.cat((of_gate, gradient * _activated(kind, gate)), -1)

    def softmax(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernels`."""
        largest = logits.amax(-1, keepdim=True).float()
        powers = (logits - largest).exp_()
        sums = powers.sum(-1)
        at_targets = logits.gather(-1, targets[:, None]).float()
        losses = sums.log() + (largest - at_targets).squeeze(-1)
        return losses, powers.to(logits.dtype), sums


def _through_norm(gradient: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
    """Return the gradient of `normalise`'s input, float32; overwrites that of its output."""
    gradient = gradient.float()
    y = x * inverse
    along = torch.linalg.vecdot(gradient, y).unsqueeze(-1).div_(-x.shape[-1])
    return gradient.addcmul_(y, along).mul_(inverse)


def _activated(kind: str, gate: Tensor) -> Tensor:
    return functional.silu(gate) if kind == "silu" else functional.gelu(gate, approximate="tanh")


class CompiledKernels(Compiled):
    """The same for bfloat16 on a CPU, compiled from passes.c."""

    name = "compiled"
    most_attended = 64
    """Rows of up to so many tokens are attended to here; for longer ones torch's products are faster."""

    def norm(self, x: Tensor, factor: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        y, inverse = torch.empty_like(x), x.new_empty((len(x), 1), dtype=torch.float32)
        self._call("norm", *x.shape, x, factor, eps, y, inverse)
        return y, inverse

    def add_norm(self, x: Tensor, y: Tensor, factor: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        total, inverse = torch.empty_like(x), x.new_empty((len(x), 1), dtype=torch.float32)
        self._call("add_norm", *x.shape, x, y, factor, eps, total, inverse)
        return total, inverse

    def norm_back(self, gradient: Tensor, x: Tensor, inverse: Tensor, factor: Tensor) -> Tensor:
        """See `Kernels`."""
        out = torch.empty_like(x)
        self._call("norm_back", *x.shape, gradient, x, inverse, factor, out)
        return out

    def norm_back_add(self, gradient: Tensor, x: Tensor, inverse: Tensor, factor: Tensor, total: Tensor) -> None:
        """See `Kernels`."""
        self._call("norm_back_add", *x.shape, gradient, x, inverse, factor, total)

    def turn(
        self, heads: Tensor, turning: int, turns: Turns, factor: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor | None]:
        """See `Kernels`."""
        tokens, every, size = heads.shape
        turned = heads.new_empty((tokens, turning, size))
        inverse = None if factor is None else heads.new_empty((tokens, turning, 1), dtype=torch.float32)
        self._call("turn", tokens, every, turning, size, heads, *turns, factor, eps, turned, inverse)
        return turned, inverse

    def turn_back(
        self,
        gradients: tuple[Tensor, Tensor, Tensor],
        heads: Tensor,
        inverse: Tensor | None,
        turns: Turns,
        factor: Tensor | None,
    ) -> Tensor:
        """See `Kernels`."""
        tokens, every, size = heads.shape
        queries, keys = gradients[0].shape[1], gradients[1].shape[1]
        out = torch.empty_like(heads)
        shape = tokens, every, queries + keys, size
        self._call("turn_back", *shape, *gradients, queries, heads, *turns, factor, inverse, out)
        return out

    def gate(self, kind: str, gate_and_up: Tensor) -> Tensor:
        """See `Kernels`."""
        rows, both = gate_and_up.shape
        product = gate_and_up.new_empty((rows, both // 2))
        self._call("gate", rows, both // 2, int(kind == "silu"), gate_and_up, product)
        return product

    def gate_back(self, kind: str, gradient: Tensor, gate_and_up: Tensor) -> Tensor:
        """See `Kernels`."""
        of_both = torch.empty_like(gate_and_up)
        self._call("gate_back", *gradient.shape, int(kind == "silu"), gradient, gate_and_up, of_both)
        return of_both

    def attend(
        self, turned: Tensor, heads: Tensor, queries: int, scale: float, rows: ShortRows
    ) -> tuple[Tensor, Tensor]:
        """Return what each token gathers, (tokens, queries x size), and what `attend_back` takes.

        Args:
            turned: (tokens, queries and keys, size).
            heads: (tokens, queries and keys and values, size).
            queries: How many there are.
            scale: What scores are multiplied by.
            rows: Where they lie.
        """
        tokens, turning, size = turned.shape
        probabilities = turned.new_empty(rows.squares * queries, dtype=torch.float32)
        gathered = turned.new_empty((tokens, queries * size))
        shape = len(rows.starts), queries, turning - queries, size
        places = rows.starts, rows.lengths, rows.places * queries
        self._call("attend", *shape, *places, turned, heads, scale, probabilities, gathered)
        return gathered, probabilities

    def attend_back(
        self, gradient: Tensor, turned: Tensor, heads: Tensor, probabilities: Tensor, scale: float, rows: ShortRows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of turned queries, turned keys and values, (tokens, heads, size) each."""
        tokens, turning, size = turned.shape
        queries, keys = gradient.shape[1] // size, heads.shape[1] - turning
        shape = len(rows.starts), queries, keys, size
        gradients = tuple(turned.new_empty((tokens, count, size)) for count in (queries, keys, keys))
        places = rows.starts, rows.lengths, rows.places * queries
        self._call("attend_back", *shape, *places, turned, heads, scale, probabilities, gradient, *gradients)
        return gradients  # type: ignore[return-value]

    def softmax(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernels`."""
        powers = torch.empty_like(logits)
        sums, losses = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
        self._call("softmax", *logits.shape, logits, targets, powers, sums, losses)
        return losses, powers, sums


class MatrixUnitKernels(MatrixUnit, CompiledKernels):
    """The same on a CPU with Intel's matrix unit, and its products besides."""

    name = "compiled, for the matrix unit"
    most_attended = 512

    def adapt(self, share: Share, outs: Tensor, rank: int, scale: float, a: Tensor, b: Tensor) -> None:
        """Add a layer's share to the gradients of its adapters.

        Args:
            share: What the gradients are products of.
            outs: The outputs of each of the layers that share their input, int64.
            rank: Of each adapter.
            scale: What B A is multiplied by.
            a: Gradients of all A, (ranks, in), float32.
            b: Gradients of all B, (outputs, rank), float32.
        """
        x, gradient, low, low_gradient = share
        (rows, width), out, ranks = rows_of(x), gradient.shape[1], low.shape[1]
        scratch = x.new_empty(2 * ranks * (rows + 31))
        sizes = rows, width, out, ranks, rank, outs.shape[0]
        self._call("adapt", *sizes, outs, scale, x, gradient, low, low_gradient, scratch, a, b)

    def attend(
        self, turned: Tensor, heads: Tensor, queries: int, scale: float, rows: ShortRows
    ) -> tuple[Tensor, Tensor]:
        """See `CompiledKernels`."""
        tokens, turning, size = turned.shape
        if size % 64:
            return super().attend(turned, heads, queries, scale, rows)
        probabilities = turned.new_empty(rows.tiles * queries * TILE)
        gathered = turned.new_empty((tokens, queries * size))
        shape = len(rows.starts), queries, turning - queries, size
        places = rows.starts, rows.lengths, rows.tile_places
        self._call("attend_tiles", *shape, *places, turned, heads, scale, probabilities, gathered)
        return gathered, probabilities

    def attend_back(
        self, gradient: Tensor, turned: Tensor, heads: Tensor, probabilities: Tensor, scale: float, rows: ShortRows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `CompiledKernels`."""
        tokens, turning, size = turned.shape
        if size % 64:
            return super().attend_back(gradient, turned, heads, probabilities, scale, rows)
        queries, keys = gradient.shape[1] // size, heads.shape[1] - turning
        shape = len(rows.starts), queries, keys, size
        gradients = tuple(turned.new_empty((tokens, count, size)) for count in (queries, keys, keys))
        places = rows.starts, rows.lengths, rows.tile_places, rows.chunk_places
        scratch = turned.new_empty(self._library.attend_scratch(queries, size, rows.tiles, rows.chunks))
        given = turned, heads, scale, probabilities, gradient
        self._call("attend_back_tiles", *shape, *places, *given, scratch, *gradients)
        return gradients  # type: ignore[return-value]


def _before(counts: Tensor) -> tuple[Tensor, int]:
    """Return the sums of the counts before each, and of all."""
    return counts.cumsum(0) - counts, int(counts.sum())


def find(device: torch.device, dtype: torch.dtype, cache: Path) -> Kernels:
    """Return the fastest kernels for a device and a number format, compiling them once into a cache.

    Args:
        device: Where the tensors are.
        dtype: The base's precision.
        cache: Directory of compiled libraries.
    """
    if device.type == "cpu" and dtype == torch.bfloat16 and (compiled := library(cache)):
        return MatrixUnitKernels(compiled) if compiled.has_matrix_unit() else CompiledKernels(compiled)
    return TorchKernels()
