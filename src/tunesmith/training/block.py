"""A decoder's layer with its adapters, forwards and backwards.

Autograd would run some two hundred small operations a layer, which on a CPU cost more than the products of
matrices; written out, gradients between them stay in float32, and nothing is kept that is not used again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from tunesmith.base_models.decoder import Layer, Turns
from tunesmith.kernels.passes import Kernels
from tunesmith.training.attention import Attention, Heads
from tunesmith.training.projection import Frozen, Projection

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""A layer's linear layers; those that share their input stand together."""


class Context(NamedTuple):
    """What all layers of a kind know of a batch."""

    turns: Turns
    attention: Attention


class FrozenBlock:
    """A layer of the base model, in the layouts that training reads fastest; jobs take turns on it.

    Attributes:
        groups: The shapes, out_features and in_features, of its linear layers, by their paths.
        linears: The layers of each group.
        heads: Of its attention.
        kind: Of its activation.
        eps: Of its norms.
        factor: Of the norm of queries and keys, if there is one.
        before_attention, after_attention, before_mlp, after_mlp: Factors of the norms that there are.
    """

    def __init__(self, layer: Layer, kernels: Kernels) -> None:
        groups = [{path: layer.linear(path) for path in group} for group in GROUPS]
        self.groups = [{path: linear.weight.shape for path, linear in group.items()} for group in groups]
        self.linears = [Frozen([*group.values()], kernels) for group in groups]
        own = layer.self_attn
        self.heads = Heads(own.heads, own.heads // own.groups, own.size, own.scale)
        self.kind, self.eps, self.factor = layer.mlp.kind, own.eps, own.factor
        before_mlp = layer.pre_feedforward_layernorm if layer.around else layer.post_attention_layernorm
        self.before_attention, self.before_mlp = layer.input_layernorm.factor, before_mlp.factor
        self.after_attention = layer.post_attention_layernorm.factor if layer.around else None
        self.after_mlp = layer.post_feedforward_layernorm.factor if layer.around else None


class _Attending(NamedTuple):
    x: Tensor
    inverse: Tensor
    normed: Tensor
    low: Tensor
    heads: Tensor
    turned_inverse: Tensor | None
    attended: Any
    gathered: Tensor
    out_low: Tensor
    out: Tensor
    out_inverse: Tensor | None


class _Multiplying(NamedTuple):
    x: Tensor
    inverse: Tensor
    normed: Tensor
    low: Tensor
    gate_and_up: Tensor
    product: Tensor
    out_low: Tensor
    out: Tensor
    out_inverse: Tensor | None


class Kept(NamedTuple):
    """What the backward pass of a block needs."""

    attending: _Attending
    multiplying: _Multiplying
    places: Tensor | None


class Block:
    """A layer with its adapters: attention and gated products, each added to what came in."""

    def __init__(self, frozen: FrozenBlock, projections: Sequence[Projection], kernels: Kernels) -> None:
        self._frozen, self._kernels = frozen, kernels
        self._qkv, self._o, self._gate_up, self._down = projections

    def forward(self, x: Tensor, context: Context, places: Tensor | None = None) -> tuple[Tensor, Kept]:
        """Return the layer's output and what `backward` takes.

        Args:
            x: (tokens, size) in the base's precision.
            context: What is known of the batch.
            places: The tokens whose output is wanted; None for all.
        """
        middle, attending = self._attend(x, context, places)
        out, multiplying = self._multiply(middle)
        return out, Kept(attending, multiplying, places)

    def backward(self, gradient: Tensor, kept: Kept, context: Context, to_input: bool = True) -> Tensor:
        """Add to the adapters' gradients and return the input's.

        Args:
            gradient: Of the output, in float32; overwritten.
            kept: What `forward` returned.
            context: The same.
            to_input: Whether the input's is wanted; otherwise what is returned means nothing.
        """
        gradient = self._multiply_back(gradient, kept.multiplying)
        return self._attend_back(gradient, kept.attending, kept.places, context, to_input)

    def _attend(self, x: Tensor, context: Context, places: Tensor | None) -> tuple[Tensor, _Attending]:
        normed, inverse = self._kernels.norm(x, self._frozen.before_attention, self._frozen.eps)
        qkv, low = self._qkv.forward(normed)
        heads = qkv.view(len(x), -1, self._frozen.heads.size)
        turning = self._frozen.heads.queries + self._frozen.heads.keys
        turned, turned_inverse = self._kernels.turn(
            heads, turning, context.turns, self._frozen.factor, self._frozen.eps
        )
        gathered, attended = context.attention.forward(turned, heads)
        left = x
        if places is not None:
            left, gathered = x[places], gathered[places]
        out, out_low = self._o.forward(gathered)
        added, out_inverse = self._add(left, out, self._frozen.after_attention)
        kept = _Attending(
            x, inverse, normed, low, heads, turned_inverse, attended, gathered, out_low, out, out_inverse
        )
        return added, kept

    def _attend_back(
        self, gradient: Tensor, kept: _Attending, places: Tensor | None, context: Context, to_input: bool
    ) -> Tensor:
        upstream = self._of_added(gradient, kept.out, kept.out_inverse, self._frozen.after_attention)
        of_gathered = self._o.backward(upstream, kept.gathered, kept.out_low)
        if places is not None:
            gradient, of_gathered = (_spread(part, places, len(kept.x)) for part in (gradient, of_gathered))
        gradients = context.attention.backward(of_gathered, kept.attended)
        of_heads = self._kernels.turn_back(
            gradients, kept.heads, kept.turned_inverse, context.turns, self._frozen.factor
        ).flatten(1)
        if not to_input:
            self._qkv.learn(of_heads, kept.normed, kept.low)
            return gradient
        of_normed = self._qkv.backward(of_heads, kept.normed, kept.low)
        self._kernels.norm_back_add(of_normed, kept.x, kept.inverse, self._frozen.before_attention, gradient)
        return gradient

    def _multiply(self, x: Tensor) -> tuple[Tensor, _Multiplying]:
        normed, inverse = self._kernels.norm(x, self._frozen.before_mlp, self._frozen.eps)
        gate_and_up, low = self._gate_up.forward(normed)
        product = self._kernels.gate(self._frozen.kind, gate_and_up)
        out, out_low = self._down.forward(product)
        added, out_inverse = self._add(x, out, self._frozen.after_mlp)
        kept = _Multiplying(x, inverse, normed, low, gate_and_up, product, out_low, out, out_inverse)
        return added, kept

    def _multiply_back(self, gradient: Tensor, kept: _Multiplying) -> Tensor:
        upstream = self._of_added(gradient, kept.out, kept.out_inverse, self._frozen.after_mlp)
        of_product = self._down.backward(upstream, kept.product, kept.out_low)
        of_both = self._kernels.gate_back(self._frozen.kind, of_product, kept.gate_and_up)
        of_normed = self._gate_up.backward(of_both, kept.normed, kept.low)
        self._kernels.norm_back_add(of_normed, kept.x, kept.inverse, self._frozen.before_mlp, gradient)
        return gradient

    def _add(self, x: Tensor, out: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return x plus what was made of it, normalised where the model does so."""
        return (x + out, None) if factor is None else self._kernels.add_norm(x, out, factor, self._frozen.eps)

    def _of_added(self, gradient: Tensor, out: Tensor, inverse: Tensor | None, factor: Tensor | None) -> Tensor:
        """Return the gradient of what was added."""
        if factor is None or inverse is None:
            return gradient.to(out.dtype)
        return self._kernels.norm_back(gradient, out, inverse, factor)


def _spread(gradient: Tensor, places: Tensor, tokens: int) -> Tensor:
    """Return the gradient of all tokens where only some were wanted."""
    return gradient.new_zeros(tokens, *gradient.shape[1:]).index_copy_(0, places, gradient)
