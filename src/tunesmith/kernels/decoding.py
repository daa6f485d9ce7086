"""What serving needs of the matrix unit: attention over cached keys and values, and a fast output head."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from tunesmith.kernels.library import library
from tunesmith.kernels.passes import MatrixUnitKernels
from tunesmith.kernels.products import Pair

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
    """

    starts: Tensor
    counts: Tensor
    seen: Tensor


class Kind(NamedTuple):
    """What layers that look equally far back have in common in one pass.

    Attributes:
        cosine: Of the tokens' positions, (tokens, size) in float32.
        sine: Signed as in `decoder.Turns`.
        tables: The numbers of each request's blocks, in the order of its tokens, (requests, most) int64.
        window: How many tokens, itself counted, a token sees.
        most: Blocks of a table.
    """

    cosine: Tensor
    sine: Tensor
    tables: Tensor
    window: int
    most: int


class Shape(NamedTuple):
    """What all layers of a decoder have in common.

    Attributes:
        queries: Heads of a token.
        keys: And as many values.
        size: Of a head.
        middle: Width of the gated product.
        silu: 1, or 0 for gelu.
        eps: Of the norms.
        scale: What scores are multiplied by.
    """

    queries: int
    keys: int
    size: int
    middle: int
    silu: int
    eps: float
    scale: float


class Layer(NamedTuple):
    """A layer: four packed matrices, the factors of its norms, where it has them, and its keys and values.

    Attributes:
        products: Of queries, keys and values; of what is gathered; of gate and up; down.
        pool: See `decoding.c`; (blocks, 2, keys, BLOCK x size).
        kind: The number of its kind.
    """

    products: Sequence[Tensor]
    before_attention: Tensor
    turned: Tensor | None
    after_attention: Tensor | None
    before_mlp: Tensor
    after_mlp: Tensor | None
    pool: Tensor
    kind: int


class Layers:
    """A decoder's layers, as `decode` takes them."""

    def __init__(self, shape: Shape, layers: Sequence[Layer]) -> None:
        self.shape = shape
        self._kept = layers  # their memory is read
        self.table = (_Layer * len(layers))(
            *[
                _Layer((ctypes.c_void_p * 4)(*map(_given, layer.products)), *map(_given, layer[1:]))
                for layer in layers
            ]
        )


class Mixes:
    """Adapters that come together in passes.

    Args:
        pairs: Of each layer and each of its products, the pairs of all adapters.
        ranks: Of each of a layer's products.

    Attributes:
        firsts: Where each adapter's tokens begin, to be set for each pass; they follow one another.
        ends: Where they end.
        pairs: Addresses.
    """

    def __init__(self, pairs: Sequence[Sequence[Sequence[Pair]]], ranks: Sequence[int]) -> None:
        self.ranks = (ctypes.c_int64 * 4)(*ranks)
        self.firsts, self.ends = (torch.zeros(len(pairs[0][0]), dtype=torch.int64) for _ in range(2))
        self._kept = pairs  # their memory is read
        self.pairs = torch.tensor(
            [
                pair[side].data_ptr()
                for layer in pairs
                for product in layer
                for side in range(2)
                for pair in product
            ]
        )


_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


class _Layer(ctypes.Structure):
    _fields_ = [
        ("products", _POINTER * 4),
        *(
            (name, _POINTER)
            for name in ("before_attention", "turned", "after_attention", "before_mlp", "after_mlp", "pool")
        ),
        ("kind", _SIZE),
    ]


class _Kind(ctypes.Structure):
    _fields_ = [*((name, _POINTER) for name in ("cosine", "sine", "tables")), ("window", _SIZE), ("most", _SIZE)]


class _Pass(ctypes.Structure):
    _fields_ = [
        *((name, _SIZE) for name in ("layers", "tokens", "width", "queries", "keys", "size", "middle", "silu")),
        ("requests", _SIZE),
        ("adapters", _SIZE),
        ("ranks", _SIZE * 4),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("layer", ctypes.POINTER(_Layer)),
        ("kind", ctypes.POINTER(_Kind)),
        *((name, _POINTER) for name in ("starts", "counts", "seen", "firsts", "ends", "pairs", "x", "scratch")),
    ]


def _given(value: Any) -> Any:
    """Return what a field of a structure holds: a tensor's address, or a number."""
    if isinstance(value, Tensor):
        if not value.is_contiguous():
            raise ValueError("a kernel takes contiguous tensors")
        return value.data_ptr()
    return value


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

    def near(self, hidden: Tensor) -> Tensor:
        """Return scores from which `likeliest` finds the largest, with half of the time that `scores` takes."""
        return self._kernels.head(hidden, self._shrunk, self._scales, self.words)

    def likeliest(
        self, near: Tensor, hidden: Tensor, rows: Tensor, counts: Tensor, allowed: Tensor | None, width: int
    ) -> tuple[Tensor, Tensor]:
        """Return the largest of some rows as `scores` has them, largest first, and their words, (n, width) each.

        Args:
            near: What `near` or `scores` returned, (rows, words).
            hidden: Of what, (rows, size).
            rows: Which n rows, int64.
            counts: How many of each of these, (n,) int64; what follows them is -infinity.
            allowed: Which words are looked at, a bit each, int32 (n, words / 32); None for all of them.
            width: Not less than any count.
        """
        return self._kernels.likeliest(
            rows, counts, hidden.contiguous(), self.weight, self._scales, near, allowed, width
        )


class DecodingKernels(MatrixUnitKernels):
    """The kernels of training's forward pass, and those of serving."""

    @classmethod
    def find(cls, device: torch.device, dtype: torch.dtype, cache: Path) -> Self | None:
        """Return them where this machine has them; `cache` is the directory of compiled libraries."""
        if device.type != "cpu" or dtype != torch.bfloat16 or (compiled := library(cache)) is None:
            return None
        return cls(compiled) if compiled.has_matrix_unit() else None

    def decode(
        self, x: Tensor, layers: "Layers", seen: Seen, kinds: Sequence[Kind], mixes: "Mixes | None"
    ) -> None:
        """Run a decoder's layers on new tokens, in place, and store their keys and values.

        Args:
            x: (tokens, width); tokens are a multiple of 16, those of no request last.
            layers: The decoder's.
            seen: What the requests have seen.
            kinds: What the layers of a kind have in common, in the order of their numbers.
            mixes: The tokens' adapters; None without any.
        """
        held = (_Kind * len(kinds))(*[_Kind(*map(_given, kind)) for kind in kinds])
        task = _Pass(
            layers=len(layers.table),
            tokens=len(x),
            width=x.shape[1],
            **layers.shape._asdict(),
            requests=len(seen.counts),
            layer=layers.table,
            kind=held,
            **{name: tensor.data_ptr() for name, tensor in seen._asdict().items()},
            x=x.data_ptr(),
        )
        if mixes is not None:
            task.adapters, task.ranks = len(mixes.firsts), mixes.ranks
            task.firsts, task.ends, task.pairs = (
                tensor.data_ptr() for tensor in (mixes.firsts, mixes.ends, mixes.pairs)
            )
        scratch = x.new_empty(self._library.decode_scratch(ctypes.addressof(task)))
        task.scratch = scratch.data_ptr()
        self._library.decode(ctypes.addressof(task))

    def shrink(self, weight: Tensor, shrunk: Tensor, scales: Tensor) -> None:
        """Write a matrix with 8 bits a weight, (out, in), and each output's scale."""
        self._call("shrink", *weight.shape, weight, shrunk, scales)

    def head(self, x: Tensor, packed: Tensor, scales: Tensor | None, words: int) -> Tensor:
        """Return `x W^T` in float32, (rows, words); W has 8 bits where there are scales."""
        rows, size = x.shape
        filled = x.new_zeros((-(-rows // ROWS) * ROWS, size))
        filled[:rows] = x
        y, scratch = x.new_empty((len(filled), words), dtype=torch.float32), torch.empty_like(filled)
        groups = len(filled) // ROWS
        if scales is None:
            self._call("head", groups, words, size, filled, packed, y, scratch)
        else:
            self._call("head_of_8_bits", groups, words, size, filled, packed, scales, y, scratch)
        return y[:rows]

    def likeliest(
        self,
        rows: Tensor,
        counts: Tensor,
        x: Tensor,
        weight: Tensor,
        scales: Tensor,
        near: Tensor,
        allowed: Tensor | None,
        width: int,
    ) -> tuple[Tensor, Tensor]:
        """Return the largest scores of some rows and their words, (n, width) each: see `Head.likeliest`.

        Args:
            rows: (n,) int64.
            counts: (n,) int64.
            x: (rows, size).
            weight: (words, size) the head's.
            scales: Of 8 bits.
            near: (rows, words).
            allowed: (n, words / 32) int32; None for all words.
            width: Of what is returned.
        """
        values = torch.empty(len(rows), width)
        tokens = torch.empty((len(rows), width), dtype=torch.int64)
        given = rows, counts, x, weight, scales, near, allowed
        self._call("likeliest", len(rows), *weight.shape, width, *given, values, tokens)
        return values, tokens
