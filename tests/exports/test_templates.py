"""Prompt formats in other programs' words."""

import re

import pytest

import tiny
from tunesmith.base_models.prompts import FORMATS, Turn
from tunesmith.exports import templates

TURNS = [Turn("system", "Be brief."), Turn("user", "one"), Turn("model", "two"), Turn("user", "three")]


def filled(template: str, turns: list[Turn]) -> str:
    """What Ollama makes of a template of the one shape that is written: a chain of roles in a loop."""
    shape = re.fullmatch(r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}", template, re.DOTALL)
    assert shape
    start, chain = shape.groups()
    branches = re.split(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', chain)
    assert branches.pop(0) == ""
    texts = dict(zip(branches[::2], branches[1::2], strict=True))
    said = [texts[{"model": "assistant"}.get(turn.role, turn.role)] for turn in turns]
    assert not re.search(r"\{\{(?! \.Content \}\})", "".join(said))
    contents = [text.replace("{{ .Content }}", turn.text) for text, turn in zip(said, turns, strict=True)]
    return start + "".join(contents)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_ollamas_template_makes_our_prompt(name: str) -> None:
    form, tokenizer = FORMATS[name], tiny.tiny_tokenizer()
    text = (templates.first_token(form) or "") + filled(templates.ollama(form), TURNS)
    # Control tokens are parsed here, as Ollama does.
    assert tokenizer.encode(text, add_special_tokens=False).ids == form.prompt(tokenizer, TURNS)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_the_text_to_send_makes_our_prompt(name: str) -> None:
    form, tokenizer = FORMATS[name], tiny.tiny_tokenizer()
    text = (templates.first_token(form) or "") + templates.prompt(form, "one", "Be brief.")
    assert tokenizer.encode(text, add_special_tokens=False).ids == form.prompt(tokenizer, TURNS[:2])
