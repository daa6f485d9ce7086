"""How much a training step has to compute, and how fast this machine multiplies matrices.

In a process of its own: python training_rate.py THREADS (bf16|fp32) prints operations a second.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch.nn import functional

SIZE = 4096
REPEATS = 15
FREE = {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"}
"""Their input is the frozen embedding, which needs no gradient."""


@dataclass(frozen=True)
class Products:
    """The matrix products that training a LoRA adapter on all linear layers cannot do without.

    A product of (m, k) with (k, n) is 2 m k n operations. For T tokens, padding not counted, of which N are
    targets, with base layers of W weights (W0 of them in products whose input is the frozen embedding), adapters
    of A weights and a head of H weights:

        base layers      2 T W forward + 2 T (W - W0) for the input's gradient; their weights get none
        adapters         2 T A forward + 4 T A for the gradients of weights and inputs
        head             2 N H forward + 2 N H for the input's gradient: at the positions that predict a target

    Attention's own products (under 1 % for rows of 45 tokens), norms, activations, the softmax and the optimizer
    are left out: time for them is time lost against the matrix unit.

    Attributes:
        base, first, adapter, head: W, W0, A and H.
    """

    base: int
    first: int
    adapter: int
    head: int

    @classmethod
    def of(cls, path: Path, rank: int) -> "Products":
        """Read a base model's shapes from its safetensors."""
        shapes = dict(_shapes(path))
        layers = {name: shape for name, shape in shapes.items() if "_proj." in name}
        head = shapes.get("lm_head.weight", shapes["model.embed_tokens.weight"])
        return cls(
            base=sum(rows * columns for rows, columns in layers.values()),
            first=sum(rows * columns for name, (rows, columns) in layers.items() if name in FREE),
            adapter=sum(rank * (rows + columns) for rows, columns in layers.values()),
            head=head[0] * head[1],
        )

    def operations(self, tokens: int, targets: int) -> int:
        """Return what training on so many tokens takes, of which so many are targets."""
        base = 2 * tokens * (2 * self.base - self.first)
        return base + 6 * tokens * self.adapter + 4 * targets * self.head


def _shapes(path: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                shape = opened.get_slice(name).get_shape()
                if len(shape) == 2:
                    yield name, (shape[0], shape[1])


def measured(threads: int, dtype: torch.dtype) -> float:
    """Return operations a second in a large product, as a linear layer asks for it: the median."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(SIZE, SIZE, generator=generator).to(dtype) for _ in range(2))
    seconds = []
    for repeat in range(2 + REPEATS):
        began = time.perf_counter()
        functional.linear(x, weight)
        if repeat >= 2:
            seconds.append(time.perf_counter() - began)
    return 2 * SIZE**3 / statistics.median(seconds)


if __name__ == "__main__":
    print(measured(int(sys.argv[1]), torch.bfloat16 if sys.argv[2] == "bf16" else torch.float32))
