"""What is exported: a tuned model with its base model's weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from tunesmith.base_models.prompts import FORMATS, PromptFormat
from tunesmith.base_models.weights import Weights


@dataclass(frozen=True)
class Tuned:
    """A tuned model.

    Attributes:
        id: Its id, without `tunedModels/`.
        display_name: What its owner calls it; may be empty.
        made: When it was created.
        base: The base model's weights.
        adapter: The adapter's files, as PEFT has them.
        prompt_format: The format that it was tuned with, a name in `FORMATS`.
        temperature, top_p, top_k: What it answers with when a request does not say.
    """

    id: str
    display_name: str
    made: datetime
    base: Weights
    adapter: Mapping[str, bytes]
    prompt_format: str
    temperature: float
    top_p: float
    top_k: int

    @property
    def format(self) -> PromptFormat:
        """How it is asked."""
        return FORMATS[self.prompt_format]

    @property
    def title(self) -> str:
        """What it is called in a heading."""
        return self.display_name or self.id
