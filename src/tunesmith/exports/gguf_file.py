"""A tuned model as one GGUF file for llama.cpp: a header with all that it must know, then the merged weights."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    get_tensor_name_map,
    quants,
)

from tunesmith.errors import FailedPrecondition
from tunesmith.exports import gguf_tokenizer
from tunesmith.exports.adapter import Adapter
from tunesmith.exports.checkpoint import BLOCK, Rows, Tensor, TensorFile, known, stored
from tunesmith.exports.merged import Merged
from tunesmith.exports.tuned import Tuned

Quantization = Literal["F32", "F16", "BF16", "Q8_0"]
"""How the matrices are stored; whatever has one dimension is F32."""

QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

_FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}
_ARCHITECTURES = {
    "gemma3_text": MODEL_ARCH.GEMMA3,
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
_GEMMA_PERIOD = 6
"""Of Gemma 3's layers each sixth sees everything; llama.cpp takes that for granted."""
_Q8_BLOCK = 32
_ALIGNMENT = 32

Config = Mapping[str, Any]


@dataclass(frozen=True)
class _Entry:
    """A tensor of the GGUF file: where it comes from, and how it is stored."""

    name: str
    file: TensorFile
    tensor: Tensor
    kind: GGMLQuantizationType

    @property
    def size(self) -> int:
        """Its bytes."""
        block, size = _BLOCKS[self.kind.name]
        return self.tensor.rows * self.tensor.columns // block * size


_BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (_Q8_BLOCK, 2 + _Q8_BLOCK)}
"""How many numbers take how many bytes."""


class GgufFile:
    """A GGUF file in the making: read its size, then its pieces.

    Args:
        tuned: The tuned model.
        quantization: How its matrices are stored.

    Raises:
        FailedPrecondition: llama.cpp does not run such a model, as far as is known here.
    """

    def __init__(self, tuned: Tuned, quantization: Quantization) -> None:
        path = tuned.base.path
        self._config: Config = json.loads((path / "config.json").read_text("utf-8"))
        self._arch = _architecture(self._config)
        self._merged = Merged(path, Adapter.read(tuned.adapter))
        self._entries = [*self._plan(quantization)]
        self._header = self._write_header(tuned, quantization)

    @property
    def size(self) -> int:
        """The file's bytes."""
        return len(self._header) + sum(_padded(entry.size) for entry in self._entries)

    def pieces(self) -> Iterator[bytes]:
        """Yield the file.

        Raises:
            FailedPrecondition: A weight is too large for F16.
        """
        for start in range(0, len(self._header), 2 * BLOCK):
            yield self._header[start : start + 2 * BLOCK]
        for entry in self._entries:
            convert = self._conversion(entry.tensor.name)
            for rows in self._merged.blocks(entry.file, entry.tensor, self._multiple(entry.tensor.name)):
                yield _encoded(convert(rows), entry)
            yield bytes(_padded(entry.size) - entry.size)

    def _plan(self, quantization: Quantization) -> Iterator[_Entry]:
        names = get_tensor_name_map(self._arch, self._config["num_hidden_layers"])
        for file in self._merged.files.values():
            for tensor in file.tensors:
                name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
                if name is None or not known(tensor.dtype) or len(tensor.shape) not in (1, 2):
                    raise FailedPrecondition(
                        f"{_NO_GGUF}: llama.cpp has no place for its {tensor.name} ({tensor.dtype})."
                    )
                yield _Entry(name, file, tensor, _kind(tensor, quantization))

    def _conversion(self, name: str) -> Callable[[Rows], Rows]:
        """Return what llama.cpp wants done to a tensor's rows."""
        if self._arch is MODEL_ARCH.GEMMA3 and name.endswith("norm.weight"):
            return lambda rows: rows + np.float32(1)  # there the offset is in the weights
        if (heads := self._multiple(name)) > 1:
            return lambda rows: _interleaved(rows, heads)
        return lambda rows: rows

    def _multiple(self, name: str) -> int:
        """Return how many rows of a tensor belong together: a head's, where they change their order."""
        if self._arch is MODEL_ARCH.LLAMA and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            return _head_dim(self._config)
        return 1

    def _write_header(self, tuned: Tuned, quantization: Quantization) -> bytes:
        writer = GGUFWriter(None, MODEL_ARCH_NAMES[self._arch])
        _describe(writer, tuned)
        writer.add_file_type(_FILE_TYPES[quantization])
        writer.add_quantization_version(2)  # of GGML, since 2023
        _write_shape(writer, self._config)
        embedding = next(entry.tensor for entry in self._entries if entry.name == "token_embd.weight")
        tokenizer = json.loads((tuned.base.path / "tokenizer.json").read_bytes())
        pad = self._config.get("pad_token_id")
        gguf_tokenizer.write(writer, tokenizer, embedding.rows, tuned.format, pad)
        for entry in self._entries:
            shape = entry.tensor.shape
            writer.add_tensor_info(entry.name, shape, np.dtype(np.float32), entry.size, raw_dtype=entry.kind)
        # The library writes files only; the header is some megabytes, most of them the vocabulary's.
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "header"
            writer.write_header_to_file(file)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            header = file.read_bytes()
        return header + bytes(_padded(len(header)) - len(header))


_NO_GGUF = "This model cannot be exported as GGUF"


def _architecture(config: Config) -> MODEL_ARCH:
    """Return llama.cpp's name of an architecture; refuse what it would compute otherwise.

    Raises:
        FailedPrecondition: It does not know the model, or a setting of it.
    """
    kind = config["model_type"]
    arch = _ARCHITECTURES.get(kind)
    if arch is None:
        known_kinds = ", ".join(sorted(_ARCHITECTURES))
        raise FailedPrecondition(
            f"{_NO_GGUF}: its architecture is {kind}, and those that can be are {known_kinds}. Export it with "
            "format PEFT or SAFETENSORS."
        )
    layers = config["num_hidden_layers"]
    kinds = config.get("layer_types") or ["full_attention"] * layers
    sliding = "sliding_attention"
    usual: list[str] = ["full_attention"] * layers
    if arch is MODEL_ARCH.GEMMA3:
        usual = [sliding if (layer + 1) % _GEMMA_PERIOD else "full_attention" for layer in range(layers)]
    elif kind == "mistral" and config.get("sliding_window") is not None:
        kinds = [sliding] * layers
    activation = config.get("hidden_activation" if arch is MODEL_ARCH.GEMMA3 else "hidden_act")
    wrong = {
        "layer_types": kinds != usual,
        "query_pre_attn_scalar": config.get("query_pre_attn_scalar", _head_dim(config)) != _head_dim(config),
        "hidden_act": activation != ("gelu_pytorch_tanh" if arch is MODEL_ARCH.GEMMA3 else "silu"),
        "rope_parameters": not all(rope["rope_type"] in ("default", "linear") for rope in _ropes(config)),
        "final_logit_softcapping": config.get("final_logit_softcapping") is not None,
        "attn_logit_softcapping": config.get("attn_logit_softcapping") is not None,
    }
    if names := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise FailedPrecondition(
            f"{_NO_GGUF}: its {', '.join(names)} in config.json {'is' if len(names) == 1 else 'are'} not what "
            f"llama.cpp takes for granted. Export it with format PEFT or SAFETENSORS."
        )
    return arch


def _write_shape(writer: GGUFWriter, config: Config) -> None:
    """Add what config.json says of the model's shape."""
    head_dim = _head_dim(config)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    full, *sliding = _ropes(config)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(full["rope_theta"])
    if full["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if sliding:
        writer.add_sliding_window(config["sliding_window"])
        writer.add_rope_freq_base_swa(sliding[0]["rope_theta"])


def _ropes(config: Config) -> list[Mapping[str, Any]]:
    """Return how positions turn: in full attention, and in sliding attention where there is some."""
    given = config["rope_parameters"]
    if "full_attention" not in given:
        return [given]
    return [given["full_attention"], *([given["sliding_attention"]] if "sliding_attention" in given else [])]


def _describe(writer: GGUFWriter, tuned: Tuned) -> None:
    """Add what people see of the file, and what it answers with when nobody says."""
    model = tuned.base.model
    writer.add_type("model")
    writer.add_name(tuned.title)
    writer.add_finetune(tuned.id)
    writer.add_license(model.licence)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, model.display_name)
    writer.add_base_model_version(0, tuned.base.version)
    writer.add_sampling_temp(tuned.temperature)
    writer.add_sampling_top_p(tuned.top_p)
    writer.add_sampling_top_k(tuned.top_k)


def _kind(tensor: Tensor, quantization: Quantization) -> GGMLQuantizationType:
    if len(tensor.shape) == 1:
        return GGMLQuantizationType.F32
    if quantization == "Q8_0" and tensor.columns % _Q8_BLOCK:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[quantization]


def _interleaved(rows: Rows, head_dim: int) -> Rows:
    """Return the rows of whole heads, each head's two halves row by row, as llama.cpp turns neighbours."""
    heads = rows.reshape(-1, 2, head_dim // 2, rows.shape[-1])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def _encoded(rows: Rows, entry: _Entry) -> bytes:
    if entry.kind is GGMLQuantizationType.Q8_0:
        return bytes(quants.quantize(rows, entry.kind).tobytes())
    try:
        return stored(rows, entry.kind.name)
    except OverflowError as error:
        raise FailedPrecondition(f"{entry.tensor.name}: {error}. Export it with quantization BF16.") from error


def _head_dim(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
