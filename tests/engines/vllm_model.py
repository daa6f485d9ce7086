"""A tiny model that vLLM runs on a CPU, and adapters for it."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

import tiny
from tunesmith.base_models import weights
from tunesmith.base_models.catalog import BaseModel
from tunesmith.base_models.weights import Weights
from tunesmith.store.artifacts import ArtifactStore

LONGEST = 512
HEAD = 32  # the smallest that vLLM computes on a CPU


def vllm_weights(path: Path) -> tuple[BaseModel, Weights]:
    """Make a weights cache with the model, always the same one."""
    formats = {"prompt_format": "labelled", "untuned_prompt_format": "plain"}
    model, cache = tiny.tiny_cache(path, "llama", **formats)
    folder, tokenizer = cache / "models" / model.id, tiny.tiny_tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=2 * HEAD,
        intermediate_size=3 * HEAD,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=HEAD,
        num_hidden_layers=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    causal_lm = transformers.LlamaForCausalLM(config)
    for byte in range(256):  # or most answers would be bytes that are no UTF-8
        causal_lm.lm_head.weight.data[tokenizer.token_to_id(f"<0x{byte:02X}>")] = 0
    causal_lm.save_pretrained(folder)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), "utf-8")
    manifest = json.loads((folder / weights.MANIFEST).read_text("utf-8"))
    manifest["sha256"] = weights._sha256(sorted(folder.glob("*.safetensors")))
    (folder / weights.MANIFEST).write_text(json.dumps(manifest), "utf-8")
    return model, weights.get(model, cache)


def publish(store: ArtifactStore, base: Weights) -> dict[str, Any]:
    """Publish adapters: two that are sound, and those that a server may serve otherwise than they were trained.

    Returns:
        Those that are sound, as PEFT runs them.
    """
    sound = {name: tiny.random_adapter(base, seed) for seed, name in enumerate(("one", "two"))}
    for name, adapted in sound.items():
        tiny.publish_adapter(store, name, base, adapted)
    files, manifest = tiny.adapter_files(sound["one"]), tiny.adapter_manifest(base, sound["one"], "labelled")
    tensors = safetensors.torch.load(files["adapter_model.safetensors"])
    renamed = {key.replace(".layers.", ".language_model.layers."): value for key, value in tensors.items()}
    zeroed = {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in tensors.items()}
    for name, other in (("misnamed", renamed), ("zeroed", zeroed)):
        other_files = files | {"adapter_model.safetensors": safetensors.torch.save(other)}
        store.publish(name, other_files, manifest)
    probe = manifest["probe"] | {"logprob": manifest["probe"]["logprob"] - 3}
    store.publish("swapped", tiny.adapter_files(sound["two"]), manifest | {"probe": probe})
    store.publish("elsewhere", files, manifest | {"weights_sha256": "0" * 64})
    probe = manifest["probe"] | {"base_logprob": manifest["probe"]["base_logprob"] - 3, "logprob": 0.0}
    store.publish("foreign", files, manifest | {"probe": probe})
    tiny.publish_adapter(store, "wide", base, tiny.random_adapter(base, 5, rank=32))
    return sound
