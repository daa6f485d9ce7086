"""Gemma 3 and Llama's kin as plain modules: loaded in a moment, few operations a layer, a short backward pass.

transformers' own modules take seconds to import in every process, and most of a short step is their glue. What
is not known here they still run, behind the same interface: see `load`.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

FULL, SLIDING = "full_attention", "sliding_attention"

_KNOWN = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3")
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
}
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
    "use_sliding_window": (None, False),
    "quantization_config": (None,),
}
"""Settings that change the computation, with the values that leave it as it is here."""


class Cache(Protocol):
    """What attention asks of the keys and values that it has seen."""

    def update(self, key: Tensor, value: Tensor, layer: int, /) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, [rows, heads, width, head size], and return all of them."""


class Output(NamedTuple):
    """What the body returns: the last hidden states, [rows, width, size]."""

    last_hidden_state: Tensor


class _Unsupported(Exception):
    """The model computes something that is not known here."""


@dataclass(frozen=True)
class Rope:
    """How fast positions turn a layer's queries and keys.

    Attributes:
        theta: The base of the frequencies.
        factor: What positions are divided by.
    """

    theta: float
    factor: float = 1.0


@dataclass(frozen=True)
class Config:
    """What config.json says of a model, as far as it matters here.

    Attributes:
        layer_types: `full_attention` or `sliding_attention` for each layer.
        sliding_window: How many tokens, itself counted, a token sees in a sliding layer.
        ropes: By layer type.
        scale: What attention scores are multiplied by.
        norm_offset: What is added to the norms' weights.
        embedding_scale: What embeddings are multiplied by.
    """

    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    layer_types: tuple[str, ...]
    sliding_window: int | None
    ropes: Mapping[str, Rope]
    scale: float
    activation: str
    tied: bool
    final_logit_softcapping: float | None = None
    norm_offset: float = 0.0
    embedding_scale: float | None = None

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> "Config":
        """Read a config.json, in transformers' present spelling or that of its versions before 5."""
        gemma = found.get("model_type") == "gemma3_text"
        if found.get("model_type") not in _KNOWN:
            raise _Unsupported(found.get("model_type"))
        for name, plain in _PLAIN.items():
            if found.get(name) not in plain:
                raise _Unsupported(name)
        size, heads = found["hidden_size"], found["num_attention_heads"]
        head_dim = found.get("head_dim") or size // heads
        kinds = _layer_types(found)
        activation = found["hidden_activation" if gemma else "hidden_act"]
        if activation not in _ACTIVATIONS:
            raise _Unsupported(activation)
        return cls(
            head_dim=head_dim,
            max_position_embeddings=found["max_position_embeddings"],
            rms_norm_eps=found["rms_norm_eps"],
            layer_types=kinds,
            sliding_window=found["sliding_window"] if SLIDING in kinds else None,
            ropes={kind: _rope(found, kind) for kind in dict.fromkeys(kinds)},
            scale=(found["query_pre_attn_scalar"] if gemma else head_dim) ** -0.5,
            activation=activation,
            tied=found.get("tie_word_embeddings", gemma),
            final_logit_softcapping=found.get("final_logit_softcapping"),
            norm_offset=1.0 if gemma else 0.0,
            embedding_scale=math.sqrt(size) if gemma else None,
        )


def _layer_types(found: Mapping[str, Any]) -> tuple[str, ...]:
    count = found["num_hidden_layers"]
    kinds = found.get("layer_types")
    if kinds is None and found["model_type"] == "gemma3_text":
        period = found["sliding_window_pattern"]
        kinds = [SLIDING if (layer + 1) % period else FULL for layer in range(count)]
    elif kinds is None:
        every = found["model_type"] == "mistral" and found.get("sliding_window") is not None
        kinds = [SLIDING if every else FULL] * count
    if len(kinds) != count or not {*kinds} <= {FULL, SLIDING}:
        raise _Unsupported("layer_types")
    return tuple(kinds)


def _rope(found: Mapping[str, Any], kind: str) -> Rope:
    given = found.get("rope_parameters")
    if given is not None:
        given = given.get(kind, given)
    elif kind == SLIDING and "rope_local_base_freq" in found:
        given = {"rope_theta": found["rope_local_base_freq"]}
    else:
        given = {"rope_theta": found["rope_theta"], **(found.get("rope_scaling") or {})}
    shape = given.get("rope_type", given.get("type", "default"))
    if shape not in ("default", "linear") or given.get("partial_rotary_factor", 1.0) != 1.0:
        raise _Unsupported(f"rope {shape}")
    return Rope(given["rope_theta"], given["factor"] if shape == "linear" else 1.0)


class _Tensors:
    """A model's tensors in its safetensors files, mapped into memory: each is taken once."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._left: dict[str, Tensor] = {}
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                self._left |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118

    def find(self, name: str) -> Tensor | None:
        found = self._left.pop(name, None)
        return None if found is None else found.to(self._device, self._dtype)

    def take(self, name: str) -> Tensor:
        found = self.find(name)
        if found is None:
            raise _Unsupported(f"no {name}")
        return found

    def linear(self, path: str) -> nn.Linear:
        weight, bias = self.take(f"{path}.weight"), self.find(f"{path}.bias")
        return _linear(weight, bias)

    def end(self) -> None:
        """Refuse a model that has more tensors than were taken."""
        if self._left:
            raise _Unsupported(min(self._left))


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x in float32 with a mean square of 1 in its last dimension, and what it was multiplied by."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * inverse, inverse


def turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return queries or keys turned by their positions, float32."""
    # The sine's first half is negative: the halves change places, and the second comes with a minus.
    return (x * cosine).addcmul_(x.roll(x.shape[-1] // 2, -1), sine)


class RMSNorm(nn.Module):
    """Root mean square norm; the products are in float32, also that with its weight."""

    def __init__(self, weight: Tensor, config: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.factor = weight.float() + config.norm_offset
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalised along its last dimension."""
        return normalise(x, self.eps)[0].mul_(self.factor).to(x.dtype)


class Turns(NamedTuple):
    """Cosines and signed sines of positions, [rows, width, 1, head size] in float32."""

    cosine: Tensor
    sine: Tensor


def _turns(positions: Tensor, rope: Rope, size: int) -> Turns:
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
    angles = positions[..., None, None].float() * (1.0 / (rope.theta**exponents * rope.factor))
    cosine, sine = angles.cos(), angles.sin()
    return Turns(torch.cat((cosine, cosine), -1), torch.cat((-sine, sine), -1))


class Attention(nn.Module):
    """Causal attention of a layer, with norms on its queries and keys where the model has them.

    Attributes:
        size: Of a head.
        scale: What scores are multiplied by.
        heads: Number of queries of a token.
        groups: Number of queries that share a key.
        factor: Of the norms of queries and keys, [queries and keys, size].
    """

    def __init__(self, tensors: _Tensors, path: str, config: Config, layer: int) -> None:
        super().__init__()
        self.q_proj = tensors.linear(f"{path}.q_proj")
        self.k_proj = tensors.linear(f"{path}.k_proj")
        self.v_proj = tensors.linear(f"{path}.v_proj")
        self.o_proj = tensors.linear(f"{path}.o_proj")
        self.size, self.scale, self._layer, self.eps = config.head_dim, config.scale, layer, config.rms_norm_eps
        self.heads = self.q_proj.out_features // self.size
        self.groups = self.heads // (self.k_proj.out_features // self.size)
        q_weight, k_weight = tensors.find(f"{path}.q_norm.weight"), tensors.find(f"{path}.k_norm.weight")
        self.factor: Tensor | None = None
        if q_weight is not None and k_weight is not None:
            self.q_norm, self.k_norm = RMSNorm(q_weight, config), RMSNorm(k_weight, config)
            queries = self.q_norm.factor.expand(self.heads, -1)
            self.factor = torch.cat((queries, self.k_norm.factor.expand(self.heads // self.groups, -1)))

    def forward(self, x: Tensor, turns: Turns, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """Return what each token gathers, [rows, width, size]; without a mask it looks at all before it."""
        heads = (*x.shape[:2], -1, self.size)
        # Together: as many operations for queries and keys as for one of them.
        both = torch.cat((self.q_proj(x), self.k_proj(x)), -1).view(heads)
        scaled = both if self.factor is None else normalise(both, self.eps)[0].mul_(self.factor)
        turned = turn(scaled, *turns).to(x.dtype).transpose(1, 2)
        query, key = turned[:, : self.heads], turned[:, self.heads :]
        value = self.v_proj(x).view(heads).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self._layer)
        shared = self.groups > 1
        if shared and mask is not None and mask.device.type != "cpu":
            # With a mask and shared heads other devices take a slow way.
            key, value = (states.repeat_interleave(self.groups, 1) for states in (key, value))
            shared = False
        gathered = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=shared
        )
        return self.o_proj(gathered.transpose(1, 2).reshape(*x.shape[:2], -1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """A layer's gated products.

    Attributes:
        kind: Of the activation.
    """

    def __init__(self, tensors: _Tensors, path: str, config: Config) -> None:
        super().__init__()
        self.gate_proj = tensors.linear(f"{path}.gate_proj")
        self.up_proj = tensors.linear(f"{path}.up_proj")
        self.down_proj = tensors.linear(f"{path}.down_proj")
        self.kind = config.activation
        self._activation = _ACTIVATIONS[self.kind]

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, of x's shape."""
        gated = self._activation(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(gated)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and products; norms come before both and, in Gemma, after both too."""

    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm
    pre_feedforward_layernorm: RMSNorm
    post_feedforward_layernorm: RMSNorm

    def __init__(self, tensors: _Tensors, path: str, config: Config, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(tensors, f"{path}.self_attn", config, layer)
        self.mlp = MLP(tensors, f"{path}.mlp", config)
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            weight = tensors.find(f"{path}.{name}_layernorm.weight")
            if weight is not None:
                self.add_module(f"{name}_layernorm", RMSNorm(weight, config))
        norms = dict(self.named_children())
        self.around = "pre_feedforward_layernorm" in norms
        if len(norms) != (6 if self.around else 4):
            raise _Unsupported("norms")

    def linear(self, path: str) -> nn.Linear:
        """Return one of the layer's linear layers, such as `mlp.up_proj`."""
        found: nn.Linear = self.get_submodule(path)  # type: ignore[assignment]
        return found

    def forward(self, x: Tensor, turns: Turns, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """Return the layer's output, of x's shape."""
        gathered = self.self_attn(self.input_layernorm(x), turns, mask, cache)
        if self.around:
            x = x + self.post_attention_layernorm(gathered)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))  # type: ignore[no-any-return]
        x = x + gathered
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Body(nn.Module):
    """The decoder without its output head."""

    def __init__(self, tensors: _Tensors, config: Config) -> None:
        super().__init__()
        self.config = config
        words = tensors.take("model.embed_tokens.weight")
        self.embed_tokens = nn.Embedding(words.shape[0], words.shape[1], _weight=words, _freeze=True)
        self.layers = nn.ModuleList(
            Layer(tensors, f"model.layers.{layer}", config, layer) for layer in range(len(config.layer_types))
        )
        self.norm = RMSNorm(tensors.take("model.norm.weight"), config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | Mapping[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
    ) -> Output:
        """Run the layers.

        Args:
            input_ids: Token ids, [rows, width].
            attention_mask: 0 or -inf to be added to the scores, [rows, 1, width, length], one for all layers or
                one a layer type; by default each token sees itself and those before it, as far as its window
                reaches, so that padding on the right needs none.
            position_ids: The tokens' positions, [rows, width]; by default they count from 0.
            past_key_values: What was seen before, which takes in these tokens; needs a mask.
            use_cache: Whether there is `past_key_values`.
        """
        width = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(width, device=input_ids.device)[None]
        x = self.embed(input_ids)
        turns = self.turns(position_ids)
        if attention_mask is None:
            masks = {kind: self._window_mask(kind, width, x) for kind in turns}
        elif isinstance(attention_mask, Tensor):
            masks = dict.fromkeys(turns, attention_mask)
        else:
            masks = {**attention_mask}
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            x = layer(x, turns[kind], masks[kind], past_key_values if use_cache else None)
        return Output(self.norm(x))

    @property
    def decoder_layers(self) -> list[Layer]:
        """The layers, by their type."""
        return [cast(Layer, layer) for layer in self.layers]

    def embed(self, ids: Tensor) -> Tensor:
        """Return what the first layer takes."""
        x: Tensor = self.embed_tokens(ids)
        if self.config.embedding_scale is None:
            return x
        # Rounded to the model's precision, as it was in training: 25.25 for the square root of 640.
        return x * torch.tensor(self.config.embedding_scale, dtype=x.dtype, device=x.device)

    def turns(self, positions: Tensor) -> dict[str, Turns]:
        """Return, by layer type, how positions turn queries and keys."""
        return {kind: _turns(positions, rope, self.config.head_dim) for kind, rope in self.config.ropes.items()}

    def _window_mask(self, kind: str, width: int, like: Tensor) -> Tensor | None:
        window = self.config.sliding_window
        if kind != SLIDING or window is None or width <= window:
            return None
        places = torch.arange(width, device=like.device)
        distance = places[:, None] - places
        hidden = (distance < 0) | (distance >= window)
        return torch.zeros(1, 1, width, width, dtype=like.dtype, device=like.device).masked_fill_(
            hidden, -torch.inf
        )


class CausalLM(nn.Module):
    """A decoder and its output head, under the names of the checkpoint; frozen.

    Attributes:
        config: What the model computes.
    """

    def __init__(self, tensors: _Tensors, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Body(tensors, config)
        own = tensors.find("lm_head.weight")
        if config.tied:
            own = self.model.embed_tokens.weight.data
        elif own is None:
            raise _Unsupported("no lm_head.weight")
        self.lm_head = _linear(own)
        tensors.end()

    @property
    def base_model(self) -> Body:
        """The decoder without its output head."""
        return self.model

    def get_output_embeddings(self) -> nn.Linear:
        """Return the output head."""
        return self.lm_head


def load(path: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a causal language model from a directory with config.json and safetensors, frozen.

    Returns:
        A `CausalLM`; transformers' own of the same interface when the architecture is not known here.
    """
    try:
        config = Config.read(json.loads((path / "config.json").read_text("utf-8")))
        return CausalLM(_Tensors(path, device, dtype), config).eval()
    except (_Unsupported, KeyError):
        return _of_transformers(path, device, dtype)


def _of_transformers(path: Path, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    causal_lm: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="sdpa", local_files_only=True
    )
    return causal_lm.requires_grad_(False).to(device).eval()
