"""Frozen matrices with low-rank adapters, forwards and backwards."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from tunesmith.engines.linear import Linear, linear, packs
from tunesmith.training.lora import LoraStack

FEW_TOKENS = 256
"""Up to here oneDNN's packed layout is the fastest for all shapes."""
LONG, NARROW = 2048, 1024
"""Products of so many inputs with no more outputs run at half the rate, but not their halves."""


class Frozen:
    """Linear layers that share their input, as one matrix in the layouts that both passes read fastest.

    Attributes:
        forward: (tokens, in_features) -> (tokens, out_features of all layers).
        backward: The gradient of the output -> that of the input.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        weights = [layer.weight.detach() for layer in layers]
        weight = torch.cat(weights) if weights[1:] else weights[0]
        biases = [_bias(layer) for layer in layers] if any(layer.bias is not None for layer in layers) else []
        self.forward = _product(weight, torch.cat(biases) if biases else None)
        self.backward = _product(weight.T, None)


def _bias(layer: nn.Linear) -> Tensor:
    return layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()


def _product(weight: Tensor, bias: Tensor | None) -> Linear:
    """Return `x -> x @ weight.T + bias`, by the fastest way of several for each number of tokens.

    The choice depends on shapes alone, so that a resumed run rounds as an uninterrupted one.
    """
    out, width = weight.shape
    if not packs(weight) or out >= width:
        return linear(weight, bias)
    if width >= LONG and out <= NARROW and bias is None:
        halves = [linear(half, None) for half in weight.chunk(2)]
        return lambda x: torch.cat([half(x) for half in halves], 1)
    few, many = linear(weight, bias), weight.clone()
    return lambda x: few(x) if len(x) <= FEW_TOKENS else functional.linear(x, many, bias)


class Tape:
    """What the adapters' gradients are made of, layer after layer of one kind; then all at once.

    A product for each layer would take several times as long as one for all of them.

    Args:
        stack: The adapters.
        most_tokens: Room, in tokens times layers.
    """

    def __init__(self, stack: LoraStack, most_tokens: int) -> None:
        self._stack, self._most = stack, most_tokens
        widths = stack.a.shape[2], stack.b.shape[1], stack.b.shape[2], stack.b.shape[2]
        self._sides = [stack.a.new_zeros(most_tokens, width) for width in widths]
        self._room = self._tokens = self._first = self._end = 0

    def begin(self, tokens: int) -> None:
        """Start the backward pass of a batch of so many tokens."""
        self._tokens, self._room = tokens, max(1, min(self._stack.blocks, self._most // tokens))
        self._first = self._end = self._stack.blocks
        if self._room * tokens > self._most:  # a single row that is longer than all that was planned for
            self._most = self._room * tokens
            self._sides = [side.new_zeros(self._most, side.shape[1]) for side in self._sides]

    def add(self, block: int, x: Tensor, gradient: Tensor, low: Tensor, low_gradient: Tensor) -> None:
        """Take a block's share, the last block first; of the batch's tokens, or of fewer."""
        if self._end - block > self._room:
            self.flush()
        self._first = block
        for side, part in zip(self._views(), (x, gradient, low, low_gradient), strict=True):
            own = side[block - self._end]
            own[: len(part)] = part
            own[len(part) :].zero_()

    def flush(self) -> None:
        """Add to the adapters' gradients what was taken since the last time."""
        x, gradient, low, low_gradient = (side[self._first - self._end :] for side in self._views())
        self._stack.add_gradient(slice(self._first, self._end), low_gradient.mT @ x, gradient.mT @ low)
        self._end = self._first

    def _views(self) -> list[Tensor]:
        return [side[: self._room * self._tokens].view(self._room, self._tokens, -1) for side in self._sides]


class Projection:
    """`W x + bias + scale * B A x` of one block's linear layers that share their input.

    Args:
        frozen: The layers.
        stack: Their adapters, with those of other blocks.
        block: Which of them.
        tape: Where the shares in the gradient are gathered; None to add them at once.
    """

    def __init__(self, frozen: Frozen, stack: LoraStack, block: int = 0, tape: Tape | None = None) -> None:
        self._frozen, self._stack, self._block, self._tape = frozen, stack, block, tape
        self._a, self._b = stack.a[block], stack.b[block]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the product, and A x, which `backward` takes.

        Args:
            x: (tokens, in_features) in the base's precision.
        """
        low = x @ self._a.T
        return self._frozen.forward(x).addmm_(low, self._b.T), low

    def backward(self, gradient: Tensor, x: Tensor, low: Tensor) -> Tensor:
        """Add to the adapter's gradient and return that of the input, in the base's precision.

        Args:
            gradient: Of the product, in the base's precision.
            x: The input.
            low: What `forward` returned.
        """
        low_gradient = self.learn(gradient, x, low)
        return self._frozen.backward(gradient).addmm_(low_gradient, self._a)

    def learn(self, gradient: Tensor, x: Tensor, low: Tensor) -> Tensor:
        """Add to the adapter's gradient alone; return that of A x."""
        low_gradient = gradient @ self._b
        if self._tape is None:
            own = slice(self._block, self._block + 1)
            self._stack.add_gradient(own, (low_gradient.T @ x)[None], (gradient.T @ low)[None])
        else:
            self._tape.add(self._block, x, gradient, low, low_gradient)
        return low_gradient
