"""Products with the base model's matrices, in the layout that the device reads fastest."""

from collections.abc import Callable

import torch
from torch.nn import functional

Linear = Callable[[torch.Tensor], torch.Tensor]

USUAL_ROWS = 16
"""Rows that the packed layout is chosen for; it serves one row and a long prompt about as well."""


def packs(weight: torch.Tensor) -> bool:
    """Return whether products with a weight are faster in oneDNN's own layout."""
    has = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return has and weight.device.type == "cpu" and weight.dtype == torch.bfloat16


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """Return `x -> x @ weight.T + bias`; where the weight is packed it need not be kept.

    bfloat16 on a CPU is packed into oneDNN's own layout, as torch.compile does it when it freezes a model: a
    decoding step reads all weights once, and reads them so in two thirds of the time.
    """
    if not packs(weight):
        return lambda x: functional.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), USUAL_ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, packed, bias, "none", [], "")
