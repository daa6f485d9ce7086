"""Frozen matrices with low-rank adapters, forwards and backwards."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tunesmith.engines.linear import Linear, linear
from tunesmith.kernels.passes import Kernels, MatrixUnitKernels, Share
from tunesmith.kernels.products import Mix, Pair
from tunesmith.training.lora import LoraStack


def product(weight: Tensor, kernels: Kernels) -> Linear:
    """Return `x -> x @ weight.T`, by the fastest way that there is; x has a multiple of 16 rows."""
    if not isinstance(kernels, MatrixUnitKernels) or not kernels.fits(weight.shape):
        return linear(weight, None)
    unit, packed, out = kernels, kernels.pack(weight), weight.shape[0]
    return lambda x: unit.product_alone(x, packed, out)


class Frozen:
    """Linear layers that share their input, as one matrix in the layouts that both passes read fastest.

    Attributes:
        shape: The matrix's: out_features of all layers, in_features.
        unit: Multiplies by it, where it is packed for a matrix unit.
        packed: Then the matrix, and transposed.
        forward: Else (tokens, in_features) -> (tokens, out_features).
        backward: The gradient of the output -> that of the input.
    """

    def __init__(self, layers: Sequence[nn.Linear], kernels: Kernels) -> None:
        weights = [layer.weight.detach() for layer in layers]
        weight = torch.cat(weights) if weights[1:] else weights[0]
        biases = [_bias(layer) for layer in layers] if any(layer.bias is not None for layer in layers) else []
        self.shape = weight.shape
        fits = isinstance(kernels, MatrixUnitKernels) and kernels.fits(weight.shape) and not biases
        self.unit = kernels if fits and isinstance(kernels, MatrixUnitKernels) else None
        if self.unit is not None:
            self.packed = self.unit.pack(weight), self.unit.pack(weight.T)
        else:
            self.forward = linear(weight, torch.cat(biases) if biases else None)
            self.backward = linear(weight.T, None)


def _bias(layer: nn.Linear) -> Tensor:
    return layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()


class PackedPairs:
    """A stack's adapters packed for a matrix unit, the ranks filled up to a multiple of 32.

    Attributes:
        ranks: How many there are then.
        forward: A and B, a row a block.
        backward: B and A transposed.
    """

    def __init__(self, stack: LoraStack, unit: MatrixUnitKernels) -> None:
        self._unit, self._stack = unit, stack
        self.ranks = -(-stack.a.shape[1] // 32) * 32
        self.forward, self.backward = (
            tuple(unit.pack(part, None, shape) for part, shape in side) for side in self._sides()
        )

    def refresh(self) -> None:
        """Pack them again after the adapters have changed."""
        for packed, side in zip((self.forward, self.backward), self._sides(), strict=True):
            for own, (part, shape) in zip(packed, side, strict=True):
                self._unit.pack(part, own, shape)

    def _sides(self) -> list[list[tuple[Tensor, tuple[int, int]]]]:
        a, b = self._stack.a, self._stack.b
        width, out = a.shape[2], b.shape[1]
        return [
            [(a, (self.ranks, width)), (b, (out, self.ranks))],
            [(b.mT, (self.ranks, out)), (a.mT, (width, self.ranks))],
        ]


class Projection:
    """`W x + bias + scale * B A x` of one block's linear layers that share their input.

    Args:
        frozen: The layers.
        stack: Their adapters, with those of other blocks.
        block: Which of them.
        pairs: The adapters packed, where the layers are.
    """

    def __init__(self, frozen: Frozen, stack: LoraStack, block: int = 0, pairs: PackedPairs | None = None) -> None:
        self._frozen, self._stack, self._block, self._pairs = frozen, stack, block, pairs
        self._a, self._b = stack.a[block], stack.b[block]
        if pairs is not None:
            a, b = pairs.forward
            b_back, a_back = pairs.backward
            self._forward = Mix([Pair(a[block], b[block])], pairs.ranks)
            self._backward = Mix([Pair(b_back[block], a_back[block])], pairs.ranks)
            self._b_back = b_back[block]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the product, and A x, which `backward` takes.

        Args:
            x: (tokens, in_features) in the base's precision.
        """
        frozen, pairs = self._frozen, self._pairs
        if frozen.unit is not None and pairs is not None:
            y, (low,) = frozen.unit.product(x, frozen.packed[0], frozen.shape[0], self._forward)
            return y, low
        low = x @ self._a.T
        return frozen.forward(x).addmm_(low, self._b.T), low

    def backward(self, gradient: Tensor, x: Tensor, low: Tensor) -> Tensor:
        """Add to the adapter's gradient and return that of the input, in the base's precision.

        Args:
            gradient: Of the product, in the base's precision.
            x: The input.
            low: What `forward` returned.
        """
        frozen, pairs = self._frozen, self._pairs
        if frozen.unit is not None and pairs is not None:
            of_x, (low_gradient,) = frozen.unit.product(
                gradient, frozen.packed[1], frozen.shape[1], self._backward
            )
        else:
            low_gradient = gradient @ self._b
            of_x = frozen.backward(gradient).addmm_(low_gradient, self._a)
        self._add(Share(x, gradient, low, low_gradient))
        return of_x

    def learn(self, gradient: Tensor, x: Tensor, low: Tensor) -> None:
        """Add to the adapter's gradient alone."""
        if self._frozen.unit is not None and self._pairs is not None:
            low_gradient = self._frozen.unit.product_alone(gradient, self._b_back, self._pairs.ranks)
        else:
            low_gradient = gradient @ self._b
        self._add(Share(x, gradient, low, low_gradient))

    def _add(self, share: Share) -> None:
        stack, block = self._stack, self._block
        if self._frozen.unit is None or self._pairs is None:
            stack.add_gradient(block, share.low_gradient.T @ share.x, share.gradient.T @ share.low)
        else:
            self._frozen.unit.adapt(share, stack.outs, stack.rank, stack.scale, *stack.gradients(block))
