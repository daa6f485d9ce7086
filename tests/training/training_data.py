"""Training data, and what PEFT makes of an adapter, for tests."""

from collections.abc import Iterable, Mapping, Sequence

import peft
import torch

from tiny import reference_model
from tunesmith import protos
from tunesmith.training.loop import Base


def pairs(*texts: tuple[str, str]) -> protos.TuningExamples:
    """Examples of inputs and outputs."""
    return protos.TuningExamples(examples=[protos.TuningExample(text_input=i, output=o) for i, o in texts])


def conversation(turns: Sequence[str], system: str | None = None) -> protos.TuningMultiturnExample:
    """An example of turns, the user's first."""
    contents = [protos.TuningContent(parts=[protos.TuningPart(text=text)]) for text in turns]
    example = protos.TuningMultiturnExample(contents=contents)
    if system is not None:
        example.system_instruction.parts.add(text=system)
    return example


def conversations(examples: Iterable[protos.TuningMultiturnExample]) -> protos.TuningExamples:
    """Examples of several turns."""
    return protos.TuningExamples(multiturn_examples=examples)


def in_peft(base: Base, files: Mapping[str, bytes], dtype: torch.dtype = torch.float32) -> peft.PeftModel:
    """The model as PEFT loads it from an adapter's files."""
    folder = base.weights.path.parent.parent / "exported"
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return peft.PeftModel.from_pretrained(reference_model(base.weights, dtype), folder)
