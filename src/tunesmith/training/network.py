"""A frozen base model with a trainable adapter: the loss of a batch, and the adapter's gradient."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunesmith.base_models.decoder import SLIDING, CausalLM
from tunesmith.engines.linear import packs
from tunesmith.errors import FailedPrecondition
from tunesmith.kernels.passes import Kernels, TorchKernels
from tunesmith.training.attention import attention
from tunesmith.training.batches import Batch
from tunesmith.training.block import GROUPS, Block, Context, FrozenBlock, Kept
from tunesmith.training.lora import Adapter
from tunesmith.training.loss import OutputHead
from tunesmith.training.projection import Frozen, PackedPairs, Projection

MOST_KEPT_TOKENS = 512
"""Of a longer row only the layers' inputs are kept; the backward pass computes the rest again."""


class Network(Protocol):
    """A base model with the adapter of one job.

    Attributes:
        adapter: What is trained.
    """

    adapter: Adapter

    def learn(self, batch: Batch, weight: float) -> float:
        """Return the summed loss of a batch, in nats, and add `weight` times its gradient to the adapter's."""

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss at each target, in nats, and whether the target is the most probable token."""


class FrozenNetwork(Protocol):
    """A base model that jobs take turns on."""

    def adapted(self, rank: int, alpha: float) -> AbstractContextManager[Network]:
        """Put an adapter on every linear layer but the head for as long as the context lasts."""


def freeze(load: Callable[[], Any], kernels: Kernels) -> FrozenNetwork:
    """Return a base model as training takes it.

    Args:
        load: Loads a `decoder.CausalLM`, or transformers' own.
        kernels: For its device and precision.

    Raises:
        FailedPrecondition: It changes its logits in a way that is not known here, or has nothing to adapt.
    """
    model = load()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise FailedPrecondition(f"This base model cannot be tuned: its {name} is not supported.")
    if not isinstance(model, CausalLM):
        return FrozenModules(model, kernels)
    kept = None if packs(model.lm_head.weight) else model
    del model
    return FrozenDecoder(load if kept is None else lambda: kept, kernels)


class FrozenDecoder:
    """A decoder that is known here, in the layouts that training reads fastest.

    Args:
        load: Returns the decoder. What is packed is not kept, but the file's pages that were read for it are held
            as long as the model is: so it is called for the head, for the layers, and for the embeddings.
        kernels: For its device and precision.
    """

    def __init__(self, load: Callable[[], CausalLM], kernels: Kernels) -> None:
        self.kernels = kernels
        self.head = OutputHead(load().lm_head.weight.detach(), kernels)
        self.blocks = [FrozenBlock(layer, kernels) for layer in load().base_model.decoder_layers]
        model = load()
        self.body, self.words = model.base_model, model.lm_head.weight.detach()

    @contextmanager
    def adapted(self, rank: int, alpha: float) -> Iterator[Network]:
        """Yield the network of one job."""
        kinds = [
            [
                {f"model.layers.{number}.{path}": shape for path, shape in block.groups[kind].items()}
                for number, block in enumerate(self.blocks)
            ]
            for kind in range(len(GROUPS))
        ]
        yield DecoderNetwork(self, Adapter(kinds, rank, alpha, self.words.device, self.words.dtype))


class DecoderNetwork:
    """Both passes written out."""

    def __init__(self, frozen: FrozenDecoder, adapter: Adapter) -> None:
        self.adapter = adapter
        self._body, self._words, self._head = frozen.body, frozen.words, frozen.head
        self._kernels, self._heads = frozen.kernels, frozen.blocks[0].heads
        kinds = list(zip(adapter.stacks, frozen.blocks[0].linears, strict=True))
        self._pairs = [PackedPairs(stack, linear.unit) if linear.unit else None for stack, linear in kinds]
        self._blocks = [
            Block(
                block,
                [
                    Projection(linear, stack, number, pairs)
                    for linear, stack, pairs in zip(block.linears, adapter.stacks, self._pairs, strict=True)
                ],
                self._kernels,
            )
            for number, block in enumerate(frozen.blocks)
        ]
        self._version = 0

    @torch.no_grad()
    def learn(self, batch: Batch, weight: float) -> float:
        """Return the summed loss of a batch, in nats, and add `weight` times its gradient to the adapter's."""
        layers, x = self._layers(batch), self._body.embed(batch.tokens)
        kept: list[Kept | Tensor] = []
        for block, context, places in layers:
            before = x
            x, seen = block.forward(x, context, places)
            kept.append(seen if len(batch.tokens) <= MOST_KEPT_TOKENS else before)
        norm = self._body.norm
        hidden, inverse = self._kernels.norm(x, norm.factor, norm.eps)
        loss, of_hidden = self._head.learn(hidden, self._words, batch.targets, batch.learnt)
        gradient = torch.zeros_like(of_hidden)
        of_hidden = of_hidden.mul_(weight).to(x.dtype)
        self._kernels.norm_back_add(of_hidden, x, inverse, norm.factor, gradient)
        for block, context, places in reversed(layers):
            last = kept.pop()
            seen = block.forward(last, context, places)[1] if isinstance(last, Tensor) else last
            gradient = block.backward(gradient, seen, context, to_input=bool(kept))
        return loss

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss at each target, in nats, and whether the target is the most probable token."""
        x = self._body.embed(batch.tokens)
        for block, context, places in self._layers(batch):
            x = block.forward(x, context, places)[0]
        losses, right = self._head.evaluate(self._body.norm(x), batch.targets)
        return losses[: batch.learnt], right[: batch.learnt]

    def _layers(self, batch: Batch) -> list[tuple[Block, Context, Tensor | None]]:
        """Return the layers as they are now, what they know of the batch, and whose outputs are wanted of each."""
        if self._version != self.adapter.version:
            self._version = self.adapter.version
            for pairs in filter(None, self._pairs):
                pairs.refresh()
        config, heads = self._body.config, self._heads
        contexts = {
            kind: Context(
                turns, attention(batch, heads, config.sliding_window if kind == SLIDING else None, self._kernels)
            )
            for kind, turns in self._body.turns(batch.positions).items()
        }
        wanted = [*[None] * (len(self._blocks) - 1), batch.places]
        kinds = (contexts[kind] for kind in config.layer_types)
        return list(zip(self._blocks, kinds, wanted, strict=True))


class FrozenModules:
    """transformers' own modules, for what is not known here: slower, by autograd."""

    def __init__(self, model: nn.Module, kernels: Kernels) -> None:
        self.model = model
        head: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]
        self.words = head.weight.detach()
        self.head = OutputHead(self.words, kernels)
        self._linears = {
            path: Frozen([module], TorchKernels())
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
        if not self._linears:
            raise FailedPrecondition("This model has no linear layers that an adapter could be put on.")

    @contextmanager
    def adapted(self, rank: int, alpha: float) -> Iterator[Network]:
        """Yield the network of one job; afterwards the model is as before."""
        modules = {path: self.model.get_submodule(path) for path in self._linears}
        shapes = [[{path: linear.weight.shape}] for path, linear in modules.items()]
        adapter = Adapter(shapes, rank, alpha, self.words.device, self.words.dtype)  # type: ignore[arg-type]
        try:
            for (path, frozen), stack in zip(self._linears.items(), adapter.stacks, strict=True):
                self.model.set_submodule(path, _Adapted(Projection(frozen, stack)))
            yield ModuleNetwork(self, adapter)
        finally:
            for path, linear in modules.items():
                self.model.set_submodule(path, linear)


class ModuleNetwork:
    """The backward pass by autograd, through modules on padded rows."""

    def __init__(self, frozen: FrozenModules, adapter: Adapter) -> None:
        self.adapter = adapter
        self._model, self._words, self._head = frozen.model, frozen.words, frozen.head

    def learn(self, batch: Batch, weight: float) -> float:
        """Return the summed loss of a batch, in nats, and add `weight` times its gradient to the adapter's."""
        with torch.enable_grad():
            hidden = self._hidden(batch)
        loss, gradient = self._head.learn(hidden.detach(), self._words, batch.targets, batch.learnt)
        hidden.backward(gradient.mul_(weight).to(hidden.dtype))  # type: ignore[no-untyped-call]
        return loss

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss at each target, in nats, and whether the target is the most probable token."""
        losses, right = self._head.evaluate(self._hidden(batch), batch.targets)
        return losses[: batch.learnt], right[: batch.learnt]

    def _hidden(self, batch: Batch) -> Tensor:
        # The padding is on the right, where no token looks: it needs no mask.
        found = self._model.base_model(input_ids=batch.padded(batch.tokens), use_cache=False)  # type: ignore[operator]
        return batch.unpadded(found.last_hidden_state)[batch.places]


class _Adapted(nn.Module):
    """A frozen linear layer with its adapter, for autograd."""

    def __init__(self, projection: Projection) -> None:
        super().__init__()
        self._projection = projection
        # Frozen embeddings have no gradient, and autograd leaves out what nothing that has one went into.
        self._anchor = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the adapter's part added."""
        y: Tensor = _Product.apply(x, self._anchor, self._projection)  # type: ignore[no-untyped-call]
        return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor, projection: Projection) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, low = projection.forward(rows)
        ctx.projection, ctx.shape = projection, x.shape
        ctx.save_for_backward(rows, low)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        rows, low = ctx.saved_tensors
        upstream = upstream.reshape(-1, upstream.shape[-1])
        if not ctx.needs_input_grad[0]:
            ctx.projection.learn(upstream, rows, low)
            return None, None, None
        return ctx.projection.backward(upstream, rows, low).view(ctx.shape), None, None
