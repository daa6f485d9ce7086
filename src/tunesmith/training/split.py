"""Which examples are held out for validation: those of one input together, by the seed and the inputs alone."""

import hashlib
import unicodedata
from collections.abc import Iterator

from tunesmith import protos
from tunesmith.training.hyperparameters import MAX_VALIDATION_FRACTION, Options

AUTOMATIC_FROM = 50
"""From this many examples on some are held out unasked: a tenth of fewer would say nothing about the model."""
AUTOMATIC_FRACTION = 0.1
AUTOMATIC_MOST = 200
"""That many tell an accuracy to within 3.5 points (standard error); more would cost each epoch time, and rows."""


def violations(options: Options, examples: int) -> Iterator[tuple[str, str]]:
    """Yield (field, reason) for each option that training with so many examples cannot take."""
    fraction = options.validation_fraction
    # Written so that NaN, which compares false to everything, is refused too.
    if fraction is not None and not 0 <= fraction <= MAX_VALIDATION_FRACTION:
        yield "validation_fraction", f"must be between 0 and {MAX_VALIDATION_FRACTION:g}, not {fraction:g}"
    elif options.patience > 0 and not wanted(examples, options):
        yield (
            "patience",
            "needs examples that are held out: give a validation_fraction above 0; without one, examples are held "
            f"out only of {AUTOMATIC_FROM} or more",
        )
    if options.patience < 0:
        yield "patience", f"must be 0 (no early stop) or a number of epochs, not {options.patience}"


def wanted(examples: int, options: Options) -> int:
    """Return how many of so many examples are to be held out."""
    if options.validation_fraction == 0:
        return 0
    if options.validation_fraction is not None:
        share = max(round(examples * options.validation_fraction), 1)
        return min(share, examples - 1)  # one must be left to learn
    if examples < AUTOMATIC_FROM:
        return 0
    return min(round(examples * AUTOMATIC_FRACTION), AUTOMATIC_MOST)


def held_out(examples: protos.TuningExamples, options: Options, seed: int) -> list[int]:
    """Return the numbers of the examples that are held out, in ascending order.

    Examples with the same input fall on one side, and so does a conversation whose last question is asked, after
    the same turns, in another one. There can be fewer than wanted, or none, when few inputs differ.
    """
    most = wanted(len(examples.examples) or len(examples.multiturn_examples), options)
    if not most:
        return []
    groups = _groups([*_questions(examples)])
    # By a hash and not by a shuffle: examples added or moved leave most others on their sides.
    chosen: list[int] = []
    for _, rows in sorted((hashlib.sha256(b"%d " % seed + key).digest(), rows) for key, rows in groups.items()):
        if len(chosen) + len(rows) <= most:
            chosen += rows
    return sorted(chosen)


def _groups(questions: list[list[bytes]]) -> dict[bytes, list[int]]:
    """Return the numbers of examples that belong together, by a key of theirs."""
    parents = {asked[-1]: asked[-1] for asked in questions}

    def root(key: bytes) -> bytes:
        while parents[key] != key:
            parents[key] = key = parents[parents[key]]
        return key

    for *earlier, last in questions:
        for key in earlier:
            if key in parents:  # else it is nobody's last question
                low, high = sorted((root(key), root(last)))
                parents[high] = low
    groups: dict[bytes, list[int]] = {}
    for number, asked in enumerate(questions):
        groups.setdefault(root(asked[-1]), []).append(number)
    return groups


def _questions(examples: protos.TuningExamples) -> Iterator[list[bytes]]:
    """Yield for each example a hash of each of its inputs with all turns before it."""
    for pair in examples.examples:
        yield [hashlib.sha256(normal(pair.text_input)).digest()]
    for conversation in examples.multiturn_examples:
        seen = hashlib.sha256()
        found = []
        for number, content in enumerate([conversation.system_instruction, *conversation.contents]):
            text = normal("".join(part.text for part in content.parts))
            seen.update(b"%d " % len(text) + text)
            if number % 2:  # 0 is the system instruction, the user begins at 1
                found.append(seen.digest())
        yield found


def normal(text: str) -> bytes:
    """Return a text without what hardly makes it another one: case, forms of characters, spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).encode()
