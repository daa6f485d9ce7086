"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on a frozen model, in PEFT's file format."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from tunesmith.errors import FailedPrecondition

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


class LoraLinear(nn.Module):
    """A frozen linear layer plus `scale * B A x`, the product in fp32."""

    def __init__(self, base: nn.Linear, a: nn.Parameter, b: nn.Parameter, scale: float) -> None:
        super().__init__()
        self.base = base
        self.lora_a = a  # (rank, in_features)
        self.lora_b = b  # (out_features, rank)
        self.scale = scale
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """Return base(x) with the adapter's part added."""
        y: Tensor = self.base(x)
        if not self.enabled:
            return y
        delta = functional.linear(functional.linear(x.float(), self.lora_a), self.lora_b)
        return y + (delta * self.scale).to(y.dtype)


class Adapter:
    """The trainable weights of all adapted layers.

    They lie in one flat fp32 tensor, and their gradients in another, so that clipping and the optimizer's
    step are a few operations and not a few hundred.

    Attributes:
        weights: The flat parameter; its `grad` gathers what the layers' backward passes add.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], rank: int, alpha: float, device: torch.device) -> None:
        self.rank, self.alpha = rank, alpha
        sizes = [rank * (linear.in_features + linear.out_features) for linear in layers.values()]
        self.weights = nn.Parameter(torch.zeros(sum(sizes), device=device))
        self.weights.grad = torch.zeros_like(self.weights)
        self.layers: dict[str, LoraLinear] = {}
        start = 0
        for path, linear in layers.items():
            middle = start + rank * linear.in_features
            end = middle + rank * linear.out_features
            a = self._view(start, middle, (rank, linear.in_features))
            b = self._view(middle, end, (linear.out_features, rank))
            self.layers[path] = LoraLinear(linear, a, b, alpha / rank)
            start = end

    def _view(self, start: int, end: int, shape: tuple[int, int]) -> nn.Parameter:
        if self.weights.grad is None:
            raise AssertionError("the gradient is allocated first")
        view = nn.Parameter(self.weights.detach()[start:end].view(shape))
        view.grad = self.weights.grad[start:end].view(shape)
        return view

    def initialise(self, seed: int) -> None:
        """Draw A uniformly in ±1/sqrt(in_features), as PEFT does; B is 0: the model starts unchanged."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in self.layers.values():
                bound = 1 / math.sqrt(layer.base.in_features)
                drawn = torch.rand(layer.lora_a.shape, generator=generator)
                layer.lora_a.copy_((drawn * 2 - 1) * bound)
                layer.lora_b.zero_()

    def to_files(self, base_model: str) -> dict[str, bytes]:
        """Return the adapter as PEFT's two files."""
        tensors = {}
        for path, layer in self.layers.items():
            tensors[f"{_PREFIX}{path}.lora_A.weight"] = layer.lora_a.detach().cpu().contiguous()
            tensors[f"{_PREFIX}{path}.lora_B.weight"] = layer.lora_b.detach().cpu().contiguous()
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
                layer.lora_a.copy_(tensors[f"{_PREFIX}{path}.lora_A.weight"])
                layer.lora_b.copy_(tensors[f"{_PREFIX}{path}.lora_B.weight"])

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
    adapter = Adapter(linears, rank, alpha, next(model.parameters()).device)
    try:
        for path, layer in adapter.layers.items():
            model.set_submodule(path, layer)
        yield adapter
    finally:
        for path, linear in linears.items():
            model.set_submodule(path, linear)
