"""Training data as requests bring it: pairs, or conversations in v1alpha's form."""

from collections.abc import Iterator

from tunesmith import protos

LONGEST_INPUT = 40_000
LONGEST_OUTPUT = 5_000
NO_EXAMPLES = (
    "no examples were received. google-genai 1.47.0 and later (and @google/genai from 1.28.0) leave "
    "training_dataset out of the request: use 1.46.0 (1.27.0), or pass the examples yourself as "
    "config.http_options.extra_body = {'tuningTask': {'trainingData': {'examples': {'examples': "
    "[{'textInput': …, 'output': …}]}}}}"
)


def count(dataset: protos.Dataset) -> int:
    """Return the number of examples."""
    return len(dataset.examples.examples) or len(dataset.examples.multiturn_examples)


def violations(dataset: protos.Dataset, path: str) -> Iterator[tuple[str, str]]:
    """Yield all that is wrong with training data, row by row, each with the path of its field."""
    pairs, conversations = dataset.examples.examples, dataset.examples.multiturn_examples
    if not pairs and not conversations:
        yield path, NO_EXAMPLES
    if pairs and conversations:
        yield f"{path}.examples", "all examples must be of one kind: give examples or multiturn_examples, not both"
    for number, pair in enumerate(pairs):
        row = f"{path}.examples.examples[{number}]"
        yield from _text(pair.text_input, f"{row}.text_input", LONGEST_INPUT)
        yield from _text(pair.output, f"{row}.output", LONGEST_OUTPUT)
    for number, conversation in enumerate(conversations):
        yield from _conversation(conversation, f"{path}.examples.multiturn_examples[{number}]")


def _conversation(example: protos.TuningMultiturnExample, path: str) -> Iterator[tuple[str, str]]:
    if example.HasField("system_instruction"):
        yield from _parts(example.system_instruction, f"{path}.system_instruction", LONGEST_INPUT)
    if not example.contents:
        yield f"{path}.contents", "contents is not specified"
    for number, content in enumerate(example.contents):
        expected, most = ("model", LONGEST_OUTPUT) if number % 2 else ("user", LONGEST_INPUT)
        # A turn without a role is the one whose turn it is, as in a request's contents.
        if content.role not in ("", expected):
            yield (
                f"{path}.contents[{number}].role",
                f"must be {expected}, not {content.role!r}: roles alternate, and the user begins",
            )
        yield from _parts(content, f"{path}.contents[{number}]", most)
    if len(example.contents) % 2:
        yield f"{path}.contents", "the last content must be the model's"


def _parts(content: protos.TuningContent, path: str, most: int) -> Iterator[tuple[str, str]]:
    return _text("".join(part.text for part in content.parts), f"{path}.parts", most)


def _text(text: str, path: str, most: int) -> Iterator[tuple[str, str]]:
    if not text:
        yield path, f"{path.rpartition('.')[2]} is empty"
    elif len(text) > most:
        yield path, f"must be at most {most:,} characters long, not {len(text):,}"
