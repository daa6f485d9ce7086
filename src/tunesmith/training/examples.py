"""Examples to rows of tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from tokenizers import Tokenizer

from tunesmith import protos
from tunesmith.base_models.prompts import PromptFormat, Turn


@dataclass(frozen=True)
class Row:
    """One example as token ids; only the answers' tokens are learnt.

    Attributes:
        prompt: What comes before the last answer.
        output: The last answer.
        earlier: Where in the prompt the earlier answers of a conversation begin and end.
        lost: Tokens that the limit took from the prompt.
        lost_output: Tokens that it took from the end of the last answer.
    """

    prompt: list[int]
    output: list[int]
    earlier: tuple[tuple[int, int], ...] = ()
    lost: int = field(default=0, compare=False)
    lost_output: int = field(default=0, compare=False)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def answers(self) -> list[tuple[int, int]]:
        """Where all answers begin and end."""
        return [*self.earlier, (len(self.prompt), len(self))]

    @property
    def learnt(self) -> int:
        """How many tokens are learnt."""
        return sum(end - start for start, end in self.answers)


def tokenize(
    examples: protos.TuningExamples, prompt_format: PromptFormat, tokenizer: Tokenizer, limit: int
) -> list[Row]:
    """Return a row an example, each of at most `limit` tokens.

    A longer row loses what is farthest from its last answer: a conversation its oldest inputs with their
    answers, and an input its beginning; an answer that is longer by itself loses its end.
    """
    conversations = [
        *([Turn("user", pair.text_input), Turn("model", pair.output)] for pair in examples.examples),
        *(_turns(example) for example in examples.multiturn_examples),
    ]
    return [_row(turns, prompt_format, tokenizer, limit) for turns in conversations]


def _turns(example: protos.TuningMultiturnExample) -> list[Turn]:
    """Return a conversation's turns, which alternate whether they name their roles or not."""
    system = _text(example.system_instruction)
    turns = [Turn("system", system)] if system else []
    for number, content in enumerate(example.contents):
        turns += [Turn("model" if number % 2 else "user", _text(content))]
    return turns


def _text(content: protos.TuningContent) -> str:
    return "".join(part.text for part in content.parts)


def _row(turns: Sequence[Turn], form: PromptFormat, tokenizer: Tokenizer, limit: int) -> Row:
    system = [turn for turn in turns[:1] if turn.role == "system"]
    *inputs, answer = turns[len(system) :]
    bare = form.opening(tokenizer)
    opening = form.opening(tokenizer, system[0].text) if system else bare
    whole = form.output(tokenizer, answer.text)
    output = whole[: limit - len(bare) - 1]
    room = limit - len(output)
    head = len(form.prompt(tokenizer, system))
    prompt, earlier = form.conversation(tokenizer, [*system, *inputs])
    before = len(prompt)
    while earlier and len(prompt) > room:  # once, or again when tokens that span texts make the guess wrong
        ends = (end + len(form.between) - head for _, end in earlier)
        enough = (n for n, gone in enumerate(ends, 1) if len(prompt) - gone <= room)
        inputs = inputs[2 * next(enough, len(earlier)) :]
        prompt, earlier = form.conversation(tokenizer, [*system, *inputs])
    excess = len(prompt) - room
    if excess > 0:
        if 2 * len(opening) > room:
            opening = bare  # a system instruction that leaves the input no room loses its own beginning
        prompt = opening + prompt[len(opening) + excess :]
    return Row(prompt, output, tuple(earlier), before - len(prompt), len(whole) - len(output))


def order(rows: int, seed: int, first: int = 0) -> Iterator[int]:
    """Yield row numbers for ever: epoch after epoch, each in an order of its own, from position `first` on.

    An epoch's order depends on the seed and its number alone, so training resumes anywhere without replay.
    """
    epoch, skip = divmod(first, rows)
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        yield from islice(torch.randperm(rows, generator=generator).tolist(), skip, None)
        epoch, skip = epoch + 1, 0
