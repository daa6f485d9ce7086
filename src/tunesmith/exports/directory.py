"""A tuned model as the directory that transformers and vLLM load: the merged weights and what belongs to them."""

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

from tunesmith.exports import readme, templates
from tunesmith.exports.adapter import Adapter
from tunesmith.exports.archive import File
from tunesmith.exports.merged import Merged
from tunesmith.exports.tuned import Tuned

_OUR_OWN = ("_model_name_or_path", "_sliding_window_pattern")
"""Keys of config.json that tell where the base model came from."""
_INDEX = "model.safetensors.index.json"


def files(tuned: Tuned) -> list[File]:
    """Return the directory's files, small ones first.

    Raises:
        FailedPrecondition: The adapter cannot be merged.
    """
    path = tuned.base.path
    merged = Merged(path, Adapter.read(tuned.adapter))
    tokenizer = tuned.base.tokenizer()
    texts = {
        "README.md": readme.safetensors(tuned),
        "config.json": _json(_config(tuned)),
        "generation_config.json": _json(_generation_config(tuned, tokenizer)),
        "tokenizer_config.json": _json(_tokenizer_config(tuned)),
        "chat_template.jinja": templates.jinja(tuned.format),
    }
    small = [File.of(name, text.encode()) for name, text in texts.items()]
    copied = [name for name in ("tokenizer.json", _INDEX) if (path / name).exists()]
    small += [File.of(name, (path / name).read_bytes()) for name in copied]
    return [*small, *(File(name, file.size, merged.safetensors(file)) for name, file in merged.files.items())]


def _config(tuned: Tuned) -> dict[str, Any]:
    """Return config.json, with the rotary base also where transformers before version 5 looks for it."""
    config: dict[str, Any] = json.loads((tuned.base.path / "config.json").read_text("utf-8"))
    for key in _OUR_OWN:
        config.pop(key, None)
    ropes = config.get("rope_parameters") or {}
    if "rope_theta" in ropes:
        config["rope_theta"] = ropes["rope_theta"]
    return config


def _generation_config(tuned: Tuned, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what generation is by default: as the service answers."""
    config: dict[str, Any] = {
        "eos_token_id": sorted(tuned.format.stop_tokens(tokenizer)),
        "do_sample": tuned.temperature > 0,
        "max_new_tokens": tuned.base.model.output_token_limit,
    }
    if tuned.temperature > 0:
        config |= {"temperature": tuned.temperature, "top_p": tuned.top_p, "top_k": tuned.top_k}
    return config | dict(_ids(tuned, tokenizer))


def _tokenizer_config(tuned: Tuned) -> dict[str, Any]:
    """Return what makes every version of transformers take tokenizer.json as it is."""
    found = tuned.base.path / "tokenizer_config.json"
    kept = json.loads(found.read_text("utf-8")) if found.exists() else {}
    names = {name: kept[name] for name in ("pad_token", "unk_token") if isinstance(kept.get(name), str)}
    first = templates.first_token(tuned.format)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": tuned.base.model.input_token_limit,
        "eos_token": tuned.format.end.token,
        **({"bos_token": first} if first else {}),
        **names,
    }


def _ids(tuned: Tuned, tokenizer: Tokenizer) -> Iterator[tuple[str, int | None]]:
    first = templates.first_token(tuned.format)
    if first is not None:
        yield "bos_token_id", tokenizer.token_to_id(first)
    config = json.loads((tuned.base.path / "config.json").read_text("utf-8"))
    if isinstance(config.get("pad_token_id"), int):
        yield "pad_token_id", config["pad_token_id"]


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
