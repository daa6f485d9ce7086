"""Cross-entropy through a large frozen output head, without holding its logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

CHUNK = 128
"""Positions whose logits exist at once: 128 x 262,144 words in fp32 are 134 MB."""


class _OutputLoss(torch.autograd.Function):
    """The head is frozen, so the only gradient is the hidden states', and the forward pass can make it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            logits = functional.linear(hidden[part].contiguous(), head).float()
            total += functional.cross_entropy(logits, targets[part], reduction="sum")
            if gradient is not None:
                probabilities = logits.softmax(-1)
                rows = torch.arange(len(logits), device=logits.device)
                probabilities[rows, targets[part]] -= 1
                gradient[part] = probabilities.to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None


def output_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy in nats, a scalar in fp32.

    Args:
        hidden: (n, width) final hidden states of the positions that predict the targets.
        head: (vocabulary, width) the frozen output head.
        targets: (n,) token ids.
    """
    loss: Tensor = _OutputLoss.apply(hidden, head, targets)  # type: ignore[no-untyped-call]
    return loss
