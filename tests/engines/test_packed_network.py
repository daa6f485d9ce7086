"""The fast network computes what the modules do, up to rounding, and the same to the last bit in any batch."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines.packed_models import CPU, WINDOW, WORDS
from tunesmith.base_models import decoder
from tunesmith.engines.lora import Adapter
from tunesmith.engines.network import Piece
from tunesmith.engines.packed_network import PackedNetwork
from tunesmith.engines.scores import bits
from tunesmith.kernels.decoding import DecodingKernels

AT_ONCE = 128


@pytest.fixture(scope="module")
def network(packed_model: Path, kernels: DecodingKernels) -> PackedNetwork:
    model = decoder.load(packed_model, CPU, torch.bfloat16)
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
    network: PackedNetwork, packed_model: Path, rank: int | None, sizes: list[int]
) -> None:
    adapter = None if rank is None else an_adapter(network, 1, rank)
    tokens = some_tokens(sum(sizes))
    expected = reference(packed_model, tokens, adapter)
    assert apart(in_pieces(network, tokens, adapter, sizes), expected) < 0.02
    if adapter:
        assert apart(expected, reference(packed_model, tokens, None)) > 0.1  # it matters


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


@pytest.mark.parametrize("sizes", [[1] * 130, [7] * 18 + [4], [33, 31, 66], [128, 2]])
def test_a_text_is_the_same_to_the_last_bit_however_it_is_cut(network: PackedNetwork, sizes: list[int]) -> None:
    tokens, adapter = some_tokens(130), an_adapter(network, 2)
    assert torch.equal(in_pieces(network, tokens, adapter, sizes), in_pieces(network, tokens, adapter, [65, 65]))


def test_what_lies_in_memory_from_before_harms_nobody(network: PackedNetwork) -> None:
    tokens = some_tokens(70)
    expected = in_pieces(network, tokens, None, [70])
    for pool in network._pools.values():
        for layer in pool.layers:
            layer.fill_(float("nan"))
    assert torch.equal(in_pieces(network, tokens, None, [3, 37, 1, 29]), expected)


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
    counts = [row % 65 for row in range(1, rows + 1)]
    allowed = torch.randint(-(2**31), 2**31, (rows, exact.shape[1] // 32), dtype=torch.int32)
    for some_allowed in (None, allowed):
        right = exact if some_allowed is None else exact.masked_fill(~bits(allowed, exact.shape[1]), -torch.inf)
        for whole in (False, True):
            found = network.scored(hidden, whole=whole)
            values, tokens = found.likeliest(range(rows), counts, some_allowed)
            for row, count in enumerate(counts):
                expected = right[row].topk(count)
                assert tokens[row, :count].tolist() == expected.indices.tolist()
                # or what is drawn would depend on who comes with it
                assert torch.equal(values[row, :count], expected.values)
                assert values[row, count:].isneginf().all()
            some = range(0, rows, 2)
            fewer = found.likeliest(some, counts[::2], None if some_allowed is None else allowed[::2].contiguous())
            assert torch.equal(fewer[1][0, :1], tokens[0, :1])
            assert torch.equal(found.likeliest(some, [1] * len(some))[1][:, 0], exact[::2].argmax(-1))


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


def last(
    network: PackedNetwork, tokens: list[int], adapter: Adapter | None = None, caller: str = "ada"
) -> tuple[Tensor, int]:
    """The last hidden state of a prompt, and how much of it was known."""
    slot = network.open(len(tokens))
    network.recall(slot, tokens, adapter, caller)
    known = slot.length
    for start in range(known, len(tokens), AT_ONCE):
        found = network.forward([Piece(slot, tokens[start : start + AT_ONCE], adapter)])
    network.close(slot)
    return found, known


def test_what_is_recalled_of_a_prompt_changes_no_bit(network: PackedNetwork) -> None:
    opening = some_tokens(200, seed=5)
    prompts = [opening + some_tokens(length, length) for length in (1, 7, 50, 120)]
    expected = [in_pieces(network, prompt, None, [100, 100, len(prompt) - 200])[-1:] for prompt in prompts]
    found = [last(network, prompt) for prompt in prompts]
    assert [known for _, known in found] == [0, 192, 192, 192]
    for (state, _), right in zip(found, expected, strict=True):
        assert torch.equal(state, right)
    assert last(network, prompts[3])[1] == 319 // 32 * 32
    assert last(network, opening[:192])[1] == 160  # the last token's state is to be computed


def test_nothing_is_recalled_of_another_adapter_or_an_unknown_one(network: PackedNetwork) -> None:
    one, two, unknown = (replace(an_adapter(network, 1), content=name) for name in ("one", "two", ""))
    tokens = some_tokens(100, seed=6)
    for adapter in (None, one, two, unknown):
        assert last(network, tokens, adapter)[1] == 0
    assert [last(network, tokens, adapter)[1] for adapter in (None, one, two, unknown)] == [96, 96, 96, 0]


def test_what_one_caller_asks_is_not_known_to_another(network: PackedNetwork) -> None:
    tokens = some_tokens(100, seed=16)
    assert [last(network, tokens, caller=caller)[1] for caller in ("ada", "ben", "ada", "ben")] == [0, 0, 96, 96]


def test_two_that_are_under_way_share_what_they_have_in_common(network: PackedNetwork) -> None:
    tokens = some_tokens(150, seed=8)
    expected = in_pieces(network, tokens, None, [100, 50])[-1:]
    first, second = network.open(200), network.open(200)
    network.recall(first, tokens, None, "ada")
    network.forward([Piece(first, tokens[:128], None)])
    used, _ = network.blocks()
    network.recall(second, tokens, None, "ada")
    assert second.length == 128
    assert network.blocks()[0] == used
    network.forward([Piece(first, tokens[128:], None)])
    network.close(first)
    assert torch.equal(network.forward([Piece(second, tokens[128:], None)]), expected)
    network.close(second)
    assert network.blocks()[0] == 0


def test_what_nobody_uses_makes_room(network: PackedNetwork) -> None:
    for seed in range(100, 160):  # more than there is room for
        last(network, some_tokens(300, seed))
    assert last(network, some_tokens(300, 159))[1] == 288
    assert last(network, some_tokens(300, 100))[1] == 0
    whole = network.open(network.longest)
    assert whole is not None
    tokens = some_tokens(network.longest, 3)
    for start in range(0, len(tokens), AT_ONCE):
        network.forward([Piece(whole, tokens[start : start + AT_ONCE], None)])
    network.close(whole)
    assert network.blocks()[0] == 0


@pytest.mark.parametrize("before", [20, WINDOW + 23, 190])
def test_tokens_that_are_taken_back_leave_no_trace(network: PackedNetwork, before: int) -> None:
    tokens = some_tokens(before + 2, seed=9)
    expected = in_pieces(network, tokens, None, [before, 1, 1])[-1:]
    slot = network.open(before + 20)
    for start in range(0, before, AT_ONCE):
        network.forward([Piece(slot, tokens[start : min(start + AT_ONCE, before)], None)])
    guessed = [tokens[before], *some_tokens(12, seed=10)]
    network.forward([Piece(slot, guessed, None, wanted=13, guessed=12)])
    network.take_back(slot, 12)
    assert slot.length == before + 1
    assert torch.equal(network.forward([Piece(slot, tokens[-1:], None)]), expected)
    network.close(slot)
