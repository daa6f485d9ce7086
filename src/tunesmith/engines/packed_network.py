"""A decoder that is known here, on a CPU with a matrix unit: few calls a layer, products of all adapters in one.

A token comes out the same to the last bit whatever else is in its pass: rows are summed each in its own order.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tunesmith.base_models.decoder import FULL, SLIDING, CausalLM, Layer, Turns
from tunesmith.engines.block_pool import BlockPool, tables
from tunesmith.engines.lora import Adapter
from tunesmith.engines.network import Piece
from tunesmith.kernels.decoding import DecodingKernels, Head, Seen
from tunesmith.kernels.products import Mix, Pair

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""A layer's linear layers; those that share their input are one matrix."""
KEPT_MIXES = 4
"""Of which adapters come together: requests that come and go make new ones."""
TURNED = 2048
"""Positions whose cosines are computed together."""
STEP = 16
"""A pass is filled up to multiples of so many tokens."""


class PackedSlot:
    """See `network.Slot`.

    Attributes:
        tables: The blocks of each kind of layer.
        promised: How many were set aside.
        firsts: The first block that is still held.
    """

    def __init__(self, promised: dict[str, int]) -> None:
        self.length = 0
        self.promised = promised
        self.tables: dict[str, list[int]] = {kind: [] for kind in promised}
        self.firsts = dict.fromkeys(promised, 0)


class _Layer:
    """A layer's matrices, packed, and its norms."""

    def __init__(self, layer: Layer, kernels: DecodingKernels) -> None:
        weights = [torch.cat([layer.linear(path).weight.detach() for path in group]) for group in GROUPS]
        self.products = [(kernels.pack(weight), weight.shape[0]) for weight in weights]
        own = layer.self_attn
        self.factor, self.kind, self.eps = own.factor, layer.mlp.kind, own.eps
        before_mlp = layer.pre_feedforward_layernorm if layer.around else layer.post_attention_layernorm
        self.before_attention, self.before_mlp = layer.input_layernorm.factor, before_mlp.factor
        self.after_attention = layer.post_attention_layernorm.factor if layer.around else None
        self.after_mlp = layer.post_feedforward_layernorm.factor if layer.around else None


class _Adapters(NamedTuple):
    """The adapters of a pass.

    Attributes:
        layers: Of each layer, a mix for each of its products.
        firsts: Where each adapter's rows begin; the mixes read it.
        ends: Where they end.
    """

    layers: list[list[Mix]]
    firsts: Tensor
    ends: Tensor


class PackedNetwork:
    """See `network.Network`.

    Args:
        model: The decoder; its head and embeddings are kept, its layers are not.
        kernels: Of this machine.
        kv_bytes: Memory for all slots together.
        at_once: New tokens of a slot in one pass, at most.
    """

    def __init__(self, model: CausalLM, kernels: DecodingKernels, kv_bytes: int, at_once: int) -> None:
        self._kernels, self._at_once = kernels, at_once
        self.body, config = model.base_model, model.config
        layers = self.body.decoder_layers
        first = layers[0].self_attn
        self._queries, self._keys, self._size = first.heads, first.heads // first.groups, first.size
        self._scale = first.scale
        self.linears = {
            f"model.layers.{number}.{path}": (layer.linear(path).in_features, layer.linear(path).out_features)
            for number, layer in enumerate(layers)
            for group in GROUPS
            for path in group
        }
        a_token = 4 * len(layers) * self._keys * self._size  # keys and values of two bytes each
        tokens = kv_bytes // a_token
        self.longest: int = min(config.max_position_embeddings, tokens)
        self._layers = [_Layer(layer, kernels) for layer in layers]
        self._head = Head(model.lm_head.weight.detach(), kernels)
        self._kinds = config.layer_types
        windows = {FULL: None, SLIDING: config.sliding_window}
        self._pools = {
            kind: BlockPool(
                self._kinds.count(kind), self._keys, self._size, windows[kind], tokens, self._head.weight.dtype
            )
            for kind in dict.fromkeys(self._kinds)
        }
        self._caches = [
            self._pools[kind].layers[self._kinds[:number].count(kind)] for number, kind in enumerate(self._kinds)
        ]
        self._turns: dict[str, Turns] = {}
        self._packed: WeakKeyDictionary[Adapter, list[list[Pair]]] = WeakKeyDictionary()
        self._mixes: OrderedDict[tuple[Adapter, ...], _Adapters] = OrderedDict()
        self.body.layers = torch.nn.ModuleList()

    @staticmethod
    def fits(model: CausalLM, kernels: DecodingKernels) -> bool:
        """Return whether a model can be run so."""
        layers = model.base_model.decoder_layers
        linears = [layer.linear(path) for layer in layers for group in GROUPS for path in group]
        shapes = [linear.weight.shape for linear in linears] + [model.lm_head.weight.shape]
        return (
            all(linear.bias is None for linear in linears)
            and all(kernels.fits(shape) for shape in shapes)
            and all(side % 64 == 0 for side in model.lm_head.weight.shape)
            and all(layer.self_attn.size % 64 == 0 for layer in layers)
        )

    def prepare(self, adapter: Adapter) -> None:
        """See `network.Network`."""
        self._packed[adapter] = [
            [self._pair(adapter, f"model.layers.{number}.", group) for group in GROUPS]
            for number in range(len(self._layers))
        ]

    def open(self, most: int) -> PackedSlot | None:
        """See `network.Network`."""
        promised: dict[str, int] = {}
        for kind, pool in self._pools.items():
            blocks = pool.most(most, self._at_once)
            if not pool.promise(blocks):
                for earlier, given in promised.items():
                    self._pools[earlier].take_back(given, [])
                return None
            promised[kind] = blocks
        return PackedSlot(promised)

    def close(self, slot: PackedSlot) -> None:
        """See `network.Network`."""
        for kind, pool in self._pools.items():
            pool.take_back(slot.promised[kind], slot.tables[kind][slot.firsts[kind] :])

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        """See `network.Network`."""
        order = sorted(range(len(pieces)), key=lambda number: id(pieces[number].adapter))
        ordered = [pieces[number] for number in order]
        starts = [0]
        for piece in ordered:
            starts.append(starts[-1] + len(piece.tokens))
        hidden = self._run(ordered, starts)
        wanted = [0] * len(pieces)
        for number, piece, end in zip(order, ordered, starts[1:], strict=True):
            wanted[number] = end - piece.wanted
        places = [wanted[number] + one for number, piece in enumerate(pieces) for one in range(piece.wanted)]
        norm = self.body.norm
        return self._kernels.norm(hidden[torch.tensor(places)], norm.factor, norm.eps)[0]

    def scores(self, hidden: Tensor) -> Tensor:
        """See `network.Network`."""
        return self._head.scores(hidden)

    def likeliest(self, hidden: Tensor, counts: Sequence[int]) -> tuple[Tensor, list[int]]:
        """See `network.Network`."""
        scores, best = self._head.likeliest(hidden, torch.tensor(counts))
        return scores, best.tolist()

    def _run(self, pieces: Sequence[Piece], starts: Sequence[int]) -> Tensor:
        """Run all layers; the last one's output is not normalised."""
        fill = -starts[-1] % STEP
        tokens = torch.tensor([token for piece in pieces for token in piece.tokens] + [0] * fill)
        lengths = [piece.slot.length for piece in pieces]
        counts = [len(piece.tokens) for piece in pieces]
        places = [length + i for length, count in zip(lengths, counts, strict=True) for i in range(count)]
        turns = self._turned(torch.tensor(places + [0] * fill))
        common = torch.tensor(starts[:-1]), torch.tensor(counts), torch.tensor(lengths)
        seen = {kind: Seen(*common, self._blocks(kind, pieces)) for kind in self._pools}
        adapters = self._mixed(pieces, starts)
        x = self.body.embed(tokens)
        gathered = x.new_zeros((len(tokens), self._queries * self._size))
        for number, (layer, kind, cache) in enumerate(zip(self._layers, self._kinds, self._caches, strict=True)):
            mixes = adapters.layers[number] if adapters else [None] * len(GROUPS)
            normed, _ = self._kernels.norm(x, layer.before_attention, layer.eps)
            heads = self._product(normed, layer, mixes, 0).view(len(tokens), -1, self._size)
            turning = self._queries + self._keys
            turned, _ = self._kernels.turn(heads, turning, turns[kind], layer.factor, layer.eps)
            window = self._pools[kind].window or 1 << 40
            self._kernels.attend_cached(turned, heads, cache, seen[kind], self._scale, window, gathered)
            x = self._added(x, self._product(gathered, layer, mixes, 1), layer.after_attention, layer.eps)
            normed, _ = self._kernels.norm(x, layer.before_mlp, layer.eps)
            product = self._kernels.gate(layer.kind, self._product(normed, layer, mixes, 2))
            x = self._added(x, self._product(product, layer, mixes, 3), layer.after_mlp, layer.eps)
        for piece in pieces:
            slot: PackedSlot = piece.slot
            slot.length += len(piece.tokens)
            for kind, pool in self._pools.items():
                slot.firsts[kind] = pool.shed(slot.tables[kind], slot.firsts[kind], slot.length)
        return x

    def _product(self, x: Tensor, layer: _Layer, mixes: Sequence[Mix | None], group: int) -> Tensor:
        (packed, out), mix = layer.products[group], mixes[group]
        if mix is None:
            return self._kernels.product_alone(x, packed, out)
        return self._kernels.product(x, packed, out, mix)[0]

    def _added(self, x: Tensor, y: Tensor, factor: Tensor | None, eps: float) -> Tensor:
        return x + y if factor is None else self._kernels.add_norm(x, y, factor, eps)[0]

    def _blocks(self, kind: str, pieces: Sequence[Piece]) -> Tensor:
        pool = self._pools[kind]
        for piece in pieces:
            pool.grow(piece.slot.tables[kind], piece.slot.length + len(piece.tokens))
        return tables([piece.slot.tables[kind] for piece in pieces])

    def _turned(self, positions: Tensor) -> dict[str, Turns]:
        """Return cosines and sines of positions, from those computed once."""
        most = int(positions.max()) + 1
        if not self._turns or len(next(iter(self._turns.values())).cosine) < most:
            found = self.body.turns(torch.arange(-(-most // TURNED) * TURNED))
            self._turns = {kind: Turns(*(part.flatten(1) for part in turns)) for kind, turns in found.items()}
        return {
            kind: Turns(*(part.index_select(0, positions) for part in turns))
            for kind, turns in self._turns.items()
        }

    def _mixed(self, pieces: Sequence[Piece], starts: Sequence[int]) -> _Adapters | None:
        """Return the adapters of a pass whose pieces are in their order."""
        ends: dict[Adapter, int] = {}
        firsts: dict[Adapter, int] = {}
        for number, piece in enumerate(pieces):
            if piece.adapter is not None:
                firsts.setdefault(piece.adapter, starts[number])
                ends[piece.adapter] = starts[number + 1]
        if not ends:
            return None
        key = tuple(ends)
        adapters = self._mixes.get(key)
        if adapters is None:
            adapters = self._mixes[key] = self._mix(key)
        self._mixes.move_to_end(key)
        while len(self._mixes) > KEPT_MIXES:
            self._mixes.popitem(last=False)
        adapters.firsts.copy_(torch.tensor([*firsts.values()]))
        adapters.ends.copy_(torch.tensor([*ends.values()]))
        return adapters

    def _mix(self, adapters: tuple[Adapter, ...]) -> _Adapters:
        for adapter in adapters:
            if adapter not in self._packed:
                self.prepare(adapter)
        most = max(adapter.rank for adapter in adapters)
        packed = [self._packed[adapter] for adapter in adapters]
        if any(adapter.rank != most for adapter in adapters):
            packed = [
                [
                    [self._pair(adapter, f"model.layers.{number}.", group, most) for group in GROUPS]
                    for number in range(len(self._layers))
                ]
                for adapter in adapters
            ]
        firsts, ends = (torch.zeros(len(adapters), dtype=torch.int64) for _ in range(2))
        layers = [
            [
                Mix([own[number][group] for own in packed], _ranks(GROUPS[group], most), firsts, ends)
                for group in range(len(GROUPS))
            ]
            for number in range(len(self._layers))
        ]
        return _Adapters(layers, firsts, ends)

    def _pair(self, adapter: Adapter, prefix: str, group: Sequence[str], rank: int = 0) -> Pair:
        """Return an adapter's factors of layers that share their input, as those of one, packed.

        Args:
            adapter: The adapter.
            prefix: Of the layers' paths.
            group: Their paths' ends.
            rank: What each layer's rank is filled up to; 0 for its own.
        """
        rank = rank or adapter.rank
        ranks, inputs = _ranks(group, rank), self.linears[prefix + group[0]][0]
        outputs = [self.linears[prefix + path][1] for path in group]
        a = torch.zeros(ranks, inputs, dtype=self._head.weight.dtype)
        b = torch.zeros(sum(outputs), ranks, dtype=self._head.weight.dtype)
        for number, path in enumerate(group):
            if factors := adapter.factors.get(prefix + path):
                first, out = number * rank, sum(outputs[:number])
                a[first : first + adapter.rank] = factors[0]
                b[out : out + outputs[number], first : first + adapter.rank] = factors[1]
        return Pair(self._kernels.pack(a, alone=True), self._kernels.pack(b, alone=True))


def _ranks(group: Sequence[str], rank: int) -> int:
    """Return the ranks of layers that share their input, filled up for the matrix unit."""
    return -(-len(group) * rank // 32) * 32
