"""Models with random weights that are large enough for the matrix unit."""

from typing import Any

import torch
import transformers

CPU = torch.device("cpu")
WINDOW, WORDS = 40, 512
SHAPE: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}
GEMMA = transformers.Gemma3TextConfig(
    **SHAPE,
    num_hidden_layers=3,
    num_key_value_heads=1,
    query_pre_attn_scalar=64,
    sliding_window=WINDOW,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
)
LLAMA = transformers.LlamaConfig(**SHAPE, num_hidden_layers=2, num_key_value_heads=2)
