"""Tiny models with random weights, their tokenizer and adapters, for tests of training and serving."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import peft
import safetensors.torch
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from tunesmith.base_models import weights
from tunesmith.base_models.catalog import BaseModel
from tunesmith.base_models.prompts import FORMATS, Turn
from tunesmith.base_models.weights import Weights
from tunesmith.store.artifacts import ArtifactStore

Architecture = Literal["gemma3", "llama"]

SPECIALS = ("<pad>", "<eos>", "<bos>", "<end_of_turn>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'-\n▁六七八"
PAIRS = ("th", "he", "an", "in", "er", "on", "▁a", "▁t", "▁o", "on", "ti", "es")
SLIDING_WINDOW = 16

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny_tokenizer() -> Tokenizer:
    """A tokenizer of Gemma's kind: spaces are ▁, letters and a few pairs have tokens, the rest are bytes."""
    vocabulary = [*SPECIALS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS, *PAIRS]
    ids = {token: number for number, token in enumerate(dict.fromkeys(vocabulary))}
    merges = [(pair[0], pair[1]) for pair in dict.fromkeys(PAIRS)]
    tokenizer = Tokenizer(models.BPE(ids, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def tiny_causal_lm(arch: Architecture, tokenizer: Tokenizer) -> Any:
    """A model of a few layers; weights large enough that its answers vary."""
    torch.manual_seed(0)  # the same weights, and so the same answers, in every run
    model = _random_causal_lm(arch, tokenizer.get_vocab_size())
    for byte in range(256):  # or most answers would be bytes that are no UTF-8
        model.lm_head.weight.data[tokenizer.token_to_id(f"<0x{byte:02X}>")] = 0
    return model


def _random_causal_lm(arch: Architecture, vocabulary: int) -> Any:
    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,  # tied random weights repeat their last token for ever
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    if arch == "llama":
        config = transformers.LlamaConfig(**shape, num_hidden_layers=3, num_key_value_heads=2)
        return transformers.LlamaForCausalLM(config)
    gemma = transformers.Gemma3TextConfig(
        **shape,
        num_hidden_layers=4,
        num_key_value_heads=1,
        query_pre_attn_scalar=8,
        sliding_window=SLIDING_WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    )
    return transformers.Gemma3ForCausalLM(gemma)


def tiny_cache(path: Path, arch: Architecture = "gemma3", **catalog: Any) -> tuple[BaseModel, Path]:
    """Make a weights cache that holds a tiny model; return its catalog entry and the cache directory.

    Args:
        path: An empty or absent directory.
        arch: The model's architecture.
        catalog: Fields of the catalog entry that differ from the usual ones.
    """
    fields: dict[str, Any] = {
        "id": f"tiny-{arch}",
        "display_name": f"Tiny {arch}",
        "version": "1",
        "path": path / "source",
        "licence": "none",
        "prompt_format": "labelled" if arch == "gemma3" else "chatml",
        "untuned_prompt_format": "plain" if arch == "gemma3" else "chatml",
        "input_token_limit": 1536,
        "output_token_limit": 256,
        "tuning_token_limit": 256,
    }
    model = BaseModel(**fields | catalog)
    cached = path / "models" / model.id
    tokenizer = tiny_tokenizer()
    tiny_causal_lm(arch, tokenizer).to(torch.bfloat16).save_pretrained(cached)
    tokenizer.save(str(cached / "tokenizer.json"))
    manifest = {
        "source": weights._source(model),
        "sha256": weights._sha256(sorted(cached.glob("*.safetensors"))),
    }
    (cached / weights.MANIFEST).write_text(json.dumps(manifest), "utf-8")
    return model, path


def reference_model(base: Weights, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers runs it."""
    return transformers.AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype).eval()


def random_adapter(
    base: Weights, seed: int, rank: int = 4, alpha: float = 8, targets: Sequence[str] = ALL_LINEARS
) -> Any:
    """The model in float32 with a random adapter, as PEFT runs it."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        model = peft.get_peft_model(reference_model(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def adapter_files(adapted: Any) -> dict[str, bytes]:
    """The files of an adapter in PEFT's format."""
    config = adapted.peft_config["default"].to_dict()
    return {
        "adapter_config.json": json.dumps(config, default=lambda value: sorted(value)).encode(),
        "adapter_model.safetensors": safetensors.torch.save(peft.get_peft_model_state_dict(adapted)),
    }


def adapter_manifest(base: Weights, adapted: Any, prompt_format: str) -> dict[str, Any]:
    """What is recorded beside an adapter, with a real probe."""
    tokenizer, form = base.tokenizer(), FORMATS[prompt_format]
    prompt = form.prompt(tokenizer, [Turn("user", "one")])
    tokens = [*prompt, *form.output(tokenizer, "two")]
    with adapted.disable_adapter():
        without = mean_logprob(adapted, tokens, len(prompt))
    return {
        "kind": "adapter",
        "base_model": base.model.id,
        "weights_sha256": base.sha256,
        "prompt_format": prompt_format,
        "recipe": {},
        "probe": {
            "tokens": tokens,
            "prompt_length": len(prompt),
            "logprob": mean_logprob(adapted, tokens, len(prompt)),
            "base_logprob": without,
        },
    }


def publish_adapter(store: ArtifactStore, path: str, base: Weights, adapted: Any) -> None:
    """Publish an adapter as training does."""
    manifest = adapter_manifest(base, adapted, base.model.prompt_format)
    store.publish(path, adapter_files(adapted), manifest)


@torch.inference_mode()
def mean_logprob(model: Any, tokens: Sequence[int], prompt_length: int) -> float:
    """Mean log-probability of the tokens that follow the prompt."""
    scores = model(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    places = torch.arange(prompt_length, len(tokens))
    return float(scores[places - 1, torch.tensor(tokens)[places]].mean())


@torch.inference_mode()
def greedy(model: Any, prompt: Sequence[int], count: int, stops: frozenset[int] = frozenset()) -> list[int]:
    """The tokens that transformers' own generate continues a prompt with, up to a stop token."""
    options = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=count, eos_token_id=sorted(stops) or None, pad_token_id=0
    )
    tokens = torch.tensor([list(prompt)])
    output = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=options)
    answer = output[0, len(prompt) :].tolist()
    return answer[:-1] if answer and answer[-1] in stops else answer
