"""Guesses: what they are made of, and that they change no answer and no distribution."""

import random
import threading
from collections import Counter

import pytest
import torch

from engines.packed_models import WORDS
from tunesmith.engines.base import Sampling
from tunesmith.engines.drafts import TOKENS, Drafter, Guess, OutputTrie, worth
from tunesmith.engines.request import Ended, Request
from tunesmith.engines.runner import Runner
from tunesmith.engines.sampling import Sampler

END = 1
OUTPUTS = [[10, 11, 12, END], [10, 11, 13, END], [10, 11, 13, END], [20, 10, 30, 31, END]]


def guessed(drafter: Drafter, most: int = 15, least: float = 0.01) -> list[int]:
    return [guess.token for guess in drafter.guesses(most, least)]


def test_an_output_is_guessed_from_its_beginning() -> None:
    trie = OutputTrie.of(OUTPUTS)
    assert trie.next([]) == (10, 0.75)
    assert trie.next([10, 11]) == (13, pytest.approx(2 / 3))
    assert trie.next([20, 10]) == (30, 1.0)  # within an output 10 goes on otherwise than at its beginning
    assert trie.next([99, 98, 97, 96, 13]) == (END, 1.0)  # the longest end that is known
    assert trie.next([99, 98, 97, 96, 95]) is None
    assert OutputTrie.of([]).next([]) is None


def test_what_follows_anything_is_not_guessed() -> None:
    assert OutputTrie.of([[5, token, END] for token in range(50, 60)]).next([5]) is None


def test_a_trie_is_the_same_from_its_file() -> None:
    trie = OutputTrie.of(OUTPUTS)
    again = OutputTrie.read(trie.content)
    assert all(again.next(answer) == trie.next(answer) for answer in ([], [10], [10, 11], [13], [20, 10, 30]))
    assert again.content == trie.content


def test_a_trie_of_many_outputs_stays_small() -> None:
    drawn = random.Random(1)
    outputs = [[drawn.randrange(9) for _ in range(40)] for _ in range(10_000)]
    assert len(OutputTrie.of(outputs).content) < 20 * 4 * TOKENS


def test_a_draft_goes_on_from_guess_to_guess() -> None:
    drafter = Drafter(OutputTrie.of(OUTPUTS), [2, 3])
    assert guessed(drafter) == [10, 11, 13, END]
    drafter.take(20)
    assert guessed(drafter) == [10, 30, 31, END]
    assert guessed(drafter, most=2) == [10, 30]


def test_a_prompt_and_the_answer_itself_are_copied_from() -> None:
    drafter = Drafter(None, [5, 6, 7, 8, 9, 2, 3])
    drafter.take(5)
    drafter.take(6)
    assert guessed(drafter, most=3) == [7, 8, 9]
    for token in (40, 41, 42, 40, 41):
        drafter.take(token)
    assert guessed(drafter, most=4) == [42, 40, 41, 42]  # it begins to repeat itself
    assert guessed(Drafter(None, [5])) == []


def test_a_source_that_errs_is_trusted_less() -> None:
    drafter = Drafter(OutputTrie.of(OUTPUTS), [2, 3])
    before = drafter.guesses(1, 0.0)[0]
    for _ in range(3):
        drafter.learn(before, right=False)
    after = drafter.guesses(1, 0.0)[0]
    assert after.chance < 0.6 * before.chance
    for _ in range(9):
        drafter.learn(before, right=True)
    assert drafter.guesses(1, 0.0)[0].chance > before.chance


def chances(*some: float) -> list[Guess]:
    return [Guess(0, chance, 0) for chance in some]


def test_what_costs_nothing_is_guessed_and_what_costs_more_only_where_it_pays() -> None:
    assert worth([chances(0.2, 0.1)], 16) == [2]
    assert worth([chances(*[0.04] * 15), chances(*[0.05] * 15)], 16) == [0, 14]  # two of 16 are taken
    assert worth([chances(0.1)] * 16, 16) == [0] * 16
    assert worth([chances(0.9, 0.8)] * 16, 16) == [2] * 16
    assert worth([chances(0.9, 0.01)] * 16, 16) == [1] * 16
    assert worth([], 16) == []


class Oracle(Drafter):
    """Knows how the answer goes on, and errs at times."""

    def __init__(self, answer: list[int], errs: float, seed: int) -> None:
        super().__init__(None, [0])
        self._known, self._errs, self._drawn = answer, errs, random.Random(seed)

    def guesses(self, most: int, least: float) -> list[Guess]:
        following = self._known[len(self._text) - 1 :][:most]
        return [
            Guess(self._drawn.randrange(WORDS) if self._drawn.random() < self._errs else token, 0.9, 0)
            for token in following
        ]


class Silent(Drafter):
    """Guesses nothing."""

    def guesses(self, most: int, least: float) -> list[Guess]:
        return []


def answers(
    runner: Runner, prompts: list[list[int]], samplings: list[Sampling], drafters: list[Drafter]
) -> list[list[int]]:
    """What comes of prompts that are asked together."""
    requests = [
        Request(
            prompt,
            None,
            Sampler(sampling),
            drafter,
            sampling.max_output_tokens,
            frozenset({END}),
            threading.Event(),
        )
        for prompt, sampling, drafter in zip(prompts, samplings, drafters, strict=True)
    ]
    runner.submit(*requests)
    found = []
    for request in requests:
        found.append([])
        end = None
        while end is None:
            event = request.events.get()
            end = event.end
            found[-1] += [chosen.token for chosen in event.tokens]
        assert isinstance(end, Ended), end
    return found


def prompts_of(count: int) -> list[list[int]]:
    drawn = random.Random(3)
    return [drawn.choices(range(2, WORDS), k=drawn.randrange(2, 60)) for _ in range(count)]


@pytest.mark.parametrize("errs", [0.0, 0.3, 1.0])
def test_guesses_change_no_answer(runner: Runner, errs: float) -> None:
    prompts = prompts_of(12)
    kinds = [
        Sampling(max_output_tokens=60, temperature=0.0, top_p=1.0, top_k=0),
        Sampling(max_output_tokens=60, temperature=1.0, top_p=0.9, top_k=40, seed=5),
        Sampling(
            max_output_tokens=60, temperature=0.7, top_p=1.0, top_k=0, seed=6, frequency_penalty=0.5, logprobs=2
        ),
    ]
    samplings = [kinds[number % 3] for number in range(12)]
    plain = answers(runner, prompts, samplings, [Silent(None, prompt) for prompt in prompts])
    assert len({tuple(answer) for answer in plain}) == 12
    oracles = [Oracle(answer, errs, number) for number, answer in enumerate(plain)]
    assert answers(runner, prompts, samplings, oracles) == plain
    alone = [
        answers(runner, [prompt], [sampling], [Oracle(answer, errs, 99)])[0]
        for prompt, sampling, answer in zip(prompts, samplings, plain, strict=True)
    ]
    assert alone == plain
    real = [Drafter(OutputTrie.of(plain[:6]), prompt) for prompt in prompts]
    assert answers(runner, prompts, samplings, real) == plain


def test_nothing_is_guessed_past_the_end_of_what_the_model_holds(runner: Runner) -> None:
    drawn = random.Random(4)
    prompt = drawn.choices(range(2, WORDS), k=runner.longest - 9)
    sampling = Sampling(max_output_tokens=60, temperature=0.0, top_p=1.0, top_k=0)
    (plain,) = answers(runner, [prompt], [sampling], [Silent(None, prompt)])
    assert len(plain) == 9
    guessing: list[Drafter] = [Oracle([*plain, *range(2, 40)], 0.0, 1)]
    assert answers(runner, [prompt], [sampling], guessing) == [plain]


def test_right_guesses_save_passes(runner: Runner) -> None:
    prompt, sampling = prompts_of(1)[0], Sampling(max_output_tokens=64, temperature=0.0, top_p=1.0, top_k=0)
    passes: Counter[str] = Counter()
    forward = runner._network.forward
    runner._network.forward = lambda pieces: (passes.update(["passes"]), forward(pieces))[1]  # type: ignore[method-assign]
    (plain,) = answers(runner, [prompt], [sampling], [Silent(None, prompt)])
    before = passes.pop("passes")
    assert before == len(plain)
    (again,) = answers(runner, [prompt], [sampling], [Oracle(plain, 0.0, 1)])
    assert again == plain
    assert passes["passes"] == 1 + -(-(len(plain) - 1) // 16)


def test_guesses_keep_the_distribution(runner: Runner) -> None:
    """What is drawn with guesses, right and wrong, is as often what the model says as what is drawn without."""
    prompt, draws = prompts_of(1)[0], 3000
    common = {"temperature": 1.0, "top_p": 1.0, "top_k": 4}
    samplings = [Sampling(max_output_tokens=2, seed=seed, **common) for seed in range(draws)]
    drafters: list[Drafter] = [Oracle([seed % WORDS] * 2, 0.5, seed) for seed in range(draws)]
    favourite = answers(
        runner,
        [prompt],
        [Sampling(max_output_tokens=2, temperature=0.0, top_p=1.0, top_k=0)],
        [Silent(None, prompt)],
    )[0]
    for number in range(0, draws, 2):
        drafters[number] = Oracle(favourite, 0.0, number)  # one that is often right
    found = Counter()
    for start in range(0, draws, 500):
        end = start + 500
        drawn = answers(runner, [prompt] * 500, samplings[start:end], drafters[start:end])
        found.update(tuple(answer) for answer in drawn)
    expected = {}
    for first, chance in likely(runner, prompt):
        for second, then in likely(runner, [*prompt, first]):
            expected[(first, second)] = draws * chance * then
    assert set(found) <= set(expected)
    assert len(expected) == 16
    squares = sum((found[pair] - often) ** 2 / often for pair, often in expected.items())
    assert squares < 37.7  # chi squared of 15 degrees of freedom is more once in 1,000 times


def likely(runner: Runner, tokens: list[int]) -> list[tuple[int, float]]:
    """The four likeliest tokens and how often each of them is drawn."""
    sampling = Sampling(max_output_tokens=1, temperature=0.0, top_p=1.0, top_k=0, logprobs=4)
    request = Request(tokens, None, Sampler(sampling), Silent(None, tokens), 1, frozenset(), threading.Event())
    runner.submit(request)
    (chosen,) = request.events.get().tokens
    weights = torch.softmax(torch.tensor([logprob for _, logprob in chosen.top]), 0).tolist()
    return [(token, weight) for (token, _), weight in zip(chosen.top, weights, strict=True)]
