"""Requests that share a prompt compute it once."""

import random
import threading

from prometheus_client import CollectorRegistry

from engines.packed_models import WORDS
from tunesmith.engines.base import Sampling
from tunesmith.engines.drafts import Drafter
from tunesmith.engines.request import Request
from tunesmith.engines.runner import Runner
from tunesmith.engines.sampling import Chosen, Sampler


def candidates(prompt: list[int], count: int, caller: str = "ada") -> list[Request]:
    return [
        Request(
            prompt,
            None,
            Sampler(Sampling(max_output_tokens=8, temperature=1.0, top_p=1.0, top_k=0, seed=seed)),
            Drafter(None, prompt),
            8,
            frozenset(),
            threading.Event(),
            caller=caller,
        )
        for seed in range(count)
    ]


def answer(request: Request) -> list[int]:
    tokens: list[Chosen] = []
    end = None
    while end is None:
        event = request.events.get()
        tokens += event.tokens
        end = event.end
    return [chosen.token for chosen in tokens]


def test_candidates_compute_their_prompt_once(runner: Runner, metrics: CollectorRegistry) -> None:
    drawn = random.Random(5)
    prompts = [drawn.choices(range(2, WORDS), k=length) for length in (200, 20)]
    alone = []
    for prompt in prompts:
        for number in range(4):
            request = candidates(prompt, 4, f"caller {number}")[number]  # nobody recalls what another's slot saw
            runner.submit(request)
            alone.append(answer(request))
    recalled = {"name": "tunesmith_recalled_prompt_tokens_total", "labels": {"model": "random"}}
    assert metrics.get_sample_value(**recalled) == 0
    together = [request for prompt in prompts for request in candidates(prompt, 4)]
    runner.submit(*together)
    assert [answer(request) for request in together] == alone
    assert metrics.get_sample_value(**recalled) == 3 * 192
