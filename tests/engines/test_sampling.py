from collections import Counter
from typing import Any

import pytest
import torch

from tunesmith.engines import draws
from tunesmith.engines.base import Sampling
from tunesmith.engines.choices import Choices
from tunesmith.engines.sampling import Chosen, Sampler
from tunesmith.engines.scores import WholeScores, top

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
LOGITS = PROBABILITIES.log()


def choose(scores: torch.Tensor, samplers: list[Sampler]) -> list[Chosen]:
    return Choices(WholeScores(scores), samplers).of(range(len(samplers)))


def drawn(count: int = 4000, logits: torch.Tensor = LOGITS, **options: Any) -> dict[int, float]:
    fields = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 5} | options
    sampler = Sampler(Sampling(max_output_tokens=1, **fields))
    counts: Counter[int] = Counter()
    for _ in range(count):
        (chosen,) = choose(logits[None].clone(), [sampler])
        sampler.take(chosen.token)
        counts[chosen.token] += 1
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
    monkeypatch.setattr(draws, "FIRST_CANDIDATES", 4)
    assert {token: drawn(1, logits, top_p=0.9, seed=token) for token in range(50)} == expected


def sampler(**options: Any) -> Sampler:
    fields = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 3} | options
    return Sampler(Sampling(max_output_tokens=1, **fields))


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 64, "top_p": 0.95},
    {"temperature": 1.3, "top_k": 7},
    {"temperature": 1.0, "top_k": 900, "top_p": 0.5},
    {"temperature": 1.0, "top_k": 2000},
    {"temperature": 1.0, "top_p": 0.2},
    {"temperature": 2.0, "top_p": 0.999},
    {"temperature": 1.0, "presence_penalty": 2.0},
]


def test_rows_of_all_kinds_choose_together_what_each_chooses_alone():
    torch.manual_seed(0)  # any scores will do; rounded, so that many are equal
    scores = (torch.randn(4 * len(KINDS), 3000) * 8).round() / 4
    options = [{**kind, "seed": seed} for seed in range(4) for kind in KINDS]
    alone = []
    for row, kind in zip(scores, options, strict=True):
        one = sampler(**kind)
        for _ in range(3):
            (chosen,) = choose(row[None].clone(), [one])
            one.take(chosen.token)
            alone.append(chosen.token)
    together = [sampler(**kind) for kind in options]
    steps = []
    for _ in range(3):
        steps.append([chosen.token for chosen in choose(scores.clone(), together)])
        for one, token in zip(together, steps[-1], strict=True):
            one.take(token)
    assert [token for row in zip(*steps, strict=True) for token in row] == alone


@pytest.mark.parametrize(("total", "count"), [(65536, 64), (65536, 5), (65536, 1024), (3001, 2), (64, 64)])
def test_the_best_of_blocks_are_the_best_of_all(total: int, count: int):
    torch.manual_seed(0)  # any scores will do
    scores = torch.randn(3, total)
    scores[1] = (scores[1] * 2).round()  # many are equal
    scores[2, : total // 2] = -torch.inf
    values, tokens = top(scores, count)
    assert torch.equal(values, scores.topk(count).values)
    assert torch.equal(scores.gather(1, tokens), values)
    assert all(len(set(row)) == count for row in tokens.tolist())


def test_what_is_not_taken_leaves_no_trace():
    one = sampler(temperature=1.0, presence_penalty=0.5)
    first = [choose(LOGITS[None].clone(), [one]) for _ in range(20)]
    assert first == first[:1] * 20
    one.take(first[0][0].token)
    assert {choose(LOGITS[None].clone(), [one])[0].token for _ in range(20)} != set()
    assert one.noise != sampler(temperature=1.0).noise


def test_noise_is_uniform_and_seeds_share_none_of_it():
    numbers = []
    for seed in (-1, 0, 1, 2, 2**31):
        one = sampler(seed=seed)
        for _ in range(2000):
            numbers.append(one.noise)
            one.take(0)
    assert len(set(numbers)) == len(numbers)
    counts = torch.tensor(numbers).histc(10, 0, 1)
    assert (counts - len(numbers) / 10).abs().max() < 0.12 * len(numbers) / 10


def test_penalties_are_subtracted_for_tokens_that_the_answer_has():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    found = []
    one = sampler(presence_penalty=0.5, frequency_penalty=0.4)
    for _ in range(7):
        (chosen,) = choose(scores.clone(), [one])
        one.take(chosen.token)
        found.append(chosen.token)
    # token 0 is worth 5.0, 4.1, 3.7, 3.3, 2.9; token 1 4.0, 3.1, 2.7; token 2 3.0
    assert found == [0, 0, 1, 0, 0, 1, 2]
    eager = sampler(presence_penalty=-2.0)
    eager.take(2)
    assert choose(scores.clone(), [eager])[0].token == 0  # 5.0, and token 2 as much: the first of them
    other = sampler()
    other.take(0)
    assert choose(scores.clone(), [other])[0].token == 0


def test_logprobs_are_the_models_own():
    one = sampler(temperature=0.3, logprobs=3, presence_penalty=2.0)
    one.take(1)
    (chosen,) = choose(LOGITS[None].clone(), [one])
    assert chosen.logprob == pytest.approx(float(LOGITS[chosen.token]))
    assert [token for token, _ in chosen.top] == [1, 3, 4]
    assert [logprob for _, logprob in chosen.top] == pytest.approx([float(LOGITS[token]) for token in (1, 3, 4)])
    rows = [sampler(), sampler(logprobs=0), sampler(logprobs=20)]
    few = choose(LOGITS.repeat(3, 1), rows)
    assert [len(chosen.top) for chosen in few] == [0, 0, 5]
    assert few[1].logprob == few[2].top[0][1] == pytest.approx(float(LOGITS[1]))
