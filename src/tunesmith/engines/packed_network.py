"""A decoder that is known here, on a CPU with a matrix unit: few calls a layer, products of all adapters in one.

A token comes out the same to the last bit whatever else is in its pass: rows are summed each in its own order.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tunesmith.base_models.decoder import FULL, SLIDING, CausalLM, Turns
from tunesmith.base_models.decoder import Layer as DecoderLayer
from tunesmith.engines.block_pool import BlockPool, tables
from tunesmith.engines.lora import Adapter
from tunesmith.engines.network import Piece
from tunesmith.engines.scores import FEW, of_rows
from tunesmith.kernels.decoding import BLOCK, DecodingKernels, Head, Kind, Layer, Layers, Mixes, Seen, Shape
from tunesmith.kernels.products import TILE, Pair

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
UNBOUNDED = 1 << 40
"""A window that all tokens are in."""
STEP = 16
"""A pass is filled up to multiples of so many tokens."""


class PackedSlot:
    """See `network.Slot`.

    Attributes:
        tokens: What it has seen.
        tables: The blocks of each kind of layer.
        promised: How many were set aside.
        firsts: The first block that is still held.
        names: What its first blocks hold, if it remembers; the last is what the next one's is made of.
    """

    def __init__(self, promised: dict[str, int]) -> None:
        self.tokens: list[int] = []
        self.names: list[bytes] = []
        self.promised = promised
        self.tables: dict[str, list[int]] = {kind: [] for kind in promised}
        self.firsts = dict.fromkeys(promised, 0)

    @property
    def length(self) -> int:
        """See `network.Slot`."""
        return len(self.tokens)


class PackedNetwork:
    """See `network.Network`.

    Args:
        model: The decoder; its head and embeddings are kept, its layers are not.
        kernels: Of this machine.
        kv_bytes: Memory for all slots together.
        at_once: New tokens of a slot in one pass, at most.
    """

    step = STEP
    recalls = BLOCK

    def __init__(self, model: CausalLM, kernels: DecodingKernels, kv_bytes: int, at_once: int) -> None:
        self._kernels, self._at_once = kernels, at_once
        self.body, config = model.base_model, model.config
        layers = self.body.decoder_layers
        first = layers[0].self_attn
        self._queries, self._keys, self._size = first.heads, first.heads // first.groups, first.size
        self.linears = {
            f"model.layers.{number}.{path}": (layer.linear(path).in_features, layer.linear(path).out_features)
            for number, layer in enumerate(layers)
            for group in GROUPS
            for path in group
        }
        a_token = 4 * len(layers) * self._keys * self._size  # keys and values of two bytes each
        tokens = kv_bytes // a_token
        self.longest: int = min(config.max_position_embeddings, tokens)
        self._head = Head(model.lm_head.weight.detach(), kernels)
        self._kinds = config.layer_types
        windows = {FULL: None, SLIDING: config.sliding_window}
        self._pools = {
            kind: BlockPool(
                self._kinds.count(kind), self._keys, self._size, windows[kind], tokens, self._head.weight.dtype
            )
            for kind in dict.fromkeys(self._kinds)
        }
        kinds = list(self._pools)
        pools = {kind: iter(pool.layers) for kind, pool in self._pools.items()}
        self._layers = Layers(
            Shape(
                *(self._queries, self._keys, self._size, layers[0].mlp.gate_proj.out_features),
                int(layers[0].mlp.kind == "silu"),
                first.eps,
                first.scale,
            ),
            [
                _packed(layer, kernels, next(pools[kind]), kinds.index(kind))
                for layer, kind in zip(layers, self._kinds, strict=True)
            ],
        )
        self._turns: dict[str, Turns] = {}
        self._packed: WeakKeyDictionary[Adapter, list[list[Pair]]] = WeakKeyDictionary()
        self._mixes: OrderedDict[tuple[Adapter, ...], Mixes] = OrderedDict()
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

    def prepare(self, adapter: Adapter) -> Adapter:
        """See `network.Network`: what is packed is kept, the factors are not."""
        kept = replace(adapter, factors={})
        self._packed[kept] = self._pack(adapter)
        return kept

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
        self._remember(slot, slot.length)
        for kind, pool in self._pools.items():
            pool.take_back(slot.promised[kind], slot.tables[kind][slot.firsts[kind] :])

    def recall(self, slot: PackedSlot, prompt: Sequence[int], adapter: Adapter | None, caller: str) -> None:
        """See `network.Network`."""
        if adapter is not None and not adapter.content:
            return
        slot.names = [f"{adapter.content if adapter else ''} {caller}".encode()]
        names = [*slot.names]
        for start in range(0, (len(prompt) - 1) // BLOCK * BLOCK, BLOCK):
            names.append(_name(names[-1], prompt[start : start + BLOCK]))
            if not any(pool.known(names[-1]) for pool in self._pools.values()):
                break
        count = self._recallable(names[1:])
        for kind, pool in self._pools.items():
            first = pool.first(count * BLOCK)
            slot.tables[kind] = [0] * first + pool.share(names[first + 1 : count + 1])
            slot.firsts[kind] = first
        slot.tokens, slot.names = list(prompt[: count * BLOCK]), names[: count + 1]

    def take_back(self, slot: PackedSlot, count: int) -> None:
        """See `network.Network`."""
        del slot.tokens[slot.length - count :]

    def blocks(self) -> tuple[int, int]:
        """See `network.Network`."""
        used, there = zip(*(pool.blocks for pool in self._pools.values()), strict=True)
        return sum(used), sum(there)

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

    def scored(self, hidden: Tensor, *, whole: bool) -> "HeadScores":
        """See `network.Network`."""
        return HeadScores(self._head, hidden, whole=whole)

    def _run(self, pieces: Sequence[Piece], starts: Sequence[int]) -> Tensor:
        """Run all layers; the last one's output is not normalised."""
        fill = -starts[-1] % STEP
        tokens = torch.tensor([token for piece in pieces for token in piece.tokens] + [0] * fill)
        lengths = [piece.slot.length for piece in pieces]
        counts = [len(piece.tokens) for piece in pieces]
        places = [length + i for length, count in zip(lengths, counts, strict=True) for i in range(count)]
        turns = self._turned(torch.tensor(places + [0] * fill))
        common = torch.tensor(starts[:-1]), torch.tensor(counts), torch.tensor(lengths)
        kinds = []
        for kind, pool in self._pools.items():
            blocks = self._blocks(pool, kind, pieces)
            kinds.append(Kind(*turns[kind], blocks, pool.window or UNBOUNDED, blocks.shape[1]))
        x = self.body.embed(tokens)
        self._kernels.decode(x, self._layers, Seen(*common), kinds, self._mixed(pieces, starts))
        for piece in pieces:
            slot: PackedSlot = piece.slot
            slot.tokens += piece.tokens
            certain = slot.length - piece.guessed
            self._remember(slot, certain)
            for kind, pool in self._pools.items():
                slot.firsts[kind] = pool.shed(slot.tables[kind], slot.firsts[kind], certain)
        return x

    def _recallable(self, names: Sequence[bytes]) -> int:
        """Return of how many of a text's first blocks all is known that tokens after them see."""
        found, runs = 0, dict.fromkeys(self._pools, 0)
        for count, name in enumerate(names, 1):
            for kind, pool in self._pools.items():
                runs[kind] = runs[kind] + 1 if pool.known(name) else 0
            if all(runs[kind] >= count - pool.first(count * BLOCK) for kind, pool in self._pools.items()):
                found = count
        return found

    def _remember(self, slot: PackedSlot, length: int) -> None:
        """Name the blocks that a slot's first tokens fill; those that it lets go of stay known for a while."""
        while slot.names and len(slot.names) * BLOCK <= length:
            number = len(slot.names) - 1
            slot.names.append(_name(slot.names[-1], slot.tokens[number * BLOCK : (number + 1) * BLOCK]))
            for kind, pool in self._pools.items():
                if number >= slot.firsts[kind]:
                    pool.name(slot.tables[kind][number], slot.names[-1])

    def _blocks(self, pool: BlockPool, kind: str, pieces: Sequence[Piece]) -> Tensor:
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

    def _mixed(self, pieces: Sequence[Piece], starts: Sequence[int]) -> Mixes | None:
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

    def _mix(self, adapters: tuple[Adapter, ...]) -> Mixes:
        for adapter in adapters:
            if adapter not in self._packed:
                self._packed[adapter] = self._pack(adapter)
        ranks = [max(_ranks(group, adapter.rank) for adapter in adapters) for group in GROUPS]
        pairs = [
            [
                [
                    _filled(self._packed[one][layer][number], _ranks(group, one.rank), ranks[number])
                    for one in adapters
                ]
                for number, group in enumerate(GROUPS)
            ]
            for layer in range(len(self._kinds))
        ]
        return Mixes(pairs, ranks)

    def _pack(self, adapter: Adapter) -> list[list[Pair]]:
        """Return an adapter's factors of each layer."""
        return [
            [self._pair(adapter, f"model.layers.{number}.", group) for group in GROUPS]
            for number in range(len(self._kinds))
        ]

    def _pair(self, adapter: Adapter, prefix: str, group: Sequence[str]) -> Pair:
        """Return an adapter's factors of layers that share their input, as those of one, packed.

        Args:
            adapter: The adapter.
            prefix: Of the layers' paths.
            group: Their paths' ends.
        """
        rank = adapter.rank
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


class HeadScores:
    """See `Scores`; where not all are asked for, they are near, and those that are the largest computed again.

    Args:
        head: The model's.
        hidden: Of each row, (rows, size).
        whole: Whether all of a row will be asked for.
    """

    def __init__(self, head: Head, hidden: Tensor, *, whole: bool) -> None:
        self._head, self._hidden = head, hidden
        self._scores = head.scores(hidden) if whole else head.near(hidden)
        self.words = head.words

    def whole(self, rows: Sequence[int]) -> Tensor:
        """See `Scores`."""
        return of_rows(self._scores, rows)

    def likeliest(
        self, rows: Sequence[int], counts: Sequence[int], allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Scores`."""
        which, width = torch.tensor(rows), FEW if max(counts) > 1 else 1
        return self._head.likeliest(self._scores, self._hidden, which, torch.tensor(counts), allowed, width)


def _name(before: bytes, tokens: Sequence[int]) -> bytes:
    """Return a name for what a block holds: of the block before it, and of its own tokens."""
    return hashlib.blake2b(before + array("i", tokens).tobytes(), digest_size=16).digest()


def _packed(layer: DecoderLayer, kernels: DecodingKernels, pool: Tensor, kind: int) -> Layer:
    """Return a layer in the layout that passes read."""
    weights = [torch.cat([layer.linear(path).weight.detach() for path in group]) for group in GROUPS]
    before_mlp = layer.pre_feedforward_layernorm if layer.around else layer.post_attention_layernorm
    return Layer(
        [kernels.pack(weight) for weight in weights],
        layer.input_layernorm.factor,
        layer.self_attn.factor,
        layer.post_attention_layernorm.factor if layer.around else None,
        before_mlp.factor,
        layer.post_feedforward_layernorm.factor if layer.around else None,
        pool,
        kind,
    )


def _filled(pair: Pair, ranks: int, most: int) -> Pair:
    """Return packed factors with more ranks, which are 0; packed are tiles, a row of 16 outputs after another."""
    if ranks == most:
        return pair
    a = pair.a.new_zeros(len(pair.a) * most // ranks)
    a[: len(pair.a)] = pair.a
    b = pair.b.new_zeros(len(pair.b) * most // ranks)
    b.view(-1, most // 32, TILE)[:, : ranks // 32] = pair.b.view(-1, ranks // 32, TILE)
    return Pair(a, b)


def _ranks(group: Sequence[str], rank: int) -> int:
    """Return the ranks of layers that share their input, filled up for the matrix unit."""
    return -(-len(group) * rank // 32) * 32
