"""Low-rank adapters side by side in one batch, without a loop over them and without merging."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from tunesmith.engines.drafts import OutputTrie
from tunesmith.engines.linear import linear as make_linear

KEPT_SELECTIONS = 4
"""Selections kept: decoding and prefill alternate between two, and requests that come and go add a few."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter in memory.

    Attributes:
        factors: By module path, A [rank, in] and B [out, rank] in float32, the scale folded into B.
        rank: The rank of all of them.
        prompt_format: Name of the prompt format that it was trained with.
        content: The same for adapters that compute the same; empty when that is not known.
        outputs: What it was tuned on; None when that is not known.
    """

    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    rank: int
    prompt_format: str
    content: str = ""
    outputs: OutputTrie | None = None


@dataclass(frozen=True)
class _Stack:
    """Adapters joined along the rank: all their products are two ordinary ones.

    Attributes:
        columns: Where each adapter's ranks lie.
        factors: By module path, the joined A [ranks, in] and B [out, ranks].
    """

    columns: Mapping[Adapter, slice]
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def ranks(self) -> int:
        return sum(adapter.rank for adapter in self.columns)


@dataclass(frozen=True)
class _Selection:
    """What one forward pass adds to the base model.

    Attributes:
        stack: The adapters.
        mask: 1 in each row's own ranks, 0 elsewhere, [rows, 1, ranks]; None when every row uses all.
    """

    stack: _Stack
    mask: torch.Tensor | None

    def add(self, module: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return `y`, the module's own output for `x`, with each row's adapter added."""
        factors = self.stack.factors.get(module)
        if factors is None:
            return y
        low = functional.linear(x.float(), factors[0])
        if self.mask is not None:
            low = low * self.mask
        # Added in float32 and rounded once, as in training.
        return (y + functional.linear(low, factors[1])).to(y.dtype)


class AdapterMix:
    """Which adapter each row of the next forward pass uses; the model's linear layers look here."""

    def __init__(self) -> None:
        self.selection: _Selection | None = None
        self._kept: OrderedDict[tuple[Adapter | None, ...], _Selection | None] = OrderedDict()

    def select(self, rows: Sequence[Adapter | None]) -> None:
        """Set the rows' adapters; None for the base model itself."""
        key = tuple(rows)
        if key not in self._kept:
            self._kept[key] = self._make(key)
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT_SELECTIONS:
            self._kept.popitem(last=False)
        self.selection = self._kept[key]

    def clear(self) -> None:
        """Let go of all adapters."""
        self.selection = None
        self._kept.clear()

    def _make(self, rows: tuple[Adapter | None, ...]) -> _Selection | None:
        needed = list(dict.fromkeys(row for row in rows if row is not None))
        if not needed:
            return None
        stack = self._find(needed) or _join(needed)
        if len(stack.columns) == 1 and None not in rows:
            return _Selection(stack, None)
        mask = torch.zeros(len(rows), 1, stack.ranks)
        for row, adapter in enumerate(rows):
            if adapter is not None:
                mask[row, :, stack.columns[adapter]] = 1.0
        device = next(iter(needed[0].factors.values()))[0].device
        return _Selection(stack, mask.to(device))

    def _find(self, needed: list[Adapter]) -> _Stack | None:
        """Return a stack that will do: joining anew at each row that leaves would copy all the others."""
        most = 2 * sum(adapter.rank for adapter in needed)
        for selection in reversed(self._kept.values()):
            if selection and selection.stack.ranks <= most and selection.stack.columns.keys() >= set(needed):
                return selection.stack
        return None


def _join(adapters: list[Adapter]) -> _Stack:
    """Join adapters along the rank; one alone is used as it is."""
    columns, end = {}, 0
    for adapter in adapters:
        columns[adapter] = slice(end, end + adapter.rank)
        end += adapter.rank
    if len(adapters) == 1:
        return _Stack(columns, adapters[0].factors)
    factors = {}
    for module in dict.fromkeys(module for adapter in adapters for module in adapter.factors):
        shapes = next(adapter.factors[module] for adapter in adapters if module in adapter.factors)
        # Zeros where an adapter leaves the module as it is.
        a, b = shapes[0].new_zeros(end, shapes[0].shape[1]), shapes[1].new_zeros(shapes[1].shape[0], end)
        for adapter in adapters:
            if module in adapter.factors:
                a[columns[adapter]], b[:, columns[adapter]] = adapter.factors[module]
        factors[module] = (a, b)
    return _Stack(columns, factors)


class AdaptedLinear(nn.Module):
    """A linear layer of the base model that adds each row's adapter."""

    def __init__(self, linear: nn.Linear, path: str, mix: AdapterMix) -> None:
        super().__init__()
        self._linear = make_linear(linear.weight, linear.bias)
        self._path = path
        self._mix = mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, [rows, width, out] for [rows, width, in]."""
        y = self._linear(x)
        selection = self._mix.selection
        return y if selection is None else selection.add(self._path, x, y)


def adapt(model: nn.Module, head: nn.Module, mix: AdapterMix) -> dict[str, tuple[int, int]]:
    """Make a model's linear layers, all but its output head, add adapters.

    Returns:
        The layers' paths, each with its numbers of inputs and outputs.
    """
    linears = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    for path, linear in linears.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, AdaptedLinear(linear, path, mix))
    return {path: (linear.in_features, linear.out_features) for path, linear in linears.items()}
