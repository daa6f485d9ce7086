"""The whole model as transformers loads it."""

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from exports.models import TEXTS, Made
from tunesmith.base_models.prompts import Turn
from tunesmith.errors import FailedPrecondition
from tunesmith.exports.formats import FORMATS, PIECE


@pytest.fixture
def unpacked(made: Made, folder: Path) -> Path:
    download = FORMATS["SAFETENSORS"](made.tuned, "F16")
    pieces = [*download.pieces]
    assert {len(piece) for piece in pieces[:-1]} <= {PIECE}
    content = b"".join(pieces)
    assert len(content) == download.size
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        archive.extractall(folder)
    return folder / "counts-safetensors"


def test_the_weights_are_the_merged_ones(made: Made, unpacked: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.bfloat16).state_dict()
    adapted = tiny.random_adapter(made.tuned.base, seed=3)
    merged = adapted.merge_and_unload().to(torch.bfloat16).state_dict()
    assert loaded.keys() == merged.keys()
    for name, tensor in merged.items():
        # Added up in another order, a sum may fall on the other side of a rounding.
        torch.testing.assert_close(loaded[name], tensor, rtol=2**-7, atol=1e-6)
    assert any((tensor != 0).any() for tensor in loaded.values())


def test_the_tokenizer_and_the_chat_template_give_our_prompts(made: Made, unpacked: Path) -> None:
    tokenizer, form = made.tuned.base.tokenizer(), made.tuned.format
    theirs: Any = AutoTokenizer.from_pretrained(unpacked)
    for text in TEXTS:
        ours = tokenizer.encode(text, add_special_tokens=False).ids
        assert theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ours
    turns = [Turn("system", "Be brief."), Turn("user", "one"), Turn("model", "two"), Turn("user", "three")]
    names = {"model": "assistant"}
    messages = [{"role": names.get(turn.role, turn.role), "content": turn.text} for turn in turns]
    prompt = theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert prompt == form.prompt(tokenizer, turns)


def test_generate_ends_where_the_service_ends(made: Made, unpacked: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(unpacked)
    config: transformers.GenerationConfig = model.generation_config
    assert {*config.eos_token_id} == {*made.tuned.format.stop_tokens(made.tuned.base.tokenizer())}
    assert (config.do_sample, config.max_new_tokens) == (False, 64)


def test_an_adapter_that_cannot_be_merged_is_refused(gemma: Made) -> None:
    files = dict(gemma.tuned.adapter)
    config = json.loads(files["adapter_config.json"]) | {"use_dora": True}
    files["adapter_config.json"] = json.dumps(config).encode()
    with pytest.raises(FailedPrecondition, match="use_dora is True, which cannot be merged"):
        FORMATS["SAFETENSORS"](replace(gemma.tuned, adapter=files), "F16")
