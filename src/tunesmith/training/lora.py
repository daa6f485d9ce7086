"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) of a frozen model, in PEFT's file format."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from safetensors.torch import load, save
from torch import Tensor

from tunesmith.errors import FailedPrecondition

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraLayer:
    """A linear layer's adapter: parts of the flat weights and of their flat gradient.

    Attributes:
        a, a_gradient: (rank, in_features).
        b, b_gradient: (out_features, rank).
    """

    a: Tensor
    b: Tensor
    a_gradient: Tensor
    b_gradient: Tensor


class LoraStack:
    """The adapters of linear layers that share their input, of all blocks that have such layers.

    Args:
        adapter: What they are part of.
        start: Where they lie in its flat weights: a block after the other, in each all A before all B.
        blocks: How many blocks there are.
        width: in_features.
        outs: out_features of each layer of a block.

    Attributes:
        a: (blocks, ranks, in_features) in the base's precision, as of the last `Adapter.refresh`.
        b: (blocks, out_features, ranks), likewise and scaled; 0 where one layer's outputs would meet another's
            adapter.
        rank: Of each.
        scale: What B A is multiplied by.
        outs: The argument, as int64.
        end: Where they end in the flat weights.
    """

    def __init__(self, adapter: "Adapter", start: int, blocks: int, width: int, outs: Sequence[int]) -> None:
        self.rank, self.scale, self._width, self._outs = adapter.rank, adapter.scale, width, list(outs)
        self.blocks, self.outs = blocks, torch.tensor(outs)
        self._size = self.rank * (len(outs) * width + sum(outs))
        self.end = start + blocks * self._size
        part = slice(start, self.end)
        self._weights, self._gradient = adapter.weights[part], adapter.gradient[part]
        self._copy = adapter.copy[part]
        self.a = self._all_a(self._copy)
        self.b = self._copy.new_zeros(blocks, sum(outs), len(outs) * self.rank)
        parts = (self._gradient[block * self._size :][: self._size] for block in range(blocks))
        middle = len(outs) * self.rank * width
        self._gradients = [(part[:middle].view(-1, width), part[middle:].view(-1, self.rank)) for part in parts]

    def layer(self, block: int, number: int) -> LoraLayer:
        """Return the adapter of one linear layer."""
        ranks = slice(number * self.rank, (number + 1) * self.rank)
        a, a_gradient = (self._all_a(flat)[block, ranks] for flat in (self._weights, self._gradient))
        b, b_gradient = (self._all_b(flat)[number][block] for flat in (self._weights, self._gradient))
        return LoraLayer(a, b, a_gradient, b_gradient)

    def refresh(self) -> None:
        """Bring `b` up to date with the adapter's copy."""
        for part, own in zip(self._parts(self.b), self._all_b(self._copy), strict=True):
            torch.mul(own, self.scale, out=part) if self.scale != 1.0 else part.copy_(own)

    def silence(self) -> None:
        """Make `b` 0 until the next refresh."""
        self.b.zero_()

    def add_gradient(self, block: int, a_gradient: Tensor, b_gradient: Tensor) -> None:
        """Add the gradients of a block's `a` and `b` to the adapter's."""
        self._all_a(self._gradient)[block].add_(a_gradient)
        for own, part in zip(self._all_b(self._gradient), self._parts(b_gradient[None]), strict=True):
            own[block].add_(part[0], alpha=self.scale)

    def gradients(self, block: int) -> tuple[Tensor, Tensor]:
        """Return where the gradients of a block's A, (ranks, in_features), and B, (out_features, rank), add up."""
        return self._gradients[block]

    def _all_a(self, flat: Tensor) -> Tensor:
        ranks = len(self._outs) * self.rank
        return flat.as_strided((self.blocks, ranks, self._width), (self._size, self._width, 1))

    def _all_b(self, flat: Tensor) -> list[Tensor]:
        ends = accumulate(
            (out * self.rank for out in self._outs), initial=len(self._outs) * self.rank * self._width
        )
        return [
            flat[start:].as_strided((self.blocks, out, self.rank), (self._size, self.rank, 1))
            for start, out in zip(ends, self._outs, strict=False)
        ]

    def _parts(self, b: Tensor) -> list[Tensor]:
        """The blocks on the diagonal."""
        starts = accumulate(self._outs, initial=0)
        return [
            b[:, at : at + out, number * self.rank : (number + 1) * self.rank]
            for number, (at, out) in enumerate(zip(starts, self._outs, strict=False))
        ]


class Adapter:
    """The trainable weights of all adapted layers.

    They lie in one flat fp32 tensor, and their gradients in another, so that clipping and the optimizer's
    step are a few operations and not a few hundred.

    Args:
        stacks: The linear layers' shapes, out_features and in_features, by their paths: for each kind a mapping a
            block, whose layers share their input.
        rank: Of each layer's adapter.
        alpha: B A is multiplied by alpha / rank.
        device: The base's.
        dtype: The base's precision.

    Attributes:
        weights: The flat weights.
        gradient: Their gradient, which backward passes add to.
        copy: The weights in the base's precision, as of the last `refresh`.
        layers: The adapters by their layers' paths, block after block.
        stacks: The same, as passes take them, in the order of the argument.
        version: Changes with every refresh.
    """

    def __init__(
        self,
        stacks: Sequence[Sequence[Mapping[str, Sequence[int]]]],
        rank: int,
        alpha: float,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.rank, self.alpha, self.version = rank, alpha, 0
        shapes = [shape for stack in stacks for block in stack for shape in block.values()]
        self.weights = torch.zeros(rank * sum(map(sum, shapes)), device=device)
        self.gradient = torch.zeros_like(self.weights)
        self.copy = self.weights.to(dtype, copy=True)
        self.stacks: list[LoraStack] = []
        start = 0
        for stack in stacks:
            outs, widths = zip(*stack[0].values(), strict=True)
            self.stacks += [LoraStack(self, start, len(stack), widths[0], outs)]
            start = self.stacks[-1].end
        self.layers = {
            path: own.layer(block, number)
            for block in range(max(map(len, stacks)))
            for stack, own in zip(stacks, self.stacks, strict=True)
            if block < len(stack)
            for number, path in enumerate(stack[block])
        }

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    def refresh(self) -> None:
        """Bring the copies in the base's precision up to date after the weights have changed."""
        self.version += 1
        self.copy.copy_(self.weights)
        for stack in self.stacks:
            stack.refresh()

    def weaken(self, strength: float) -> None:
        """Multiply all B by a number, and so what the adapter adds to its layers' outputs."""
        for layer in self.layers.values():
            layer.b.mul_(strength)
        self.refresh()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the model answer without the adapter inside the block."""
        self.version += 1
        for stack in self.stacks:
            stack.silence()
        try:
            yield
        finally:
            self.refresh()

    def initialise(self, seed: int) -> None:
        """Draw A uniformly in ±1/sqrt(in_features), as PEFT does; B is 0: the model starts unchanged."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers.values():
            drawn = torch.rand(layer.a.shape, generator=generator)
            layer.a.copy_((drawn * 2 - 1) / math.sqrt(layer.a.shape[1]))
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
        for path, layer in self.layers.items():
            layer.a.copy_(tensors[f"{_PREFIX}{path}.lora_A.weight"])
            layer.b.copy_(tensors[f"{_PREFIX}{path}.lora_B.weight"])
        self.refresh()
