"""Frozen matrices with low-rank adapters, forwards and backwards."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tunesmith.engines.linear import linear
from tunesmith.training.kernels import CompiledKernels, Kernels, MatrixUnitKernels
from tunesmith.training.lora import LoraStack


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


class Tape:
    """What the adapters' gradients are made of, layer after layer of one kind; then all at once.

    A product for each layer would take several times as long as one for all of them.

    Args:
        stack: The adapters.
        ranks: Of A x as it comes, which may be filled up.
        most_tokens: Room, in tokens times layers.
        kernels: For the device and the precision.
    """

    def __init__(self, stack: LoraStack, ranks: int, most_tokens: int, kernels: Kernels) -> None:
        self._stack, self._most, self._kernels = stack, most_tokens, kernels
        widths = stack.a.shape[2], stack.b.shape[1], ranks, ranks
        self._sides = [stack.a.new_zeros(most_tokens, width) for width in widths]
        self._views: list[Tensor] = []
        self._room = self._first = self._end = 0

    def begin(self, tokens: int) -> None:
        """Start the backward pass of a batch of so many tokens."""
        self._room = max(1, min(self._stack.blocks, self._most // tokens))
        self._first = self._end = self._stack.blocks
        if self._room * tokens > self._most:  # a single row that is longer than all that was planned for
            self._most = self._room * tokens
            self._sides = [side.new_zeros(self._most, side.shape[1]) for side in self._sides]
        shape = self._room, tokens, -1
        self._views = [side[: self._room * tokens].view(shape) for side in self._sides]

    def add(self, block: int, x: Tensor, gradient: Tensor, low: Tensor, low_gradient: Tensor) -> None:
        """Take a block's share, the last block first; of the batch's tokens, or of fewer."""
        if self._end - block > self._room:
            self.flush()
        self._first = block
        parts, places = (x, gradient, low, low_gradient), [side[block - self._end] for side in self._views]
        if isinstance(self._kernels, CompiledKernels):
            self._kernels.keep(places, parts)
            return
        for own, part in zip(places, parts, strict=True):
            own[: len(part)] = part
            own[len(part) :].zero_()

    def flush(self) -> None:
        """Add to the adapters' gradients what was taken since the last time."""
        x, gradient, low, low_gradient = (side[self._first - self._end :] for side in self._views)
        self._stack.add_gradient(slice(self._first, self._end), low_gradient.mT @ x, gradient.mT @ low)
        self._end = self._first


class Projection:
    """`W x + bias + scale * B A x` of one block's linear layers that share their input.

    Args:
        frozen: The layers.
        stack: Their adapters, with those of other blocks.
        block: Which of them.
        tape: Where the shares in the gradient are gathered; None to add them at once.
        pairs: The adapters packed, where the layers are.
    """

    def __init__(
        self,
        frozen: Frozen,
        stack: LoraStack,
        block: int = 0,
        tape: Tape | None = None,
        pairs: PackedPairs | None = None,
    ) -> None:
        self._frozen, self._stack, self._block, self._tape, self._pairs = frozen, stack, block, tape, pairs
        self._a, self._b = stack.a[block], stack.b[block]
        if pairs is not None:
            a, b = pairs.forward
            b_back, a_back = pairs.backward
            self._forward, self._backward = (a[block], b[block]), (b_back[block], a_back[block])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the product, and A x, which `backward` takes.

        Args:
            x: (tokens, in_features) in the base's precision.
        """
        frozen, pairs = self._frozen, self._pairs
        if frozen.unit is not None and pairs is not None:
            return frozen.unit.product(x, frozen.packed[0], frozen.shape[0], self._forward, pairs.ranks)
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
            of_x, low_gradient = frozen.unit.product(
                gradient, frozen.packed[1], frozen.shape[1], self._backward, pairs.ranks
            )
        else:
            low_gradient = gradient @ self._b
            of_x = frozen.backward(gradient).addmm_(low_gradient, self._a)
        self._keep(gradient, x, low, low_gradient)
        return of_x

    def learn(self, gradient: Tensor, x: Tensor, low: Tensor) -> None:
        """Add to the adapter's gradient alone."""
        if self._frozen.unit is not None and self._pairs is not None:
            low_gradient = self._frozen.unit.product_alone(gradient, self._backward[0], self._pairs.ranks)
        else:
            low_gradient = gradient @ self._b
        self._keep(gradient, x, low, low_gradient)

    def _keep(self, gradient: Tensor, x: Tensor, low: Tensor, low_gradient: Tensor) -> None:
        if self._tape is None:
            own = slice(self._block, self._block + 1)
            self._stack.add_gradient(own, (low_gradient.T @ x)[None], (gradient.T @ low)[None])
        else:
            self._tape.add(self._block, x, gradient, low, low_gradient)
