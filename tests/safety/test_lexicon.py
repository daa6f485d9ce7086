"""The embedded rater on texts that anybody would rate alike."""

import pytest

from tunesmith import protos
from tunesmith.caller import Caller
from tunesmith.safety.lexicon import OVERLAP, WINDOW, LexiconRater

NAMES = ("SEXUALLY_EXPLICIT", "HATE_SPEECH", "HARASSMENT", "DANGEROUS_CONTENT")
NEGLIGIBLE, LOW, MEDIUM, HIGH = (
    getattr(protos.SafetyRating, name) for name in ("NEGLIGIBLE", "LOW", "MEDIUM", "HIGH")
)


def rated(text: str) -> dict[str, int]:
    return dict(zip(NAMES, LexiconRater().rate(text, None, Caller("nobody")), strict=True))


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("He was having sex with her, naked, moaning.", "SEXUALLY_EXPLICIT"),
        ("All immigrants are vermin and should be deported.", "HATE_SPEECH"),
        ("Shut up, you worthless piece of shit.", "HARASSMENT"),
        ("Explain how to build a bomb at home.", "DANGEROUS_CONTENT"),
    ],
)
def test_each_category_is_found_and_no_other(text: str, category: str) -> None:
    found = rated(text)
    assert found[category] >= MEDIUM
    assert all(found[other] < MEDIUM for other in NAMES if other != category)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "LXIII",
        "How do I kill a process that listens on port 8080?",
        "Chicken breasts need twenty minutes in the oven.",
        "Muslims fast during Ramadan.",
        "I hate Mondays.",
        "The garbage collector runs when memory is low.",
    ],
)
def test_harmless_texts_with_words_that_sound_otherwise(text: str) -> None:
    assert set(rated(text).values()) == {NEGLIGIBLE}


@pytest.mark.parametrize("first", ["k1ll", "KILL", "kiiiill", "ｋｉｌｌ", "kill "])
def test_disguises_are_taken_off(first: str) -> None:
    assert rated(f"{first} yourself")["HARASSMENT"] >= MEDIUM


def test_more_of_it_is_more_probable() -> None:
    once = rated("Fuck you.")["HARASSMENT"]
    assert MEDIUM <= once < rated("Fuck you, you worthless piece of shit, go die.")["HARASSMENT"] == HIGH


def test_help_and_refusals_are_taken_for_less() -> None:
    asked = rated("How to build a pipe bomb.")["DANGEROUS_CONTENT"]
    refused = rated("I'm sorry, I can't tell you how to build a pipe bomb.")["DANGEROUS_CONTENT"]
    assert refused < asked


def test_a_long_text_is_judged_by_its_worst_place() -> None:
    harmless = "The cat sat on the mat. " * 200
    assert rated(f"{harmless}Kill yourself, you worthless piece of shit.{harmless}")["HARASSMENT"] == HIGH
    border = "x" * (WINDOW - OVERLAP // 2) + " kill yourself, piece of shit " + "x" * WINDOW
    assert rated(border)["HARASSMENT"] == HIGH
    sparse = ("The idiot came back. " + harmless) * 20
    assert rated(sparse)["HARASSMENT"] < MEDIUM
