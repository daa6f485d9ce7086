"""Any model, run as the modules that it is made of: on every device, and what `packed_network` does not know."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.base_models.weights import Weights
from tunesmith.engines.kv_cache import KVCache, causal_mask
from tunesmith.engines.linear import linear
from tunesmith.engines.lora import Adapter, AdapterMix, adapt
from tunesmith.engines.network import Piece
from tunesmith.engines.scores import WholeScores
from tunesmith.errors import FailedPrecondition


class ModuleSlot:
    """See `network.Slot`."""

    def __init__(self, row: int) -> None:
        self.row, self.length = row, 0


class ModuleNetwork:
    """See `network.Network`.

    A token's last bits depend on how many come with it, so nothing is guessed here.

    Args:
        model: transformers' own, or `decoder.CausalLM`; its linear layers are changed to add adapters.
        weights: Where it comes from.
        device: Where it is.
        dtype: Number format of its weights.
    """

    step = 1
    recalls = 0

    def __init__(self, model: Any, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._mix = AdapterMix()
        config, head = model.config, model.get_output_embeddings()
        self._windows = _windows(weights, config)
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.longest: int = config.max_position_embeddings
        self.linears = adapt(model, head, self._mix)
        self._head = linear(head.weight, head.bias)
        self._body: nn.Module = model.base_model
        self._cache = KVCache(device)

    def prepare(self, adapter: Adapter) -> Adapter:
        """See `network.Network`; nothing is to be done."""
        return adapter

    def open(self, most: int) -> ModuleSlot | None:  # noqa: ARG002 - the memory is not bounded here
        """See `network.Network`."""
        return ModuleSlot(self._cache.take())

    def close(self, slot: ModuleSlot) -> None:
        """See `network.Network`."""
        self._cache.give_back(slot.row)
        if not self._cache.lengths:
            self._mix.clear()

    def recall(self, slot: ModuleSlot, prompt: Sequence[int], adapter: Adapter | None, caller: str) -> None:
        """See `network.Network`; nothing is kept."""

    def take_back(self, slot: ModuleSlot, count: int) -> None:
        """See `network.Network`."""
        slot.length -= count
        self._cache.lengths[slot.row] -= count

    def blocks(self) -> tuple[int, int]:
        """See `network.Network`."""
        return 0, 0

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        """See `network.Network`."""
        rows, widths = [piece.slot.row for piece in pieces], [len(piece.tokens) for piece in pieces]
        width = max(widths)
        tokens = torch.tensor(
            [[*piece.tokens, *[0] * (width - len(piece.tokens))] for piece in pieces], device=self._device
        )
        self._mix.select([piece.adapter for piece in pieces])
        positions = self._cache.begin(rows, width)
        end = self._cache.end
        masks = {kind: causal_mask(positions, end, window, self._dtype) for kind, window in self._windows.items()}
        output = self._body(
            input_ids=tokens,
            # Models whose layers differ take a mask for each kind of layer, the others one mask.
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache.advance(rows, widths)
        for piece in pieces:
            piece.slot.length += len(piece.tokens)
        hidden: Tensor = output.last_hidden_state
        return torch.cat(
            [hidden[row, len(piece.tokens) - piece.wanted : len(piece.tokens)] for row, piece in enumerate(pieces)]
        )

    def scores(self, hidden: Tensor) -> Tensor:
        """See `network.Network`.

        The head is applied here and not by the model: its product of a three-dimensional, non-contiguous
        bfloat16 input takes forty times as long.
        """
        scores = self._head(hidden.contiguous()).float()
        return scores if self._softcap is None else torch.tanh(scores / self._softcap) * self._softcap

    def scored(self, hidden: Tensor, *, whole: bool) -> WholeScores:  # noqa: ARG002
        """See `network.Network`."""
        return WholeScores(self.scores(hidden))


def _windows(weights: Weights, config: Any) -> dict[str, int | None]:
    """Return the kinds of a model's layers, each with how many tokens its attention looks back."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or [])
    if not kinds:
        return {"all": window}
    if unknown := kinds.keys() - {"full_attention", "sliding_attention"}:
        raise FailedPrecondition(f"models/{weights.model.id} has {min(unknown)} layers, which are not served.")
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}
