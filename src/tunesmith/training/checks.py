"""What is odd about training data as a whole, before training starts: most of it a person would want to know."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from tunesmith import protos
from tunesmith.base_models.prompts import PromptFormat, Turn
from tunesmith.errors import FailedPrecondition
from tunesmith.training.hyperparameters import Options
from tunesmith.training.split import normal, wanted

if TYPE_CHECKING:  # what answers requests imports this file, and starts without torch
    from tunesmith.training.examples import Row

MOST_ROWS = 100
"""Rows that a warning lists; its message counts all."""
_FEW = 5
"""Rows that a message names."""
_MARKUP = re.compile(
    r"<(?:bos|eos|pad|unk|start_of_turn|end_of_turn|begin_of_text|end_of_text|eot_id)>|<\|[a-z_]{2,30}\|>"
    r"|\[/?INST\]|</s>\s*$",
    re.IGNORECASE,
)
"""How formats of prompts mark turns and ends."""
_BROKEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]")
"""Control characters, and what decoders put where bytes were no text."""
_LONG = 2000
_LONGER = 20
"""A text of so many characters, and so many times the median, is often several that were read as one."""
_LABELS = 0.1
"""Outputs are labels when there are at most so many different ones an example."""
_DOMINATES = 0.8
_ENOUGH = 20
"""Examples below which a share of them says little."""


@dataclass(frozen=True)
class DataWarning:
    """Something about the training data that its owner may not know.

    Attributes:
        kind: A word for programs, such as `duplicate`.
        rows: Numbers of examples, from 0, at most `MOST_ROWS`; empty when it is about all of them.
        message: What it is and what to do, for a person.
    """

    kind: str
    rows: tuple[int, ...]
    message: str


@dataclass(frozen=True)
class _Example:
    """An example as the checks see it: what is asked, with all turns before it, and the last answer."""

    asked: tuple[str, ...]
    texts: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def output(self) -> str:
        return self.outputs[-1]


def of_examples(
    examples: protos.TuningExamples, held_out: Collection[int] = (), options: Options | None = None
) -> list[DataWarning]:
    """Return what the texts show; no tokenizer is needed.

    Args:
        examples: Valid training data.
        held_out: Numbers of the examples that validate.
        options: With which they were picked; None: do not ask whether they are too few.
    """
    found = [*_read(examples)]
    return [
        *_repeated(found),
        *_matching("blank_output", found, _is_blank, _BLANK),
        *_matching("stray_space", found, _is_stray, _STRAY),
        *_matching("control_text", found, lambda one: any(map(_MARKUP.search, one.texts)), _CONTROL),
        *_matching("broken_text", found, lambda one: any(map(_BROKEN.search, one.texts)), _UNREADABLE),
        *_long(found),
        *_one_sided(found),
        *_validated(found, frozenset(held_out), options),
    ]


def of_rows(
    rows: Sequence["Row"], form: PromptFormat, tokenizer: Tokenizer, limit: int, held_out: Collection[int] = ()
) -> list[DataWarning]:
    """Return what the tokens show, of rows that `examples.tokenize` made with the same arguments.

    Raises:
        FailedPrecondition: Answers leave nothing of their inputs: such rows teach to answer to nothing.
    """
    empty = len(form.prompt(tokenizer, [Turn("user", "")]))
    if hopeless := [number for number, row in enumerate(rows) if row.lost and len(row.prompt) <= empty]:
        row = rows[hopeless[0]]
        raise FailedPrecondition(
            f"The output of {_named(hopeless)} leaves no room for the input: that of examples[{hopeless[0]}] has "
            f"{len(row.output) + row.lost_output:,} tokens, and input and output together can have {limit:,}. "
            "Shorten the output, or make several examples of one."
        )
    cut = [number for number, row in enumerate(rows) if row.lost]
    warnings = []
    if cut:
        most = max(cut, key=lambda number: rows[number].lost)
        warnings.append(
            _warning(
                "input_cut",
                cut,
                f"{_named(cut)} {_has(cut)} more than the {limit:,} tokens that an input and its output can have "
                "together: the input loses its beginning (a conversation its oldest turns). "
                f"examples[{most}] loses most, {rows[most].lost:,} tokens. Shorten the input, or put what matters "
                "at its end.",
            )
        )
    learnt = {tuple(row.prompt) for number, row in enumerate(rows) if number not in held_out}
    if leaking := [number for number in sorted(held_out) if tuple(rows[number].prompt) in learnt]:
        warnings.append(
            _warning(
                "leak",
                leaking,
                f"{_named(leaking)} {_is(leaking)} held out for validation, and what the limit of {limit:,} "
                "tokens leaves of the input is also an input that is learnt: the validation loss looks better "
                "than it is. Shorten the inputs so that what tells them apart is kept.",
            )
        )
    return warnings


def _read(examples: protos.TuningExamples) -> Iterator[_Example]:
    for pair in examples.examples:
        yield _Example((pair.text_input,), (pair.text_input, pair.output), (pair.output,))
    for conversation in examples.multiturn_examples:
        contents = [conversation.system_instruction, *conversation.contents]
        system, *turns = ("".join(part.text for part in content.parts) for content in contents)
        yield _Example((system, *turns[:-1]), (system, *turns), tuple(turns[1::2]))


def _repeated(found: Sequence[_Example]) -> Iterator[DataWarning]:
    """Yield examples that say the same twice, and those that contradict each other."""
    alike: dict[tuple[str, ...], dict[str, list[int]]] = defaultdict(dict)
    for number, one in enumerate(found):
        asked = tuple(text.strip() for text in one.asked)
        alike[asked].setdefault(one.output.strip(), []).append(number)
    if again := sorted(number for outputs in alike.values() for rows in outputs.values() for number in rows[1:]):
        yield _warning(
            "duplicate",
            again,
            f"{_named(again)} {_say(again)} the same as an earlier one: what is repeated weighs more. Remove the "
            "repetitions unless they are meant.",
        )
    torn = [outputs for outputs in alike.values() if len(outputs) > 1]
    if torn:
        rows = sorted(number for outputs in torn for numbers in outputs.values() for number in numbers)
        first, second = sorted(numbers[0] for numbers in torn[0].values())[:2]
        yield _warning(
            "contradiction",
            rows,
            f"{_named(rows)} give different outputs for the same input, as examples[{first}] "
            f"{_quoted(found[first].output)} and examples[{second}] {_quoted(found[second].output)}. The model "
            "can only guess between them. Keep one, or put what tells them apart into the input.",
        )


def _matching(
    kind: str, found: Sequence[_Example], matches: Callable[[_Example], bool], message: str
) -> Iterator[DataWarning]:
    if rows := [number for number, one in enumerate(found) if matches(one)]:
        yield _warning(kind, rows, message.format(rows=_named(rows), has=_has(rows)))


_BLANK = (
    "{rows} {has} an output of white space alone: the model learns to answer with nothing. Write what it should "
    "answer, or remove these examples."
)
_STRAY = (
    "{rows} {has} white space before or after the output, which the model learns to write. Remove it unless it is "
    "meant; the prompt format puts its own between input and output."
)
_CONTROL = (
    "{rows} {has} text that marks turns or ends in some prompt format, as <eos> does: here it is learnt as "
    "letters. Remove it; the marks of the base model's own format are added for you."
)
_UNREADABLE = (
    "{rows} {has} control characters or the character U+FFFD, which stands for bytes that could not be read. Read "
    "the file with the encoding that it was written in, and send the examples again."
)


def _is_blank(one: _Example) -> bool:
    return any(not output.strip() for output in one.outputs)


def _is_stray(one: _Example) -> bool:
    return any(output.strip() not in ("", output) for output in one.outputs)


def _long(found: Sequence[_Example]) -> Iterator[DataWarning]:
    """Yield examples that are longer than the others by far."""
    lengths = [sum(map(len, one.texts)) for one in found]
    most = max(_LONG, _LONGER * median(lengths))
    if rows := [number for number, length in enumerate(lengths) if length > most]:
        yield _warning(
            "long",
            rows,
            f"{_named(rows)} {_is(rows)} more than {_LONGER} times as long as the usual {median(lengths):,.0f} "
            f"characters. Look whether several examples were read as one, as after a quotation mark that is "
            "never closed.",
        )


def _one_sided(found: Sequence[_Example]) -> Iterator[DataWarning]:
    """Yield a label that nearly all examples have."""
    counts = Counter(one.output.strip() for one in found)
    (output, times), *_ = counts.most_common(1)
    share = times / len(found)
    if len(found) < _ENOUGH or len(counts) > max(2, _LABELS * len(found)) or share < _DOMINATES:
        return
    rows = [number for number, one in enumerate(found) if one.output.strip() != output]
    yield _warning(
        "one_output",
        rows,
        f"{share:.0%} of the examples have the output {_quoted(output)}: a model that always answers so is right "
        "as often. Add examples with other outputs, or remove some of these.",
    )


def _validated(
    found: Sequence[_Example], held_out: Collection[int], options: Options | None
) -> Iterator[DataWarning]:
    """Yield what makes validation say less than it seems to."""
    if options and wanted(len(found), options) and not held_out:
        yield DataWarning(
            "nothing_held_out",
            (),
            "No examples are held out for validation: those of one input stay together, and too few inputs "
            "differ. Add examples with other inputs, or set validation_fraction to 0.",
        )
    learnt = {normal(one.output) for number, one in enumerate(found) if number not in held_out}
    if len(learnt) <= (len(found) - len(held_out)) / 2:
        return  # labels, which both sides must have
    if rows := [number for number in sorted(held_out) if normal(found[number].output) in learnt]:
        yield _warning(
            "leak",
            rows,
            f"{_named(rows)} {_is(rows)} held out for validation, and other examples teach the same output: the "
            "validation loss looks better than it is. Remove near copies if these are some.",
        )


def _warning(kind: str, rows: Sequence[int], message: str) -> DataWarning:
    return DataWarning(kind, tuple(rows[:MOST_ROWS]), message)


def _named(rows: Sequence[int]) -> str:
    """Return the rows as errors of requests name them."""
    named = [f"examples[{number}]" for number in rows[:_FEW]]
    if len(rows) > _FEW:
        return f"{len(rows):,} examples ({', '.join(named)}, …)"
    return " and ".join([", ".join(named[:-1]), named[-1]] if named[1:] else named)


def _has(rows: Sequence[int]) -> str:
    return "has" if len(rows) == 1 else "have"


def _is(rows: Sequence[int]) -> str:
    return "is" if len(rows) == 1 else "are"


def _say(rows: Sequence[int]) -> str:
    return "says" if len(rows) == 1 else "say"


def _quoted(text: str) -> str:
    short = text.strip()
    return repr(short if len(short) <= 40 else f"{short[:39]}…")
