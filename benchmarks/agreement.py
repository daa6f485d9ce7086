"""Whether answers depend on who else is served, and whether they are PEFT's.

200 held-out inputs over eight adapters, greedy: asked alone, in random batches of up to 16, and of PEFT in
transformers. Prints the share of equal texts, and for each difference how sure the engine was where they part: by
how much the best token's log-probability exceeded the second's.
Run: python benchmarks/agreement.py [--prompts N] [--tokens N] [--seed N] [--no-peft] [--float32] [--quick]
"""

import argparse
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

import serving_weights
from tunesmith.base_models.device import compute_dtype
from tunesmith.base_models.prompts import FORMATS, Turn
from tunesmith.base_models.weights import Weights
from tunesmith.config import Settings
from tunesmith.engines.base import Place, Sampling
from tunesmith.engines.torch_engine import TorchEngine
from tunesmith.store.artifacts import ArtifactStore

ADAPTERS = len(serving_weights.TASKS)
MOST_TOGETHER = 16
SHOWN = 30
"""Characters of a text on each side of where it parts from another."""


@dataclass(frozen=True)
class Question:
    """An input, and the adapter that is asked."""

    text: str
    adapter: int


class Asker:
    """Asks the engine.

    Args:
        engine: The engine.
        base: Its base model.
        tokens: The longest answer.
    """

    def __init__(self, engine: TorchEngine, base: Weights, tokens: int) -> None:
        self._engine, self._base, self._tokens = engine, base, tokens

    def answer(self, question: Question) -> str:
        """Return the answer to a question."""
        return self._ask(question)[0]

    def places(self, question: Question) -> list[Place]:
        """Return the answer's tokens with the two most probable ones at each place."""
        return self._ask(question, logprobs=2)[1]

    def together(self, questions: Sequence[Question]) -> list[str]:
        """Return the answers to questions that are asked at the same moment."""
        with ThreadPoolExecutor(len(questions)) as threads:
            return list(threads.map(self.answer, questions))

    def _ask(self, question: Question, logprobs: int | None = None) -> tuple[str, list[Place]]:
        sampling = Sampling(0.0, 1.0, 1, self._tokens, logprobs=logprobs)
        path, turns = serving_weights.adapter_path(question.adapter), [Turn("user", question.text)]
        chunks = [*self._engine.generate(self._base.model, path, turns, sampling, threading.Event())]
        return "".join(chunk.text for chunk in chunks), [place for chunk in chunks for place in chunk.places]


def questions(count: int) -> list[Question]:
    """Return so many held-out inputs, in turn of each adapter's own task."""
    inputs = [[text for text, _ in serving_weights.rows_of(task, "held out")] for task in serving_weights.TASKS]
    # Adapters that were tuned on the same task get different inputs.
    return [
        Question(inputs[number % ADAPTERS][number * 7 % len(inputs[number % ADAPTERS])], number % ADAPTERS)
        for number in range(count)
    ]


def in_random_batches(asker: Asker, asked: Sequence[Question], draw: random.Random) -> list[str]:
    """Return the answers, asked in random order in batches of random size."""
    order, answers = draw.sample(range(len(asked)), len(asked)), [""] * len(asked)
    while order:
        size = draw.randint(2, MOST_TOGETHER)
        batch, order = order[:size], order[size:]
        for number, answer in zip(batch, asker.together([asked[number] for number in batch]), strict=True):
            answers[number] = answer
    return answers


@torch.inference_mode()
def of_peft(base: Weights, folder: Path, asked: Sequence[Question], tokens: int, dtype: torch.dtype) -> list[str]:
    """Return what PEFT in transformers answers, one question at a time, in the precision that we serve in."""
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
    store, tokenizer = serving_weights.artifacts_of(folder), base.tokenizer()
    model: Any = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype)
    adapted: Any = PeftModel.from_pretrained(model, f"{store}/{serving_weights.adapter_path(0)}", adapter_name="0")
    for number in range(1, ADAPTERS):
        adapted.load_adapter(f"{store}/{serving_weights.adapter_path(number)}", adapter_name=str(number))
    form = FORMATS[base.model.prompt_format]
    stops = sorted(form.stop_tokens(tokenizer))
    settings = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=stops, pad_token_id=0)
    answers = []
    for question in asked:
        adapted.set_adapter(str(question.adapter))
        prompt = torch.tensor([form.prompt(tokenizer, [Turn("user", question.text)])])
        output = adapted.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
        )
        answers.append(text_of(tokenizer, output[0, prompt.shape[1] :].tolist(), form.answer))
    return answers


def text_of(tokenizer: Tokenizer, tokens: list[int], opening: str) -> str:
    """Return an answer's text without what opens it and what ended it."""
    return str(tokenizer.decode(tokens)).removeprefix(opening)


def parting(asker: Asker, question: Question, mine: str, other: str) -> tuple[int, float]:
    """Return after how many tokens two answers part, and by how much the best token led there, in nats."""
    common = shared(mine, other)
    written = ""
    places = asker.places(question)
    for number, place in enumerate(places):
        written = (written + place.chosen.text).lstrip()
        if len(written) > common:
            return number, lead(place)
    return len(places), float("nan")  # one goes on where the other ends


def shared(a: str, b: str) -> int:
    """Return how many characters two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def lead(place: Place) -> float:
    """Return by how much the most probable token's log-probability exceeds the second's."""
    first, second = (one.logprob for one in place.top[:2])
    return first - second


def compare(
    asker: Asker, title: str, asked: Sequence[Question], mine: Sequence[str], theirs: Sequence[str]
) -> Iterator[str]:
    """Yield what there is to say of two lists of answers."""
    apart = [number for number in range(len(asked)) if mine[number] != theirs[number]]
    yield f"{title}: {len(asked) - len(apart)} of {len(asked)} the same ({1 - len(apart) / len(asked):.1%})"
    for number in apart:
        question, ours, other = asked[number], mine[number], theirs[number]
        tokens, margin = parting(asker, question, ours, other)
        at = max(shared(ours, other) - SHOWN // 2, 0)
        task = serving_weights.TASKS[question.adapter]
        yield f"  {task} (adapter {question.adapter}), after {tokens} tokens, lead {margin:.3f} nats:"
        yield f"    {ours[at : at + SHOWN]!r} and {other[at : at + SHOWN]!r}"


def main(options: argparse.Namespace) -> None:
    """Ask in each way and print what is the same."""
    settings = Settings.load()
    base = serving_weights.base_weights(settings)
    folder = serving_weights.folder_of(base)
    serving_weights.make(folder, [])
    count, tokens = (40, 24) if options.quick else (options.prompts, options.tokens)
    asked = questions(count)
    print(
        f"{base.version}, {count} inputs over {ADAPTERS} adapters, answers of at most {tokens} tokens", flush=True
    )
    store = ArtifactStore(serving_weights.artifacts_of(folder))
    dtype = torch.float32 if options.float32 else compute_dtype(torch.device("cpu"))
    engine = TorchEngine(store, settings.cache_dir, device="cpu", max_batch=settings.max_batch, dtype=dtype)
    try:
        asker, draw = Asker(engine, base, tokens), random.Random(options.seed)
        alone = timed("alone", lambda: [asker.answer(question) for question in asked])
        batched = timed("in batches", lambda: in_random_batches(asker, asked, draw))
        print(*compare(asker, "alone and in batches", asked, alone, batched), sep="\n", flush=True)
        if not options.no_peft:
            theirs = timed("PEFT", lambda: of_peft(base, folder, asked, tokens, dtype))
            print(*compare(asker, "alone and PEFT", asked, alone, theirs), sep="\n", flush=True)
    finally:
        engine.close()


def timed(title: str, ask: Callable[[], list[str]]) -> list[str]:
    """Ask, and say how long it took."""
    began = time.perf_counter()
    answers = ask()
    print(f"{title}: {time.perf_counter() - began:.1f} s, {len(set(answers))} different answers", flush=True)
    return answers


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=200, help="inputs")
    parser.add_argument("--tokens", type=int, default=48, help="the longest answer")
    parser.add_argument("--seed", type=int, default=0, help="of the batches")
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT out")
    parser.add_argument("--float32", action="store_true", help="in a precision that leaves no near ties")
    parser.add_argument("--quick", action="store_true", help="40 inputs, short answers: to see that all works")
    return parser.parse_args()


if __name__ == "__main__":
    main(arguments())
