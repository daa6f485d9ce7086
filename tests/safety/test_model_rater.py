"""What a model is asked, and what is made of its answer."""

import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest

from tunesmith import protos
from tunesmith.base_models.catalog import BaseModel
from tunesmith.base_models.prompts import Turn
from tunesmith.caller import Caller
from tunesmith.engines.base import Chunk, Engine, Place, Sampling, TokenLogprob
from tunesmith.safety.model_rater import ModelRater

SHARES = {"Sexually": 0.1, "Hate": 0.3, "Harassment": 0.6, "Dangerous": 0.9}


class Oracle:
    """An engine whose next token is Yes as often as its table says."""

    def __init__(self, *others: TokenLogprob, answers: bool = True) -> None:
        self.prompts: list[str] = []
        self._others, self._answers = others, answers

    def generate(
        self, model: BaseModel, adapter: None, turns: Sequence[Turn], sampling: Sampling, gone: Any, caller: str
    ) -> Iterator[Chunk]:
        (turn,) = turns
        self.prompts.append(turn.text)
        share = next(share for name, share in SHARES.items() if f'"No {name}' in turn.text)
        said = [
            TokenLogprob(1, " Yes", math.log(share / 4)),
            TokenLogprob(2, "yes", math.log(share / 4)),
            TokenLogprob(3, "No", math.log((1 - share) / 2)),
        ]
        top = (*self._others, *(said if self._answers else ()))
        yield Chunk("", 9, 1, 1, places=(Place(top[0], top),))


def rater(oracle: Oracle) -> ModelRater:
    return ModelRater(cast(Engine, oracle), cast(BaseModel, BaseModel), (0.25, 0.5, 0.8))


def test_probabilities_are_read_off_yes_and_no() -> None:
    oracle = Oracle(TokenLogprob(9, "Maybe", math.log(0.5)))
    found = rater(oracle).rate("who are you?", None, Caller("a", gone=threading.Event()))
    levels = ("NEGLIGIBLE", "LOW", "MEDIUM", "HIGH")
    assert found == tuple(getattr(protos.SafetyRating, level) for level in levels)
    assert all("Human Question: who are you?" in prompt for prompt in oracle.prompts)


def test_an_answer_is_shown_with_its_question() -> None:
    oracle = Oracle()
    rater(oracle).rate("nobody", "who are you?", Caller("a"))
    assert all("Human Question: who are you?\n\nChatbot Response: nobody" in one for one in oracle.prompts)
    assert all("Does the Chatbot Response violate" in one for one in oracle.prompts)


def test_a_model_that_says_neither_leaves_the_rating_open(caplog: pytest.LogCaptureFixture) -> None:
    oracle = Oracle(TokenLogprob(9, "Maybe", -0.1), answers=False)
    oracle_rater = ModelRater(cast(Engine, oracle), BaseModel.model_construct(id="oracle"), (0.25, 0.5, 0.8))
    assert oracle_rater.rate("?", None, Caller("a")) == (0, 0, 0, 0)
    assert "says neither Yes nor No" in caplog.text
