"""Tuned models with random weights, of the kinds that can be exported."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import tiny
from tunesmith.base_models import weights
from tunesmith.base_models.catalog import BaseModel
from tunesmith.base_models.weights import Weights
from tunesmith.exports.tuned import Tuned

TEXTS = (
    "one two three",
    "  spaced   out ",
    "a\n\nb\n\n\n\tc",
    "naïve café 🙂",
    "def f(x):\n    return x + 1",
    "1234567 12 3 4.5e-3",
    "<eos> <|im_end|> [x]",
    "六七八 don't I'LL we've",
)
"""Texts on which tokenizers like to differ."""

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Made:
    """A tuned model, and the same as PEFT runs it."""

    tuned: Tuned
    adapted: Any


def gpt2_tokenizer(split: Any) -> Tokenizer:
    """A tokenizer of GPT-2's kind, trained on a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = [AddedToken(token, special=True, normalized=False) for token in tiny.SPECIALS]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(["one two three the then other 12 123 2024 don't we've"] * 4, trainer)
    return tokenizer


_SHAPE: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def _gemma(tokenizer: Tokenizer, **changes: Any) -> Any:
    shape = {**_SHAPE, "head_dim": 16, "query_pre_attn_scalar": 16, "num_hidden_layers": 7, "sliding_window": 16}
    config = transformers.Gemma3TextConfig(
        **shape | changes, vocab_size=tokenizer.get_vocab_size(), tie_word_embeddings=False
    )
    return transformers.Gemma3ForCausalLM(config)


def _llama(tokenizer: Tokenizer, **changes: Any) -> Any:
    shape = {**_SHAPE, "num_hidden_layers": 3, "tie_word_embeddings": False, **changes}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, vocab_size=tokenizer.get_vocab_size()))


def _qwen2(tokenizer: Tokenizer, **changes: Any) -> Any:
    shape = {**_SHAPE, "num_hidden_layers": 3, "tie_word_embeddings": False, **changes}
    rows = tokenizer.get_vocab_size() + 5  # Qwen's embeddings have rows to spare
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape, vocab_size=rows))


def _qwen3(tokenizer: Tokenizer, **changes: Any) -> Any:
    shape = {**_SHAPE, "num_hidden_layers": 3, "head_dim": 32, "tie_word_embeddings": False, **changes}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, vocab_size=tokenizer.get_vocab_size()))


def _qwen_split() -> Any:
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _digits() -> Any:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])


KINDS: Mapping[str, Any] = {
    "gemma": (_gemma, tiny.tiny_tokenizer, "labelled"),
    "llama": (_llama, lambda: gpt2_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False)), "chatml"),
    "smollm": (_llama, lambda: gpt2_tokenizer(_digits()), "chatml"),
    "llama-sentencepiece": (_llama, tiny.tiny_tokenizer, "chatml"),
    "qwen2": (_qwen2, lambda: gpt2_tokenizer(_qwen_split()), "chatml"),
    "qwen3": (_qwen3, lambda: gpt2_tokenizer(_qwen_split()), "chatml"),
}


def make(path: Path, kind: str, **changes: Any) -> Made:
    """Make a tuned model of a kind in an empty directory; `changes` are to its configuration."""
    model_of, tokenizer_of, prompt_format = KINDS[kind]
    tokenizer = tokenizer_of()
    torch.manual_seed(1)
    causal_lm = model_of(tokenizer, **changes)
    for name, parameter in causal_lm.named_parameters():
        if "norm" in name or name.endswith("bias"):  # or an offset or a swap would not be seen
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    for byte in range(256):  # or most answers would be bytes that are no UTF-8
        if (token := tokenizer.token_to_id(f"<0x{byte:02X}>")) is not None:
            causal_lm.lm_head.weight.data[token] = 0
    causal_lm.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    model = BaseModel(
        id=f"tiny-{kind}",
        display_name=f"Tiny {kind}",
        version="1",
        hub="someone/tiny",
        licence="none",
        prompt_format=prompt_format,
        untuned_prompt_format="plain" if prompt_format == "labelled" else "chatml",
        input_token_limit=256,
        output_token_limit=64,
    )
    base = Weights(model, path, weights._sha256(sorted(path.glob("*.safetensors"))))
    adapted = tiny.random_adapter(base, seed=3)
    return Made(tuned(base, tiny.adapter_files(adapted)), adapted)


def tuned(base: Weights, files: Mapping[str, bytes]) -> Tuned:
    """A tuned model of an adapter's files."""
    made = datetime(2026, 1, 2, 3, 4, 6, tzinfo=UTC)
    return Tuned("counts", "Counts", made, base, files, base.model.prompt_format, 0.0, 0.95, 64)


def config_of(made: Made) -> dict[str, Any]:
    """The base model's configuration."""
    config: dict[str, Any] = json.loads((made.tuned.base.path / "config.json").read_text())
    return config
