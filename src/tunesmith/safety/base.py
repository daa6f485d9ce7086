"""What the service asks of a rater."""

from typing import Protocol

from tunesmith import protos
from tunesmith.caller import Caller

HARM = protos.POOL.FindEnumTypeByName("google.ai.generativelanguage.v1beta.HarmCategory")


def category(name: str) -> int:
    """Return a `HarmCategory` by its name without what all begin with."""
    number: int = HARM.values_by_name[f"HARM_CATEGORY_{name}"].number
    return number


CATEGORIES = tuple(map(category, ("SEXUALLY_EXPLICIT", "HATE_SPEECH", "HARASSMENT", "DANGEROUS_CONTENT")))
"""What texts are rated for, in the order in which ratings come."""

Probabilities = tuple[int, ...]
"""A `SafetyRating.HarmProbability` for each of `CATEGORIES`; unspecified where a rater could not say."""


class Rater(Protocol):
    """Says how likely it is that a text is harmful.

    Attributes:
        every: How many characters an answer may grow by, while it is streamed, until it is rated again.
    """

    every: int

    def rate(self, text: str, question: str | None, caller: Caller) -> Probabilities:
        """Return the probability of each category.

        Args:
            text: What somebody asks, or what a model answers.
            question: What the answer answers; None when the text is a question.
            caller: Who asks; a rater that is a model takes its turns with theirs.

        Raises:
            Cancelled: The caller has left.
        """
        ...
