"""Examples to rows of tokens, and rows to batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from tokenizers import Tokenizer

from tunesmith import protos
from tunesmith.base_models.prompts import PromptFormat, Turn


@dataclass(frozen=True)
class Row:
    """One example as token ids; only the output's tokens are learnt."""

    prompt: list[int]
    output: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.output)


def tokenize(
    examples: protos.TuningExamples, prompt_format: PromptFormat, tokenizer: Tokenizer, limit: int
) -> list[Row]:
    """Return a row an example, each of at most `limit` tokens.

    A longer row loses the beginning of its input, the part farthest from the answer; an output that is
    longer by itself loses its end.
    """
    opening = prompt_format.opening(tokenizer)
    rows = []
    for example in examples.examples:
        prompt = prompt_format.prompt(tokenizer, [Turn("user", example.text_input)])
        output = prompt_format.output(tokenizer, example.output)[: limit - len(opening) - 1]
        excess = len(prompt) + len(output) - limit
        if excess > 0:
            prompt = opening + prompt[len(opening) + excess :]
        rows.append(Row(prompt, output))
    return rows


def order(rows: int, seed: int, first: int = 0) -> Iterator[int]:
    """Yield row numbers for ever: epoch after epoch, each in an order of its own, from position `first` on.

    An epoch's order depends on the seed and its number alone, so training resumes anywhere without replay.
    """
    epoch, skip = divmod(first, rows)
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        yield from islice(torch.randperm(rows, generator=generator).tolist(), skip, None)
        epoch, skip = epoch + 1, 0


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to one length, ready for the model.

    Attributes:
        tokens: (rows, length) token ids.
        attention: (rows, length), 1 where there is a token.
        positions: (targets, 2) row and column whose hidden state predicts a target.
        targets: (targets,) output tokens to be predicted.
    """

    tokens: torch.Tensor
    attention: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor


def collate(rows: Sequence[Row], device: torch.device) -> Batch:
    """Return the rows as one batch."""
    length = max(map(len, rows))
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    attention = torch.zeros(len(rows), length, dtype=torch.long)
    positions, targets = [], []
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row.prompt + row.output)
        attention[number, : len(row)] = 1
        positions += [(number, column) for column in range(len(row.prompt) - 1, len(row) - 1)]
        targets += row.output
    return Batch(
        tokens.to(device),
        attention.to(device),
        torch.tensor(positions, device=device),
        torch.tensor(targets, device=device),
    )


def micro_batches(rows: Sequence[Row], most_tokens: int) -> Iterator[list[Row]]:
    """Split a batch into parts of at most `most_tokens` padded tokens (or one row), long rows first."""
    part: list[Row] = []
    for row in sorted(rows, key=len, reverse=True):
        if part and len(part[0]) * (len(part) + 1) > most_tokens:
            yield part
            part = []
        part.append(row)
    if part:
        yield part
