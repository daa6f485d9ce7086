"""Cross-entropy through a large frozen output head, without holding its logits."""

import torch
from torch import Tensor
from torch.nn import functional

from tunesmith.kernels.passes import Kernels
from tunesmith.training.projection import product

CHUNK = 128
"""Positions whose logits exist at once: 128 x 262,144 words in fp32 are 134 MB."""


class OutputHead:
    """The frozen output head.

    The only gradient is the hidden states', which the forward pass makes at once.

    Args:
        weight: (vocabulary, width); where it is packed it is not kept.
        kernels: For its device and precision.
    """

    def __init__(self, weight: Tensor, kernels: Kernels) -> None:
        self._kernels = kernels
        self._forward, self._backward = (product(matrix, kernels) for matrix in (weight, weight.T))

    def learn(self, hidden: Tensor, weight: Tensor, targets: Tensor, learnt: int) -> tuple[float, Tensor]:
        """Return the summed cross-entropy in nats and its gradient, (n, width) in fp32.

        Args:
            hidden: (n, width) final hidden states of the positions that predict the targets.
            weight: The head's, of which the targets' rows are read.
            targets: (n,) token ids.
            learnt: How many of them count: the first ones.
        """
        total, gradients = 0.0, []
        for part, target in zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True):
            losses, powers, sums = self._kernels.softmax(self._forward(part), target)
            total += losses[: max(0, learnt)].sum().item()
            gradient = self._backward(powers).float().div_(sums[:, None]).sub_(weight[target])
            gradient[max(0, learnt) :] = 0.0
            learnt -= len(part)
            gradients.append(gradient)
        return total, torch.cat(gradients)

    def evaluate(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy at each target, in nats, and whether it is the most probable token.

        Args:
            hidden: (n, width) final hidden states of the positions that predict the targets.
            targets: (n,) token ids.
        """
        losses, right = [], []
        for part, target in zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True):
            logits = self._forward(part)
            right.append(logits.argmax(-1) == target)
            losses.append(functional.cross_entropy(logits.float(), target, reduction="none"))
        return torch.cat(losses), torch.cat(right)
