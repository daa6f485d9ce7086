"""A rater that asks a model of the catalog, in ShieldGemma's words: does this violate that policy, yes or no?"""

import logging
import math
from collections.abc import Iterable

from tunesmith import protos
from tunesmith.base_models.catalog import BaseModel
from tunesmith.base_models.prompts import Turn
from tunesmith.caller import Caller
from tunesmith.engines.base import Engine, Sampling, TokenLogprob
from tunesmith.safety.base import CATEGORIES, Probabilities

LONGEST = 6_000  # characters of a text that the model is shown: the last ones
_ASK = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_output_tokens=1, logprobs=20)
_WANTED = {"yes": True, "no": False}

_POLICIES = (
    (
        "No Sexually Explicit Information",
        "contains or seeks generation of content that references sexual acts, or other lewd content, for a "
        "purpose other than education, science or art",
    ),
    (
        "No Hate Speech",
        "contains or seeks generation of content that targets identity and/or protected attributes (e.g., "
        "dehumanizing people on the basis of identity, supporting discrimination, or promoting stereotypes)",
    ),
    (
        "No Harassment",
        "contains or seeks generation of content that is malicious, intimidating, bullying, or abusive and "
        "targets another individual (e.g., physical threats, disparaging victims of violence)",
    ),
    (
        "No Dangerous Content",
        "contains or seeks generation of content that harms oneself and/or others (e.g., accessing or building "
        "firearms and explosive devices, promotion of terrorism, instructions for suicide)",
    ),
)
"""In the order of CATEGORIES."""

log = logging.getLogger(__name__)


class ModelRater:
    """Reads P(Yes) against P(No) off a model's next token, one question a category.

    Args:
        engine: Runs the model.
        model: Which one.
        cuts: From which probability of Yes on a text is LOW, MEDIUM and HIGH.
    """

    every = 400

    def __init__(self, engine: Engine, model: BaseModel, cuts: tuple[float, float, float]) -> None:
        self._engine, self._model, self._cuts = engine, model, cuts

    def rate(self, text: str, question: str | None, caller: Caller) -> Probabilities:
        """See Rater."""
        found = []
        for title, policy in _POLICIES[: len(CATEGORIES)]:
            likely = self._ask(_prompt(text, question, title, policy), caller)
            if likely is None:
                log.warning("%s says neither Yes nor No to %r: no safety rating", self._model.id, title)
                found.append(protos.SafetyRating.HARM_PROBABILITY_UNSPECIFIED)
            else:
                found.append(protos.SafetyRating.NEGLIGIBLE + sum(likely >= cut for cut in self._cuts))
        return tuple(found)

    def _ask(self, prompt: str, caller: Caller) -> float | None:
        """Return P(Yes) out of Yes and No; None when the model thinks of neither."""
        turns = [Turn("user", prompt)]
        for chunk in self._engine.generate(self._model, None, turns, _ASK, caller.gone, caller.account):
            for place in chunk.places:
                return _yes(place.top)
        return None


def _yes(tokens: Iterable[TokenLogprob]) -> float | None:
    shares = {True: 0.0, False: 0.0}
    for token in tokens:
        meant = _WANTED.get(token.text.strip().lower())
        if meant is not None:
            shares[meant] += math.exp(token.logprob)
    total = sum(shares.values())
    return shares[True] / total if total else None


def _prompt(text: str, question: str | None, title: str, policy: str) -> str:
    what = "Human Question" if question is None else "Chatbot Response"
    parts = [] if question is None else [f"Human Question: {question[-LONGEST:].strip()}\n"]
    shown = "\n".join([*parts, f"{what}: {text[-LONGEST:].strip()}"])
    return (
        "You are a policy expert trying to help determine whether a text is in violation of the defined safety "
        f"policies.\n\n<start_of_turn>\n{shown}\n<end_of_turn>\n\n"
        "Our safety principle is defined in the below:\n\n"
        f'* "{title}": The {what} shall not be one that {policy}.\n\n'
        f"Does the {what} violate the above principle? Your answer must start with 'Yes' or 'No'. And then walk "
        "through step by step to be sure we answer correctly."
    )
