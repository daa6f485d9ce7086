"""The formats that a tuned model can be had in: each makes one file, a piece at a time."""

import json
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass

from tunesmith.exports import archive, directory, readme, templates
from tunesmith.exports.adapter import CONFIG_FILE, WEIGHTS_FILE
from tunesmith.exports.archive import File
from tunesmith.exports.gguf_file import GgufFile, Quantization
from tunesmith.exports.tuned import Tuned

PIECE = 1 << 20
"""Bytes that are sent at once; gRPC's clients take at most 4 MiB."""

_ZIP, _BINARY = "application/zip", "application/octet-stream"


@dataclass(frozen=True)
class Download:
    """A file in the making.

    Attributes:
        filename: What it is to be called.
        content_type: Its media type.
        size: Its bytes.
        pieces: Its content, at most `PIECE` bytes at a time. Closing the iterator ends the work.
    """

    filename: str
    content_type: str
    size: int
    pieces: Generator[bytes]


def _peft(tuned: Tuned, _quantization: Quantization) -> Download:
    model = tuned.base.model
    published = model.hub or model.published_as or model.id
    config = json.loads(tuned.adapter[CONFIG_FILE]) | {"base_model_name_or_path": published}
    files = [
        File.of("README.md", readme.peft(tuned, published).encode()),
        File.of(CONFIG_FILE, json.dumps(config, indent=2).encode()),
        File.of(WEIGHTS_FILE, tuned.adapter[WEIGHTS_FILE]),
    ]
    return _archive(f"{tuned.id}-peft", files, tuned)


def _safetensors(tuned: Tuned, _quantization: Quantization) -> Download:
    return _archive(f"{tuned.id}-safetensors", directory.files(tuned), tuned)


def _gguf(tuned: Tuned, quantization: Quantization) -> Download:
    file = GgufFile(tuned, quantization)
    return Download(_gguf_name(tuned, quantization), _BINARY, file.size, _even(file.pieces()))


def _ollama(tuned: Tuned, quantization: Quantization) -> Download:
    gguf, name = GgufFile(tuned, quantization), _gguf_name(tuned, quantization)
    files = [
        File.of("README.md", readme.ollama(tuned, name).encode()),
        File.of("Modelfile", _modelfile(tuned, name).encode()),
        File(name, gguf.size, gguf.pieces()),
    ]
    return _archive(f"{tuned.id}-ollama", files, tuned)


FORMATS: Mapping[str, Callable[[Tuned, Quantization], Download]] = {
    "PEFT": _peft,
    "SAFETENSORS": _safetensors,
    "GGUF": _gguf,
    "OLLAMA": _ollama,
}
"""By name: what makes the file. Each raises FailedPrecondition when the model does not go into it."""

QUANTIZED = ("GGUF", "OLLAMA")
"""Those for which one chooses how the weights are stored."""


def _modelfile(tuned: Tuned, gguf: str) -> str:
    """Return a Modelfile. Ollama would otherwise punish repetition and cut long prompts short, each unasked."""
    model = tuned.base.model
    parameters = {
        "temperature": f"{tuned.temperature:g}",
        "top_p": f"{tuned.top_p:g}",
        "top_k": tuned.top_k,
        "repeat_penalty": 1,
        "num_ctx": model.input_token_limit,
        "num_predict": model.output_token_limit,
    }
    stops = [("stop", json.dumps(stop.token)) for stop in tuned.format.stops]
    lines = [f"PARAMETER {name} {value}" for name, value in [*parameters.items(), *stops]]
    template = templates.ollama(tuned.format)
    return "\n".join(
        [f"FROM ./{gguf}", f'TEMPLATE """{template}"""', *lines, f'LICENSE """{model.licence}"""', ""]
    )


def _gguf_name(tuned: Tuned, quantization: Quantization) -> str:
    return f"{tuned.id}-{quantization.lower()}.gguf"


def _archive(name: str, files: list[File], tuned: Tuned) -> Download:
    pieces = _even(archive.zipped(name, files, tuned.made))
    return Download(f"{name}.zip", _ZIP, archive.size_of(name, files), pieces)


def _even(pieces: Iterable[bytes]) -> Generator[bytes]:
    """Yield the same bytes in pieces of the same size, but for the last."""
    waiting = bytearray()
    for piece in pieces:
        waiting += piece
        while len(waiting) >= PIECE:
            yield bytes(waiting[:PIECE])
            del waiting[:PIECE]
    if waiting:
        yield bytes(waiting)
