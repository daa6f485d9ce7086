"""Adam on one flat tensor of weights."""

import torch
from torch import Tensor


class Adam:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) with betas 0.9 and 0.999, by torch's fused kernel.

    `torch.optim.AdamW` calls the same kernel, but imports torch's compiler first: a second of every start.

    Attributes:
        state: The number of steps taken and the two moments: all that a later run needs to go on.
    """

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights.detach()
        self.state = {
            "step": torch.zeros((), device=weights.device),
            "exp_avg": torch.zeros_like(self._weights),
            "exp_avg_sq": torch.zeros_like(self._weights),
        }

    def step(self, gradient: Tensor, learning_rate: float) -> None:
        """Change the weights in place."""
        self.state["step"] += 1
        torch._fused_adamw_(
            [self._weights],
            [gradient],
            [self.state["exp_avg"]],
            [self.state["exp_avg_sq"]],
            [],
            [self.state["step"]],
            lr=learning_rate,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
