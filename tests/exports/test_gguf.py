"""GGUF files in llama.cpp: the same tokens, the same prompts, the same answers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

import tiny
from exports import models
from exports.llama import ask
from exports.models import TEXTS, Made
from tunesmith.base_models.prompts import Turn
from tunesmith.errors import FailedPrecondition
from tunesmith.exports import templates
from tunesmith.exports.formats import FORMATS
from tunesmith.exports.gguf_file import Quantization

QUESTIONS = [f"question {number}" for number in range(8)]


def write(made: Made, path: Path, quantization: Quantization = "F32") -> Path:
    download = FORMATS["GGUF"](made.tuned, quantization)
    file = path / download.filename
    file.write_bytes(b"".join(download.pieces))
    assert file.stat().st_size == download.size
    return file


def expected(made: Made, count: int) -> list[str]:
    """What transformers answers, with PEFT's adapter."""
    tokenizer, form = made.tuned.base.tokenizer(), made.tuned.format
    prompts = [form.prompt(tokenizer, [Turn("user", question)]) for question in QUESTIONS]
    # llama.cpp ends an answer at whatever any model is known to end one with.
    ends = [tokenizer.token_to_id(token) for token in ("<eos>", "<end_of_turn>", "<|im_end|>", "<|endoftext|>")]
    stops = frozenset(ends)
    return [tokenizer.decode(tiny.greedy(made.adapted, prompt, count, stops)) for prompt in prompts]


def test_the_same_tokens_prompts_and_answers(made: Made, tmp_path: Path) -> None:
    tokenizer, form = made.tuned.base.tokenizer(), made.tuned.format
    prompts = [templates.prompt(form, question) for question in QUESTIONS]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}]
    said = ask(write(made, tmp_path), prompts, 12, TEXTS, messages)
    assert said.tokens == [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    first = templates.first_token(form) or ""
    assert said.prompt.removeprefix(first) == templates.prompt(form, "one", "Be brief.")
    assert said.answers == expected(made, 12)


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0"])
def test_narrower_weights_answer_nearly_alike(gemma: Made, tmp_path: Path, quantization: Quantization) -> None:
    exact = write(gemma, tmp_path).stat().st_size
    file = write(gemma, tmp_path, quantization)
    assert file.stat().st_size < 0.8 * exact
    prompts = [templates.prompt(gemma.tuned.format, question) for question in QUESTIONS]
    # Random weights are far less sure of a token than trained ones: only first tokens are compared.
    same = [mine == theirs for mine, theirs in zip(ask(file, prompts, 1).answers, expected(gemma, 1), strict=True)]
    assert sum(same) >= 6


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("gemma", {"layer_types": ["full_attention"] * 7}, "layer_types"),
        ("gemma", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_parameters",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, kind: str, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(FailedPrecondition, match=named):
        FORMATS["GGUF"](models.make(tmp_path, kind, **changes).tuned, "F16")


def test_an_unknown_architecture_is_refused(gemma: Made, tmp_path: Path) -> None:
    path = tmp_path / "other"
    shutil.copytree(gemma.tuned.base.path, path)
    (path / "config.json").write_text(json.dumps(models.config_of(gemma) | {"model_type": "mamba"}))
    tuned = replace(gemma.tuned, base=replace(gemma.tuned.base, path=path))
    with pytest.raises(FailedPrecondition, match="its architecture is mamba, and those that can be are gemma3"):
        FORMATS["GGUF"](tuned, "F16")


def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(gemma: Made, tmp_path: Path) -> None:
    path = tmp_path / "other"
    shutil.copytree(gemma.tuned.base.path, path)
    models.gpt2_tokenizer(pre_tokenizers.Whitespace()).save(str(path / "tokenizer.json"))
    tuned = replace(gemma.tuned, base=replace(gemma.tuned.base, path=path))
    with pytest.raises(FailedPrecondition, match="no name for how its tokenizer splits text"):
        FORMATS["GGUF"](tuned, "F16")
