"""The fast network computes what the modules do, up to rounding, and the same to the last bit in any batch."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tunesmith.base_models import decoder
from tunesmith.engines.lora import Adapter
from tunesmith.engines.network import Piece
from tunesmith.engines.packed_network import PackedNetwork
from tunesmith.kernels.decoding import DecodingKernels

CPU = torch.device("cpu")
WINDOW, WORDS = 40, 512
AT_ONCE = 128
SHAPE: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}
GEMMA = transformers.Gemma3TextConfig(
    **SHAPE,
    num_hidden_layers=3,
    num_key_value_heads=1,
    query_pre_attn_scalar=64,
    sliding_window=WINDOW,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
)
LLAMA = transformers.LlamaConfig(**SHAPE, num_hidden_layers=2, num_key_value_heads=2)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> DecodingKernels:
    found = DecodingKernels.find(CPU, torch.bfloat16, tmp_path_factory.mktemp("kernels"))
    if found is None:
        pytest.skip("this machine has no matrix unit or no compiler")
    return found


@pytest.fixture(scope="module", params=["gemma3", "llama"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights."""
    torch.manual_seed(0)
    if request.param == "gemma3":
        model: Any = transformers.Gemma3ForCausalLM(GEMMA)
    else:
        model = transformers.LlamaForCausalLM(LLAMA)
    folder = tmp_path_factory.mktemp(request.param)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def network(path: Path, kernels: DecodingKernels) -> PackedNetwork:
    model = decoder.load(path, CPU, torch.bfloat16)
    assert PackedNetwork.fits(model, kernels)
    return PackedNetwork(model, kernels, 4 << 20, AT_ONCE)


def an_adapter(network: PackedNetwork, seed: int, rank: int = 16) -> Adapter:
    drawn = torch.Generator().manual_seed(seed)
    factors = {
        path: (0.1 * torch.randn(rank, inputs, generator=drawn), 0.1 * torch.randn(outputs, rank, generator=drawn))
        for path, (inputs, outputs) in network.linears.items()
    }
    return Adapter(factors, rank, "plain")


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(WORDS), k=count)


def in_pieces(network: PackedNetwork, tokens: list[int], adapter: Adapter | None, sizes: list[int]) -> Tensor:
    """The hidden states of all tokens, taken in so many at a time."""
    slot = network.open(len(tokens))
    found, start = [], 0
    for size in sizes:
        found.append(network.forward([Piece(slot, tokens[start : start + size], adapter, size)]))
        start += size
    assert start == len(tokens)
    network.close(slot)
    return torch.cat(found)


def reference(path: Path, tokens: list[int], adapter: Adapter | None) -> Tensor:
    """The same in float32, from the plain modules with the adapter merged."""
    model = decoder.load(path, CPU, torch.float32)
    for name, (a, b) in (adapter.factors if adapter else {}).items():
        linear = model.get_submodule(name)
        linear.weight = torch.nn.Parameter(linear.weight + b @ a, requires_grad=False)
    with torch.inference_mode():
        hidden: Tensor = model.base_model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
    return hidden


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("rank", [None, 8, 16])
@pytest.mark.parametrize("sizes", [[5], [100], [100, 3, 50], [17, *[1] * 60]])
def test_hidden_states_are_those_of_the_modules(
    network: PackedNetwork, path: Path, rank: int | None, sizes: list[int]
) -> None:
    adapter = None if rank is None else an_adapter(network, 1, rank)
    tokens = some_tokens(sum(sizes))
    expected = reference(path, tokens, adapter)
    assert apart(in_pieces(network, tokens, adapter, sizes), expected) < 0.02
    if adapter:
        assert apart(expected, reference(path, tokens, None)) > 0.1  # it matters


def test_a_token_is_the_same_to_the_last_bit_in_any_batch(network: PackedNetwork) -> None:
    adapters = [None, *(an_adapter(network, seed) for seed in range(5)), an_adapter(network, 9, rank=8)]
    texts = [some_tokens(length, length) for length in (3, 60, 17, 100, 33, 1, 48, 90, 7)]
    who = [adapters[number % len(adapters)] for number in range(len(texts))]
    alone = [
        in_pieces(network, text, adapter, [len(text) - 1, 1] if text[1:] else [1])[-1]
        for text, adapter in zip(texts, who, strict=True)
    ]
    drawn = random.Random(7)
    slots = [network.open(len(text)) for text in texts]
    before = [number for number, text in enumerate(texts) if text[1:]]
    drawn.shuffle(before)
    for some in (before[:3], before[3:]):
        network.forward([Piece(slots[number], texts[number][:-1], who[number]) for number in some])
    order = list(range(len(texts)))
    drawn.shuffle(order)
    together = network.forward([Piece(slots[number], texts[number][-1:], who[number]) for number in order])
    for number, found in zip(order, together, strict=True):
        assert torch.equal(found, alone[number])
    for slot in slots:
        network.close(slot)


def test_memory_is_promised_held_and_given_back(network: PackedNetwork) -> None:
    tokens = network.longest
    slots = []
    while slot := network.open(tokens // 4):
        slots.append(slot)
    assert len(slots) >= 4
    assert network.open(tokens // 2) is None
    expected = in_pieces_of(network, slots[0], some_tokens(300))
    network.close(slots.pop())
    again = network.open(tokens // 4)  # its blocks have been others'
    assert again is not None
    assert torch.equal(in_pieces_of(network, again, some_tokens(300)), expected)
    for slot in [*slots, again]:
        network.close(slot)
    whole = network.open(tokens)
    assert whole is not None
    network.close(whole)


def in_pieces_of(network: PackedNetwork, slot: Any, tokens: list[int]) -> Tensor:
    for start in range(0, len(tokens) - 1, AT_ONCE):
        network.forward([Piece(slot, tokens[start : min(start + AT_ONCE, len(tokens) - 1)], None)])
    return network.forward([Piece(slot, tokens[-1:], None)])


@pytest.mark.parametrize("rows", [1, 5, 16, 40])
def test_the_likeliest_words_have_exact_scores(network: PackedNetwork, rows: int) -> None:
    hidden = in_pieces(network, some_tokens(rows, rows), None, [rows])
    exact = network.scores(hidden)
    weight = network._head.weight.float()
    assert torch.allclose(exact, hidden.float() @ weight.T, atol=1e-3)
    counts = [1 + row % 64 for row in range(rows)]
    scores, best = network.likeliest(hidden, counts)
    assert best == exact.argmax(-1).tolist()
    for row, count in enumerate(counts):
        expected, found = exact[row].topk(count), scores[row].topk(count)
        assert found.indices.tolist() == expected.indices.tolist()
        assert torch.allclose(found.values, expected.values, atol=1e-3)


def test_of_a_prepared_adapter_only_what_is_packed_is_kept(network: PackedNetwork) -> None:
    adapters = [an_adapter(network, rank, rank) for rank in (8, 16, 40)]
    kept = [network.prepare(adapter) for adapter in adapters]
    assert all(not adapter.factors for adapter in kept)
    tokens = some_tokens(20)
    alone = [in_pieces(network, tokens, adapter, [20]) for adapter in adapters]
    slots = [network.open(20) for _ in kept]
    pieces = [Piece(slot, tokens, adapter, 20) for slot, adapter in zip(slots, kept, strict=True)]
    together = network.forward(pieces).split(20)
    used, there = network.blocks()
    assert 0 < used < there
    for expected, found in zip(alone, together, strict=True):
        assert torch.equal(found, expected)
    for slot in slots:
        network.close(slot)
    assert network.blocks() == (0, there)
