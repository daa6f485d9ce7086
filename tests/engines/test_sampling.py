from collections import Counter
from typing import Any

import pytest
import torch

from tunesmith.engines import sampling as module
from tunesmith.engines.base import Sampling
from tunesmith.engines.sampling import Sampler, choose

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
LOGITS = PROBABILITIES.log()


def drawn(count: int = 4000, logits: torch.Tensor = LOGITS, **options: Any) -> dict[int, float]:
    fields = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 5} | options
    sampler = Sampler(Sampling(max_output_tokens=1, **fields))
    counts = Counter(choose(logits[None], [sampler])[0] for _ in range(count))
    return {token: number / count for token, number in counts.items()}


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, {0: 0.1, 1: 0.4, 2: 0.05, 3: 0.25, 4: 0.2}),
        ({"top_k": 2}, {1: 0.4, 3: 0.25}),
        ({"top_k": 99}, {0: 0.1, 1: 0.4, 2: 0.05, 3: 0.25, 4: 0.2}),
        ({"top_p": 0.6}, {1: 0.4, 3: 0.25}),
        ({"top_p": 0.7}, {1: 0.4, 3: 0.25, 4: 0.2}),
        # of the two that top_k leaves, the first has 0.4 / 0.65 = 0.62
        ({"top_k": 2, "top_p": 0.6}, {1: 1.0}),
        ({"top_k": 2, "top_p": 0.63}, {1: 0.4, 3: 0.25}),
        # temperature last: it changes the odds among those that top_p left, not which these are
        ({"top_p": 0.6, "temperature": 2.0}, {1: 0.4**0.5, 3: 0.25**0.5}),
        ({"temperature": 0.5}, {0: 0.01, 1: 0.16, 2: 0.0025, 3: 0.0625, 4: 0.04}),
        ({"temperature": 0.0}, {1: 1.0}),
        ({"temperature": 2.0, "top_k": 1}, {1: 1.0}),
    ],
)
def test_what_is_drawn_how_often(options: dict[str, Any], weights: dict[int, float]):
    total = sum(weights.values())
    found = drawn(**options)
    assert found.keys() == weights.keys()
    for token, weight in weights.items():
        assert found[token] == pytest.approx(weight / total, abs=0.03)


def test_top_p_of_a_large_vocabulary_looks_at_more_candidates_until_they_are_enough(
    monkeypatch: pytest.MonkeyPatch,
):
    torch.manual_seed(0)  # any scores will do
    logits = torch.randn(600)
    expected = {token: drawn(1, logits, top_p=0.9, seed=token) for token in range(50)}
    monkeypatch.setattr(module, "FIRST_CANDIDATES", 4)
    assert {token: drawn(1, logits, top_p=0.9, seed=token) for token in range(50)} == expected


def test_each_row_chooses_by_itself():
    samplers = [
        Sampler(Sampling(temperature=temperature, top_p=1, top_k=0, max_output_tokens=1, seed=3))
        for temperature in (0.0, 1.0, 0.0)
    ]
    rows = torch.stack([LOGITS, LOGITS, LOGITS.flip(0)])
    tokens = choose(rows, samplers)
    alone = Sampler(Sampling(temperature=1.0, top_p=1, top_k=0, max_output_tokens=1, seed=3))
    assert tokens == [1, choose(LOGITS[None], [alone])[0], 3]
