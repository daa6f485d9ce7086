"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on a frozen model, in PEFT's file format."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tunesmith.errors import FailedPrecondition

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


class _LoraProduct(torch.autograd.Function):
    """`W x + bias + scale * B A x` in the base's precision, with a backward pass of matrix products alone.

    Autograd would make some twenty small operations of each layer, which on a CPU cost more than the products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, _weights: Tensor, layer: "LoraLinear") -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ layer.a_copy.T
        y = functional.linear(rows, layer.base.weight, layer.base.bias)
        y.addmm_(low, layer.b_copy.T, alpha=layer.scale)
        ctx.layer, ctx.shape = layer, x.shape
        ctx.save_for_backward(rows, low)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        rows, low = ctx.saved_tensors
        layer: LoraLinear = ctx.layer
        upstream = upstream.reshape(-1, upstream.shape[-1])
        low_upstream = (upstream @ layer.b_copy).mul_(layer.scale)
        layer.b_gradient.add_(upstream.T @ low, alpha=layer.scale)
        layer.a_gradient.add_(low_upstream.T @ rows)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        gradient = (upstream @ layer.base.weight).addmm_(low_upstream, layer.a_copy)
        return gradient.view(ctx.shape), None, None


class LoraLinear(nn.Module):
    """A frozen linear layer with a low-rank adapter.

    Attributes:
        a, b: The adapter, (rank, in_features) and (out_features, rank), parts of the adapter's flat weights.
        a_copy, b_copy: The same in the base's precision, as of the last `Adapter.refresh`.
        a_gradient, b_gradient: Where the backward pass adds, parts of the adapter's flat gradient.
        enabled: Otherwise the layer is the base's own.
    """

    def __init__(self, base: nn.Linear, adapter: "Adapter", start: int, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale, self.enabled = base, scale, True
        # In a tuple, as a module would take a parameter for one of its own.
        self._weights = (adapter.weights,)
        a, b = (rank, base.in_features), (base.out_features, rank)
        middle, end = start + math.prod(a), start + math.prod(a) + math.prod(b)
        flat = adapter.weights.detach()
        self.a, self.b = flat[start:middle].view(a), flat[middle:end].view(b)
        self.a_copy, self.b_copy = adapter.copy[start:middle].view(a), adapter.copy[middle:end].view(b)
        self.a_gradient = adapter.gradient[start:middle].view(a)
        self.b_gradient = adapter.gradient[middle:end].view(b)

    def forward(self, x: Tensor) -> Tensor:
        """Return base(x) with the adapter's part added."""
        if not self.enabled:
            return self.base(x)  # type: ignore[no-any-return]
        y: Tensor = _LoraProduct.apply(x, self._weights[0], self)  # type: ignore[no-untyped-call]
        return y


class Adapter:
    """The trainable weights of all adapted layers.

    They lie in one flat fp32 tensor, and their gradients in another, so that clipping and the optimizer's
    step are a few operations and not a few hundred.

    Attributes:
        weights: The flat parameter.
        gradient: Its gradient, which the layers' backward passes add to.
        copy: The weights in the base's precision, which the products take.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], rank: int, alpha: float) -> None:
        self.rank, self.alpha = rank, alpha
        base = next(iter(layers.values())).weight
        sizes = [rank * (linear.in_features + linear.out_features) for linear in layers.values()]
        self.weights = nn.Parameter(torch.zeros(sum(sizes), device=base.device))
        self.weights.grad = self.gradient = torch.zeros_like(self.weights)
        self.copy = self.weights.detach().to(base.dtype)  # of an fp32 base the weights themselves
        starts = accumulate(sizes, initial=0)
        self.layers = {
            path: LoraLinear(linear, self, start, rank, alpha / rank)
            for (path, linear), start in zip(layers.items(), starts, strict=False)
        }

    def refresh(self) -> None:
        """Bring the copy up to date after the weights have changed."""
        self.copy.copy_(self.weights.detach())

    def initialise(self, seed: int) -> None:
        """Draw A uniformly in ±1/sqrt(in_features), as PEFT does; B is 0: the model starts unchanged."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in self.layers.values():
                bound = 1 / math.sqrt(layer.base.in_features)
                drawn = torch.rand(layer.a.shape, generator=generator)
                layer.a.copy_((drawn * 2 - 1) * bound)
                layer.b.zero_()
        self.refresh()

    def to_files(self, base_model: str) -> dict[str, bytes]:
        """Return the adapter as PEFT's two files."""
        tensors = {}
        for path, layer in self.layers.items():
            tensors[f"{_PREFIX}{path}.lora_A.weight"] = layer.a.cpu().contiguous()
            tensors[f"{_PREFIX}{path}.lora_B.weight"] = layer.b.cpu().contiguous()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "target_modules": sorted({path.rpartition(".")[2] for path in self.layers}),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        return {CONFIG_FILE: json.dumps(config, indent=2).encode(), WEIGHTS_FILE: save(tensors)}

    def from_files(self, files: Mapping[str, bytes]) -> None:
        """Take over the weights of an adapter of the same shape.

        Raises:
            FailedPrecondition: Its layers, its rank or its scale differ.
        """
        config = json.loads(files[CONFIG_FILE])
        tensors = load(files[WEIGHTS_FILE])
        wanted = {f"{_PREFIX}{path}.lora_{side}.weight" for path in self.layers for side in "AB"}
        if set(tensors) != wanted or (config["r"], config["lora_alpha"]) != (self.rank, self.alpha):
            raise FailedPrecondition("The adapter to start from has other layers or another rank.")
        with torch.no_grad():
            for path, layer in self.layers.items():
                layer.a.copy_(tensors[f"{_PREFIX}{path}.lora_A.weight"])
                layer.b.copy_(tensors[f"{_PREFIX}{path}.lora_B.weight"])
        self.refresh()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the model answer without the adapter inside the block."""
        for layer in self.layers.values():
            layer.enabled = False
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enabled = True


@contextmanager
def attached(model: nn.Module, rank: int, alpha: float) -> Iterator[Adapter]:
    """Adapt every linear layer of the model's blocks inside the block; afterwards the model is as before."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if not linears:
        raise FailedPrecondition("This model has no linear layers that an adapter could be put on.")
    adapter = Adapter(linears, rank, alpha)
    try:
        for path, layer in adapter.layers.items():
            model.set_submodule(path, layer)
        yield adapter
    finally:
        for path, linear in linears.items():
            model.set_submodule(path, linear)
