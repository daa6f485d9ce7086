"""What a base model and the model tuned from it answer to some of the training data."""

import logging
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tunesmith import protos
from tunesmith.base_models.catalog import BaseModel
from tunesmith.base_models.prompts import Turn
from tunesmith.caller import Caller
from tunesmith.engines.base import Engine, Sampling
from tunesmith.errors import FailedPrecondition, InvalidArgument
from tunesmith.services import datasets

MOST = 8
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_output_tokens=128)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Example:
    row: int
    turns: Sequence[Turn]
    expected: str


def predictions(
    engine: Engine,
    base: BaseModel,
    adapter: str | None,
    examples: protos.TuningExamples,
    held_out: Collection[int],
    caller: Caller,
) -> list[protos.SamplePrediction]:
    """Return the answers to at most 8 examples, held-out ones first; none while the model cannot be asked here.

    Raises:
        Cancelled: The caller left.
        Unavailable: The engine is closing.
    """
    count = datasets.count(protos.Dataset(examples=examples))
    chosen = [_example(examples, row) for row in _rows(count, sorted(held_out))]

    def answer(example: _Example, adapter: str | None) -> str | None:
        chunks = engine.generate(base, adapter, example.turns, GREEDY, caller.gone, caller.account)
        try:
            return "".join(chunk.text for chunk in chunks)
        except InvalidArgument:  # the input is longer than the model takes
            return None

    try:
        with ThreadPoolExecutor(2 * MOST, "samples") as threads:  # so that they are one batch
            before = threads.map(answer, chosen, [None] * len(chosen))
            after = threads.map(answer, chosen, [adapter] * len(chosen))
            answers = [*zip(chosen, before, after, strict=True)]
    except FailedPrecondition as error:
        log.warning("no samples of a tuned model's answers: %s", error.message)
        return []
    return [
        protos.SamplePrediction(
            row=example.row,
            held_out=example.row in held_out,
            input=example.turns[-1].text,
            expected=example.expected,
            base_answer=untuned,
            tuned_answer=tuned,
        )
        for example, untuned, tuned in answers
        if untuned is not None and tuned is not None
    ]


def _rows(count: int, held_out: Sequence[int]) -> Iterator[int]:
    """Yield the rows to show, evenly spread: held-out ones, and others when these are few."""
    yield from _spread(held_out, MOST)
    unseen = frozenset(held_out)
    yield from _spread([row for row in range(count) if row not in unseen], MOST - min(MOST, len(held_out)))


def _spread(rows: Sequence[int], most: int) -> list[int]:
    if len(rows) <= most:
        return [*rows]
    return [rows[n * len(rows) // most] for n in range(most)]


def _example(examples: protos.TuningExamples, row: int) -> _Example:
    if examples.examples:
        pair = examples.examples[row]
        return _Example(row, [Turn("user", pair.text_input)], pair.output)
    conversation = examples.multiturn_examples[row]
    system = _text(conversation.system_instruction)
    turns = [Turn("system", system)] if system else []
    for number, content in enumerate(conversation.contents):
        turns.append(Turn("model" if number % 2 else "user", _text(content)))
    *asked, answer = turns
    return _Example(row, asked, answer.text)


def _text(content: protos.TuningContent) -> str:
    return "".join(part.text for part in content.parts)
